"""Models that understand the labels of a small dataset, to edit its images with, and runs that edit them."""

from pathlib import Path
from typing import Any

import torch

from ddpm import DDIM, ModelConfig, ScheduleConfig, build_network
from pipeline.cluster import ClusterConfig
from pipeline.generation.requests.requests import Edit
from pipeline.generation.sample_config import SampleConfig
from pipeline.models.model_files import ModelCard, encode_model
from tests.pipeline.small_datasets import NUM_CLASSES
from tests.pipeline.tiny_models import TINY_UNET


def write_editing_model(
    folder: Path, *, seed: int = 1, class_names: str = "abcdefg", dataset_digest: str = "", **changes: Any
) -> str:
    """Write an untrained model of 8x8 grey images whose classes are a small dataset's; returns the folder as a URI."""
    values: dict[str, Any] = {
        "network": TINY_UNET,
        "schedule": ScheduleConfig(name="cosine", num_timesteps=50),
        "image_size": (8, 8),
        "channels": 1,
        "num_classes": NUM_CLASSES,
    }
    config = ModelConfig(**(values | changes))
    network = build_network(config, seed=seed)
    with torch.no_grad():  # the last convolution of a fresh U-Net is zero: its images would not depend on the label
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    names = tuple(class_names) if config.num_classes else ()
    card = ModelCard(config=config, class_names=names, dataset_digest=dataset_digest)
    folder.mkdir(parents=True)
    for name, data in encode_model(card, network.state_dict(), None).as_dict().items():
        (folder / name).write_bytes(data)
    return str(folder)


def editing_config(model: str, output: Path, request: Edit, **changes: Any) -> SampleConfig:
    """Output shards of 6, batches of 4: neither divides 21 inputs, nor do input shards of 7, 5 and 9."""
    values: dict[str, Any] = {
        "sampler": DDIM(num_steps=5),
        "shard_size": 6,
        "batch_size": 4,
        "num_actors": 2,
        "cluster": ClusterConfig(num_cpus=2),
    }
    return SampleConfig(model=model, output=str(output), request=request, **(values | changes))
