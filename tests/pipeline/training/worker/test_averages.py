"""The averages shared by ranks: together they are those of one rank, bit by bit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from ddpm import build_network
from pipeline.training.train_config import OptimizerConfig
from pipeline.training.worker.averages import Averages, deal_out
from tests.pipeline.training.small_runs import MODEL

OPTIMIZER = OptimizerConfig(ema_halflife_images=100, more_ema_halflives_images=(20,), ema_ramp_up_ratio=None)
NUM_STEPS = 5


class WithBuffers(nn.Module):
    """Parameters of two dtypes, one of them used twice, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.two = nn.Linear(4, 6)
        self.two.weight = self.one.weight
        self.exact = nn.Parameter(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_every_tensor_is_of_one_rank_and_each_has_about_as_much(world: int) -> None:
    network = build_network(MODEL)
    shares = deal_out(network, world)
    assert sorted(name for share in shares for name in share) == sorted(network.state_dict())
    sizes = [sum(network.state_dict()[name].numel() for name in share) for share in shares]
    largest = max(tensor.numel() for tensor in network.state_dict().values())
    assert max(sizes) - min(sizes) <= largest


def test_what_does_not_travel_in_one_vector_stays_with_rank_0() -> None:
    network = WithBuffers()
    shares = deal_out(network, 3)
    assert {"exact", "norm.running_mean", "norm.num_batches_tracked"} <= set(shares[0])
    assert sorted(name for share in shares for name in share) == sorted(network.state_dict())
    assert {network.state_dict()[name].dtype for share in shares[1:] for name in share} == {torch.float32}


def digests(averages: Averages) -> dict[str, str]:
    return {
        f"{file}/{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for file, named in averages.tensors().items()
        for name, tensor in named.items()
    }


def train(network: nn.Module, averages: Averages) -> None:
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        averages.update(network, torch.tensor(0 if step == 2 else 16))


def one_rank(rank: int, folder: str, world: int) -> None:
    """Averages of a rank that began with other weights, before rank 0's were given to it; kept, gathered, restored."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    network = build_network(MODEL, seed=rank)
    averages = Averages(network, OPTIMIZER, (0.05,), rank=rank, world=world)
    network.load_state_dict(build_network(MODEL, seed=0).state_dict())
    averages.begin(network)
    train(network, averages)
    averages.gather()
    if rank == 0:
        Path(folder, "gathered.json").write_text(json.dumps(digests(averages)))
        torch.save(averages.tensors(), Path(folder, "tensors"))
    torch.distributed.barrier()
    again = Averages(build_network(MODEL, seed=7), OPTIMIZER, (0.05,), rank=rank, world=world)
    again.restore(torch.load(Path(folder, "tensors")), (), num_images=averages.num_images)
    again.gather()
    again.gather()
    if rank == 0:
        Path(folder, "restored.json").write_text(json.dumps(digests(again)))
    network.load_state_dict(build_network(MODEL, seed=3).state_dict())
    again.update(network, torch.tensor(16))
    try:
        again.tensors()
    except AssertionError as error:
        Path(folder, f"stale-{rank}").write_text(str(error))
    again.gather()
    if rank == 0:
        Path(folder, "later.json").write_text(json.dumps(digests(again)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_together_keep_what_one_rank_keeps(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path), 3), nprocs=3)
    network = build_network(MODEL, seed=0)
    alone = Averages(network, OPTIMIZER, (0.05,))
    alone.begin(network)
    train(network, alone)
    expected = digests(alone)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("gathered", "restored", "later")}
    assert list(found["gathered"]) == list(expected) and len(expected) == 3 * len(network.state_dict())
    assert found["gathered"] == found["restored"] == expected
    network.load_state_dict(build_network(MODEL, seed=3).state_dict())
    alone.update(network, torch.tensor(16))
    assert found["later"] == digests(alone) != expected
    for rank in range(3):
        assert "only rank 0 has the whole averages" in (tmp_path / f"stale-{rank}").read_text()
