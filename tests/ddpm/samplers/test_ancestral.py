"""Ancestral sampling: the loop of its steps, and where DDIM is the same. Its law is in test_gaussian_oracle.py."""

import torch
from torch import Tensor

from ddpm import DDIM, Ancestral, NetworkDenoiser, p_sample
from tests.ddpm.sampler_examples import SCHEDULE, SHAPE, elementwise


def randn(seed: int) -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posterior_variance() -> None:
    """Song et al., section 4.1. They are written differently, so this checks both, with clipping on."""
    denoise, timesteps = NetworkDenoiser(network=elementwise, schedule=SCHEDULE), [0, 3, 10, 50, 99]
    ddim, ancestral = (
        sampler.sample(denoise, SCHEDULE, randn(0), None, timesteps=timesteps, noise=randn)
        for sampler in (DDIM(eta=1.0), Ancestral(variance="fixed_small"))
    )
    torch.testing.assert_close(ddim, ancestral, rtol=0, atol=1e-10)


def test_all_steps_are_the_full_loop() -> None:
    """Algorithm 2 over the training chain itself: no respacing, the steps counted by hand."""
    x_T, denoise = randn(0), NetworkDenoiser(network=elementwise, schedule=SCHEDULE)

    def noise(draw: int) -> Tensor:
        return torch.full_like(x_T, 0.1 * (-1) ** draw)

    sampler = Ancestral(variance="fixed_large")
    got = sampler.sample(denoise, SCHEDULE, x_T, None, timesteps=range(100), noise=noise)
    x_t = x_T
    for t in range(99, -1, -1):
        eps = noise(100 - t) if t > 0 else torch.zeros_like(x_T)
        x_t = p_sample(SCHEDULE, denoise, x_t, torch.full((2,), t), None, variance="fixed_large", eps=eps)
    torch.testing.assert_close(got, x_t, rtol=0, atol=1e-9)


def test_without_the_final_step_it_stops_at_the_first_place() -> None:
    denoise = NetworkDenoiser(network=elementwise, schedule=SCHEDULE)
    drawn = list[int]()

    def noise(draw: int) -> Tensor:
        drawn.append(draw)
        return randn(draw)

    x_t = Ancestral().sample(denoise, SCHEDULE, randn(0), None, timesteps=[7, 50, 99], noise=noise, final_step=False)
    assert drawn == [1, 2]
    x_0 = Ancestral().sample(denoise, SCHEDULE, randn(0), None, timesteps=[7, 50, 99], noise=randn)
    torch.testing.assert_close(denoise(x_t, torch.tensor([7, 7]), None).x_0_hat, x_0, rtol=0, atol=1e-12)
