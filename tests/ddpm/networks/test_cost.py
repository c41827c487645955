"""Parameters and floating-point operations: the paper's network layer by layer, rectangles, networks of one's own."""

import pytest
import torch

from ddpm import DiTConfig, ModelConfig, OwnNetworkConfig, UNetConfig, build_network, count_parameters, flops_per_image
from ddpm.networks.cost import num_parameters

CIFAR10 = ModelConfig(image_size=(32, 32), channels=3)


def own(factory: str, **options: int) -> ModelConfig:
    network = OwnNetworkConfig(factory=f"own_networks.affine:{factory}", options=options)  # type: ignore[arg-type]
    return ModelConfig(network=network, image_size=(8, 8), channels=2)


def test_count_parameters() -> None:
    assert count_parameters(build_network(CIFAR10)) == num_parameters(CIFAR10) == 35_746_307
    shared = torch.nn.Linear(3, 4)
    assert count_parameters(torch.nn.Sequential(shared, shared)) == 16


def conv_flops(in_channels: int, out_channels: int, kernel_size: int, resolution: int) -> int:
    return 2 * in_channels * out_channels * kernel_size**2 * resolution**2


def res_block_flops(in_channels: int, out_channels: int, resolution: int) -> int:
    flops = conv_flops(in_channels, out_channels, 3, resolution) + conv_flops(out_channels, out_channels, 3, resolution)
    flops += 2 * 512 * out_channels  # the embedding
    return flops + (conv_flops(in_channels, out_channels, 1, resolution) if in_channels != out_channels else 0)


def test_flops_of_the_cifar10_network_equal_the_sum_over_its_layers() -> None:
    """Written down from the paper's description, layer by layer: 12.44 GFLOP, 12.11 without attention's products."""
    blocks = [
        *[(128, 128, 32), (128, 128, 32), (128, 256, 16), (256, 256, 16)],
        *[(256, 256, 8), (256, 256, 8), (256, 256, 4), (256, 256, 4)],
        *[(256, 256, 4), (256, 256, 4)],
        *[(512, 256, 4), (512, 256, 4), (512, 256, 4), (512, 256, 8), (512, 256, 8), (512, 256, 8)],
        *[(512, 256, 16), (512, 256, 16), (384, 256, 16), (384, 128, 32), (256, 128, 32), (256, 128, 32)],
    ]
    flops = sum(res_block_flops(*block) for block in blocks)
    flops += conv_flops(3, 128, 3, 32) + conv_flops(128, 3, 3, 32)
    flops += conv_flops(128, 128, 3, 16) + conv_flops(256, 256, 3, 8) + conv_flops(256, 256, 3, 4)  # down
    flops += conv_flops(256, 256, 3, 8) + conv_flops(256, 256, 3, 16) + conv_flops(256, 256, 3, 32)  # up
    flops += 2 * 128 * 512 + 2 * 512 * 512
    products = 0
    for num_pixels in [256] * 5 + [16]:
        flops += 4 * 2 * 256 * 256 * num_pixels
        products += 2 * 2 * num_pixels**2 * 256
    assert flops_per_image(CIFAR10) == flops + products
    assert flops / 1e9 == pytest.approx(12.108, abs=0.001)
    assert (flops + products) / 1e9 == pytest.approx(12.444, abs=0.001)


def test_flops_take_no_memory_for_weights() -> None:
    """A network of 45 billion parameters (180 GB) is counted: only shapes are made."""
    config = ModelConfig(image_size=(32, 32), channels=3, network=UNetConfig(base_channels=4608))
    assert flops_per_image(config) > 1e13


def test_flops_of_rectangles() -> None:
    """They go with the number of pixels, but for attention, whichever way the image lies."""
    unet = UNetConfig(
        base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4
    )

    def flops(height: int, width: int) -> int:
        return flops_per_image(ModelConfig(network=unet, image_size=(height, width), channels=3))

    def without_products(height: int, width: int) -> float:
        """Less the two products of the middle's attention, which go with the square of its number of pixels."""
        return flops(height, width) - 2 * 2 * (height * width // 4) ** 2 * 32

    of_a_pixel = (without_products(16, 16) - without_products(8, 8)) / (16**2 - 8**2)
    expected = without_products(8, 8) + of_a_pixel * (24 * 40 - 8**2)
    assert without_products(24, 40) == without_products(40, 24) == expected
    dit = DiTConfig(hidden_size=16, depth=2, num_heads=2)
    upright, lying, square = (
        flops_per_image(ModelConfig(network=dit, image_size=size, channels=3)) for size in ((8, 32), (32, 8), (16, 16))
    )
    assert upright == lying == square


@pytest.mark.usefixtures("own_package")
def test_flops_of_own_networks_on_shapes_or_values() -> None:
    flops = 2 * 2 * 2 * 5 * 64
    assert flops_per_image(own("Affine", width=5)) == flops
    assert flops_per_image(own("LooksAtValues", width=5)) == flops
    assert flops_per_image(own("Attends", width=5)) == flops + 2 * 2 * 64**2 * 2


@pytest.mark.usefixtures("own_package")
def test_counting_flops_disturbs_no_random_state() -> None:
    before = torch.get_rng_state()
    flops_per_image(own("draws"))
    assert torch.equal(torch.get_rng_state(), before)
