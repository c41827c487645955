"""Image i is image i in any batch; the draws are the documented ones; the config refuses what would be ignored."""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ddpm import (
    NetworkDenoiser,
    PredictionType,
    SamplerConfig,
    ScheduleConfig,
    Stream,
    ancestral_sample,
    ddim_sample,
    dpm_solver_2m_sample,
    dpm_solver_2m_sde_sample,
    dpm_solver_3m_common_sample,
    dpm_solver_3m_sample,
    generate,
    heun_sample,
    make_schedule,
    num_evaluations,
    p_sample_loop,
    run_sampler,
    spaced_timesteps,
    standard_normal,
)
from ddpm.samplers.config import SamplerName
from tests.ddpm.oracles import TWO_MODES

SCHEDULE = make_schedule(ScheduleConfig(name="cosine", num_timesteps=100))
SHAPE = (3, 5, 7)
SAMPLERS = [
    SamplerConfig(name="ancestral", num_steps=20),
    SamplerConfig(name="ancestral", num_steps=20, variance="fixed_large", spacing="trailing"),
    SamplerConfig(name="ddim", num_steps=20),
    SamplerConfig(name="ddim", num_steps=20, eta=0.0, spacing="leading", clip_x_0=False),
    SamplerConfig(name="dpm_solver_2m", num_steps=20, dynamic_threshold=0.9),
    SamplerConfig(name="dpm_solver_2m_sde", num_steps=20, spacing="quadratic", guidance_scale=2.0),
    SamplerConfig(name="dpm_solver_3m", num_steps=20, spacing="trailing"),
    SamplerConfig(name="dpm_solver_3m_common", num_steps=20, clip_x_0=False),
    SamplerConfig(name="heun", num_steps=10, spacing="log_snr"),
    SamplerConfig(name="heun", num_steps=10, spacing="karras", churn=10.0),
]


def elementwise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """A network without sums: rounding cannot depend on the batch. Labels shift it."""
    shift = t / 100 if label is None else t / 100 + label
    return torch.tanh(x_t * 0.7 + shift.to(x_t)[:, None, None, None])


def faint(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """A network that takes almost all of x_t for noise: images stay within [-1, 1] though the predictions leave it."""
    return 0.97 * x_t


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name}-{s.spacing}")
def test_an_image_does_not_depend_on_its_batch(sampler: SamplerConfig) -> None:
    ids = torch.tensor([4711, 0, 2**40 + 3, 12, 13, 14, 2**32])
    label = ids % 4

    def images(rows: list[int]) -> Tensor:
        return generate(
            elementwise,
            SCHEDULE,
            sampler,
            seed=7,
            sample_ids=ids[rows],
            label=label[rows],
            image_shape=SHAPE,
            null_label=4,
        )

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
        return generate(
            elementwise,
            SCHEDULE,
            SAMPLERS[0],
            seed=seed,
            sample_ids=ids,
            label=torch.full_like(ids, label),
            image_shape=SHAPE,
        )

    assert not torch.equal(images(0, 0), images(1, 0))
    assert not torch.equal(images(0, 0), images(0, 1))


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no_clip"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    ("name", "option"), [("ancestral", "fixed_small"), ("ancestral", "fixed_large"), ("ddim", 0.5), ("ddim", 1.0)]
)
def test_generate_uses_the_config_and_the_documented_draws(name: str, option: Any, spacing: Any, clip: bool) -> None:
    """x_T is draw 0 of its stream; the steps are draws 1, 2, ... of theirs, and the last step draws nothing."""
    ids, drawn = torch.arange(4), []

    def noise(draw: int) -> Tensor:
        drawn.append(draw)
        return standard_normal(5, Stream.STEP, ids, draw, SHAPE)

    x_T = standard_normal(5, Stream.X_T, ids, 0, SHAPE)
    denoise = NetworkDenoiser(network=faint, schedule=SCHEDULE, clip_x_0=clip)
    timesteps = spaced_timesteps(100, 10, spacing)
    options: dict[str, Any] = {"name": name, "num_steps": 10, "spacing": spacing, "clip_x_0": clip}
    if name == "ancestral":
        options["variance"] = option
        x_0 = ancestral_sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, noise=noise, variance=option)
    else:
        options["eta"] = option
        x_0 = ddim_sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, noise=noise, eta=option)
    assert drawn == list(range(1, 10))

    def images(**changed: Any) -> Tensor:
        config = SamplerConfig(**{**options, **changed})
        return generate(faint, SCHEDULE, config, seed=5, sample_ids=ids, label=None, image_shape=SHAPE)

    assert torch.equal(images(), x_0.clamp(-1, 1))
    assert not torch.equal(images(clip_x_0=not clip), x_0.clamp(-1, 1))


@pytest.mark.parametrize("options", [{}, {"churn": 8.0, "churn_interval": (0.01, 60.0), "churn_noise": 1.1}])
def test_the_new_samplers_use_the_config_and_the_documented_draws(options: dict[str, Any]) -> None:
    """Churn has a stream of its own; the stochastic 2M draws from the steps' stream."""
    ids, label = torch.arange(4), torch.tensor([0, 1, 2, 3])
    x_T = standard_normal(5, Stream.X_T, ids, 0, SHAPE)
    denoise = NetworkDenoiser(network=elementwise, schedule=SCHEDULE, prediction_type="v", dynamic_threshold=0.8)
    timesteps = spaced_timesteps(SCHEDULE, 10, "karras")

    def images(name: Any, **more: Any) -> Tensor:
        config = SamplerConfig(name=name, num_steps=10, spacing="karras", dynamic_threshold=0.8, **more)
        return generate(
            elementwise,
            SCHEDULE,
            config,
            seed=5,
            sample_ids=ids,
            label=label,
            image_shape=SHAPE,
            prediction_type="v",
        )

    def noise(stream: Stream) -> Callable[[int], Tensor]:
        return lambda draw: standard_normal(5, stream, ids, draw, SHAPE)

    heun = heun_sample(denoise, SCHEDULE, x_T, label, timesteps=timesteps, noise=noise(Stream.CHURN), **options)
    assert torch.equal(images("heun", **options), heun.clamp(-1, 1))
    plain = dpm_solver_2m_sample(denoise, SCHEDULE, x_T, label, timesteps=timesteps)
    assert torch.equal(images("dpm_solver_2m"), plain.clamp(-1, 1))
    third = dpm_solver_3m_sample(denoise, SCHEDULE, x_T, label, timesteps=timesteps)
    assert torch.equal(images("dpm_solver_3m"), third.clamp(-1, 1))
    common = dpm_solver_3m_common_sample(denoise, SCHEDULE, x_T, label, timesteps=timesteps)
    assert torch.equal(images("dpm_solver_3m_common"), common.clamp(-1, 1))
    sde = dpm_solver_2m_sde_sample(denoise, SCHEDULE, x_T, label, timesteps=timesteps, noise=noise(Stream.STEP))
    assert torch.equal(images("dpm_solver_2m_sde"), sde.clamp(-1, 1))
    for a, b in itertools.combinations((heun, plain, third, common, sde), 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name}-{s.spacing}")
def test_deterministic_samplers_are_known_as_such(sampler: SamplerConfig) -> None:
    """From one x_T, with two keys for the noise of the steps."""
    ids = torch.arange(2)
    x_T = standard_normal(0, Stream.X_T, ids, 0, SHAPE)
    denoise = NetworkDenoiser(network=elementwise, schedule=SCHEDULE)
    one, two = (run_sampler(denoise, SCHEDULE, sampler, x_T, ids, seed=seed, sample_ids=ids) for seed in (1, 2))
    assert torch.equal(one, two) is sampler.is_deterministic


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name}-{s.spacing}")
def test_evaluations_are_counted(sampler: SamplerConfig) -> None:
    calls = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        calls.append(len(x_t))
        return elementwise(x_t, t, label)

    ids = torch.arange(2)
    generate(network, SCHEDULE, sampler, seed=0, sample_ids=ids, label=ids, image_shape=SHAPE, null_label=7)
    assert len(calls) == num_evaluations(SCHEDULE, sampler)
    assert len(calls) == sampler.num_steps if sampler.name != "heun" else len(calls) > sampler.num_steps
    assert set(calls) == ({4} if sampler.guidance_scale != 1 else {2})


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_every_sampler_makes_the_data_it_was_given_the_network_of(name: Any) -> None:
    """Two modes, each of eps, x_0 and v: the same images, and of the 3,200 pixels as many in each mode as should be."""
    ids = torch.arange(50)
    schedule = make_schedule(ScheduleConfig(name="cosine"))
    sampler = SamplerConfig(
        name=name, num_steps=100, clip_x_0=False, spacing="log_snr" if name == "heun" else "linspace"
    )
    images = {
        kind: generate(
            lambda x, t, label, kind=kind: TWO_MODES.network(schedule, kind)(x.double(), t, label),
            schedule,
            sampler,
            seed=1,
            sample_ids=ids,
            label=None,
            image_shape=(1, 8, 8),
            prediction_type=kind,
        )
        for kind in get_args(PredictionType)
    }
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

    def images(net: Any, variance: Any, learned: bool) -> Tensor:
        sampler = SamplerConfig(name="ancestral", num_steps=20, variance=variance)
        return generate(
            net,
            SCHEDULE,
            sampler,
            seed=0,
            sample_ids=torch.arange(2),
            label=None,
            image_shape=SHAPE,
            learned_variance=learned,
        )

    small = images(faint, "fixed_small", learned=False)
    torch.testing.assert_close(images(network, "learned_range", learned=True), small, rtol=0, atol=1e-5)
    assert torch.equal(images(network, "fixed_small", learned=True), small)
    with pytest.raises(ValueError, match=r"^variance: learned_range needs"):
        images(faint, "learned_range", learned=False)


def test_guidance_needs_a_null_label_and_labels() -> None:
    def images(label: Tensor | None, null_label: int | None) -> Tensor:
        sampler = SamplerConfig(num_steps=3, guidance_scale=2.0)
        return generate(
            elementwise,
            SCHEDULE,
            sampler,
            seed=0,
            sample_ids=torch.arange(2),
            label=label,
            image_shape=SHAPE,
            null_label=null_label,
        )

    images(torch.arange(2), 2)
    with pytest.raises(ValueError, match=r"^guidance_scale: needs a network trained with a null label, got 2.0"):
        images(torch.arange(2), None)
    with pytest.raises(ValueError, match=r"^label: "):
        images(None, 2)


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posterior_variance() -> None:
    """Song et al., section 4.1. They are written differently, so this checks both, with clipping on."""
    x_T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = NetworkDenoiser(network=elementwise, schedule=SCHEDULE)

    def noise(draw: int) -> Tensor:
        return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)

    timesteps = [0, 3, 10, 50, 99]
    ddim = ddim_sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, noise=noise, eta=1.0)
    ancestral = ancestral_sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, noise=noise, variance="fixed_small")
    torch.testing.assert_close(ddim, ancestral, rtol=0, atol=1e-10)


def test_all_steps_are_the_full_loop() -> None:
    x_T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = NetworkDenoiser(network=elementwise, schedule=SCHEDULE)

    def noise(draw: int) -> Tensor:
        return torch.full_like(x_T, 0.1 * (-1) ** draw)

    subset = ancestral_sample(denoise, SCHEDULE, x_T, None, timesteps=range(100), noise=noise, variance="fixed_large")
    loop = p_sample_loop(SCHEDULE, denoise, x_T, None, variance="fixed_large", noise=noise)
    torch.testing.assert_close(subset, loop, rtol=0, atol=1e-9)


def test_deterministic_sampling_draws_no_noise() -> None:
    def no_noise(draw: int) -> Tensor:
        raise AssertionError(f"draw {draw}")

    ddim_sample(
        NetworkDenoiser(network=elementwise, schedule=SCHEDULE),
        SCHEDULE,
        torch.zeros(1, *SHAPE),
        None,
        timesteps=[0, 50, 99],
        noise=no_noise,
        eta=0.0,
    )


def test_one_step_goes_straight_to_x_0_hat() -> None:
    ids = torch.arange(2)
    sampler = SamplerConfig(num_steps=1)
    got = generate(elementwise, SCHEDULE, sampler, seed=5, sample_ids=ids, label=None, image_shape=SHAPE)
    x_T = standard_normal(5, Stream.X_T, ids, 0, SHAPE)
    x_0_hat = NetworkDenoiser(network=elementwise, schedule=SCHEDULE)(x_T, torch.full((2,), 99), None).x_0_hat
    torch.testing.assert_close(got, x_0_hat)


def test_global_random_state_and_gradients_are_left_alone() -> None:
    model = nn.Conv2d(3, 3, 1).eval()
    before = torch.get_rng_state()
    got = generate(
        lambda x, t, label: model(x),
        SCHEDULE,
        SAMPLERS[0],
        seed=0,
        sample_ids=torch.arange(2),
        label=None,
        image_shape=SHAPE,
    )
    assert not got.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_training_mode_is_refused() -> None:
    class Zero(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            return torch.zeros_like(x_t)

    model = Zero()
    with pytest.raises(ValueError, match=r"^network: must be in eval mode"):
        generate(model, SCHEDULE, SAMPLERS[0], seed=0, sample_ids=torch.arange(2), label=None, image_shape=SHAPE)
    model.eval()
    generate(model, SCHEDULE, SAMPLERS[0], seed=0, sample_ids=torch.arange(2), label=None, image_shape=SHAPE)


def test_nan_is_not_hidden() -> None:
    got = generate(
        lambda x, t, label: x * torch.nan,
        SCHEDULE,
        SAMPLERS[0],
        seed=0,
        sample_ids=torch.arange(2),
        label=None,
        image_shape=SHAPE,
    )
    assert bool(got.isnan().all())


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("name", {"name": "euler"}),
        ("num_steps", {"num_steps": 0}),
        ("eta", {"eta": 1.5}),
        ("eta", {"eta": -0.1}),
        ("eta", {"name": "ancestral", "eta": 0.5}),
        ("eta", {"name": "heun", "eta": 0.0}),
        ("variance", {"variance": "fixed_large"}),
        ("variance", {"name": "dpm_solver_2m", "variance": "learned_range"}),
        ("variance", {"name": "ancestral", "variance": "learned"}),
        ("spacing", {"spacing": "exponential"}),
        ("dynamic_threshold", {"dynamic_threshold": 0.0}),
        ("dynamic_threshold", {"dynamic_threshold": 0.9, "clip_x_0": False}),
        ("guidance_scale", {"guidance_scale": -1.0}),
        ("guidance_scale", {"guidance_rescale": 0.5}),
        ("guidance_scale", {"guidance_interval": (0.1, 2.0)}),
        ("guidance_interval", {"guidance_scale": 2.0, "guidance_interval": (2.0, 0.1)}),
        ("guidance_rescale", {"guidance_scale": 2.0, "guidance_rescale": 1.1}),
        ("churn", {"name": "heun", "churn": -1.0}),
        ("churn", {"churn": 1.0}),
        ("churn_interval", {"name": "heun", "churn": 1.0, "churn_interval": (3.0, 3.0)}),
        ("churn_noise", {"name": "heun", "churn": 1.0, "churn_noise": -1.0}),
    ],
)
def test_impossible_configs_are_refused(field: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .*got"):
        SamplerConfig(**options)  # type: ignore[arg-type]


def test_more_steps_than_trained_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_steps: .*100.* got 101"):
        generate(
            elementwise,
            SCHEDULE,
            SamplerConfig(num_steps=101),
            seed=0,
            sample_ids=torch.arange(1),
            label=None,
            image_shape=SHAPE,
        )
