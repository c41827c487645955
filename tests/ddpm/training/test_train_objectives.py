"""per_sample_loss under every objective: values against the bound, gradients against closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import (
    DiffusionModel,
    ImportanceSampler,
    Network,
    NetworkDenoiser,
    NoiseSchedule,
    ObjectiveConfig,
    PredictionType,
    ScheduleConfig,
    Stream,
    TrainingBatch,
    Variance,
    bound_term,
    make_schedule,
    make_training_batch,
    per_sample_loss,
    q_sample,
    standard_normal,
    stratified_timesteps,
)
from ddpm.training.objectives import loss_weights

SCHEDULE = make_schedule(ScheduleConfig(name="cosine", num_timesteps=40))
ZERO = make_schedule(ScheduleConfig(num_timesteps=40, zero_terminal_snr=True))
VLB, HYBRID = ObjectiveConfig(name="vlb"), ObjectiveConfig(name="hybrid", vlb_weight=0.01)
PREDICTIONS: tuple[PredictionType, ...] = ("eps", "x_0", "v")


def unasked(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """To make a batch."""
    raise AssertionError("the network is asked")


def model_of(network: Network, schedule: NoiseSchedule = SCHEDULE, **changes: Any) -> DiffusionModel:
    return DiffusionModel(network=network, schedule=schedule, image_shape=(2, 3, 2), **changes)


def every_t() -> TrainingBatch:
    """Forty random images of two channels, one at each t, in float64."""
    ids, t = torch.arange(40), torch.arange(40)
    x_0, eps = standard_normal(0, Stream.EVAL_X_0, ids, 0, (2, 2, 3, 2), torch.float64).unbind(1)
    x_0 = (x_0.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    x_t = q_sample(SCHEDULE, x_0, t, eps)
    return TrainingBatch(x_t=x_t, t=t, eps=eps, x_0=x_0, weight=torch.ones(40), label=None)


def answer(channels: int) -> Tensor:
    """What the network answers, whatever it is asked: a leaf to differentiate by."""
    ids = torch.arange(40)
    values = standard_normal(0, Stream.EVAL_X_0, ids, 1, (channels, 3, 2), torch.float64) / 2
    return values.requires_grad_()


def loss_of(
    output: Tensor,
    objective: ObjectiveConfig,
    prediction_type: PredictionType = "eps",
    *,
    learned: bool = False,
) -> Tensor:
    """Of that answer to the forty images."""
    model = model_of(lambda x_t, t, label: output, prediction_type=prediction_type, learned_variance=learned)
    return per_sample_loss(model, every_t(), objective=objective)


def gradient(
    output: Tensor, objective: ObjectiveConfig, prediction_type: PredictionType, *, learned: bool = False
) -> Tensor:
    """Of the sum of these losses, with respect to the answer."""
    (result,) = torch.autograd.grad(loss_of(output, objective, prediction_type, learned=learned).sum(), output)
    return result


def test_the_default_is_l_simple_to_the_last_bit() -> None:
    batch = every_t()
    loss = per_sample_loss(model_of(lambda x_t, t, label: torch.sin(3 * x_t).float()), batch)
    answered = torch.sin(3 * batch.x_t).float().double()
    assert torch.equal(loss, (batch.eps - answered).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["constant", "min_snr", "p2"])
def test_l_simple_is_the_weighted_error_of_what_is_predicted(prediction_type: PredictionType, weighting: str) -> None:
    objective, batch = ObjectiveConfig(weighting=weighting), every_t()  # type: ignore[arg-type]
    abar = SCHEDULE.alpha_bar[:, None, None, None]
    target = {"eps": batch.eps, "x_0": batch.x_0, "v": abar.sqrt() * batch.eps - (1 - abar).sqrt() * batch.x_0}
    output = answer(2)
    loss = loss_of(output, objective, prediction_type)
    weight = loss_weights(SCHEDULE, objective, prediction_type)
    torch.testing.assert_close(loss, weight * (target[prediction_type] - output).square().mean(dim=(1, 2, 3)))
    found = gradient(output, objective, prediction_type)
    torch.testing.assert_close(found, weight[:, None, None, None] * 2 * (output - target[prediction_type]) / 12)


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_one_x_0_hat_costs_the_same_whatever_is_predicted(weighting: str) -> None:
    batch, objective = every_t(), ObjectiveConfig(weighting=weighting)  # type: ignore[arg-type]
    abar = SCHEDULE.alpha_bar[:, None, None, None]
    a, s = abar.sqrt(), (1 - abar).sqrt()
    x_0_hat = 0.9 * batch.x_0 + 0.05
    eps_hat = (batch.x_t - a * x_0_hat) / s
    outputs = {"eps": eps_hat, "x_0": x_0_hat, "v": a * eps_hat - s * x_0_hat}
    losses = [loss_of(outputs[kind], objective, kind) for kind in PREDICTIONS]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed_small", "learned_range"])
def test_vlb_is_t_times_the_unclipped_term(prediction_type: PredictionType, learned: bool) -> None:
    batch, variance = every_t(), "learned_range" if learned else "fixed_small"
    output = answer(4 if learned else 2).detach()

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return output

    denoise = NetworkDenoiser(
        network=network,
        schedule=SCHEDULE,
        prediction_type=prediction_type,
        learned_variance=learned,
        clip_x_0=False,
    )
    expected = 40 * bound_term(SCHEDULE, denoise, batch.x_0, batch.t, None, variance=variance, eps=batch.eps)  # type: ignore[arg-type]
    model = model_of(network, prediction_type=prediction_type, learned_variance=learned)
    loss = per_sample_loss(model, batch, objective=VLB)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)


def test_the_decoder_has_as_many_levels_as_the_model() -> None:
    """L_0 alone depends on them; the finer the levels, the less likely the one."""
    batch, network = every_t(), lambda x_t, t, label: 0.9 * x_t
    coarse, fine = (
        per_sample_loss(model_of(network, num_levels=levels), batch, objective=VLB) for levels in (256, 65536)
    )
    assert torch.equal(coarse[1:], fine[1:])
    denoise = NetworkDenoiser(network=network, schedule=SCHEDULE, clip_x_0=False)
    expected = 40 * bound_term(
        SCHEDULE, denoise, batch.x_0, batch.t, None, variance="fixed_small", eps=batch.eps, num_levels=65536
    )
    torch.testing.assert_close(fine, expected, rtol=1e-12, atol=0.0)
    assert float(fine[0]) > float(coarse[0]) + 40 * 5


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_vlb_of_eps_is_ho_s_weighted_loss(variance: Variance) -> None:
    """Eq. 12: beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) |eps - eps_hat|^2, and its gradient, for t > 0.

    With either variance of the bound; what is trained has the posterior's.
    """
    batch, output = every_t(), answer(2)
    beta, alpha, abar = SCHEDULE.beta, SCHEDULE.alpha, SCHEDULE.alpha_bar
    sigma2 = beta if variance == "fixed_large" else SCHEDULE.posterior_variance
    weight = (40 * beta**2 / (2 * sigma2 * alpha * (1 - abar)) / math.log(2))[1:]
    error = (output - batch.eps)[1:]
    denoise = NetworkDenoiser(network=lambda x_t, t, label: output, schedule=SCHEDULE, clip_x_0=False)
    loss = 40 * bound_term(SCHEDULE, denoise, batch.x_0, batch.t, None, variance=variance, eps=batch.eps)
    if variance == "fixed_small":
        torch.testing.assert_close(loss_of(output, VLB), loss, rtol=1e-12, atol=0.0)
    ratio = SCHEDULE.posterior_variance[1:] / sigma2[1:]
    constant = 40 * 0.5 * (ratio - 1 - ratio.log()) / math.log(2)
    torch.testing.assert_close(loss[1:], constant + weight * error.square().mean(dim=(1, 2, 3)), rtol=1e-9, atol=1e-9)
    (gradients,) = torch.autograd.grad(loss.sum(), output)
    found = gradients[1:]
    torch.testing.assert_close(found, weight[:, None, None, None] * 2 * error / 12, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_hybrid_trains_the_mean_by_l_simple_alone_and_the_variance_by_the_bound(
    prediction_type: PredictionType,
) -> None:
    output = answer(4)
    hybrid = gradient(output, HYBRID, prediction_type, learned=True)
    simple = gradient(output[:, :2].detach().requires_grad_(), ObjectiveConfig(), prediction_type)
    vlb = gradient(output, VLB, prediction_type, learned=True)
    assert torch.equal(hybrid[:, :2], simple)
    assert bool((vlb[:, :2].abs() > 1e-9).any(dim=(1, 2, 3)).all()), "the bound has a gradient that is kept away"
    torch.testing.assert_close(hybrid[:, 2:], 0.01 * vlb[:, 2:], rtol=1e-9, atol=1e-18)
    assert bool((hybrid[:, 2:].abs() > 0).all())


@pytest.mark.parametrize("weighting", ["constant", "min_snr"])
def test_hybrid_is_the_sum_of_its_parts_also_when_weighted(weighting: str) -> None:
    output = answer(4).detach()
    hybrid = ObjectiveConfig(name="hybrid", vlb_weight=0.01, weighting=weighting)  # type: ignore[arg-type]
    simple = loss_of(output[:, :2], ObjectiveConfig(weighting=weighting))  # type: ignore[arg-type]
    vlb = loss_of(output, VLB, learned=True)
    found = loss_of(output, hybrid, learned=True)
    torch.testing.assert_close(found, simple + 0.01 * vlb, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_gradient_of_the_bound_by_finite_differences(prediction_type: PredictionType) -> None:
    """Mean and learned variance together, at t = 0 (the decoder), in the middle and at the end."""
    whole, rows = every_t(), torch.tensor([0, 1, 20, 39])
    fields = {name: getattr(whole, name)[rows] for name in ("x_t", "t", "eps", "x_0", "weight")}
    batch = TrainingBatch(**fields, label=None)

    def loss(output: Tensor) -> Tensor:
        model = model_of(lambda x_t, t, label: output, prediction_type=prediction_type, learned_variance=True)
        return per_sample_loss(model, batch, objective=VLB)

    start = torch.cat((answer(2)[rows] / 5, answer(2)[rows]), dim=1).detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (start,), eps=1e-7, atol=1e-4, rtol=1e-4)


def test_learned_variance_is_drawn_to_the_true_one() -> None:
    """For an error of the mean that is zero the bound is least at the posterior's variance (v = -1), for a large one at
    the other end: the sign of the gradient of v says which way."""
    batch = every_t()
    for error, sign in ((0.0, 1.0), (3.0, -1.0)):
        output = torch.cat((batch.eps + error, torch.zeros_like(batch.eps)), dim=1).requires_grad_()
        found = gradient(output, HYBRID, "eps", learned=True)[1:, 2:]
        assert bool((found.sign() == sign).all())


@pytest.mark.parametrize("prediction_type", ["x_0", "v"])
@pytest.mark.parametrize("objective", [ObjectiveConfig(), VLB, HYBRID], ids=lambda objective: objective.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_objectives_train_every_step_where_no_signal_is_left(
    prediction_type: PredictionType, objective: ObjectiveConfig, dtype: torch.dtype
) -> None:
    """The mean at every t, the last one too; a learned variance at all but the last, whose bounds are one number."""
    batch, learned = every_t(), objective.name != "simple"
    x_0, eps = batch.x_0.to(dtype), batch.eps.to(dtype)
    x_t = q_sample(ZERO, x_0, batch.t, eps)
    batch = TrainingBatch(x_t=x_t, t=batch.t, eps=eps, x_0=x_0, weight=batch.weight, label=None)
    output = answer(4 if learned else 2).detach().to(dtype).requires_grad_()
    model = model_of(lambda x_t, t, label: output, ZERO, prediction_type=prediction_type, learned_variance=learned)
    loss = per_sample_loss(model, batch, objective=objective)
    (found,) = torch.autograd.grad(loss.sum(), output)
    assert bool(loss.isfinite().all()) and bool(found.isfinite().all())
    assert bool((found[:, :2].abs().amax(dim=(1, 2, 3)) > 0).all())
    assert not learned or bool((found[:-1, 2:].abs().amax(dim=(1, 2, 3)) > 0).all())


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
@pytest.mark.parametrize("name", ["simple", "hybrid"])
def test_a_weighting_that_leaves_the_last_step_untrained_is_refused(name: str, weighting: str) -> None:
    objective = ObjectiveConfig(name=name, weighting=weighting)  # type: ignore[arg-type]
    model = model_of(unasked, ZERO, prediction_type="v", learned_variance=name == "hybrid")
    with pytest.raises(ValueError, match=rf"^weighting: .* {weighting}, of weight 0 at t = 39 .*; choose constant"):
        per_sample_loss(model, every_t(), objective=objective)


def test_eps_is_refused_where_no_signal_is_left() -> None:
    """There x_t is eps, and the network would learn to answer with what it is given."""
    for objective in (ObjectiveConfig(), VLB):
        with pytest.raises(ValueError, match=r"^prediction_type: must be v or x_0"):
            per_sample_loss(model_of(unasked, ZERO), every_t(), objective=objective)


def test_what_does_not_fit_is_refused() -> None:
    batch = every_t()
    fixed, learned = (model_of(lambda x_t, t, label: x_t, learned_variance=asked) for asked in (False, True))
    with pytest.raises(ValueError, match=r"^name: "):
        per_sample_loss(fixed, batch, objective=HYBRID)
    with pytest.raises(ValueError, match=r"^name: simple does not train the learned variance"):
        per_sample_loss(learned, batch)
    with pytest.raises(ValueError, match=r"^network: "):
        per_sample_loss(learned, batch, objective=VLB)
    with pytest.raises(ValueError, match=r"^eps_hat: "):
        per_sample_loss(learned, batch, objective=HYBRID)


def test_t_that_is_chosen_elsewhere_is_used_with_its_weight() -> None:
    ids = torch.arange(64)
    x_0 = torch.zeros(64, 1, 2, 3)
    sampler = ImportanceSampler(40, history=1)
    sampler.update(torch.arange(40), torch.arange(40).float() + 1)
    slots = torch.arange(64)
    for chosen in (
        stratified_timesteps(40, seed=5, step=2, slots=slots, global_batch=64),
        sampler.draw(seed=5, step=2, slots=slots),
    ):
        batch = make_training_batch(
            model_of(unasked),
            x_0,
            None,
            seed=5,
            sample_ids=ids,
            epochs=ids,
            flip=True,
            label_drop=0.0,
            timesteps=chosen,
        )
        assert torch.equal(batch.t, chosen.t) and torch.equal(batch.weight, chosen.weight)
        assert torch.equal(batch.x_t, q_sample(SCHEDULE, batch.x_0, chosen.t, batch.eps))
    assert float(batch.weight.std()) > 0.1


def test_flips_reach_x_0_and_no_choice_is_uniform_with_weight_one() -> None:
    ids = torch.arange(64)
    x_0 = torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3).expand(64, 1, 2, 3)
    batch = make_training_batch(
        model_of(unasked), x_0, None, seed=5, sample_ids=ids, epochs=ids, flip=True, label_drop=0.0
    )
    flipped = (batch.x_0 == x_0.flip(-1)).all(dim=(1, 2, 3))
    assert bool((flipped ^ (batch.x_0 == x_0).all(dim=(1, 2, 3))).all()) and 10 < int(flipped.sum()) < 54
    assert torch.equal(batch.x_t, q_sample(SCHEDULE, batch.x_0, batch.t, batch.eps))
    assert torch.equal(batch.weight, torch.ones(64))


def test_importance_weights_leave_the_mean_loss_unbiased() -> None:
    """The mean over 200 steps of weighted losses is L_vlb's mean over uniform t, within 4 standard errors, and that
    with less spread than uniform t has."""
    output = answer(2).detach()
    losses = loss_of(output, VLB)
    sampler = ImportanceSampler(40, history=3)
    for _ in range(3):
        sampler.update(torch.arange(40), losses)
    chosen = sampler.draw(seed=1, step=0, slots=torch.arange(20_000))
    weighted = chosen.weight * losses[chosen.t]
    error = float(weighted.std()) / 20_000**0.5
    assert abs(float(weighted.mean() - losses.mean())) < 4 * error + 1e-6
    assert float(weighted.std()) < 0.2 * float(losses.std())
