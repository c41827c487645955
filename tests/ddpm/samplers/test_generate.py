"""Image i is image i in any batch; the draws are the documented ones; every sampler makes the data of its network."""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ddpm import (
    DDIM,
    SAMPLERS,
    Ancestral,
    DiffusionModel,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver3M,
    DPMSolver3MCommon,
    Heun,
    Network,
    NetworkDenoiser,
    PredictionType,
    Sampler,
    ScheduleConfig,
    Spacing,
    Stream,
    Variance,
    generate,
    make_schedule,
    spaced_timesteps,
    standard_normal,
)
from tests.ddpm.oracles import TWO_MODES
from tests.ddpm.sampler_examples import CHOSEN, SCHEDULE, SHAPE, elementwise


def faint(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """A network that takes almost all of x_t for noise: images stay within [-1, 1] though the predictions leave it."""
    return 0.97 * x_t


def model_of(network: Network, **changes: Any) -> DiffusionModel:
    return DiffusionModel(network=network, schedule=SCHEDULE, image_shape=SHAPE, **changes)


@pytest.mark.parametrize("sampler", CHOSEN, ids=lambda s: f"{s.name}-{s.spacing}")
def test_an_image_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    ids = torch.tensor([4711, 0, 2**40 + 3, 12, 13, 14, 2**32])
    label = ids % 4

    def images(rows: list[int]) -> Tensor:
        model = model_of(elementwise, null_label=4)
        return generate(model, sampler, seed=7, sample_ids=ids[rows], label=label[rows])

    batch = images([0, 1, 2, 3, 4, 5, 6])
    assert batch.shape == (7, *SHAPE) and batch.dtype == torch.float32
    assert float(batch.abs().max()) <= 1
    for rows in ([6, 5, 4, 3, 2, 1, 0], [2], [5, 0, 3]):
        assert torch.equal(images(rows), batch[rows])
    for a, b in itertools.combinations(batch, 2):
        assert not torch.equal(a, b)


def test_seed_and_label_matter() -> None:
    ids = torch.arange(3)

    def images(seed: int, label: int) -> Tensor:
        label_of_each = torch.full_like(ids, label)
        return generate(model_of(elementwise), CHOSEN[0], seed=seed, sample_ids=ids, label=label_of_each)

    assert not torch.equal(images(0, 0), images(1, 0))
    assert not torch.equal(images(0, 0), images(0, 1))


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no_clip"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (Ancestral, {"variance": "fixed_small"}),
        (Ancestral, {"variance": "fixed_large"}),
        (DDIM, {"eta": 0.5}),
        (DDIM, {"eta": 1.0}),
    ],
)
def test_generate_uses_the_options_and_the_documented_draws(
    kind: Any, option: dict[str, Any], spacing: Spacing, clip: bool
) -> None:
    """x_T is draw 0 of its stream; the steps are draws 1, 2, ... of theirs, and the last step draws nothing."""
    ids, drawn = torch.arange(4), []

    def noise(draw: int) -> Tensor:
        drawn.append(draw)
        return standard_normal(5, Stream.STEP, ids, draw, SHAPE)

    x_T = standard_normal(5, Stream.X_T, ids, 0, SHAPE)
    denoise = NetworkDenoiser(network=faint, schedule=SCHEDULE, clip_x_0=clip)
    timesteps = spaced_timesteps(100, 10, spacing)
    x_0 = kind(**option).sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, noise=noise)
    assert drawn == list(range(1, 10))

    def images(*, clip_x_0: bool) -> Tensor:
        sampler = kind(**option, num_steps=10, spacing=spacing, clip_x_0=clip_x_0)
        return generate(model_of(faint), sampler, seed=5, sample_ids=ids, label=None)

    assert torch.equal(images(clip_x_0=clip), x_0.clamp(-1, 1))
    assert not torch.equal(images(clip_x_0=not clip), x_0.clamp(-1, 1))


@pytest.mark.parametrize("options", [{}, {"churn": 8.0, "churn_interval": (0.01, 60.0), "churn_noise": 1.1}])
def test_the_other_samplers_use_the_options_and_the_documented_draws(options: dict[str, Any]) -> None:
    """Churn has a stream of its own; the stochastic 2M draws from the steps' stream."""
    ids, label = torch.arange(4), torch.tensor([0, 1, 2, 3])
    x_T = standard_normal(5, Stream.X_T, ids, 0, SHAPE)
    denoise = NetworkDenoiser(network=elementwise, schedule=SCHEDULE, prediction_type="v", dynamic_threshold=0.8)
    timesteps = spaced_timesteps(SCHEDULE, 10, "karras")

    def images(kind: Any, **more: Any) -> Tensor:
        sampler = kind(num_steps=10, spacing="karras", dynamic_threshold=0.8, **more)
        return generate(model_of(elementwise, prediction_type="v"), sampler, seed=5, sample_ids=ids, label=label)

    def noise(stream: Stream) -> Callable[[int], Tensor]:
        return lambda draw: standard_normal(5, stream, ids, draw, SHAPE)

    def walked(sampler: Sampler, stream: Stream) -> Tensor:
        return sampler.sample(denoise, SCHEDULE, x_T, label, timesteps=timesteps, noise=noise(stream))

    heun = walked(Heun(**options), Stream.CHURN)
    assert torch.equal(images(Heun, **options), heun.clamp(-1, 1))
    plain = walked(DPMSolver2M(), Stream.STEP)
    assert torch.equal(images(DPMSolver2M), plain.clamp(-1, 1))
    third = walked(DPMSolver3M(), Stream.STEP)
    assert torch.equal(images(DPMSolver3M), third.clamp(-1, 1))
    common = walked(DPMSolver3MCommon(), Stream.STEP)
    assert torch.equal(images(DPMSolver3MCommon), common.clamp(-1, 1))
    sde = walked(DPMSolver2MSDE(), Stream.STEP)
    assert torch.equal(images(DPMSolver2MSDE), sde.clamp(-1, 1))
    for a, b in itertools.combinations((heun, plain, third, common, sde), 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_makes_the_data_it_was_given_the_network_of(name: str) -> None:
    """Two modes, each of eps, x_0 and v: the same images, and of the 3,200 pixels as many in each mode as should be."""
    ids = torch.arange(50)
    schedule = make_schedule(ScheduleConfig(name="cosine"))
    spacing: Spacing = "log_snr" if name == "heun" else "linspace"
    sampler = SAMPLERS[name](num_steps=100, clip_x_0=False, spacing=spacing)  # type: ignore[call-arg]

    def made(kind: PredictionType) -> Tensor:
        exact = TWO_MODES.network(schedule, kind)
        model = DiffusionModel(
            network=lambda x, t, label: exact(x.double(), t, label),
            schedule=schedule,
            image_shape=(1, 8, 8),
            prediction_type=kind,
        )
        return generate(model, sampler, seed=1, sample_ids=ids, label=None)

    images = {kind: made(kind) for kind in get_args(PredictionType)}
    torch.testing.assert_close(images["x_0"], images["v"], rtol=0, atol=2e-3)
    # eps in float32 loses x_0_hat at the end of the schedule, where no sampler gives it any weight.
    torch.testing.assert_close(images["eps"], images["v"], rtol=0, atol=2e-2)
    # Five standard errors of a share of 0.4 among 3,200; -0.15 lies between the modes.
    assert float((images["v"] < -0.15).float().mean()) == pytest.approx(0.4, abs=0.045)
    for low, high, mean, deviation in ((-2, -0.15, -0.6, 0.15), (-0.15, 2, 0.5, 0.25)):
        pixels = images["v"][(images["v"] > low) & (images["v"] < high)]
        assert float(pixels.mean()) == pytest.approx(mean, abs=0.04)
        assert float(pixels.std()) == pytest.approx(deviation, abs=0.03)


def test_a_learned_variance_is_used() -> None:
    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return torch.cat((faint(x_t, t, label), torch.full_like(x_t, -1.0)), dim=1)

    def images(net: Network, variance: Variance, learned: bool) -> Tensor:
        sampler = Ancestral(num_steps=20, variance=variance)
        model = model_of(net, learned_variance=learned)
        return generate(model, sampler, seed=0, sample_ids=torch.arange(2), label=None)

    small = images(faint, "fixed_small", learned=False)
    torch.testing.assert_close(images(network, "learned_range", learned=True), small, rtol=0, atol=1e-5)
    assert torch.equal(images(network, "fixed_small", learned=True), small)
    with pytest.raises(ValueError, match=r"^variance: learned_range needs"):
        images(faint, "learned_range", learned=False)


def test_guidance_needs_a_null_label_and_labels() -> None:
    def images(label: Tensor | None, null_label: int | None) -> Tensor:
        sampler = DDIM(num_steps=3, guidance_scale=2.0)
        model = model_of(elementwise, null_label=null_label)
        return generate(model, sampler, seed=0, sample_ids=torch.arange(2), label=label)

    images(torch.arange(2), 2)
    with pytest.raises(ValueError, match=r"^guidance_scale: needs a network trained with a null label, got 2.0"):
        images(torch.arange(2), None)
    with pytest.raises(ValueError, match=r"^label: "):
        images(None, 2)


def test_one_step_goes_straight_to_x_0_hat() -> None:
    ids = torch.arange(2)
    got = generate(model_of(elementwise), DDIM(num_steps=1), seed=5, sample_ids=ids, label=None)
    x_T = standard_normal(5, Stream.X_T, ids, 0, SHAPE)
    x_0_hat = NetworkDenoiser(network=elementwise, schedule=SCHEDULE)(x_T, torch.full((2,), 99), None).x_0_hat
    torch.testing.assert_close(got, x_0_hat)


def test_global_random_state_and_gradients_are_left_alone() -> None:
    network = nn.Conv2d(3, 3, 1).eval()
    before = torch.get_rng_state()
    model = model_of(lambda x, t, label: network(x))
    got = generate(model, CHOSEN[0], seed=0, sample_ids=torch.arange(2), label=None)
    assert not got.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_training_mode_is_refused() -> None:
    class Zero(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            return torch.zeros_like(x_t)

    network = Zero()
    with pytest.raises(ValueError, match=r"^network: must be in eval mode"):
        generate(model_of(network), CHOSEN[0], seed=0, sample_ids=torch.arange(2), label=None)
    network.eval()
    generate(model_of(network), CHOSEN[0], seed=0, sample_ids=torch.arange(2), label=None)


def test_nan_is_not_hidden() -> None:
    model = model_of(lambda x, t, label: x * torch.nan)
    got = generate(model, CHOSEN[0], seed=0, sample_ids=torch.arange(2), label=None)
    assert bool(got.isnan().all())


def test_more_steps_than_trained_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_steps: .*100.* got 101"):
        generate(model_of(elementwise), DDIM(num_steps=101), seed=0, sample_ids=torch.arange(1), label=None)
