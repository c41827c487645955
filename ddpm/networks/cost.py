"""How large a network is, and what a forward pass costs."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm.networks.model_config import ModelConfig, build_network, construct


def count_parameters(network: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in network.parameters())


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the network that a config describes, without memory for them where that can be.

    Raises:
        ValueError: As `build_network`.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return count_parameters(construct(config))
    except Exception:  # a network of the user's own may look at values, which fails in many ways
        return count_parameters(build_network(config))


def flops_per_image(config: ModelConfig) -> int:
    """Floating-point operations of one forward pass for one image.

    Args:
        config: Which network.

    Returns:
        Operations of convolutions and matrix products, a multiplication and an addition counted as two: 12.44e9 for the
        CIFAR-10 network of Ho et al. 2020, of which 0.34e9 are the two products inside attention (counters that do not
        see into PyTorch's attention say 12.1e9). Norms and activations, not counted, add about one percent. A training
        step takes about three times as many.

    Raises:
        ValueError: As `build_network`.
    """
    try:
        # Shapes only: no memory and no arithmetic, whatever the size of the network.
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return _count_flops(construct(config), config)
    except Exception:  # a network of the user's own may look at values, which fails in many ways
        return _count_flops(build_network(config), config)


def cost_key(config: ModelConfig) -> str:
    """What of a model decides what it costs, as text: the network and its images, not how many classes there are."""
    return f"{config.network} {config.image_size} {config.channels}"


def _count_flops(network: nn.Module, config: ModelConfig) -> int:
    """Counts one forward pass; the operands are made on the current default device, where the network is."""
    x_t = torch.zeros(1, config.channels, *config.image_size)
    t = torch.zeros(1, dtype=torch.int64)
    label: Tensor | None = None if config.num_classes is None else torch.zeros(1, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    # The fused kernels for the CPU are unknown to the counter; the plain formula is matrix products that it sees.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network.eval()(x_t, t, label)
    return int(counter.get_total_flops())
