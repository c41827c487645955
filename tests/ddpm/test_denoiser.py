"""Conversions between eps and x_0, and what clipping does to both."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm.denoiser import EpsDenoiser, predict_eps_from_x_0, predict_x_0_from_eps
from ddpm.diffusion import q_sample
from ddpm.schedules import ScheduleConfig, make_schedule

SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))


@given(seed=st.integers(0, 2**31), t=st.integers(0, 999))
def test_predictions_invert_q_sample(seed: int, t: int) -> None:
    x_0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = torch.tensor([t, 999 - t, 500])[:2]
    x_t = q_sample(SCHEDULE, x_0, step, eps)
    # At t = 999 the rounding of x_t comes back multiplied by 1 / sqrt(alpha_bar) = 2e4: 1e-16 becomes 1e-12.
    torch.testing.assert_close(predict_x_0_from_eps(SCHEDULE, x_t, step, eps), x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(predict_eps_from_x_0(SCHEDULE, x_t, step, x_0), eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("clip", [True, False])
def test_the_pair_belongs_to_x_t(clip: bool) -> None:
    """x_t = sqrt(alpha_bar) x_0_hat + sqrt(1 - alpha_bar) eps_hat, whether or not something was clipped."""
    x_t = 3 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, eps = torch.tensor([0, 1, 500, 999]), x_t.sin()
    got = EpsDenoiser(network=lambda x, t, label: eps, schedule=SCHEDULE, clip_x_0=clip)(x_t, t, None)
    torch.testing.assert_close(q_sample(SCHEDULE, got.x_0_hat, t, got.eps_hat), x_t, rtol=0, atol=1e-9)
    raw = predict_x_0_from_eps(SCHEDULE, x_t, t, eps)
    assert float(raw.abs().max()) > 1
    torch.testing.assert_close(got.x_0_hat, raw.clamp(-1, 1) if clip else raw)
    assert torch.equal(got.eps_hat, eps) is not clip


def test_network_is_given_x_t_t_and_label_as_they_are() -> None:
    seen: list[Tensor | None] = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        seen.extend((x_t, t, label))
        return torch.zeros_like(x_t, dtype=torch.bfloat16)

    x_t, t, label = torch.randn(2, 1, 4, 4), torch.tensor([3, 7]), torch.tensor([1, 0])
    got = EpsDenoiser(network=network, schedule=SCHEDULE)(x_t, t, label)
    assert seen[0] is x_t and seen[1] is t and seen[2] is label
    assert got.x_0_hat.dtype == got.eps_hat.dtype == torch.float32


def test_wrong_shape_of_the_answer_is_refused() -> None:
    denoise = EpsDenoiser(network=lambda x, t, label: x.repeat(1, 2, 1, 1), schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"^network: .*\[1, 3, 4, 4\], got \[1, 6, 4, 4\]"):
        denoise(torch.zeros(1, 3, 4, 4), torch.tensor([0]), None)
