"""Pixels of 8 and of 16 bits: every value comes back, the scale is that of [-1, 1], nothing is hidden."""

import math

import pytest
import torch

from ddpm import images_to_x_0, x_0_to_images


def test_every_pixel_value_survives_the_round_trip() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 8, 2)
    x_0 = images_to_x_0(images)
    assert x_0.shape == (2, 2, 8, 8) and x_0.dtype == torch.float32 and x_0.is_contiguous()
    assert float(x_0.min()) == -1 and float(x_0.max()) == 1
    assert torch.equal(x_0[1, 0, 2], images[1, 2, :, 0].float() / 127.5 - 1)
    assert torch.equal(x_0_to_images(x_0), images)


def test_pixels_are_the_nearest_and_clamped() -> None:
    x_0 = torch.tensor([-7.0, -1.0, -1 + 0.6 / 127.5, 1 - 0.4 / 127.5, 1.0, math.inf]).reshape(1, 1, 1, 6)
    assert x_0_to_images(x_0).flatten().tolist() == [0, 0, 1, 255, 255, 255]
    with pytest.raises(ValueError, match=r"^x_0: "):
        x_0_to_images(torch.tensor([[[[math.nan]]]]))
