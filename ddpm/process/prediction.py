"""What a network may predict (eps, x_0 or v), and how each follows from another and x_t.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar),

    x_t = a x_0 + s eps        v = a eps - s x_0        x_0 = a x_t - s v        eps = s x_t + a v.

(x_t, v) is (x_0, eps) turned by an angle, so v can be turned back at every t without loss. The other two divide: x_0
from eps by a, which is 0 at the end of a schedule with zero terminal SNR; eps from x_0 by s, which is small at t = 0.

Coefficients are float64 and cast to the dtype of the images last; t may be a float, a place between two steps.

Source:
    Ho et al. 2020 (arXiv:2006.11239), Eq. 4. Salimans and Ho 2022 (arXiv:2202.00512), appendix D, for v.
"""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from ddpm.process.schedules import NoiseSchedule, gather
from ddpm.shapes import Images, PerSample, Times

PredictionType = Literal["eps", "x_0", "v"]
"""What a network answers with: the noise, the clean images, or v."""


def predict_x_0_from_eps(schedule: NoiseSchedule, x_t: Images, t: Times, eps: Images) -> Images:
    """The clean images that x_t and its noise imply: q_sample solved for x_0. Not where alpha_bar is 0.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Eq. 4, reparametrised as in section 3.2.
    """
    return _at(schedule, lambda a: a.rsqrt(), t, x_t) * x_t - _at(schedule, lambda a: (1 / a - 1).sqrt(), t, x_t) * eps


def predict_eps_from_x_0(schedule: NoiseSchedule, x_t: Images, t: Times, x_0: Images) -> Images:
    """The noise that x_t and its clean images imply: q_sample solved for eps."""
    return (x_t - _signal(schedule, t, x_t) * x_0) * _at(schedule, lambda a: (1 - a).rsqrt(), t, x_t)


def predict_v(schedule: NoiseSchedule, x_0: Images, t: Times, eps: Images) -> Images:
    """The v of clean images and noise, a eps - s x_0: what a network of this kind learns."""
    return _signal(schedule, t, x_0) * eps - _noise(schedule, t, x_0) * x_0


def predict_x_0_from_v(schedule: NoiseSchedule, x_t: Images, t: Times, v: Images) -> Images:
    """The clean images that x_t and v imply."""
    return _signal(schedule, t, x_t) * x_t - _noise(schedule, t, x_t) * v


def predict_eps_from_v(schedule: NoiseSchedule, x_t: Images, t: Times, v: Images) -> Images:
    """The noise that x_t and v imply."""
    return _noise(schedule, t, x_t) * x_t + _signal(schedule, t, x_t) * v


def predict_x_0_and_eps(
    schedule: NoiseSchedule, x_t: Images, t: Times, output: Images, prediction_type: PredictionType
) -> tuple[Images, Images]:
    """Both halves of x_t from a network's answer.

    Args:
        schedule: The training chain.
        x_t: Noised images [B, C, H, W].
        t: Index [B] into the schedule, or places between its steps.
        output: What the network answered, same shape as x_t.
        prediction_type: What that is.

    Returns:
        x_0_hat and eps_hat, same shape as x_t, with x_t = a x_0_hat + s eps_hat. The one that the network predicts is
        its answer, unchanged.

    Raises:
        ValueError: If prediction_type is unknown.
    """
    match prediction_type:
        case "eps":
            return predict_x_0_from_eps(schedule, x_t, t, output), output
        case "x_0":
            return output, predict_eps_from_x_0(schedule, x_t, t, output)
        case "v":
            return predict_x_0_from_v(schedule, x_t, t, output), predict_eps_from_v(schedule, x_t, t, output)
    raise _unknown(prediction_type)


def prediction_target(
    schedule: NoiseSchedule, x_0: Images, t: Times, eps: Images, prediction_type: PredictionType
) -> Images:
    """What a network of this kind should answer when x_0 was noised with eps to t.

    Raises:
        ValueError: If prediction_type is unknown.
    """
    match prediction_type:
        case "eps":
            return eps
        case "x_0":
            return x_0
        case "v":
            return predict_v(schedule, x_0, t, eps)
    raise _unknown(prediction_type)


def check_prediction_type(prediction_type: str, schedule: NoiseSchedule) -> None:
    """Refuse what no conversion can serve.

    Raises:
        ValueError: If prediction_type is unknown, or eps for a schedule whose last step has no signal: there x_t is
            eps, whatever x_0 is.
    """
    if prediction_type not in get_args(PredictionType):
        raise _unknown(prediction_type)
    if prediction_type == "eps" and float(schedule.alpha_bar[-1]) == 0:
        raise ValueError("prediction_type: must be v or x_0 for a schedule with zero terminal SNR, got 'eps'; train v")


def _signal(schedule: NoiseSchedule, t: Times, like: Images) -> PerSample:
    """a, the factor of x_0 in x_t."""
    return _at(schedule, lambda alpha_bar: alpha_bar.sqrt(), t, like)


def _noise(schedule: NoiseSchedule, t: Times, like: Images) -> PerSample:
    """s, the factor of eps in x_t."""
    return _at(schedule, lambda alpha_bar: (1 - alpha_bar).sqrt(), t, like)


def _at(schedule: NoiseSchedule, of_alpha_bar: Callable[[Tensor], Tensor], t: Times, like: Images) -> PerSample:
    """A function of alpha_bar at t, shaped to multiply images; the cast is the last thing done."""
    if t.is_floating_point():
        return of_alpha_bar(schedule.alpha_bar_at(t)).to(like, non_blocking=True)[:, None, None, None]
    return gather(of_alpha_bar(schedule.alpha_bar), t, like)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type: must be eps, x_0 or v, got {prediction_type!r}; choose one of them")
