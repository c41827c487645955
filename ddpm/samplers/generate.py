"""Images of given sample ids: a sampler, run with their noise."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ddpm.model import DiffusionModel
from ddpm.noise import Stream, standard_normal
from ddpm.process.denoiser import Denoiser
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.sampler import Callback, Sampler
from ddpm.shapes import Images, Labels


def generate(
    model: DiffusionModel,
    sampler: Sampler,
    *,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    label: Int[Tensor, " b"] | None,
    guide: DiffusionModel | None = None,
    x_0_error: Tensor | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """Make the images of some sample ids; image i depends on its id and label, not on its neighbours in the batch.

    Args:
        model: The model.
        sampler: Which sampler, with which options.
        seed: Key of the run, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48), int64, on the network's device.
        label: Class [B], same device, or None for an unconditional network.
        guide: A second, weaker model to lead away from (autoguidance), instead of leading away from "no label".
        x_0_error: What x_0_error_table gave for this model, float64 [T], where the sampler needs it.
        callback: Told what each step starts from, and the x_0_hat of it.

    Returns:
        x_0 float32 [B, C, H, W], clamped to [-1, 1], on sample_ids' device. NaN stays NaN.

    Raises:
        ValueError: If the sampler asks for more steps than were trained, for guidance without labels or for a variance
            that is not predicted, the guide was trained on another schedule or would have no effect, a network is in
            training mode or answers with another shape, or seed or ids are out of range.
    """
    denoise = sampler.denoiser(model, guide)
    with torch.no_grad():
        x_T = standard_normal(seed, Stream.X_T, sample_ids, 0, model.image_shape)
        x_0 = run_sampler(
            denoise,
            model.schedule,
            sampler,
            x_T,
            label,
            seed=seed,
            sample_ids=sample_ids,
            x_0_error=x_0_error,
            callback=callback,
        )
        return x_0.clamp(-1, 1)


def run_sampler(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    sampler: Sampler,
    x_T: Images,
    label: Labels | None,
    *,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    num_steps: int | None = None,
    x_0_error: Table | None = None,
    callback: Callback | None = None,
) -> Images:
    """Walk a sampler's steps with the noise of some sample ids.

    Args:
        denoise: Predicts x_0_hat and eps_hat; guidance and limits are its doing.
        schedule: The training chain.
        sampler: Which sampler.
        x_T: Where to start [B, C, H, W]: noise, or images noised to the last of the steps that are walked.
        label: Class [B], or None.
        seed: Key of the noise of the steps.
        sample_ids: Ids [B].
        num_steps: How many of the sampler's steps to walk, the least noisy ones; None walks them all.
        x_0_error: As in generate.
        callback: As in generate.

    Returns:
        x_0 [B, C, H, W].

    Raises:
        ValueError: If the sampler asks for more steps than were trained, or a variance that is not predicted.
    """
    timesteps = sampler.timesteps(schedule)[:num_steps]
    return sampler.sample(
        denoise,
        schedule,
        x_T,
        label,
        timesteps=timesteps,
        noise=lambda draw: standard_normal(seed, sampler.noise_stream, sample_ids, draw, x_T.shape[1:], x_T.dtype),
        x_0_error=visited_entries(x_0_error, schedule, timesteps),
        callback=callback,
    )


def visited_entries(table: Table | None, schedule: NoiseSchedule, timesteps: list[int]) -> Float64[Tensor, " n"] | None:
    """The entries of a table of the training chain that belong to the visited steps.

    Raises:
        ValueError: If the table is of another chain.
    """
    if table is not None and len(table) != schedule.num_timesteps:
        raise ValueError(
            f"x_0_error: must have one entry per trained step, {schedule.num_timesteps}, got {len(table)}; "
            "measure this model"
        )
    return None if table is None else table[timesteps]
