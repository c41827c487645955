"""What every sampler keeps to: steps counted, noise only where it says so, the callback told, options refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ddpm import (
    DDIM,
    SAMPLERS,
    Ancestral,
    Denoiser,
    DiffusionModel,
    DPMSolver2M,
    Heun,
    NetworkDenoiser,
    NoiseSchedule,
    Prediction,
    Sampler,
    Stream,
    generate,
    spaced_timesteps,
    standard_normal,
)
from ddpm.process.denoiser import MovesT
from ddpm.process.interpolation import Table
from ddpm.samplers.generate import run_sampler
from ddpm.samplers.sampler import Callback, no_noise
from tests.ddpm.sampler_examples import CHOSEN, SCHEDULE, SHAPE, elementwise

IDS = torch.arange(2)
DENOISE = NetworkDenoiser(network=MovesT(elementwise), schedule=SCHEDULE)
Told = tuple[int, Tensor, Tensor, Tensor]


def named(sampler: Sampler) -> str:
    return f"{sampler.name}-{sampler.spacing}"


@pytest.mark.parametrize("sampler", CHOSEN, ids=named)
def test_deterministic_samplers_are_known_as_such(sampler: Sampler) -> None:
    """From one x_T, with two keys for the noise of the steps."""
    x_T = standard_normal(0, Stream.X_T, IDS, 0, SHAPE)
    one, two = (run_sampler(DENOISE, SCHEDULE, sampler, x_T, IDS, seed=seed, sample_ids=IDS) for seed in (1, 2))
    assert torch.equal(one, two) is sampler.is_deterministic


@pytest.mark.parametrize("sampler", CHOSEN, ids=named)
def test_only_a_deterministic_sampler_needs_no_noise(sampler: Sampler) -> None:
    x_T, timesteps = standard_normal(0, Stream.X_T, IDS, 0, SHAPE), sampler.timesteps(SCHEDULE)
    if sampler.is_deterministic:
        sampler.sample(DENOISE, SCHEDULE, x_T, IDS, timesteps=timesteps)
        return
    with pytest.raises(ValueError, match=r"^noise: step \d+ draws noise, got none to draw from"):
        sampler.sample(DENOISE, SCHEDULE, x_T, IDS, timesteps=timesteps)
    with pytest.raises(ValueError, match=r"^noise: step 3 "):
        no_noise(3)


@pytest.mark.parametrize("sampler", CHOSEN, ids=named)
def test_evaluations_are_counted(sampler: Sampler) -> None:
    calls = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        calls.append(len(x_t))
        return elementwise(x_t, t, label)

    model = DiffusionModel(network=network, schedule=SCHEDULE, image_shape=SHAPE, null_label=7)
    generate(model, sampler, seed=0, sample_ids=IDS, label=IDS)
    assert len(calls) == sampler.num_evaluations(SCHEDULE)
    assert len(calls) == sampler.num_steps if sampler.name != "heun" else len(calls) > sampler.num_steps
    assert set(calls) == ({4} if sampler.guidance_scale != 1 else {2})
    assert sampler.num_evaluations(SCHEDULE, 0) == 0
    assert 4 <= sampler.num_evaluations(SCHEDULE, 4) < len(calls)


def test_the_options_reach_the_denoiser() -> None:
    model = DiffusionModel(network=elementwise, schedule=SCHEDULE, image_shape=SHAPE, prediction_type="v", null_label=7)
    plain = DDIM().denoiser(model)
    assert plain == NetworkDenoiser(network=MovesT(elementwise), schedule=SCHEDULE, prediction_type="v")
    assert not DDIM(clip_x_0=False).denoiser(model).clip_x_0
    assert DDIM(dynamic_threshold=0.9).denoiser(model).dynamic_threshold == 0.9
    options: dict[str, Any] = {"guidance_scale": 3.0, "guidance_interval": (0.1, 2.0), "guidance_rescale": 0.7}
    guided: Any = DDIM(**options).denoiser(model).network
    assert (guided.scale, guided.interval, guided.rescale) == (3.0, (0.1, 2.0), 0.7)
    assert (guided.network, guided.null_label, guided.prediction_type) == (MovesT(elementwise), 7, "v")


# --- the callback -----------------------------------------------------------------------------------------------------


def listening() -> tuple[list[Told], Callback]:
    told = list[Told]()

    def callback(step: int, t: Tensor, x_t: Tensor, x_0_hat: Tensor) -> None:
        told.append((step, t, x_t.clone(), x_0_hat.clone()))

    return told, callback


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_is_told_each_step_and_changes_nothing(name: str, spacing: Any) -> None:
    sampler = SAMPLERS[name](num_steps=7, spacing=spacing)  # type: ignore[call-arg]
    model = DiffusionModel(network=elementwise, schedule=SCHEDULE, image_shape=SHAPE)
    told, callback = listening()
    silent, heard = (
        generate(model, sampler, seed=3, sample_ids=IDS, label=IDS, callback=given) for given in (None, callback)
    )
    assert torch.equal(silent, heard)
    assert [step for step, _, _, _ in told] == [1, 2, 3, 4, 5, 6, 7]
    visited = spaced_timesteps(SCHEDULE, 7, spacing)
    assert [t.tolist() for _, t, _, _ in told] == [[place] * 2 for place in reversed(visited)]
    assert torch.equal(told[0][2], standard_normal(3, Stream.X_T, IDS, 0, SHAPE))
    for _, t, x_t, x_0_hat in told:
        assert torch.equal(x_0_hat, DENOISE(x_t, t, IDS).x_0_hat)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_where_the_last_step_is_left_out(name: str) -> None:
    told, callback = listening()
    x_T = standard_normal(3, Stream.X_T, IDS, 0, SHAPE)
    SAMPLERS[name]().sample(  # type: ignore[call-arg]
        DENOISE,
        SCHEDULE,
        x_T,
        None,
        timesteps=[2.5, 40.0, 90.25],
        noise=lambda draw: torch.ones_like(x_T),
        callback=callback,
        final_step=False,
    )
    assert [(step, t.tolist()) for step, t, _, _ in told] == [(1, [90.25] * 2), (2, [40.0] * 2)]


def test_the_callback_of_deterministic_ddim_is_handed_the_denoisers_own_answer() -> None:
    answers, heard = list[Tensor](), list[Tensor]()

    def denoise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        prediction = DENOISE(x_t, t, label)
        answers.append(prediction.x_0_hat)
        return prediction

    def callback(step: int, t: Tensor, x_t: Tensor, x_0_hat: Tensor) -> None:
        heard.append(x_0_hat)

    x_T = standard_normal(3, Stream.X_T, IDS, 0, SHAPE)
    x_0 = DDIM(eta=0.0).sample(denoise, SCHEDULE, x_T, IDS, timesteps=range(0, 100, 9), callback=callback)
    assert len(heard) == 12 and all(told is answer for told, answer in zip(heard, answers, strict=True))
    torch.testing.assert_close(x_0, heard[-1], rtol=0, atol=1e-5)  # the last step goes to x_0_hat


def test_with_churn_the_callback_is_told_where_the_denoiser_was_asked() -> None:
    """After the new noise: as noisy as the step before or less, more so than the place visited."""
    told, callback = listening()
    sampler, x_T = Heun(churn=8.0, num_steps=10), standard_normal(3, Stream.X_T, IDS, 0, SHAPE)
    run_sampler(DENOISE, SCHEDULE, sampler, x_T, IDS, seed=0, sample_ids=IDS, callback=callback)
    places, visited = [int(t[0]) for _, t, _, _ in told], sampler.timesteps(SCHEDULE)[::-1]
    assert all(place >= t for place, t in zip(places, visited, strict=True)) and places != visited
    assert places == sorted(places, reverse=True)
    for _, t, x_t, x_0_hat in told:
        assert torch.equal(x_0_hat, DENOISE(x_t, t, IDS).x_0_hat)


# --- a sampler of one's own -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class NewNoise(Sampler):
    """All noise is new at every step: x_t is q_sample of the last x_0_hat, or of a share of it."""

    order: ClassVar[int] = 0
    noise_stream: ClassVar[Stream] = Stream.CHURN

    name: str = "new_noise"
    share: float = 1.0

    def check(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: must be in (0, 1], got {self.share}; 1 keeps x_0_hat")

    @property
    def is_deterministic(self) -> bool:
        return False

    def sample(
        self,
        denoise: Denoiser,
        schedule: NoiseSchedule,
        x_T: Tensor,
        label: Tensor | None,
        *,
        timesteps: Sequence[int] | Sequence[float],
        noise: Callable[[int], Tensor] = no_noise,
        x_0_error: Table | None = None,
        callback: Callback | None = None,
        final_step: bool = True,
    ) -> Tensor:
        x_t, chain = x_T, schedule.respace(timesteps)
        for draw, i in enumerate(reversed(range(len(timesteps))), start=1):
            x_0_hat = self.share * denoise(x_t, chain.timesteps[i].expand(len(x_t)), label).x_0_hat
            alpha_bar = float(chain.alpha_bar_prev[i])
            x_t = alpha_bar**0.5 * x_0_hat + ((1 - alpha_bar) ** 0.5 * noise(draw) if i > 0 else 0)
        return x_t


def test_a_sampler_that_nobody_registered_runs_through_generate() -> None:
    """Its options, its steps and its stream are the ones used; guidance and limits come for nothing."""
    assert NewNoise().name not in SAMPLERS
    heard = list[int]()

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        heard.append(int(t[0]))
        return 0.25 * x_t

    model = DiffusionModel(network=network, schedule=SCHEDULE, image_shape=SHAPE, prediction_type="x_0")
    sampler = NewNoise(num_steps=3, spacing="trailing", share=0.5)
    got = generate(model, sampler, seed=9, sample_ids=IDS, label=None)
    visited = spaced_timesteps(SCHEDULE, 3, "trailing")
    assert heard == visited[::-1]
    x = standard_normal(9, Stream.X_T, IDS, 0, SHAPE)
    for draw, t in enumerate(visited[-2::-1], start=1):
        eps, alpha_bar = standard_normal(9, Stream.CHURN, IDS, draw, SHAPE), float(SCHEDULE.alpha_bar[t])
        x = alpha_bar**0.5 * 0.5 * (0.25 * x).clamp(-1, 1) + (1 - alpha_bar) ** 0.5 * eps
    torch.testing.assert_close(got, 0.5 * (0.25 * x).clamp(-1, 1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"^share: must be in \(0, 1\], got 0"):
        NewNoise(share=0)
    with pytest.raises(ValueError, match=r"^num_steps: must be at least 1, got 0"):
        NewNoise(num_steps=0)


def test_a_sampler_says_how_it_walks_and_whether_it_draws() -> None:
    class Silent(Sampler):
        pass

    with pytest.raises(TypeError, match=r"abstract method.*is_deterministic.*sample"):
        Silent(name="silent")  # type: ignore[abstract]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("num_steps", {"num_steps": 0}),
        ("spacing", {"spacing": "exponential"}),
        ("dynamic_threshold", {"dynamic_threshold": 0.0}),
        ("dynamic_threshold", {"dynamic_threshold": 0.9, "clip_x_0": False}),
        ("guidance_scale", {"guidance_scale": -1.0}),
        ("guidance_scale", {"guidance_rescale": 0.5}),
        ("guidance_scale", {"guidance_interval": (0.1, 2.0)}),
        ("guidance_interval", {"guidance_scale": 2.0, "guidance_interval": (2.0, 0.1)}),
        ("guidance_rescale", {"guidance_scale": 2.0, "guidance_rescale": 1.1}),
    ],
)
def test_impossible_options_are_refused_by_every_sampler(kind: Any, field: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .*got"):
        kind(**options)


@pytest.mark.parametrize(
    ("field", "kind", "options"),
    [
        ("eta", DDIM, {"eta": 1.5}),
        ("eta", DDIM, {"eta": -0.1}),
        ("variance", Ancestral, {"variance": "learned"}),
        ("churn", Heun, {"churn": -1.0}),
        ("churn_interval", Heun, {"churn": 1.0, "churn_interval": (3.0, 3.0)}),
        ("churn_noise", Heun, {"churn": 1.0, "churn_noise": -1.0}),
    ],
)
def test_impossible_options_of_one_sampler_are_refused(field: str, kind: Any, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .*got"):
        kind(**options)


@pytest.mark.parametrize(("kind", "option"), [(Ancestral, "eta"), (Heun, "eta"), (DDIM, "variance"), (DDIM, "churn")])
def test_no_sampler_has_another_s_options(kind: Any, option: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        kind(**{option: 0.5})


def test_what_a_sampler_needs() -> None:
    assert [Ancestral(variance=v).needs_learned_variance for v in ("fixed_small", "learned_range", "analytic")] == [
        False,
        True,
        False,
    ]
    assert [Ancestral(variance=v).needs_x_0_error for v in ("fixed_large", "learned_range", "analytic")] == [
        False,
        False,
        True,
    ]
    assert not DPMSolver2M().needs_learned_variance and not DPMSolver2M().needs_x_0_error
