"""The objective on held-out images, beside the mean over every t."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ddpm import Estimate, ModelConfig, ObjectiveConfig, ScheduleConfig, UNetConfig, build_model
from pipeline.data.image_stream import LabelledImages
from pipeline.measuring.held_out_loss import held_out_loss
from pipeline.measuring.measures import eps_mse

CPU = torch.device("cpu")
UNET = UNetConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
MODEL = build_model(
    ModelConfig(
        network=UNET,
        schedule=ScheduleConfig(name="cosine", num_timesteps=20),
        image_size=(8, 8),
        channels=1,
        num_classes=3,
    )
)


@pytest.fixture(scope="module", autouse=True)
def trained() -> None:
    """A new network answers with zeros, whatever it is asked."""
    assert isinstance(MODEL.network, torch.nn.Module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in MODEL.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def stream(number: int = 200) -> Iterator[LabelledImages]:
    images = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 1), dtype=np.uint8)
    yield LabelledImages(images=images, labels=np.arange(number) % 3)


def measure(draws: int, number: int = 200, seed: int = 5) -> Estimate:
    return held_out_loss(MODEL, ObjectiveConfig(), stream(number), seed=seed, draws=draws, batch_size=50, device=CPU)


def test_it_is_the_mean_over_images_and_t() -> None:
    found = measure(20)
    (every_t,) = eps_mse([MODEL.network], MODEL.schedule, stream, images_per_t=200, seed=1, batch_size=50, device=CPU)
    apart = abs(found.value - every_t.value) / np.hypot(found.standard_error, every_t.standard_error)
    assert apart < 4 and found.standard_error < 0.02 * found.value
    assert measure(20) == found and measure(20, seed=6) != found


def test_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^stream: must have at least two images, got 1; "):
        measure(2, number=1)
