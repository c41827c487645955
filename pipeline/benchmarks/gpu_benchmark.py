"""Training speed of the presets' networks on one device, beside a peer's network in the same steps of the same run.

A step is the pipeline's: noising by the counter-based noise, forward and backward pass, clipping, fused Adam, the
moving average; without reading data and without other ranks. The peer's network is trained by the very same step, so
that what differs is the network. Contenders take turns, since clocks and temperatures drift. What a card can do at most
is measured beside them: its rate of bf16 matrix products and its memory's bandwidth.

Needs torch and jaxtyping alone; diffusers for the peer.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ddpm import (
    DiffusionModel,
    Ema,
    build_network,
    count_parameters,
    flops_per_image,
    images_to_x_0,
    make_training_batch,
    per_sample_loss,
)
from ddpm.networks.cost import cost_key
from pipeline.benchmarks.gpu_cases import Case, Mode, Peer
from pipeline.models.network_pass import NetworkPass, compile_or_interpret, laid_out, multiply_float32_as
from pipeline.training.metrics.matrix_rate import PASSES_PER_STEP, fastest, matrix_flops_per_s, wait_for
from pipeline.training.trial import train_on_nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the device can do at most, measured."""

    matrix_flops_per_s: float
    """Of a product of large bf16 matrices, a multiplication and an addition counted as two."""
    memory_bytes_per_s: float
    """Read and written by a copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One network in one mode."""

    case: str
    """Name of the case."""
    network: str
    """"ours" or "diffusers"."""
    mode: str
    """Name of the mode."""
    precision: str
    """Of the mode, like the next two."""
    compile: bool
    channels_last: bool
    cost_key: str
    """What of the model decides what it costs."""
    batch: int
    """Images of a step."""
    num_parameters: int
    """Of the network."""
    images_per_s: tuple[float, ...]
    """Of each round."""
    flops_per_image: int
    """Of a step, per image: three forward passes, whatever is computed again."""
    peak_bytes: int | None
    """Most memory of this contender alone; None where the device does not count."""
    start_s: float
    """Seconds of its first steps, in which it is compiled."""
    note: str = ""
    """What went otherwise than asked for."""

    @property
    def median(self) -> float:
        """Images per second."""
        return statistics.median(self.images_per_s)


class Contender:
    """A network in training.

    Args:
        name: Of the case.
        case: The case; a batch that does not fit is for the caller to halve.
        mode_name: Name of the mode.
        mode: The mode.
        device: Where.
        is_peer: Whether diffusers' network is trained in place of ours.
    """

    def __init__(
        self, name: str, case: Case, mode_name: str, mode: Mode, device: torch.device, *, is_peer: bool
    ) -> None:
        """Build it, and train it for the first steps.

        Raises:
            torch.OutOfMemoryError: If the batch does not fit.
            ImportError, ValueError: As Peer.
        """
        self._name, self._case, self._mode_name, self._mode, self._device = name, case, mode_name, mode, device
        self.is_peer = is_peer
        self._note, self._step = "", 0
        network: nn.Module = Peer(case) if is_peer else _ours(case)
        self._network = laid_out(network, device, channels_last=mode.channels_last).train()
        self._pass = NetworkPass(self._network, device, precision=mode.precision, channels_last=mode.channels_last)
        started_s = time.perf_counter()
        if mode.compile:
            reason = compile_or_interpret(
                self._pass,
                lambda: train_on_nothing(self._pass, self._network, case.model, case.batch, holds_moments=False),
            )
            self._note = "" if reason is None else f"not compiled: {reason}"
        self._model = DiffusionModel.of(case.model, self._pass)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=1e-4, fused=True)
        self._ema = Ema(self._network, 1_000_000)
        c, (h, w) = case.model.channels, case.model.image_size
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(256, (case.batch, h, w, c), dtype=torch.uint8, generator=generator).to(device)
        self._ids = torch.arange(case.batch, device=device)
        self._label = None if case.model.num_classes is None else self._ids % case.model.num_classes
        self._peak_bytes = self._peak_of(self.steps, 3)
        self._start_s = time.perf_counter() - started_s
        self._rates: list[float] = []

    def steps(self, number: int) -> float:
        """Train; returns the seconds that it took."""
        multiply_float32_as(self._mode.precision)  # it belongs to the process, and another contender may have set it
        wait_for(self._device)
        started_s = time.perf_counter()
        for _ in range(number):
            self._train()
        wait_for(self._device)
        return time.perf_counter() - started_s

    def measure(self, number: int) -> None:
        """A round of so many steps."""
        self._rates.append(number * self._case.batch / self.steps(number))

    def table_of_time(self, number: int) -> list[tuple[str, float]]:
        """The operations that took most of the device's time, with their shares of it."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            self.steps(number)
        of_device = self._device.type == "cuda"
        times = {
            event.key: event.self_device_time_total if of_device else event.self_cpu_time_total
            for event in profiler.key_averages()
        }
        total = sum(times.values()) or 1
        most = sorted(times.items(), key=lambda item: -item[1])[:10]
        return [(name, time_us / total) for name, time_us in most]

    def figures(self) -> Figures:
        """What was measured."""
        return Figures(
            case=self._name,
            network="diffusers" if self.is_peer else "ours",
            mode=self._mode_name,
            precision=self._mode.precision,
            compile=self._mode.compile,
            channels_last=self._mode.channels_last,
            cost_key=cost_key(self._case.model),
            batch=self._case.batch,
            num_parameters=count_parameters(self._network),
            images_per_s=tuple(self._rates),
            flops_per_image=PASSES_PER_STEP * flops_per_image(self._case.model),
            peak_bytes=self._peak_bytes,
            start_s=self._start_s,
            note=self._note,
        )

    def _train(self) -> None:
        case = self._case
        batch = make_training_batch(
            self._model,
            images_to_x_0(self._images, self._model.num_levels),
            self._label,
            seed=0,
            sample_ids=self._ids,
            epochs=torch.full_like(self._ids, self._step),
            flip=True,
            label_drop=0.0,
        )
        losses = per_sample_loss(self._model, batch, objective=case.objective)
        torch.autograd.backward(losses.mean())
        parameters = list(self._network.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.update(self._network, case.batch)
        self._step += 1

    def _peak_of(self, work: Callable[[int], object], number: int) -> int | None:
        """Most memory during some work, less what others hold."""
        if self._device.type != "cuda":
            work(number)
            return None
        torch.cuda.reset_peak_memory_stats(self._device)
        before: int = torch.cuda.memory_allocated(self._device)
        own = sum(tensor.nbytes for tensor in self._network.state_dict().values())
        own += sum(tensor.nbytes for tensor in self._ema.state_dict().values()) + self._images.nbytes
        work(number)
        peak: int = torch.cuda.max_memory_allocated(self._device)
        return int(peak - (before - own))


def contend(
    name: str,
    case: Case,
    modes: dict[str, Mode],
    device: torch.device,
    *,
    rounds: int,
    steps: int,
    with_peer: bool,
    say: Callable[[str], object],
) -> tuple[list[Figures], list[tuple[str, float]]]:
    """Measure a case in all modes, ours and the peer's in turn.

    Args:
        name: Of the case.
        case: The case.
        modes: By name.
        device: Where.
        rounds: Turns of each.
        steps: Steps of a turn.
        with_peer: Whether diffusers' network takes part.
        say: Takes lines of progress.

    Returns:
        The figures, and of ours in the last mode where the time went.
    """
    while True:
        try:
            contenders = list(_contenders(name, case, modes, device, with_peer=with_peer, say=say))
            break
        except torch.OutOfMemoryError:
            if case.batch == 1:
                raise
        torch.cuda.empty_cache()
        case = dataclasses.replace(case, batch=case.batch // 2)
        say(f"{name}: does not fit, so {case.batch} images a step")
    for number in range(rounds):
        for contender in contenders:
            contender.measure(steps)
        say(f"{name}: round {number + 1} of {rounds}")
    ours = [contender for contender in contenders if not contender.is_peer]
    return [contender.figures() for contender in contenders], ours[-1].table_of_time(min(steps, 3))


def measure_limits(device: torch.device) -> Limits:
    """The device's rate of bf16 matrix products and its memory's bandwidth, each the best of several."""
    source = torch.zeros(2**20 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return Limits(
        matrix_flops_per_s=matrix_flops_per_s(device, torch.bfloat16),
        memory_bytes_per_s=2 * source.nbytes / fastest(lambda: target.copy_(source), device),
    )


def _contenders(
    name: str,
    case: Case,
    modes: dict[str, Mode],
    device: torch.device,
    *,
    with_peer: bool,
    say: Callable[[str], object],
) -> Iterator[Contender]:
    for mode_name, mode in modes.items():
        for is_peer in (False, True) if with_peer else (False,):
            contender = Contender(name, case, mode_name, mode, device, is_peer=is_peer)
            say(f"{name}: {'diffusers' if is_peer else 'ours'} in {mode_name} is ready")
            yield contender


def _ours(case: Case) -> nn.Module:
    return build_network(case.model, seed=0, gradient_checkpointing=case.gradient_checkpointing)
