"""Pixels of 8 and of 16 bits: every value comes back, the scale is that of [-1, 1], nothing is hidden."""

import math

import pytest
import torch

from ddpm import images_to_x_0, x_0_to_images
from ddpm.process.pixels import NumLevels

DTYPES = {256: torch.uint8, 65536: torch.uint16}


@pytest.mark.parametrize("num_levels", [256, 65536])
def test_every_pixel_value_survives_the_round_trip(num_levels: NumLevels) -> None:
    images = torch.arange(num_levels).to(DTYPES[num_levels]).reshape(2, num_levels // 32, 8, 2)
    x_0 = images_to_x_0(images, num_levels)
    assert x_0.shape == (2, 2, num_levels // 32, 8) and x_0.dtype == torch.float32 and x_0.is_contiguous()
    assert float(x_0.min()) == -1 and float(x_0.max()) == 1
    assert torch.equal(x_0[1, 0, 2], images[1, 2, :, 0].float() / ((num_levels - 1) / 2) - 1)
    exact = 2 * torch.arange(num_levels, dtype=torch.float64) / (num_levels - 1) - 1
    torch.testing.assert_close(x_0.permute(0, 2, 3, 1).flatten().double(), exact, rtol=0, atol=1e-7)
    back = x_0_to_images(x_0, num_levels)
    assert back.dtype == DTYPES[num_levels] and back.is_contiguous() and torch.equal(back, images)


def test_256_is_what_is_meant_where_nothing_is_said() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    assert torch.equal(images_to_x_0(images), images_to_x_0(images, 256))
    assert torch.equal(x_0_to_images(images_to_x_0(images)), images)
    # A level of 8 bits is one of 16 bits too, with the same place in [-1, 1].
    fine = x_0_to_images(images_to_x_0(images), 65536)
    assert torch.equal(fine.to(torch.int64), 257 * images.to(torch.int64))


@pytest.mark.parametrize("num_levels", [256, 65536])
def test_pixels_are_the_nearest_and_clamped(num_levels: NumLevels) -> None:
    last, half = num_levels - 1, (num_levels - 1) / 2
    x_0 = torch.tensor([-7.0, -1.0, -1 + 0.6 / half, 1 - 0.4 / half, 1.0, math.inf]).reshape(1, 1, 1, 6)
    assert x_0_to_images(x_0, num_levels).to(torch.int64).flatten().tolist() == [0, 0, 1, last, last, last]
    with pytest.raises(ValueError, match=r"^x_0: "):
        x_0_to_images(torch.tensor([[[[math.nan]]]]), num_levels)
