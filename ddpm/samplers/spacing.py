"""Which steps of the training chain a sampler visits."""

from typing import Literal, get_args

Spacing = Literal["leading", "linspace", "trailing"]


def spaced_timesteps(num_timesteps: int, num_steps: int, spacing: Spacing) -> list[int]:
    """A subset of the training chain's steps.

    Args:
        num_timesteps: T, the length of the training chain.
        num_steps: How many steps to visit, in [1, T].
        spacing: linspace includes both ends (rounded half to even); leading starts at 0 and may stop short of T-1;
            trailing ends at T-1 and may start after 0.

    Returns:
        Strictly ascending indices in [0, T-1].

    Raises:
        ValueError: If num_steps is outside [1, T] or the spacing is unknown.

    Source:
        Lin et al. 2024 (arXiv:2305.08891), Table 2. For one step, linspace visits T-1: x_T is noise of that step.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"num_steps: must be in [1, {num_timesteps}], the trained steps, got {num_steps}; choose fewer"
        )
    match spacing:
        case "leading":
            return [i * (num_timesteps // num_steps) for i in range(num_steps)]
        case "linspace":
            last = num_timesteps - 1
            return [round(i * last / (num_steps - 1)) for i in range(num_steps)] if num_steps > 1 else [last]
        case "trailing":
            return sorted(round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps))
    raise ValueError(f"spacing: must be one of {', '.join(get_args(Spacing))}, got {spacing!r}; choose one of them")
