"""Weightings against their papers and each other, and configs that would ignore what they are told."""

import pytest
import torch

from ddpm import NoiseSchedule, ObjectiveConfig, PredictionType, ScheduleConfig, make_schedule
from ddpm.process.interpolation import Table
from ddpm.training.objectives import check_objective, loss_weights

SCHEDULES = {
    "linear": make_schedule(ScheduleConfig()),
    "cosine": make_schedule(ScheduleConfig(name="cosine")),
    "shifted": make_schedule(ScheduleConfig(shift=8.0)),
    "cosine, T = 4000": make_schedule(ScheduleConfig(name="cosine", num_timesteps=4000)),
}
NO_SIGNAL = [make_schedule(ScheduleConfig(name=name, zero_terminal_snr=True)) for name in ("linear", "cosine")]
MIN_SNR = ObjectiveConfig(weighting="min_snr")
P2 = ObjectiveConfig(weighting="p2")


def snr_of(schedule: NoiseSchedule) -> Table:
    return schedule.alpha_bar / (1 - schedule.alpha_bar)


@pytest.mark.parametrize("name", SCHEDULES)
def test_min_snr_is_the_paper_s_formula_of_each_prediction(name: str) -> None:
    schedule = SCHEDULES[name]
    snr = snr_of(schedule)
    capped = snr.clamp(max=5)
    expected = {"eps": (5 / snr).clamp(max=1), "x_0": capped, "v": capped / (snr + 1)}
    for prediction_type, weight in expected.items():
        torch.testing.assert_close(loss_weights(schedule, MIN_SNR, prediction_type), weight, rtol=1e-12, atol=0.0)  # type: ignore[arg-type]
    again = loss_weights(schedule, ObjectiveConfig(weighting="min_snr", min_snr_gamma=1.0), "x_0")
    torch.testing.assert_close(again, snr.clamp(max=1), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", [MIN_SNR, P2, ObjectiveConfig(weighting="p2", p2_gamma=0.5)])
def test_a_weighting_is_one_and_the_same_in_terms_of_x_0(name: str, objective: ObjectiveConfig) -> None:
    """|eps - eps_hat|^2 = SNR |x_0 - x_0_hat|^2 and |v - v_hat|^2 = (SNR + 1) |x_0 - x_0_hat|^2."""
    schedule = SCHEDULES[name]
    snr = snr_of(schedule)
    of_x_0 = loss_weights(schedule, objective, "x_0")
    torch.testing.assert_close(loss_weights(schedule, objective, "eps") * snr, of_x_0, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(loss_weights(schedule, objective, "v") * (snr + 1), of_x_0, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("p2_gamma", [0.0, 0.5, 1.0])
def test_p2_is_the_paper_s_formula(p2_gamma: float) -> None:
    schedule = SCHEDULES["cosine"]
    weight = loss_weights(schedule, ObjectiveConfig(weighting="p2", p2_gamma=p2_gamma), "eps")
    torch.testing.assert_close(weight, 1 / (1 + snr_of(schedule)).pow(p2_gamma))


@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_trained_in_float32_too_and_constant_is_one(name: str, prediction_type: PredictionType) -> None:
    schedule = SCHEDULES[name]
    for objective in (MIN_SNR, P2):
        weight = loss_weights(schedule, objective, prediction_type)
        assert weight.dtype == torch.float64 and weight.shape == (schedule.num_timesteps,)
        for digits in (weight, weight.float()):
            assert bool((digits.isfinite() & (digits > 0)).all())
        check_objective(objective, "fixed_small", schedule, prediction_type)
    for constant in (ObjectiveConfig(), ObjectiveConfig(name="hybrid")):
        for of_any in (schedule, *NO_SIGNAL):
            assert bool((loss_weights(of_any, constant, prediction_type) == 1).all())


@pytest.mark.parametrize("prediction_type", ["x_0", "v"])
@pytest.mark.parametrize("objective", [MIN_SNR, P2, ObjectiveConfig(weighting="p2", p2_gamma=0.0)])
def test_without_a_terminal_signal_no_weighting_by_snr_trains_the_last_step(
    objective: ObjectiveConfig, prediction_type: PredictionType
) -> None:
    for schedule in NO_SIGNAL:
        with pytest.raises(ValueError, match=r"^weighting: .*of weight 0 at t = 999 .*choose constant for zero"):
            check_objective(objective, "fixed_small", schedule, prediction_type)


def test_a_gamma_that_rounds_a_weight_to_0_is_refused() -> None:
    """SNR is 1e4 at t = 0: to the power of 12 it is beyond float32."""
    with pytest.raises(ValueError, match=r"^weighting: .* p2, of weight 0 at t = .*; lower p2_gamma$"):
        loss_weights(SCHEDULES["linear"], ObjectiveConfig(weighting="p2", p2_gamma=12.0), "eps")
    with pytest.raises(ValueError, match=r"^weighting: .* min_snr, of weight 0 at t = .*; raise min_snr_gamma$"):
        loss_weights(SCHEDULES["linear"], ObjectiveConfig(weighting="min_snr", min_snr_gamma=1e-50), "v")


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("name", {"name": "complex"}),
        ("weighting", {"weighting": "snr"}),
        ("t_choice", {"t_choice": "random"}),
        ("vlb_weight", {"name": "hybrid", "vlb_weight": 0.0}),
        ("vlb_weight", {"vlb_weight": 0.1}),
        ("vlb_weight", {"name": "vlb", "vlb_weight": 0.1}),
        ("min_snr_gamma", {"weighting": "min_snr", "min_snr_gamma": -1.0}),
        ("min_snr_gamma", {"min_snr_gamma": 3.0}),
        ("p2_gamma", {"weighting": "p2", "p2_gamma": float("nan")}),
        ("p2_gamma", {"weighting": "min_snr", "p2_gamma": 0.5}),
        ("weighting", {"name": "vlb", "weighting": "p2"}),
    ],
)
def test_impossible_or_ignored_options_are_refused(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: "):
        ObjectiveConfig(**arguments)  # type: ignore[arg-type]


def test_options_that_are_used_are_taken() -> None:
    assert ObjectiveConfig(name="hybrid", vlb_weight=0.1, weighting="min_snr", min_snr_gamma=1.0).vlb_weight == 0.1
    assert ObjectiveConfig(name="vlb", t_choice="importance").t_choice == "importance"


def test_an_objective_must_train_the_variance_and_nothing_else_may_be_learned() -> None:
    schedule = SCHEDULES["linear"]
    for name, variance in (("hybrid", "fixed_small"), ("hybrid", "fixed_large"), ("simple", "learned_range")):
        with pytest.raises(ValueError, match=r"^name: "):
            check_objective(ObjectiveConfig(name=name), variance, schedule, "eps")  # type: ignore[arg-type]
    for name, variance in (("simple", "fixed_small"), ("vlb", "fixed_large"), ("vlb", "learned_range")):
        check_objective(ObjectiveConfig(name=name), variance, schedule, "eps")  # type: ignore[arg-type]
    check_objective(ObjectiveConfig(name="hybrid"), "learned_range", schedule, "eps")
