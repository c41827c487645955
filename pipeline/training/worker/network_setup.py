"""The network, made ready for its first step: how many images it sees at once, compiled or not, and who shares it."""

from collections.abc import Callable, Sequence

import torch

from pipeline.errors import ConfigError
from pipeline.models.network_pass import NetworkPass, compile_or_interpret
from pipeline.progress import say
from pipeline.training.train_task import TrainTask
from pipeline.training.trial import (
    everywhere,
    largest_fitting,
    micro_batches,
    train_on_nothing,
)
from pipeline.training.worker.training_state import TrainingState


def set_up(
    task: TrainTask, state: TrainingState, device: torch.device, *, rank: int, rows: Sequence[int]
) -> tuple[NetworkPass, list[slice]]:
    """The network as every step evaluates it, and this rank's micro-batches; collective.

    Args:
        task: What the worker was given.
        state: The state in training; it is told the size of a micro-batch, which its checkpoints hold.
        device: Where the network lives.
        rank: This rank.
        rows: Images of each rank in a global batch.

    Raises:
        ConfigError: If not one image fits into the device's memory.
    """
    config, agree = task.config, everywhere(device)
    network = NetworkPass(state.network.train(), device, precision=config.precision, channels_last=config.channels_last)

    def attempt(size: int) -> None:
        train_on_nothing(network, state.network, task.model_config, size, holds_moments=state.has_moments)

    state.micro_batch = _micro_batch(config.micro_batch, state.micro_batch, max(rows), device, attempt, agree)
    own = micro_batches(rows[rank], max(rows), state.micro_batch)
    if config.compile:
        reason = compile_or_interpret(network, lambda: _each(attempt, own), agree)
        if reason is not None:
            say(f"compile: does not work here, so that the network is interpreted: {reason}")
    network.share()
    return network, own


def _micro_batch(
    given: int | None,
    before: int | None,
    most_rows: int,
    device: torch.device,
    attempt: Callable[[int], None],
    agree: Callable[[bool], bool],
) -> int | None:
    """Images at once: as given, else as the run has had it, else on an accelerator the most that fit."""
    size, most = given, most_rows if before is None else min(before, most_rows)
    if size is None and device.type == "cpu":
        return before
    if size is None:
        size = largest_fitting(most, attempt, agree)
        if size is None:
            raise ConfigError(
                f"micro_batch: not even 1 image at once fits into the memory of {device}, beside the network and its "
                "optimiser; add --gradient-checkpointing or --precision bf16, or take a smaller network"
            )
        if before is None:
            say(f"micro-batches of {size} images: the most, of a worker's {most_rows}, that fit into memory")
    if before not in (None, size) and size != most:
        say(f"micro-batches of {size} images; the run has had {before} before")
    return size


def _each(attempt: Callable[[int], None], parts: Sequence[slice]) -> None:
    for size in sorted({part.stop - part.start for part in parts}):
        attempt(size)
