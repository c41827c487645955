"""Whatever a network predicts, the denoiser answers alike; what limiting x_0_hat does to the pair."""

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm import NetworkDenoiser, PredictionType, ScheduleConfig, make_schedule, q_sample
from ddpm.process.denoiser import threshold_dynamically
from ddpm.process.prediction import predict_eps_from_x_0, predict_v, predict_x_0_from_eps

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
    got = NetworkDenoiser(network=lambda x, t, label: eps, schedule=SCHEDULE, clip_x_0=clip)(x_t, t, None)
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
    got = NetworkDenoiser(network=network, schedule=SCHEDULE)(x_t, t, label)
    assert seen[0] is x_t and seen[1] is t and seen[2] is label
    assert got.x_0_hat.dtype == got.eps_hat.dtype == torch.float32


def test_wrong_shape_of_the_answer_is_refused() -> None:
    denoise = NetworkDenoiser(network=lambda x, t, label: x.repeat(1, 2, 1, 1), schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"^network: .*\[1, 3, 4, 4\], got \[1, 6, 4, 4\]"):
        denoise(torch.zeros(1, 3, 4, 4), torch.tensor([0]), None)


@pytest.mark.parametrize(
    "limit", [{"clip_x_0": False}, {}, {"dynamic_threshold": 0.9}], ids=["none", "clip", "dynamic"]
)
def test_what_the_network_predicts_does_not_matter(limit: dict[str, Any]) -> None:
    x_t, x_0_hat = 2 * torch.randn(2, 4, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 1, 500, 999])
    eps_hat = predict_eps_from_x_0(SCHEDULE, x_t, t, x_0_hat)
    answers = {"eps": eps_hat, "x_0": x_0_hat, "v": predict_v(SCHEDULE, x_0_hat, t, eps_hat)}

    def predict(kind: PredictionType) -> tuple[Tensor, Tensor]:
        denoise = NetworkDenoiser(
            network=lambda x, t, label: answers[kind], schedule=SCHEDULE, prediction_type=kind, **limit
        )
        got = denoise(x_t, t, None)
        torch.testing.assert_close(q_sample(SCHEDULE, got.x_0_hat, t, got.eps_hat), x_t, rtol=0, atol=1e-9)
        return got.x_0_hat, got.eps_hat

    for kind in ("eps", "v"):
        for a, b in zip(predict(kind), predict("x_0"), strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_learned_variance_is_the_second_half_of_the_channels() -> None:
    x_t = torch.randn(2, 3, 4, 4)
    answer = torch.cat((0.5 * x_t, torch.full_like(x_t, -1.0)), dim=1)
    answer[1, 3:] = 0.5
    t = torch.tensor([3, 7])
    got = NetworkDenoiser(network=lambda x, t, label: answer, schedule=SCHEDULE, learned_variance=True)(x_t, t, None)
    plain = NetworkDenoiser(network=lambda x, t, label: 0.5 * x, schedule=SCHEDULE)(x_t, t, None)
    assert torch.equal(got.x_0_hat, plain.x_0_hat) and torch.equal(got.eps_hat, plain.eps_hat)
    assert plain.variance_fraction is None and got.variance_fraction is not None
    assert got.variance_fraction.shape == x_t.shape
    assert got.variance_fraction[0].unique().tolist() == [0.0] and got.variance_fraction[1].unique().tolist() == [0.75]
    with pytest.raises(ValueError, match=r"^network: .*\[2, 6, 4, 4\], got \[2, 3, 4, 4\]"):
        NetworkDenoiser(network=lambda x, t, label: x, schedule=SCHEDULE, learned_variance=True)(x_t, t, None)


@given(seed=st.integers(0, 2**31), quantile=st.floats(0.01, 1), scale=st.floats(0.1, 5), size=st.integers(1, 6))
def test_dynamic_threshold_is_diffusers(seed: int, quantile: float, scale: float, size: int) -> None:
    x_0 = scale * torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scheduler: Any = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=torch.inf
    )
    got = threshold_dynamically(x_0, quantile)
    torch.testing.assert_close(got, scheduler._threshold_sample(x_0), rtol=1e-12, atol=1e-12)
    assert float(got.abs().max()) <= 1


def test_dynamic_threshold_looks_at_each_image_alone() -> None:
    x_0 = (
        torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.2, 1, 9])[:, None, None, None]
    )
    got = threshold_dynamically(x_0, 0.9)
    for i in range(3):
        assert torch.equal(threshold_dynamically(x_0[i : i + 1], 0.9), got[i : i + 1])
    assert torch.equal(got[0], x_0[0])
    # The contrast of an overexposed image is kept: with clipping most of its pixels would be at 1.
    assert float((got[2].abs() == 1).float().mean()) < 0.15 < 0.8 < float((x_0[2].abs() >= 1).float().mean())


def test_impossible_denoisers_are_refused() -> None:
    def make(**options: Any) -> NetworkDenoiser:
        return NetworkDenoiser(network=lambda x, t, label: x, schedule=SCHEDULE, **options)

    for quantile in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"^dynamic_threshold: must be in \(0, 1\], got "):
            make(dynamic_threshold=quantile)
    with pytest.raises(ValueError, match=r"^dynamic_threshold: .* clip_x_0 off"):
        make(dynamic_threshold=0.9, clip_x_0=False)
    with pytest.raises(ValueError, match=r"^prediction_type: "):
        make(prediction_type="flow")
