"""L_simple by hand, KL and L_T against torch and closed forms."""

import math

import numpy as np
import pytest
import torch

from ddpm import (
    ScheduleConfig,
    Stream,
    gaussian_kl,
    images_to_x_0,
    make_schedule,
    prior_loss,
    random_words,
    simple_loss,
)


def test_simple_loss_is_the_mean_square_of_each_sample() -> None:
    eps = torch.zeros(2, 1, 2, 2)
    eps_hat = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]]).reshape(2, 1, 2, 2)
    assert simple_loss(eps, eps_hat).tolist() == [7.5, 1.0]


def test_gradient_is_twice_the_error_over_the_size() -> None:
    eps_hat = torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1).requires_grad_()
    simple_loss(torch.zeros(1, 2, 1, 1), eps_hat).sum().backward()  # type: ignore[no-untyped-call]
    assert eps_hat.grad is not None and eps_hat.grad.flatten().tolist() == [0.5, -1.0]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"^eps_hat: "):
        simple_loss(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 1))


def test_kl_equals_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    m_q, m_p, lv_q, lv_p = torch.randn(4, 1000, generator=generator, dtype=torch.float64) * 3
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(m_q, (lv_q / 2).exp()), torch.distributions.Normal(m_p, (lv_p / 2).exp())
    )
    torch.testing.assert_close(gaussian_kl(m_q - m_p, lv_q, lv_p), expected, rtol=1e-12, atol=1e-12)


def test_kl_of_neighbours_keeps_its_digits() -> None:
    """For a log-variance off by r it is r^2 / 4 + r^3 / 12: the plain formula has no right digit at r = 1e-9."""
    zero = torch.zeros(1, dtype=torch.float64)
    for r in (1e-3, 1e-6):
        assert float(gaussian_kl(zero, zero + r, zero)) == pytest.approx(r**2 / 4 + r**3 / 12, rel=1e-5)
    assert float(gaussian_kl(zero, zero, zero)) == 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior_is_its_closed_form_also_for_float32_images(name: str, dtype: torch.dtype) -> None:
    schedule = make_schedule(ScheduleConfig(name=name, num_timesteps=1000))  # type: ignore[arg-type]
    x_0 = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2).to(dtype)
    a = float(schedule.alpha_bar[-1])
    expected = (a * x_0.double().square() - a - math.log1p(-a)).mean(dim=(1, 2, 3)) / (2 * math.log(2))
    prior = prior_loss(schedule, x_0)
    assert prior.dtype == torch.float64
    torch.testing.assert_close(prior, expected, rtol=1e-9, atol=1e-18)


def test_prior_of_a_chain_is_that_of_its_last_step() -> None:
    schedule = make_schedule(ScheduleConfig())
    x_0 = torch.ones(1, 1, 2, 2)
    whole, chain = prior_loss(schedule, x_0), prior_loss(schedule.respace([0, 400, 999]), x_0)
    assert torch.equal(whole, chain)
    assert float(prior_loss(schedule.respace([0, 400]), x_0)) > 1000 * float(whole)


def test_no_signal_no_prior_term() -> None:
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True))
    assert prior_loss(schedule, torch.ones(1, 1, 2, 2)).tolist() == [0.0]


def test_prior_of_images_like_cifar10_s() -> None:
    """32 x 32 x 3 with CIFAR-10's mean and spread of each channel, under the paper's schedule."""
    words = random_words(0, Stream.EVAL_X_0, torch.arange(64), 0, 3072).numpy().reshape(64, 32, 32, 3)
    uniform = (words / 2**32 - 0.5) * np.sqrt(12)
    pixels = np.array([125.3, 123.0, 113.9]) + np.array([63.0, 62.1, 66.7]) * uniform
    images = torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))
    prior = prior_loss(make_schedule(ScheduleConfig()), images_to_x_0(images))
    assert 7e-6 < float(prior.mean()) < 3e-5
    for extreme in (0, 255):  # x_0^2 = 1, the most that an image can have
        assert (
            float(prior_loss(make_schedule(ScheduleConfig()), images_to_x_0(torch.full_like(images, extreme)))[0])
            < 3e-5
        )
