"""Weightings against their papers and each other, and configs that would ignore what they are told."""

import pytest
import torch

from ddpm import NoiseSchedule, ObjectiveConfig, PredictionType, ScheduleConfig, make_schedule
from ddpm.process.interpolation import Table
from ddpm.training.objectives import check_objective, loss_weights

SCHEDULES = {
    "linear": make_schedule(ScheduleConfig()),
    "cosine": make_schedule(ScheduleConfig(name="cosine")),
    "zero terminal SNR": make_schedule(ScheduleConfig(zero_terminal_snr=True)),
}
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
def test_weights_are_finite_and_constant_is_one(name: str, prediction_type: PredictionType) -> None:
    schedule = SCHEDULES[name]
    for objective in (MIN_SNR, P2):
        weight = loss_weights(schedule, objective, prediction_type)
        assert weight.dtype == torch.float64 and weight.shape == (1000,)
        assert bool((weight.isfinite() & (weight >= 0)).all())
    for name_of_objective in ("simple", "hybrid"):
        objective = ObjectiveConfig(name=name_of_objective)
        assert torch.equal(loss_weights(schedule, objective, prediction_type), torch.ones(1000, dtype=torch.float64))


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
    for name, variance in (("hybrid", "fixed_small"), ("hybrid", "fixed_large"), ("simple", "learned_range")):
        with pytest.raises(ValueError, match=r"^name: "):
            check_objective(ObjectiveConfig(name=name), variance)  # type: ignore[arg-type]
    for name, variance in (("simple", "fixed_small"), ("vlb", "fixed_large"), ("vlb", "learned_range")):
        check_objective(ObjectiveConfig(name=name), variance)  # type: ignore[arg-type]
    check_objective(ObjectiveConfig(name="hybrid"), "learned_range")
