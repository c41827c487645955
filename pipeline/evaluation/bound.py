"""The variational bound of images as figures: bits per dimension, whole and by term."""

import dataclasses
from collections.abc import Iterable

import torch

from ddpm import (
    BoundStatistics,
    LikelihoodConfig,
    ModelConfig,
    Network,
    NetworkDenoiser,
    NoiseSchedule,
    bound_of_images,
    images_to_x_0,
    make_schedule,
)
from pipeline.data.image_stream import LabelledImages, regroup


def measure_bound(
    network: torch.nn.Module,
    model: ModelConfig,
    stream: Iterable[LabelledImages],
    config: LikelihoodConfig,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> BoundStatistics:
    """The variational bound of a stream of images.

    Args:
        network: In eval mode, on the device.
        model: What it is; a learned variance is used where it has one.
        stream: Images; the id of each is its place in the stream.
        config: Which bound, and how much of it per image.
        seed: Key of the counter-based noise.
        batch_size: Images per evaluation of the network.
        device: Where the network is.

    Returns:
        Its statistics over images and over t, in bits per dimension.

    Raises:
        ValueError: If there is no image, or the config asks for more steps than were trained.
    """
    schedule = make_schedule(model.schedule)
    if model.learned_variance:
        config = dataclasses.replace(config, variance="learned_range")
    statistics, start = None, 0
    for group in regroup(stream, batch_size):
        label = None
        if model.num_classes is not None and group.labels is not None:
            label = torch.from_numpy(group.labels).to(device)
        bound = bound_of_images(
            network,
            schedule,
            config,
            seed=seed,
            sample_ids=torch.arange(start, start + len(group), device=device),
            x_0=images_to_x_0(torch.from_numpy(group.images).to(device)),
            label=label,
            prediction_type=model.prediction_type,
        )
        start += len(group)
        more = BoundStatistics.of(bound)
        statistics = more if statistics is None else statistics + more
    if statistics is None:
        raise ValueError("stream: must have images, got none; name a split that has some")
    return statistics


def eps_network(network: torch.nn.Module, schedule: NoiseSchedule, model: ModelConfig) -> Network:
    """The network as one that predicts eps, whatever it was trained to predict."""
    denoise = NetworkDenoiser(
        network=network,
        schedule=schedule,
        prediction_type=model.prediction_type,
        learned_variance=model.learned_variance,
        clip_x_0=False,
    )
    return lambda x_t, t, label: denoise(x_t, t, label).eps_hat
