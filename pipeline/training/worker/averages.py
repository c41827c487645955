"""The moving averages that a training run keeps, each rank a share of every one.

The first is the model that is sampled and registered; each further one lies beside it as a model of its own, under the
names of `model_files.average_names`. Power-function averages are tracked for their snapshots; a checkpoint holds them
to go on with, and the list of the snapshots that were taken.

Ranks have equal weights after every step, so that each keeps some tensors of every average: no rank is slower than the
others for it. Rank 0 gets the others' shares (`gather`) before anything is made of the averages.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm import Ema, EmaBank, PowerEma
from ddpm.training.ema import check_state
from pipeline.training.checkpoints.ema_snapshots import SnapshotRecord, SnapshotStore
from pipeline.training.checkpoints.host_copy import HostCopy, Tensors
from pipeline.training.checkpoints.state_files import tracked_name, weights_name
from pipeline.training.train_config import OptimizerConfig
from pipeline.training.worker.background import BackgroundWriter


def deal_out(network: nn.Module, world: int) -> list[list[str]]:
    """Which tensors of a network each rank averages: about as many numbers for each.

    What is not a parameter of the commonest dtype (buffers, say) is rank 0's: shares travel as one vector.

    Args:
        network: The network.
        world: Number of ranks.

    Returns:
        Names for each rank, every one of the network's state_dict once.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    state = network.state_dict()
    numbers = Counter[torch.dtype]()
    for parameter in parameters.values():
        numbers[parameter.dtype] += parameter.numel()
    commonest = numbers.most_common(1)[0][0] if numbers else None
    shares: list[list[str]] = [[] for _ in range(world)]
    load = [0] * world
    for name in sorted(state, key=lambda name: (-state[name].numel(), name)):
        may_travel = name in parameters and state[name].dtype == commonest
        rank = load.index(min(load)) if may_travel else 0
        shares[rank].append(name)
        load[rank] += state[name].numel()
    return shares


class Averages:
    """This rank's share of the averages of one network, on the network's device.

    Args:
        network: The network in training; its present weights are the first averages.
        config: Half-lives and ramp-up.
        sigma_rels: Lengths of the power-function averages.
        rank: This rank.
        world: Number of ranks.
    """

    def __init__(
        self,
        network: nn.Module,
        config: OptimizerConfig,
        sigma_rels: tuple[float, ...] = (),
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Start from the network's present weights."""
        self.snapshots: list[SnapshotRecord] = []
        self._last_snapshot_images, self._snapshot_copy = 0, HostCopy()
        self._rank, self._shares = rank, deal_out(network, world)
        self._like = {name: tensor.to("meta") for name, tensor in network.state_dict().items()}
        own = None if world == 1 else frozenset(self._shares[rank])
        self._tracked = {sigma_rel: PowerEma(network, sigma_rel, names=own) for sigma_rel in sigma_rels}
        self._halflives = config.ema_halflives_images
        self._bank = EmaBank(network, self._halflives, ramp_up_ratio=config.ema_ramp_up_ratio, names=own)
        self._whole: dict[str, dict[str, Tensor]] | None = None
        self._device = next(iter(network.state_dict().values())).device

    @property
    def registered(self) -> Ema:
        """This rank's share of the average that is sampled and registered."""
        return self._bank[self._halflives[0]]

    @property
    def num_images(self) -> int:
        """Images taken in so far, without skipped batches; to read it waits for the device."""
        return self.registered.num_images

    def begin(self, network: nn.Module) -> None:
        """Start from the network's present weights: those of rank 0, which the others got after these were made."""
        weights = network.state_dict()
        for average, _ in self._named():
            average.load_state_dict({name: weights[name] for name in average.state_dict()})

    def update(self, network: nn.Module, num_images: Tensor) -> None:
        """Take in the network's weights after a step on num_images images (0-dim), 0 of a skipped one; no waiting."""
        self._whole = None
        self._bank.update(network, num_images)
        for average in self._tracked.values():
            average.update(network, num_images)

    def gather(self) -> None:
        """Collective: rank 0 has the whole averages until the next update, on its device."""
        if len(self._shares) == 1 or self._whole is not None:
            return
        self._whole = whole = {}
        for file, own in self._own().items():
            if self._rank == 0:
                there = own | dict(self._received())
                whole[file] = {name: there[name] for name in self._like}  # in the network's order, as in files
            elif own:
                dist.send(torch.cat([own[name].reshape(-1) for name in self._shares[self._rank]]), dst=0)

    def take_snapshot(self, step: int, store: SnapshotStore, dtype: str, writer: BackgroundWriter) -> None:
        """Store the tracked averages, which were gathered, beside training, unless nothing has changed since the last.

        The snapshot is among `snapshots` when its job is done: a checkpoint that is written after it names it.

        Args:
            step: Global batches behind it.
            store: Where.
            dtype: "float32" or "float16".
            writer: Does the writing.

        Raises:
            BaseException: What the writer's jobs before have raised.
        """
        if self.num_images == self._last_snapshot_images:
            return
        writer.wait("snapshot")
        num_images = self._last_snapshot_images = self.num_images
        whole = self.tensors()
        copies = self._snapshot_copy.take({name: whole[name] for name in map(tracked_name, self._tracked)})
        averages = {sigma_rel: copies[tracked_name(sigma_rel)] for sigma_rel in self._tracked}
        writer.start("snapshot", lambda: self.snapshots.append(store.save(step, num_images, averages, dtype)))

    @property
    def is_tracking(self) -> bool:
        """Whether there are power-function averages, of which snapshots are taken."""
        return bool(self._tracked)

    @property
    def halflives_images(self) -> tuple[int, ...]:
        """Half-lives of the averages that are models, the registered one's first."""
        return self._halflives

    @property
    def files(self) -> tuple[str, ...]:
        """The averages' names, as those of `tensors`."""
        return tuple(self._own())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every whole average by its file and its weights' names; not copies. On rank 0, after `gather`."""
        if len(self._shares) == 1:
            return self._own()
        assert self._whole, "only rank 0 has the whole averages, and only until the next step"
        return self._whole

    def restore(self, tensors: Tensors, snapshots: Sequence[SnapshotRecord], *, num_images: int) -> None:
        """Go on from stored averages.

        Args:
            tensors: As `tensors` gave them: whole, on every rank.
            snapshots: The snapshots behind them.
            num_images: Images that these averages had taken in; the ramp-up goes on from there.

        Raises:
            KeyError: If an average, or something of it, is missing.
            ValueError: If the weights are another network's.
        """
        for average, file in self._named():
            given = tensors[file]
            if len(self._shares) > 1:
                check_state(given, self._like)
                given = {name: given[name] for name in self._shares[self._rank]}
            average.load_state_dict(given, num_images=num_images)
        self._whole = None
        self.snapshots = list(snapshots)
        self._last_snapshot_images = self.snapshots[-1].num_images if self.snapshots else 0

    def _named(self) -> Iterator[tuple[Ema | PowerEma, str]]:
        """Every average with its file."""
        for halflife_images in self._halflives:
            yield self._bank[halflife_images], weights_name(self._halflives, halflife_images)
        for sigma_rel, average in self._tracked.items():
            yield average, tracked_name(sigma_rel)

    def _own(self) -> dict[str, dict[str, Tensor]]:
        return {file: average.state_dict() for average, file in self._named()}

    def _received(self) -> Iterator[tuple[str, Tensor]]:
        """The other ranks' tensors of an average."""
        for rank, names in enumerate(self._shares):
            if rank == 0 or not names:
                continue
            sizes = [self._like[name].numel() for name in names]
            vector = torch.empty(sum(sizes), dtype=self._like[names[0]].dtype, device=self._device)
            dist.recv(vector, src=rank)
            for name, part in zip(names, torch.split(vector, sizes)):
                yield name, part.view(self._like[name].shape)
