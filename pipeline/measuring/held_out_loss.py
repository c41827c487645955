"""The training objective on images that were not trained on."""

from collections.abc import Iterable

import torch

from ddpm import (
    DiffusionModel,
    Estimate,
    ObjectiveConfig,
    images_to_x_0,
    make_training_batch,
    per_sample_loss,
    stratified_timesteps,
)
from pipeline.data.image_stream import LabelledImages, regroup

_FIRST_ID = 2**40
"""Ids, and so noise, that no image in training has."""


@torch.no_grad()
def held_out_loss(
    model: DiffusionModel,
    objective: ObjectiveConfig,
    stream: Iterable[LabelledImages],
    *,
    seed: int,
    draws: int,
    batch_size: int,
    device: torch.device,
) -> Estimate:
    """The objective's mean over images and t, as training logs it; t is stratified, whichever way training chooses it.

    Args:
        model: Its network on the device, in eval mode.
        objective: What is minimised.
        stream: At least two images, with labels where the model has classes.
        seed: Key of the noise: two models measured with one seed share it.
        draws: Times that each image is noised, each with a t and noise of its own.
        batch_size: Images per evaluation of the network.
        device: Where the network is.

    Returns:
        The mean, with its standard error over images.

    Raises:
        ValueError: If there are fewer than two images.
    """
    means = []
    start = 0
    for group in regroup(stream, batch_size):
        slots = torch.arange(len(group), device=device)
        ids = _FIRST_ID + start + slots
        x_0 = images_to_x_0(torch.from_numpy(group.images).to(device), model.num_levels)
        label = None
        if model.null_label is not None and group.labels is not None:
            label = torch.from_numpy(group.labels).to(device)
        losses = torch.zeros(len(group), dtype=torch.float64, device=device)
        for draw in range(draws):
            batch = make_training_batch(
                model,
                x_0,
                label,
                seed=seed,
                sample_ids=ids,
                epochs=torch.full_like(ids, draw),
                flip=False,
                label_drop=0.0,
                timesteps=stratified_timesteps(
                    model.schedule.num_timesteps,
                    seed=seed,
                    step=start * draws + draw,
                    slots=slots,
                    global_batch=len(group),
                ),
            )
            losses += per_sample_loss(model, batch, objective=objective).double() / draws
        means.append(losses.cpu())
        start += len(group)
    if start < 2:
        raise ValueError(f"stream: must have at least two images, got {start}; name a split that has more")
    values = torch.cat(means)
    return Estimate(value=float(values.mean()), standard_error=float(values.std() / len(values) ** 0.5))
