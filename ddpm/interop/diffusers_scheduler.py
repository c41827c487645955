"""What a diffusers scheduler's `scheduler_config.json` says, in our words; diffusers is not imported.

Their `prediction_type`, `variance_type` and `timestep_spacing` are understood. Whatever would make other images than
diffusers does is refused by the name of the option, never dropped. Two differences remain: their samplers do not
re-derive eps_hat after clipping (DDIM does on request), and DPM-Solver's leading and linspace count one step more.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ddpm.process.diffusion import Variance
from ddpm.process.prediction import PredictionType
from ddpm.process.schedules import ScheduleConfig
from ddpm.process.spacing import Spacing
from ddpm.samplers.ancestral import Ancestral
from ddpm.samplers.ddim import DDIM
from ddpm.samplers.dpm_solver import DPMSolver2M, DPMSolver2MSDE
from ddpm.samplers.dpm_solver_3m import DPMSolver3MCommon
from ddpm.samplers.sampler import Sampler

PREDICTION_TYPES: dict[str, PredictionType] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
"""diffusers' `prediction_type`."""
VARIANCE_TYPES: dict[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
"""diffusers' `variance_type`; its fixed_large_log is a variance of log beta, which is no variance."""
TIMESTEP_SPACINGS: dict[str, Spacing] = {"leading": "leading", "linspace": "linspace", "trailing": "trailing"}
"""diffusers' `timestep_spacing`."""

# By `algorithm_type` and `solver_order`.
_DPM_SOLVERS: dict[str, dict[int, type[Sampler]]] = {
    "dpmsolver++": {2: DPMSolver2M, 3: DPMSolver3MCommon},
    "sde-dpmsolver++": {2: DPMSolver2MSDE},
}
# What diffusers takes where an option is missing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"clip_sample": True, "timestep_spacing": "leading"},
    "DDIMScheduler": {"clip_sample": True, "timestep_spacing": "leading"},
    "DPMSolverMultistepScheduler": {"clip_sample": False, "timestep_spacing": "linspace"},
}
_COMMON_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "lower_order_final": True,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
# Options with one value that can be reproduced here, which is also their default.
_ONLY: dict[str, Any] = {
    "trained_betas": None,
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample_range": 1.0,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusersScheduler:
    """A scheduler of diffusers as our configs."""

    schedule: ScheduleConfig
    """The schedule that the network was trained on."""
    prediction_type: PredictionType
    """What the network predicts."""
    learned_variance: bool
    """Whether the network answers with twice the channels."""
    sampler: Sampler
    """The sampler, with the number of steps that was asked for."""


def from_diffusers_scheduler(config: Mapping[str, Any], *, num_steps: int) -> DiffusersScheduler:
    """Read the config of a `DDPMScheduler`, `DDIMScheduler` or `DPMSolverMultistepScheduler`.

    Args:
        config: What `scheduler_config.json` holds, or `scheduler.config`; what is missing has diffusers' default.
        num_steps: Steps per image, which diffusers is told when it samples.

    Returns:
        Our schedule, prediction type and sampler. DDIM gets eta 0, diffusers' default.

    Raises:
        ValueError: If the config asks for something that is not here; the message names the option.
    """
    scheduler = config.get("_class_name", "DDPMScheduler")
    if scheduler not in _DEFAULTS:
        raise _refused("_class_name", scheduler, _DEFAULTS)
    options = _COMMON_DEFAULTS | _DEFAULTS[scheduler] | dict(config)
    for name, value in _ONLY.items():
        if options.get(name, value) != value:
            raise _refused(name, options[name], [value])
    # DPM-Solver's default is None, which is no statement; DDIM has no such option.
    variance = _translate("variance_type", options.get("variance_type") or "fixed_small", VARIANCE_TYPES)
    common = {
        "num_steps": num_steps,
        "spacing": _translate("timestep_spacing", options["timestep_spacing"], TIMESTEP_SPACINGS),
        **_threshold(options),
    }
    sampler: Sampler
    if scheduler == "DDPMScheduler":
        sampler = Ancestral(variance=variance, **common)
    elif scheduler == "DDIMScheduler":
        sampler = DDIM(eta=0.0, **common)
    else:
        by_order = _translate("algorithm_type", options["algorithm_type"], _DPM_SOLVERS)
        sampler = _translate("solver_order", options["solver_order"], by_order)(**common)
        if options["solver_order"] == 3 and not options["lower_order_final"]:  # without effect on order 2
            raise _refused("lower_order_final", options["lower_order_final"], [True])
    return DiffusersScheduler(
        schedule=_schedule(options),
        prediction_type=_translate("prediction_type", options["prediction_type"], PREDICTION_TYPES),
        learned_variance=variance == "learned_range",
        sampler=sampler,
    )


def _schedule(options: Mapping[str, Any]) -> ScheduleConfig:
    T = options["num_train_timesteps"]
    beta_schedule = options["beta_schedule"]
    if beta_schedule == "linear":
        for name, value in (("beta_start", 0.1 / T), ("beta_end", 20 / T)):
            if not math.isclose(options[name], value, rel_tol=1e-6):
                raise _refused(name, options[name], [value])
    elif beta_schedule != "squaredcos_cap_v2":
        raise _refused("beta_schedule", beta_schedule, ["linear", "squaredcos_cap_v2"])
    return ScheduleConfig(
        name="linear" if beta_schedule == "linear" else "cosine",
        num_timesteps=T,
        zero_terminal_snr=options["rescale_betas_zero_snr"],
    )


def _threshold(options: Mapping[str, Any]) -> dict[str, Any]:
    """How x_0_hat is limited; there, thresholding replaces clipping, and an upper limit of 1 makes it clipping."""
    if not options["thresholding"]:
        return {"clip_x_0": options["clip_sample"]}
    limit = options["sample_max_value"]
    if limit not in (1.0, math.inf):
        raise _refused("sample_max_value", limit, [1.0, math.inf])
    return {"clip_x_0": True, "dynamic_threshold": options["dynamic_thresholding_ratio"] if limit > 1 else None}


def _translate(name: str, value: object, words: Mapping[Any, _T]) -> _T:
    if not isinstance(value, str | int) or value not in words:
        raise _refused(name, value, words)
    return words[value]


def _refused(name: str, value: object, known: Iterable[object]) -> ValueError:
    choices = " or ".join(repr(choice) for choice in known)
    return ValueError(f"{name}: must be {choices} to be imported from diffusers, got {value!r}; set it up by hand")
