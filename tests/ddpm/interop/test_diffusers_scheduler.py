"""Scheduler configs that diffusers itself wrote are read into ours; what cannot be kept is refused by name."""

import json
import math
from typing import Any

import diffusers
import pytest
import torch

from ddpm import DDIM, Ancestral, DPMSolver2M, DPMSolver2MSDE, DPMSolver3MCommon, Sampler, ScheduleConfig, make_schedule
from ddpm.interop.diffusers_scheduler import TIMESTEP_SPACINGS, VARIANCE_TYPES, from_diffusers_scheduler

SCHEDULERS: dict[str, Any] = {
    name: getattr(diffusers, name) for name in ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")
}


def written_by(name: str, **options: Any) -> dict[str, Any]:
    """As in scheduler_config.json."""
    config: dict[str, Any] = json.loads(SCHEDULERS[name](**options).to_json_string())
    assert config["_class_name"] == name
    return config


def test_defaults() -> None:
    """Whether the file states a default or leaves it out makes no difference."""
    for config in (written_by("DDPMScheduler"), {}):
        got = from_diffusers_scheduler(config, num_steps=30)
        assert got.schedule == ScheduleConfig() and got.prediction_type == "eps" and not got.learned_variance
        assert got.sampler == Ancestral(num_steps=30, spacing="leading")
    for config in (written_by("DDIMScheduler"), {"_class_name": "DDIMScheduler"}):
        got = from_diffusers_scheduler(config, num_steps=30)
        assert got.sampler == DDIM(eta=0.0, num_steps=30, spacing="leading")
    for config in (written_by("DPMSolverMultistepScheduler"), {"_class_name": "DPMSolverMultistepScheduler"}):
        got = from_diffusers_scheduler(config, num_steps=30)
        assert got.sampler == DPMSolver2M(num_steps=30, spacing="linspace", clip_x_0=False)


@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("sample", "x_0"), ("v_prediction", "v")])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_prediction_type(name: str, theirs: str, ours: str) -> None:
    assert from_diffusers_scheduler(written_by(name, prediction_type=theirs), num_steps=5).prediction_type == ours


@pytest.mark.parametrize("variance_type", sorted(VARIANCE_TYPES))
def test_variance_type(variance_type: str) -> None:
    got = from_diffusers_scheduler(written_by("DDPMScheduler", variance_type=variance_type), num_steps=5)
    assert got.sampler == Ancestral(variance=VARIANCE_TYPES[variance_type], num_steps=5, spacing="leading")
    assert got.learned_variance is (variance_type == "learned_range")
    solver = written_by("DPMSolverMultistepScheduler", variance_type="learned_range")
    assert from_diffusers_scheduler(solver, num_steps=5).learned_variance


@pytest.mark.parametrize("spacing", sorted(TIMESTEP_SPACINGS))
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_timestep_spacing(name: str, spacing: str) -> None:
    assert from_diffusers_scheduler(written_by(name, timestep_spacing=spacing), num_steps=5).sampler.spacing == spacing


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, ScheduleConfig(name="cosine")),
        (
            {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
            ScheduleConfig(name="cosine", num_timesteps=300),
        ),
        ({"rescale_betas_zero_snr": True}, ScheduleConfig(zero_terminal_snr=True)),
        (
            {"num_train_timesteps": 250, "beta_start": 4e-4, "beta_end": 0.08},
            ScheduleConfig(num_timesteps=250),
        ),
    ],
)
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_schedule_is_the_one_that_diffusers_builds(name: str, options: dict[str, Any], config: ScheduleConfig) -> None:
    got = from_diffusers_scheduler(written_by(name, prediction_type="v_prediction", **options), num_steps=5)
    assert got.schedule == config
    theirs = SCHEDULERS[name](**options).alphas_cumprod.double()
    torch.testing.assert_close(make_schedule(got.schedule).alpha_bar, theirs, rtol=0, atol=2e-6)


def test_limits_and_solvers() -> None:
    def sampler(name: str, **options: Any) -> Sampler:
        return from_diffusers_scheduler(written_by(name, **options), num_steps=5).sampler

    assert not sampler("DDPMScheduler", clip_sample=False).clip_x_0
    assert sampler("DPMSolverMultistepScheduler", thresholding=True).clip_x_0
    assert sampler("DDPMScheduler", thresholding=True).dynamic_threshold is None
    dynamic = sampler("DDPMScheduler", thresholding=True, sample_max_value=math.inf, dynamic_thresholding_ratio=0.9)
    assert dynamic.clip_x_0 and dynamic.dynamic_threshold == 0.9
    assert isinstance(sampler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"), DPMSolver2MSDE)
    assert isinstance(sampler("DPMSolverMultistepScheduler", solver_order=3), DPMSolver3MCommon)
    assert isinstance(sampler("DPMSolverMultistepScheduler", lower_order_final=False), DPMSolver2M)


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("_class_name", {"_class_name": "PNDMScheduler"}),
        ("prediction_type", {"prediction_type": "flow_prediction"}),
        ("variance_type", {"variance_type": "learned"}),
        ("variance_type", {"variance_type": "fixed_large_log"}),
        ("timestep_spacing", {"timestep_spacing": 3}),
        ("beta_schedule", {"beta_schedule": "scaled_linear"}),
        ("beta_start", {"beta_start": 0.00085}),
        ("beta_end", {"beta_end": 0.012}),
        ("beta_start", {"num_train_timesteps": 500}),
        ("trained_betas", {"trained_betas": [0.1, 0.2]}),
        ("steps_offset", {"steps_offset": 1}),
        ("set_alpha_to_one", {"_class_name": "DDIMScheduler", "set_alpha_to_one": False}),
        ("clip_sample_range", {"clip_sample_range": 2.0}),
        ("sample_max_value", {"thresholding": True, "sample_max_value": 1.5}),
        ("solver_order", {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}),
        ("solver_order", {"_class_name": "DPMSolverMultistepScheduler", "solver_order": None}),
        (
            "solver_order",
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        ),
        (
            "lower_order_final",
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "lower_order_final": False},
        ),
        ("algorithm_type", {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}),
        ("use_karras_sigmas", {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}),
    ],
)
def test_what_would_make_other_images_is_refused(field: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: must be .* to be imported from diffusers, got "):
        from_diffusers_scheduler(config, num_steps=5)
