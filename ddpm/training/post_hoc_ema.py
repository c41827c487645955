"""Averages of weights whose length is chosen after training: snapshots of two of them give any other.

A power-function average ending at t weighs the weights at time tau with (tau / t)^gamma: its profile is the same at all
times but for its scale, unlike an exponential one. Its length is sigma_rel, the standard deviation of that profile as a
share of t. Time is counted in images taken in. Linear combinations of such profiles are fitted to the one that is
wanted, and the same combination of the snapshots is its average.

Source: Karras et al. 2024 (arXiv:2312.02696), section 3 and appendix C.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from ddpm.training.ema import WeightAverage, check_state

MAX_SIGMA_REL = 12**-0.5
"""sigma_rel of the plain mean over all of training (gamma 0); beyond it the first weights would weigh the most."""


def sigma_rel_from_gamma(gamma: float) -> float:
    """Length of the profile with this exponent, gamma >= 0.

    It is the standard deviation of u = tau / t with density (gamma + 1) u^gamma on [0, 1].
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Exponent of the profile with this length.

    It is the largest root of gamma^3 + 7 gamma^2 + (16 - sigma_rel^-2) gamma + 12 - sigma_rel^-2.

    Raises:
        ValueError: If sigma_rel is not in (0, 12^-1/2].

    Source:
        Karras et al. 2024, appendix C; the cubic is sigma_rel_from_gamma, squared and multiplied out.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel: must be in (0, {MAX_SIGMA_REL:.4f}], got {sigma_rel}; 0.05 to 0.10 is usual")
    s = sigma_rel**-2
    gamma, before = 1 / sigma_rel, math.inf  # right of the largest root, where Newton's steps only fall
    while gamma < before:
        cubic = ((gamma + 7) * gamma + 16 - s) * gamma + 12 - s
        before, gamma = gamma, gamma - cubic / ((3 * gamma + 14) * gamma + 16 - s)
    return max(before, 0.0)


class PowerEma(WeightAverage):
    """The power-function average; the network's first weights, before any step, are not in it.

    Args:
        model: The network.
        sigma_rel: Length of the average as a share of the training so far, in (0, 12^-1/2].
        names: As in WeightAverage.

    Raises:
        ValueError: If sigma_rel is out of range.

    Source:
        Karras et al. 2024, Eq. 2-3; for steps on any number of images.
    """

    def __init__(self, model: nn.Module, sigma_rel: float, *, names: Collection[str] | None = None) -> None:
        """Start from the model's weights."""
        self.gamma = gamma_from_sigma_rel(sigma_rel)
        super().__init__(model, names)
        self.sigma_rel = sigma_rel

    def _share(self, num_images: Int64[Tensor, ""]) -> Float64[Tensor, ""]:
        """1 - (before / after)^(gamma + 1) in images: the integral of the profile over the step; 1 at first."""
        # log1p: without cancellation. At first it is that of -1, and the share 1 - exp(-infinity).
        return -torch.expm1((self.gamma + 1) * torch.log1p(-num_images / (self._num_images + num_images).double()))


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerProfile:
    """What weighs how much in a power-function average."""

    num_images: int
    """Where it ends: images taken in, above 0."""
    sigma_rel: float
    """Its length, in (0, 12^-1/2]."""

    def __post_init__(self) -> None:
        if not self.num_images > 0:
            raise ValueError(f"num_images: must be above 0, got {self.num_images}; an average needs a step")
        gamma_from_sigma_rel(self.sigma_rel)


def inner_products(
    one: Sequence[PowerProfile], other: Sequence[PowerProfile], *, unit_images: float
) -> Float64[Tensor, "m n"]:
    """Integrals over time of the products of profiles, each profile with integral 1.

    Args:
        one: m profiles.
        other: n profiles.
        unit_images: The unit of time, in images.

    Source:
        Karras et al. 2024, appendix C.
    """
    t_1, gamma_1 = (column[:, None] for column in _table(one, unit_images))
    t_2, gamma_2 = (column[None, :] for column in _table(other, unit_images))
    t = torch.minimum(t_1, t_2)
    # the power of a ratio to the end of each, so that nothing overflows
    return (
        (gamma_1 + 1)
        * (gamma_2 + 1)
        / (gamma_1 + gamma_2 + 1)
        * (t / t_1) ** gamma_1
        * (t / t_2) ** gamma_2
        * (t / (t_1 * t_2))
    )


def _table(profiles: Sequence[PowerProfile], unit_images: float) -> tuple[Tensor, Tensor]:
    """Ends and exponents, float64 [n] each."""
    ends = [profile.num_images / unit_images for profile in profiles]
    gammas = [gamma_from_sigma_rel(profile.sigma_rel) for profile in profiles]
    return torch.tensor(ends, dtype=torch.float64), torch.tensor(gammas, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class PostHocFit:
    """How to combine snapshots into an average that was not tracked."""

    weights: tuple[float, ...]
    """One for each snapshot; their sum is 1."""
    residual: float
    """Distance between the combined profile and the wanted one, as a share of the wanted one's norm."""


def fit_post_hoc_ema(snapshots: Sequence[PowerProfile], target: PowerProfile) -> PostHocFit:
    """The combination of snapshots whose profile is closest to the wanted one, in the sense of least squares.

    The weights are made to sum to 1, which the paper leaves to the fit: weights of the network that never moved must
    come out as they are, and a sum that is off by 1e-3 would be an error of 1e-3 of the whole network.

    Args:
        snapshots: Profiles of the averages at hand, all different, ending no later than the wanted one.
        target: The profile that is wanted.

    Raises:
        ValueError: If there is no snapshot, one twice, or one that ends later than the target.

    Source:
        Karras et al. 2024, appendix C.
    """
    if not snapshots or len(set(snapshots)) < len(snapshots):
        raise ValueError(f"snapshots: must be different and at least one, got {len(snapshots)}; drop repeats")
    last = max(snapshot.num_images for snapshot in snapshots)
    if last > target.num_images:
        raise ValueError(
            f"snapshots: must end at or before the target's {target.num_images} images, got {last}; leave out the rest"
        )
    n, unit = len(snapshots), float(target.num_images)
    products = inner_products(snapshots, snapshots, unit_images=unit)
    wanted = inner_products(snapshots, [target], unit_images=unit)[:, 0]
    norms = products.diagonal().sqrt()  # profiles of unit norm keep the system well conditioned
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = products / norms[:, None] / norms
    system[n, :n] = system[:n, n] = 1 / norms  # the Lagrange multiplier of the sum
    right = torch.cat([wanted / norms, torch.ones(1, dtype=torch.float64)])
    weights = torch.linalg.solve(system, right)[:n] / norms
    of_target = float(inner_products([target], [target], unit_images=unit))
    squared = of_target - 2 * float(weights @ wanted) + float(weights @ products @ weights)
    return PostHocFit(weights=tuple(weights.tolist()), residual=math.sqrt(max(squared, 0.0) / of_target))


@torch.no_grad()
def combine_snapshots(
    model: nn.Module, states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The weighted sum of states of one network, summed in float64; one state is held at a time.

    Args:
        model: A network of that architecture: names, shapes and dtypes of the result.
        states: State dicts in the order of the weights, read as they come; of a lower precision if need be. The last
            one must be the newest: buffers, which are not averaged, are taken from it.
        weights: What PostHocFit has.

    Returns:
        The state dict, on the CPU.

    Raises:
        ValueError: If a state is of another network, or there are more or fewer states than weights.
    """
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    averaged = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    sums = {name: torch.zeros_like(own[name], dtype=torch.float64) for name in averaged}
    buffers: dict[str, Tensor] = {}
    num_states = 0
    for state in states:
        if num_states == len(weights):
            raise ValueError(f"states: must be as many as weights ({len(weights)}), got more; give one for each weight")
        check_state(state, own)
        for name, tensor in state.items():
            if name in averaged:
                sums[name].add_(tensor.cpu().double(), alpha=weights[num_states])
            else:
                buffers[name] = tensor.cpu()
        num_states += 1
    if num_states < len(weights):
        raise ValueError(f"states: must be as many as weights ({len(weights)}), got {num_states}; one is missing")
    return {name: (sums | buffers)[name].to(tensor.dtype) for name, tensor in own.items()}
