"""Sampling speed of the presets' networks on one device, beside diffusers' pipeline with the same weights and steps.

What is measured is a batch from noise to pixels on the host: Ho et al.'s sampler on a subset of the steps. Ours is as
it is built and as the job's flags for speed make it: bf16, channels last, compiled and launched as a CUDA graph; the
peer is as it comes, and in bf16 and compiled. Each is given the batch at which it is fastest. Before ours is timed, the
images of the compiled network are compared with those of the same network interpreted. Contenders take turns.

Needs torch and jaxtyping alone; diffusers for the peer.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ddpm import Ancestral, DiffusionModel, ModelConfig, build_network, flops_per_image, generate, x_0_to_images
from pipeline.benchmarks.diffusers_pipeline import diffusers_pipeline
from pipeline.benchmarks.gpu_cases import CASES, MODES, Mode
from pipeline.models.cuda_graph import GraphedNetwork
from pipeline.models.network_pass import NetworkPass, compile_or_interpret, laid_out, multiply_float32_as
from pipeline.training.metrics.matrix_rate import wait_for

MAX_DISTANCE = 0.05
"""Mean |difference| of compiled and interpreted images in [-1, 1], our choice: rounding in bf16, and no more."""

_NOT_TIMED = "not timed: its images are not those of the interpreted network"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingCase:
    """A network that is sampled from."""

    model: ModelConfig
    """The network, its images and its schedule."""
    batches: tuple[int, ...]
    """Images of a batch, ascending: each contender has the one of them at which it is fastest."""


SAMPLING_CASES = {
    "cifar10": SamplingCase(model=CASES["cifar10-128"].model, batches=(256, 1024)),
    "celebahq256": SamplingCase(model=CASES["celebahq256"].model, batches=(16, 64)),
    "tiny": SamplingCase(model=CASES["tiny"].model, batches=(2, 4)),
}
"""By name; "tiny" is for tests, and is run only where it is named."""
SAMPLING_MODES = {"float32": MODES["float32"], "bf16-compiled": MODES["bf16-compiled"]}
"""By name; a peer in float32 multiplies as PyTorch does unless told, which on a GPU is in tf32 for convolutions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingFigures:
    """One contender."""

    case: str
    """Name of the case."""
    network: str
    """"ours" or "diffusers"."""
    mode: str
    """Name of the mode."""
    batch: int
    """Images of a batch."""
    evaluations_per_s: tuple[float, ...]
    """Images times evaluations of each (img·NFE) per second, of each round; none of what was not timed."""
    flops_per_evaluation: int
    """Of the network, per image."""
    start_s: float
    """Seconds of its first batches, in which it is compiled."""
    distance: float | None
    """Mean |difference| of its images from those of the network interpreted; None where there is nothing to compare."""
    note: str = ""
    """What went otherwise than asked for."""

    @property
    def median(self) -> float:
        """img·NFE per second; 0 of what was not timed."""
        return statistics.median(self.evaluations_per_s) if self.evaluations_per_s else 0.0


class Sampled:
    """A contender, ready to be timed: a function that makes a batch, and what is known of it."""

    def __init__(self, case: SamplingCase, mode: Mode, batch: int, steps: int, device: torch.device) -> None:
        """Build the network with weights that are zero nowhere: images must depend on it to be compared."""
        self.case, self.mode, self.batch, self.device = case, mode, batch, device
        self.sampler = Ancestral(num_steps=steps)
        self.note = ""
        self.distance: float | None = None
        self.network = build_network(case.model, seed=0).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in self.network.parameters():
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def make(self) -> object:
        """A batch of images, on the host."""
        raise NotImplementedError

    def seconds(self) -> float:
        """What a batch takes."""
        wait_for(self.device)
        started_s = time.perf_counter()
        self.make()
        wait_for(self.device)
        return time.perf_counter() - started_s


class Ours(Sampled):
    """Our network under our sampler."""

    def __init__(self, case: SamplingCase, mode: Mode, batch: int, steps: int, device: torch.device) -> None:
        """Compare it interpreted and compiled, if it is to be."""
        super().__init__(case, mode, batch, steps, device)
        module = laid_out(self.network, device, channels_last=mode.channels_last)
        evaluated = NetworkPass(module, device, precision=mode.precision, channels_last=mode.channels_last)
        self._model = dataclasses.replace(DiffusionModel.of(case.model, module), network=evaluated)
        self._ids = torch.arange(batch, device=device)
        interpreted = self._images()
        if not mode.compile:
            return
        reason = compile_or_interpret(evaluated, lambda: wait_for(self._images().device))
        self.note = "" if reason is None else f"not compiled: {reason}"
        if device.type == "cuda":
            graphed = GraphedNetwork(evaluated, self._says)
            self._model = dataclasses.replace(self._model, network=graphed)
        self.distance = float((self._images() - interpreted).abs().mean())

    def make(self) -> object:
        """See Sampled.make."""
        multiply_float32_as(self.mode.precision)  # it belongs to the process, and another may have set it
        return x_0_to_images(self._images(), self.case.model.num_levels).cpu()

    def _images(self) -> torch.Tensor:
        return generate(self._model, self.sampler, seed=0, sample_ids=self._ids, label=None)

    def _says(self, line: str) -> None:
        self.note = line


class Peers(Sampled):
    """Diffusers' pipeline with the same weights."""

    def __init__(self, case: SamplingCase, mode: Mode, batch: int, steps: int, device: torch.device) -> None:
        """Build it; errors as diffusers_pipeline."""
        super().__init__(case, mode, batch, steps, device)
        self._pipeline = diffusers_pipeline(
            case.model,
            self.network.state_dict(),
            self.sampler,
            device=device,
            dtype=torch.bfloat16 if mode.precision == "bf16" else torch.float32,
            compiled=mode.compile,
        )

    def make(self) -> object:
        """See Sampled.make."""
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]  # PyTorch's own choice
        return self._pipeline(self.batch)


def contend_sampling(
    name: str,
    case: SamplingCase,
    device: torch.device,
    *,
    rounds: int,
    steps: int,
    with_peer: bool,
    say: Callable[[str], object],
) -> list[SamplingFigures]:
    """Measure a case, ours and the peer's in all modes, in turn.

    Args:
        name: Of the case.
        case: The case.
        device: Where.
        rounds: Turns of each, of one batch.
        steps: Network evaluations of an image.
        with_peer: Whether diffusers' pipeline takes part.
        say: Takes lines of progress.
    """
    kinds: list[tuple[str, type[Sampled]]] = [("ours", Ours), *([("diffusers", Peers)] if with_peer else [])]
    ready: list[tuple[str, str, Sampled, float]] = []
    rates: list[list[float]] = []
    for mode_name, mode in SAMPLING_MODES.items():
        for network, kind in kinds:
            contender, start_s = _fastest(kind, case, mode, steps, device)
            say(f"{name}: {network} in {mode_name} is ready, with {contender.batch} images a batch")
            if contender.distance is not None and not contender.distance <= MAX_DISTANCE:  # NaN is not
                contender.note = _NOT_TIMED
            ready.append((network, mode_name, contender, start_s))
            rates.append([])
    for number in range(rounds):
        for (_, _, contender, _), of_contender in zip(ready, rates, strict=True):
            if contender.note != _NOT_TIMED:
                of_contender.append(contender.batch * steps / contender.seconds())
        say(f"{name}: round {number + 1} of {rounds} of sampling")
    flops = flops_per_image(case.model)
    return [
        SamplingFigures(
            case=name,
            network=network,
            mode=mode_name,
            batch=contender.batch,
            evaluations_per_s=tuple(of_contender),
            flops_per_evaluation=flops,
            start_s=start_s,
            distance=contender.distance,
            note=contender.note,
        )
        for (network, mode_name, contender, start_s), of_contender in zip(ready, rates, strict=True)
    ]


def _fastest(
    kind: type[Sampled], case: SamplingCase, mode: Mode, steps: int, device: torch.device
) -> tuple[Sampled, float]:
    """The contender with the batch at which it is fastest, of those that fit, and the seconds that it took to start."""
    best: Sampled | None = None
    best_rate = best_start_s = 0.0
    for batch in case.batches:
        started_s = time.perf_counter()
        try:
            contender = kind(case, mode, batch, steps, device)
            contender.make()
            start_s = time.perf_counter() - started_s
            rate = batch / contender.seconds()
        except torch.OutOfMemoryError:
            if best is None:
                raise
            torch.cuda.empty_cache()
            break
        if rate > best_rate:
            best, best_rate, best_start_s = contender, rate, start_s
    assert best is not None
    return best, best_start_s
