"""DDIM upwards: images to noise and back. The sampler itself is in test_generate.py and the oracles."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddpm import (
    DDIM,
    NetworkDenoiser,
    Prediction,
    ScheduleConfig,
    ddim_invert,
    ddim_step,
    make_schedule,
    spaced_timesteps,
)
from ddpm.process.spacing import continuous_timesteps
from tests.ddpm.oracles import GAUSSIAN, SKEWED, TWO_MODES

SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))


def test_round_trip_error_falls_with_the_steps() -> None:
    """Images to noise and back on trained steps, first and final step included."""
    x_0 = torch.linspace(-0.9, 0.9, 40, dtype=torch.float64).reshape(10, 1, 2, 2)
    denoise, errors = TWO_MODES.denoiser(SCHEDULE), []
    for num_steps in (20, 50, 100, 200, 500, 1000):
        timesteps = spaced_timesteps(SCHEDULE, num_steps, "linspace")
        x_T = ddim_invert(denoise, SCHEDULE, x_0, None, timesteps=timesteps)
        back = DDIM(eta=0.0).sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps)
        errors.append(float((back - x_0).abs().max()))
    print(f"\nlargest round-trip error for 20, 50, 100, 200, 500, 1000 steps: {', '.join(f'{e:.4f}' for e in errors)}")
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.02


def test_the_first_step_adds_noise_to_the_known_image() -> None:
    """Trailing steps start at t > 0. To take the image for x_t there missed by 0.283, 0.166 and 0.093."""
    linear = make_schedule(ScheduleConfig(name="linear"))
    x_0 = torch.linspace(-0.9, 0.9, 40, dtype=torch.float64).reshape(10, 1, 2, 2)
    denoise, errors = SKEWED.denoiser(linear), []
    for num_steps in (5, 10, 20):
        timesteps = spaced_timesteps(linear, num_steps, "trailing")
        x_T = ddim_invert(denoise, linear, x_0, None, timesteps=timesteps)
        back = DDIM(eta=0.0).sample(denoise, linear, x_T, None, timesteps=timesteps)
        errors.append(float((back - x_0).square().mean().sqrt()))
    print(f"\nround-trip RMS for 5, 10, 20 trailing steps: {', '.join(f'{e:.4f}' for e in errors)}")
    assert errors[0] < 0.22 and errors[1] < 0.14 and errors[2] < 0.085
    start = ddim_invert(denoise, linear, x_0, None, timesteps=[99])
    alpha_bar = linear.alpha_bar[99]
    eps_hat = denoise(x_0, torch.full((10,), 99), None).eps_hat
    torch.testing.assert_close(start, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps_hat, rtol=0, atol=1e-14)


def test_inversion_converges_to_the_flow_at_first_order() -> None:
    """Between sigma(0) and sigma(999), without the first step: the exact flow upwards."""
    ends = [float(SCHEDULE.alpha_bar[t]) for t in (0, -1)]
    x = torch.linspace(-0.2, 1.6, 19, dtype=torch.float64)
    exact, errors = GAUSSIAN.flow(x, *ends), []
    for num_steps in (160, 320, 640):
        timesteps = continuous_timesteps(SCHEDULE, num_steps + 1, "log_snr")
        got = ddim_invert(
            GAUSSIAN.denoiser(SCHEDULE), SCHEDULE, x[:, None, None, None], None, timesteps=timesteps, first_step=False
        )
        errors.append(float((got.flatten() - exact).abs().max()))
    assert math.log2(errors[1] / errors[2]) >= 0.85


def test_a_step_up_undoes_a_step_down_where_the_noise_is_known() -> None:
    """For data that is one image x_0_hat never changes, and the round trip is exact however few the steps."""
    image = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    asked: list[int] = []

    def denoise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        asked.append(int(t[0]))
        alpha_bar = SCHEDULE.alpha_bar[t][:, None, None, None]
        return Prediction(x_0_hat=image, eps_hat=(x_t - alpha_bar.sqrt() * image) / (1 - alpha_bar).sqrt())

    x_T = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = [100, 400, 999]
    x_t = DDIM(eta=0.0).sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, final_step=False)
    assert asked == [999, 400]
    asked.clear()
    back = ddim_invert(denoise, SCHEDULE, x_t, None, timesteps=timesteps, first_step=False)
    torch.testing.assert_close(back, x_T, rtol=0, atol=1e-10)
    assert asked == [100, 400]
    asked.clear()
    ddim_invert(denoise, SCHEDULE, image, None, timesteps=timesteps)
    assert asked == [100, 100, 400]


def test_label_and_training_index_reach_the_network() -> None:
    heard = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        heard.append((t.tolist(), label))
        return torch.zeros_like(x_t)

    label = torch.tensor([4, 2])
    ddim_invert(
        NetworkDenoiser(network=network, schedule=SCHEDULE), SCHEDULE, torch.zeros(2, 1, 2, 2), label, timesteps=[7, 70]
    )
    assert [t for t, _ in heard] == [[7, 7], [7, 7]] and all(given is label for _, given in heard)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_impossible_eta(eta: float) -> None:
    x_t, t = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.tensor([999])
    with pytest.raises(ValueError, match=r"^eta: "):
        DDIM(eta=eta)
    with pytest.raises(ValueError, match=r"^eta: "):
        ddim_step(SCHEDULE, GAUSSIAN.denoiser(SCHEDULE), x_t, t, None, eta=eta, eps=x_t)
