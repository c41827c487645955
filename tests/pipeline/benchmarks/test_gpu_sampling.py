"""The benchmark of sampling on a GPU, on a CPU at tiny sizes: who takes part, what is compared, what goes untimed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm import DDIM, Ancestral, ModelConfig, build_network
from pipeline.benchmarks import gpu_sampling
from pipeline.benchmarks.diffusers_pipeline import diffusers_pipeline
from pipeline.benchmarks.gpu_benchmark import Limits
from pipeline.benchmarks.gpu_report import Report
from pipeline.benchmarks.gpu_sampling import SAMPLING_CASES, SamplingFigures, contend_sampling
from pipeline.models.network_pass import NetworkPass

CPU = torch.device("cpu")
TINY = SAMPLING_CASES["tiny"]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is minutes here, and has its own tests."""
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: None)


@pytest.mark.usefixtures("no_compiler")
def test_both_take_part_in_all_modes() -> None:
    lines: list[str] = []
    figures = contend_sampling("tiny", TINY, CPU, rounds=2, steps=2, with_peer=True, say=lines.append)
    assert [(one.network, one.mode) for one in figures] == [
        *(("ours", "float32"), ("diffusers", "float32")),
        *(("ours", "bf16-compiled"), ("diffusers", "bf16-compiled")),
    ]
    assert all(len(one.evaluations_per_s) == 2 and one.batch in TINY.batches for one in figures)
    assert lines[-1] == "tiny: round 2 of 2 of sampling"


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_images_that_are_not_the_interpreted_networks_are_not_timed(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NetworkPass, "compile", lambda self: setattr(self, "_is_wrong", True))
    right = NetworkPass.__call__

    def evaluate(self: NetworkPass, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return right(self, x_t, t, label) + (wrong if hasattr(self, "_is_wrong") else 0)

    monkeypatch.setattr(NetworkPass, "__call__", evaluate)
    monkeypatch.setattr(gpu_sampling, "x_0_to_images", lambda x_0, num_levels: x_0)  # which refuses NaN
    _, compiled = contend_sampling("tiny", TINY, CPU, rounds=2, steps=2, with_peer=False, say=str)
    assert compiled.evaluations_per_s == () and compiled.median == 0
    assert compiled.note == "not timed: its images are not those of the interpreted network"


@pytest.mark.usefixtures("no_compiler")
def test_a_batch_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(gpu_sampling.Ours):
        def __init__(self, case, mode, batch, *rest):  # type: ignore[no-untyped-def]
            if batch > 2:
                raise torch.OutOfMemoryError("full")
            super().__init__(case, mode, batch, *rest)

    monkeypatch.setattr(gpu_sampling, "Ours", Small)
    figures = contend_sampling("tiny", TINY, CPU, rounds=1, steps=1, with_peer=False, say=str)
    assert [one.batch for one in figures] == [2, 2]


def test_the_ratios_follow_from_what_was_measured() -> None:
    def one(network: str, mode: str, *rates: float) -> SamplingFigures:
        return SamplingFigures(
            case="a",
            network=network,
            mode=mode,
            batch=8,
            evaluations_per_s=rates,
            flops_per_evaluation=10**10,
            start_s=4.0,
            distance=None,
        )

    ours = one("ours", "bf16-compiled", 10, 30, 20)
    sampling = [ours, one("diffusers", "float32", 8), one("diffusers", "bf16-compiled")]
    limits = Limits(matrix_flops_per_s=1e14, memory_bytes_per_s=1e12)
    report = Report(machine={"device": "d"}, limits=limits, figures=[], tables_of_time={}, sampling=sampling)
    assert "| a | 8 | ours | bf16-compiled | 20 (10 to 30) | 2.50 |  | 0.2 | - | 4 s |" in report.to_markdown()
    assert json.loads(report.to_json())["sampling"][0]["beside"] == {"float32": 2.5}


@pytest.mark.parametrize("sampler", [DDIM(num_steps=2), Ancestral(num_steps=2)], ids=lambda one: one.name)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_diffusers_makes_images_of_our_weights(sampler: Ancestral | DDIM, num_classes: int | None) -> None:
    tiny = TINY.model
    model = ModelConfig(
        network=tiny.network, schedule=tiny.schedule, image_size=(8, 8), channels=3, num_classes=num_classes
    )
    weights = build_network(model, seed=3).state_dict()
    images = np.asarray(diffusers_pipeline(model, weights, sampler, device=CPU)(4))
    assert images.size == 4 * 3 * 8 * 8 and 0 <= images.min() < images.max() <= 1
    guided = dataclasses.replace(sampler, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"^sampler: must be ddim or ancestral without guidance beside diffusers, got"):
        diffusers_pipeline(model, weights, guided, device=CPU)
