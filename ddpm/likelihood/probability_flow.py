"""Likelihood by the probability-flow ODE: a bound for another model than the variational bound is one for.

There images are made by T noisy steps; here by the flow from noise down to t = 0, which is deterministic, and one step
of the decoder. The two bounds share the network, the decoder's term and its noise; neither limits the other.

The flow carries x_T to x_0 without noise and with the marginals of the diffusion, so that the density at its end is
that at its start, changed by the divergence on the way. It is written in the angle phi = arctan(sigma), in which

    x_t = cos(phi) x_0 + sin(phi) eps,        dx/dphi = v(x, phi) = cos(phi) eps_hat - sin(phi) x_0_hat,

because v is as large as the images at both ends, also where no signal is left. It is solved by a Runge-Kutta method of
third order that looks at the network at given nodes only, so that all of them may be steps that it was trained on: two
intervals at a time, and Heun's method for one that is left over. x_0_hat must not be clipped: a clipped pixel has no
divergence.

Nodes are *quadratic*, close together where there is little noise. There the density of pixels of a few values has as
many sharp peaks, and what the solver misses looks like probability: with 100 equal steps in t the bits of one pixel of
26 levels came out up to 3 too low, far under the entropy, and with quadratic ones within 0.02
(`pytest -s tests/ddpm/likelihood/test_flow_nodes.py`). So that it need not be believed, every measurement is taken with
every second node as well: `FlowBound.discretisation`.

Source:
    Song et al. 2021 (arXiv:2011.13456), section 4.3 and appendix D.2. Hutchinson 1990 for the trace by random probes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ddpm.likelihood.terms import PerSampleBits, bound_term
from ddpm.model import DiffusionModel
from ddpm.noise import Stream, random_words, standard_normal
from ddpm.process.denoiser import Denoiser
from ddpm.process.diffusion import Variance, q_sample
from ddpm.process.schedules import NoiseSchedule
from ddpm.process.spacing import spaced_timesteps
from ddpm.shapes import Images, Labels, Steps, check_precision

Probes = Float[Tensor, "k b c h w"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowBound:
    """The bound of a batch of images by the probability flow, in bits per dimension, at one draw of the noise."""

    bits_per_dim: PerSampleBits
    """The bound of each image [B]."""
    discretisation: PerSampleBits
    """How much higher it is than with every second node, on the same noise and probes [B]. Where the nodes are close
    enough for the solver's third order this is seven times the error that is left; else about as large as it."""


def rademacher_probes(seed: int, sample_ids: Steps, num_probes: int, like: Images) -> Probes:
    """Random signs, for an unbiased estimate of a trace: E[probe^T J probe] = tr J, with no variance from J's diagonal.

    Args:
        seed: Key of the run, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48).
        num_probes: K, at least 1.
        like: Images [B, C, H, W] whose shape and dtype a probe has.

    Returns:
        -1 and 1 [K, B, C, H, W].
    """
    size = like[0].numel()
    words = [random_words(seed, Stream.EVAL_PROBE, sample_ids, draw, size) for draw in range(num_probes)]
    return (2 * (torch.stack(words) & 1) - 1).reshape(num_probes, *like.shape).to(like)


def probability_flow_log_density(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_t: Images,
    label: Labels | None,
    *,
    timesteps: Sequence[int] | Sequence[float],
    probes: Probes | None,
) -> Float64[Tensor, " b"]:
    """Log-density that the flow, started from N(0, I) at its last node, has at x_t at its first.

    Args:
        denoise: Predicts x_0_hat and eps_hat, without clipping.
        schedule: The training chain.
        x_t: Images [B, C, H, W] at the noise of timesteps[0]: noised ones, or samples of the flow.
        label: Class [B], or None.
        timesteps: Nodes of the training chain, ascending; floats, between steps, if the network takes them. Every step
            of a thousand leaves an error of 1e-5 bits/dim for Gaussians and of 3e-3 for pixels of four sharp values,
            for which the first steps are long.
        probes: For Hutchinson's estimate of the divergence, with which the log-density is unbiased; None for the exact
            one, which needs as many backward passes as an image has dimensions.

    Returns:
        Natural logarithms [B], float64, without gradient.

    Raises:
        ValueError: If x_t is neither float32 nor float64.
    """
    check_precision("x_t", x_t)
    chain = schedule.respace(timesteps)
    angle = torch.atan2((1 - chain.alpha_bar).sqrt(), chain.alpha_bar.sqrt()).tolist()

    def slope(x: Tensor, node: int) -> tuple[Tensor, Tensor]:
        t = chain.timesteps[node].to(x.device).expand(len(x))
        return _velocity_and_divergence(denoise, x, t, label, angle[node], probes)

    x, integral = x_t.detach(), torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)
    node, last = 0, chain.num_timesteps - 1
    while node < last:
        h, whole = angle[node + 1] - angle[node], angle[min(node + 2, last)] - angle[node]
        c = h / whole
        v_1, divergence_1 = slope(x, node)
        v_2, divergence_2 = slope(x + h * v_1, node + 1)
        if abs(c - 0.5) > 0.1:  # only one interval is left, or two of different lengths: the weights below have a pole
            x = x + h / 2 * (v_1 + v_2)
            integral = integral + h / 2 * (divergence_1 + divergence_2)
            node += 1
            continue
        # Exact for quadratics through the nodes 0, c and 1; a from the last condition for order 3, b_3 a c = 1/6.
        b_2, b_3 = 1 / (6 * c * (1 - c)), (2 - 3 * c) / (6 * (1 - c))
        b_1, a = 1 - b_2 - b_3, 1 / (6 * b_3 * c)
        v_3, divergence_3 = slope(x + whole * ((1 - a) * v_1 + a * v_2), node + 2)
        x = x + whole * (b_1 * v_1 + b_2 * v_2 + b_3 * v_3)
        integral = integral + whole * (b_1 * divergence_1 + b_2 * divergence_2 + b_3 * divergence_3)
        node += 2
    return _standard_normal_log_density(x) + integral


def probability_flow_bound(
    model: DiffusionModel,
    *,
    seed: int,
    sample_ids: Steps,
    x_0: Images,
    label: Labels | None,
    variance: Variance | None = None,
    num_steps: int | None = None,
    num_probes: int | None = 1,
) -> FlowBound:
    """A bound on the bits per dimension of images, in which the flow takes the place of all but one step.

    -log p(x_0) <= E[log q(x_1 | x_0) - log p(x_1) - log p(x_0 | x_1)], where x_1 is x_t at t = 0: the density p(x_1) is
    the flow's, and the decoder p(x_0 | x_1) is L_0 of the variational bound, at the same noise as there. It bounds the
    model that draws x_1 by the flow, not the one that draws it by noisy steps.

    Args:
        model: The model.
        seed: Key of the noise and of the probes, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48), on the network's device.
        x_0: The images [B, C, H, W] in [-1, 1], float32 or float64, at the levels of the model's pixels.
        label: Class [B], same device, or None for an unconditional network.
        variance: Which variance the decoder has; None: the model's own.
        num_steps: Nodes of the flow, quadratic, at least 3; None for every trained step. Half as many again are
            evaluated to find the share of discretisation.
        num_probes: Probes for the divergence; None for the exact one.

    Returns:
        Bits per dimension without gradient, unbiased for the bound but for what the solver misses, and the latter.

    Raises:
        ValueError: If the network is in training mode or answers with another shape, x_0 has too few digits, num_steps
            is below 3 or more than were trained, or num_probes is below 1.
    """
    if num_steps is not None and num_steps < 3:
        raise ValueError(
            f"num_steps: must be at least 3, both ends and one to leave out, got {num_steps}; 100 is a good start"
        )
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"num_probes: must be at least 1, got {num_probes}; None is for the exact divergence")
    check_precision("x_0", x_0)
    schedule, denoise = model.schedule, model.denoiser(clip_x_0=False)
    T = schedule.num_timesteps
    t = torch.zeros_like(sample_ids)
    eps = standard_normal(seed, Stream.EVAL_BOUND_EPS, sample_ids, 0, x_0.shape[1:], x_0.dtype)
    x_1 = q_sample(schedule, x_0, t, eps)
    probes = None if num_probes is None else rademacher_probes(seed, sample_ids, num_probes, x_0)
    nodes = spaced_timesteps(T, T if num_steps is None else num_steps, "quadratic")
    every_second = [*nodes[:-1:2], nodes[-1]]
    log_p, log_p_by_half = (
        probability_flow_log_density(denoise, schedule, x_1, label, timesteps=timesteps, probes=probes)
        for timesteps in (nodes, every_second)
    )
    log_q = _standard_normal_log_density(eps) - x_0[0].numel() / 2 * math.log(1 - float(schedule.alpha_bar[0]))
    with torch.no_grad():
        decoder = bound_term(
            schedule, denoise, x_0, t, label, variance=variance or model.variance, eps=eps, num_levels=model.num_levels
        )
    nats_to_bits_per_dim = 1 / (x_0[0].numel() * math.log(2))
    return FlowBound(
        bits_per_dim=(log_q - log_p) * nats_to_bits_per_dim + decoder,
        discretisation=(log_p_by_half - log_p) * nats_to_bits_per_dim,
    )


def _velocity_and_divergence(
    denoise: Denoiser, x: Images, t: Tensor, label: Labels | None, angle: float, probes: Probes | None
) -> tuple[Images, Float64[Tensor, " b"]]:
    """The velocity v of each image, and its divergence with respect to that image: exact, or by probes."""
    share = 1.0
    if probes is None:
        size = x[0].numel()
        probes = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:]).expand(size, *x.shape)
    else:
        share = 1 / len(probes)
    with torch.enable_grad():
        x = x.requires_grad_()
        prediction = denoise(x, t, label)
        velocity = math.cos(angle) * prediction.eps_hat - math.sin(angle) * prediction.x_0_hat
        divergence = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for probe in probes:
            (product,) = torch.autograd.grad(velocity, x, probe, retain_graph=True)
            divergence = divergence + share * (product * probe).to(torch.float64).sum(dim=(1, 2, 3))
    x.requires_grad_(False)
    return velocity.detach(), divergence


def _standard_normal_log_density(x: Images) -> Float64[Tensor, " b"]:
    """Log-density of N(0, I) at each image."""
    return -0.5 * (x.to(torch.float64).square() + math.log(2 * math.pi)).sum(dim=(1, 2, 3))
