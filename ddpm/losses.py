"""Training objectives, each per sample: the caller weights and averages, so that sums over ranks stay exact."""

from jaxtyping import Float
from torch import Tensor


def simple_loss(eps: Float[Tensor, "b c h w"], eps_hat: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """L_simple: the squared error of the predicted noise.

    Args:
        eps: The noise that was added [B, C, H, W].
        eps_hat: The network's prediction, same shape.

    Returns:
        Mean over C, H and W for each sample [B]; 1 for a network that always answers 0, in expectation.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Eq. 14.
    """
    if eps.shape != eps_hat.shape:
        raise ValueError(
            f"eps_hat: must have eps's shape {list(eps.shape)}, got {list(eps_hat.shape)}; check the network"
        )
    return (eps - eps_hat).square().mean(dim=(1, 2, 3))
