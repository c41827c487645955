"""Gradient checkpointing: the same gradients bit by bit, also with dropout and under DDP, and less memory."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ddpm import DiTConfig, ModelConfig, UNetConfig, build_network
from ddpm.networks.gradient_checkpointing import run_block, switch_on_checkpointing
from ddpm.networks.memory import LiveBytes, step_memory

UNET = UNetConfig(
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(8,),
    num_groups=4,
    dropout=0.3,
)
ADM = replace(UNET, num_head_channels=8, adaptive_group_norm=True, residual_resampling=True, learned_variance=True)
DIT = DiTConfig(hidden_size=32, depth=4, num_heads=2)
NETWORKS = {
    "unet": ModelConfig(network=UNET, image_size=(16, 16), channels=3, num_classes=3),
    "adm": ModelConfig(network=ADM, image_size=(16, 16), channels=3, num_classes=3),
    "dit": ModelConfig(network=DIT, image_size=(16, 16), channels=3, num_classes=3),
}


def trained(config: ModelConfig, *, gradient_checkpointing: bool) -> nn.Module:
    """A network without the zeros that would hide most gradients."""
    network = build_network(config, gradient_checkpointing=gradient_checkpointing)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def loss_of(network: nn.Module, seed: int = 0) -> Tensor:
    x_t = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)  # dropout
    loss: Tensor = (network(x_t, torch.tensor([1, 30, 400, 999]), torch.tensor([0, 1, 2, 3])) - 1).square().mean()
    return loss


def gradients(network: nn.Module, seed: int = 0) -> list[Tensor]:
    network.zero_grad()
    loss_of(network, seed).backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_bit_equal_with_dropout_too(name: str) -> None:
    plain = trained(NETWORKS[name], gradient_checkpointing=False)
    recomputed = trained(NETWORKS[name], gradient_checkpointing=True)
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    expected = gradients(plain)
    after = torch.get_rng_state()
    found = gradients(recomputed)
    assert torch.equal(torch.get_rng_state(), after), "what is drawn after the step changed"
    assert len(expected) == len(found) == len(list(plain.parameters()))
    for (parameter_name, _), one, other in zip(plain.named_parameters(), expected, found, strict=True):
        assert torch.equal(one, other), parameter_name
    if name != "dit":  # it has no dropout
        assert not all(torch.equal(one, other) for one, other in zip(expected, gradients(plain, seed=1), strict=True))


def test_without_the_generators_state_dropout_would_spoil_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above does see a mask that differs."""

    def careless(block: Any, *inputs: Any, preserve_rng_state: bool, **options: Any) -> Any:
        return checkpoint(block, *inputs, preserve_rng_state=False, **options)

    expected = gradients(trained(NETWORKS["unet"], gradient_checkpointing=False))
    monkeypatch.setattr("ddpm.networks.gradient_checkpointing.checkpoint", careless)
    found = gradients(trained(NETWORKS["unet"], gradient_checkpointing=True))
    assert not all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_blocks_are_run_again_in_the_backward_pass_only_if_asked_for() -> None:
    for asked in (False, True):
        network = trained(NETWORKS["dit"], gradient_checkpointing=asked)
        calls: list[nn.Module] = []

        def note(block: nn.Module, _: Any, calls: list[nn.Module] = calls) -> None:
            calls.append(block)

        for block in network.get_submodule("blocks").children():
            block.register_forward_pre_hook(note)
        loss = loss_of(network)
        assert len(calls) == 4
        loss.backward()
        assert len(calls) == (8 if asked else 4)


def test_nothing_is_kept_without_gradients() -> None:
    network = trained(NETWORKS["unet"], gradient_checkpointing=True)
    with torch.no_grad():
        quiet = loss_of(network)
    assert not quiet.requires_grad
    assert torch.equal(quiet, loss_of(network).detach())
    assert run_block(lambda x: 2 * x, torch.ones(1), recompute=False).item() == 2


def test_a_network_that_does_not_offer_it_is_refused_in_one_line() -> None:
    network = nn.Conv2d(1, 1, 1)
    for wrong in ("absent", None, 1):
        if wrong != "absent":
            network.gradient_checkpointing = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"^gradient_checkpointing: a.b:c does not offer it; give the module") as e:
            switch_on_checkpointing(network, "a.b:c")
        assert "\n" not in str(e.value)
    network.gradient_checkpointing = False  # type: ignore[assignment]
    switch_on_checkpointing(network, "a.b:c")
    assert network.gradient_checkpointing is True


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_meter_counts_what_is_held() -> None:
    with LiveBytes([]) as live:
        x = torch.ones(256)  # 1 KiB
        y = x.reshape(16, 16).t()  # the same memory
        z = (y + 1).sum()  # another KiB while it is summed, and 4 bytes
        assert (live.now, live.peak) == (1024 + 4, 2048 + 4)
        del x
        assert live.now == 1024 + 4
        del y, z
    assert live.now == 0


IMAGENET64_UNET = UNetConfig(
    base_channels=192,
    channel_multipliers=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    num_head_channels=64,
    adaptive_group_norm=True,
    residual_resampling=True,
)
REAL = {  # name: network, most of the plain peak that may be left
    "CIFAR-10 U-Net of Ho et al.": (ModelConfig(image_size=(32, 32), channels=3, num_classes=10), 0.3),
    "ImageNet-64 ADM": (ModelConfig(network=IMAGENET64_UNET, image_size=(64, 64), channels=3, num_classes=1000), 0.22),
    "DiT-B/4 at 64 pixels": (
        ModelConfig(
            network=DiTConfig(patch_size=4, hidden_size=768, depth=12, num_heads=12),
            image_size=(64, 64),
            channels=3,
            num_classes=1000,
        ),
        0.17,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_memory_of_a_training_step(name: str) -> None:
    config, most = REAL[name]
    plain, less = (step_memory(config, 2, gradient_checkpointing=asked) for asked in (False, True))
    (kept, peak), (kept_less, peak_less) = (plain.kept, plain.peak), (less.kept, less.peak)
    mib = 2 * 2**20  # per image
    print(f"{name}: kept for backward {kept / mib:.1f} -> {kept_less / mib:.1f} MiB per image, ", end="")
    print(f"peak {peak / mib:.1f} -> {peak_less / mib:.1f} MiB per image, without weights and their gradients")
    assert kept_less < most * kept and peak_less < most * peak


# --- DDP --------------------------------------------------------------------------------------------------------------


def ddp_gradients(rank: int, name: str, folder: str) -> None:
    """One of two ranks: a step with and without checkpointing, each on another half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for asked in (False, True):
        network = DistributedDataParallel(trained(NETWORKS[name], gradient_checkpointing=asked))
        found = []
        for step in range(2):  # buckets are arranged anew after the first
            found += gradients(network, seed=10 * step + rank)
        if rank == 0:
            torch.save(found, Path(folder, f"{name}-{asked}.pt"))
    torch.distributed.barrier()
    os._exit(0)  # torch's threads may outlive the interpreter, which then aborts now and then; the results are written


def test_gradients_are_bit_equal_under_ddp(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ddp_gradients, args=("adm", str(tmp_path)), nprocs=2)
    plain, recomputed = (torch.load(tmp_path / f"adm-{asked}.pt") for asked in (False, True))
    assert len(plain) == len(recomputed) > 0
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))
    alone = gradients(trained(NETWORKS["adm"], gradient_checkpointing=False), seed=0)
    assert not torch.equal(plain[0], alone[0]), "the ranks' gradients were not averaged"
