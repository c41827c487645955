"""Multistep solvers in log-SNR that look at x_0_hat, of any order: what both forms of DPM-Solver++ 3M share.

With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) and lambda = log(a / s), the probability-flow equation is linear but
for x_0_hat. Over a step from lambda to lambda' = lambda + h its exact solution is

    x' = (s'/s) x + a' integral_0^h e^(tau - h) x_0_hat(lambda + tau) dtau

x_0_hat is replaced by the polynomial through its values at n nodes tau = r h: where the step starts (r = 0), places
visited before (r < 0) and, to correct a step once taken, where it ends (r = 1). That is integrated exactly. With

    M_k = integral_0^h e^(tau - h) (tau / h)^k dtau = 1 - (k / h) M_{k-1},     M_0 = 1 - e^-h

(k! h phi_{k+1}(-h) in terms of the phi functions) the weights w of the n values are the solution of

    sum_i w_i r_i^k = M_k     for k = 0 .. n - 1

since then each power up to n - 1 has its exact integral; x' errs by O(h^(n+1)), and n nodes give order n. Without any
signal lambda is -infinity, in the clean image +infinity: h is infinite there and all M_k are 1, and a node infinitely
far behind has no weight.
"""

import math
from collections.abc import Callable, Sequence

import torch

from ddpm.process.denoiser import Denoiser
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.sampler import Callback, reporting
from ddpm.shapes import Images, Labels

Weights = Callable[[Sequence[float], float], list[float]]
"""weights(nodes, h) -> w: the factor of x_0_hat at each node; nodes are in units of h, the first is 0."""

_MAX_NODES = 3
"""Places that are remembered, also across a step that looks at fewer."""
_NUM_TERMS = 20
"""Of the series for h < 1: the next is below 1 / 21!."""


def exact_weights(nodes: Sequence[float], h: float) -> list[float]:
    """Integrate the polynomial through all nodes exactly, as at the top of this file."""
    near = [r for r in nodes if r > -math.inf]
    powers = torch.tensor([[r**k for r in near] for k in range(len(near))], dtype=torch.float64)
    moments = torch.tensor([moment(k, h) for k in range(len(near))], dtype=torch.float64)
    weights = iter(torch.linalg.solve(powers, moments).tolist())
    return [next(weights) if r > -math.inf else 0.0 for r in nodes]


def midpoint_weights(nodes: Sequence[float], h: float) -> list[float]:
    """With two nodes the straight line at the middle of the step, (1 - e^-h) D(1/2), as in 2M; otherwise exact_weights.

    The order is the same: M_1 = h/2 + O(h^2) in both.
    """
    if len(nodes) != 2:
        return exact_weights(nodes, h)
    share = 1 / (2 * nodes[1])
    return [moment(0, h) * (1 - share), moment(0, h) * share]


def moment(k: int, h: float) -> float:
    """M_k. For small h by its series, h sum_m (-h)^m k! / (k + m + 1)!: the recurrence would lose its digits."""
    if h < 1:
        terms = ((-h) ** m / math.perm(k + m + 1, m + 1) for m in range(_NUM_TERMS))
        return h * math.fsum(terms)
    return -math.expm1(-h) if k == 0 else 1 - k / h * moment(k - 1, h)


def multistep_sample(
    denoise: Denoiser,
    chain: NoiseSchedule,
    x_T: Images,
    label: Labels | None,
    *,
    weights: Weights,
    order: Callable[[int], int],
    correct_first: bool,
    callback: Callback | None,
    final_step: bool,
) -> Images:
    """All steps of a chain, each from x_0_hat of as many places as there are, at most those of its order.

    Args:
        denoise: Predicts x_0_hat.
        chain: The chain that is walked, respaced.
        x_T: Standard normal noise [B, C, H, W].
        label: Class [B], or None.
        weights: How the values at the nodes are weighed.
        order: order(i) is the largest number of nodes, 1 to 3, of the step from entry i of the chain; 1 for the last,
            i = 0.
        correct_first: Take the first step again as soon as x_0_hat is known where it led: a node more, at r = 1, and no
            evaluation more, since x_0_hat is not asked for again at the corrected place.
        callback: As in Sampler.sample; where the first step led it is told before that is corrected.
        final_step: Go on from the chain's first entry to x_0; if not, x_t of that entry is returned.

    Returns:
        x_0 [B, C, H, W].
    """
    T = chain.num_timesteps
    places = [float(log_snr) / 2 for log_snr in chain.log_snr(torch.arange(T))]
    widths = [after - place for after, place in zip([math.inf, *places], places, strict=False)]
    kept: list[float] = ((1 - chain.alpha_bar_prev) / (1 - chain.alpha_bar)).sqrt().tolist()
    signal: list[float] = chain.alpha_bar_prev.sqrt().tolist()

    def step(i: int, x: Images, nodes: list[float], values: list[Images]) -> Images:
        x_next = kept[i] * x
        for weight, value in zip(weights(nodes, widths[i]), values, strict=True):
            x_next = x_next + signal[i] * weight * value
        return x_next

    x_t = x_T
    nodes: list[float] = []
    values: list[Images] = []
    visited: list[tuple[float, Images]] = []  # lambda and x_0_hat, the latest first
    for draw, i in enumerate(reversed(range(0 if final_step else 1, T)), start=1):
        told = reporting(denoise, callback, draw)
        x_0_hat = told(x_t, chain.timesteps[i].expand(len(x_t)), label).x_0_hat
        if i == T - 2 and correct_first:
            x_t = step(i + 1, x_T, [*nodes, 1.0], [*values, x_0_hat])
        visited = [(places[i], x_0_hat), *visited][:_MAX_NODES]
        used = visited[: order(i)]
        nodes = [0.0, *((place - places[i]) / widths[i] for place, _ in used[1:])]
        values = [value for _, value in used]
        x_t = step(i, x_t, nodes, values)
    return x_t
