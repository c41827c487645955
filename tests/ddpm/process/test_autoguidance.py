"""Autoguidance: closed forms on Gaussians, guides that predict something else, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm import (
    SAMPLERS,
    DiffusionModel,
    DPMSolver2M,
    GuidedNetwork,
    Network,
    NetworkDenoiser,
    NoiseSchedule,
    PredictionType,
    ScheduleConfig,
    generate,
    make_schedule,
    spaced_timesteps,
)
from tests.ddpm.oracles import Mixture

SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))
T = torch.tensor([0, 1, 500, 999])
KINDS: list[PredictionType] = ["eps", "x_0", "v"]


def gaussian(mean: float, variance: float = 0.04) -> Mixture:
    return Mixture(weights=(1.0,), means=(mean,), variances=(variance,))


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def guide_of(network: Network, schedule: NoiseSchedule = SCHEDULE, **options: Any) -> DiffusionModel:
    return DiffusionModel(network=network, schedule=schedule, image_shape=(1, 4, 4), **options)


def guided(main: Network, weak: Network, scale: float, **options: Any) -> GuidedNetwork:
    guide = guide_of(weak, prediction_type=options.pop("weak_kind", "eps"))
    return GuidedNetwork(network=main, schedule=SCHEDULE, guide=guide, scale=scale, **options)


@pytest.mark.parametrize("weak_kind", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_it_leads_away_from_the_guide_whatever_the_two_predict(
    scale: float, kind: PredictionType, weak_kind: PredictionType
) -> None:
    """N(0.5, s^2) guided by N(-0.1, s^2): at every t exact for N(-0.1 + 0.6 scale, s^2), in the main network's kind."""
    network = guided(
        gaussian(0.5).network(SCHEDULE, kind),
        gaussian(-0.1).network(SCHEDULE, weak_kind),
        scale,
        prediction_type=kind,
        weak_kind=weak_kind,
    )
    x_t = images(0, 4, 2, 3, 3)
    for t in (T, T.to(torch.float64) * 0.999):
        expected = gaussian(-0.1 + 0.6 * scale).network(SCHEDULE, kind)(x_t, t, None)
        torch.testing.assert_close(network(x_t, t, None), expected, rtol=0, atol=1e-9)


def test_a_sampler_guided_away_from_a_wider_model_makes_the_closed_form_gaussian() -> None:
    """The case that the paper is about: equal means, the guide too wide. The law that results is narrower than either.

    Precisions of x_t are combined like scores: 2 / (abar 0.04 + 1 - abar) - 1 / (abar 0.16 + 1 - abar).
    """
    network = guided(gaussian(0.3, 0.04).network(SCHEDULE), gaussian(0.3, 0.16).network(SCHEDULE), 2.0)

    def closed_form(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar_at(t)[:, None, None, None]
        precision = 2 / (alpha_bar * 0.04 + 1 - alpha_bar) - 1 / (alpha_bar * 0.16 + 1 - alpha_bar)
        return (1 - alpha_bar).sqrt() * precision * (x_t - alpha_bar.sqrt() * 0.3)

    x_T = images(1, 64, 1, 8, 8)

    def run(net: Network) -> Tensor:
        denoise = NetworkDenoiser(network=net, schedule=SCHEDULE, clip_x_0=False)
        timesteps = spaced_timesteps(SCHEDULE, 50, "log_snr")
        return DPMSolver2M().sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps)

    made = run(network)
    torch.testing.assert_close(made, run(closed_form), rtol=0, atol=1e-9)
    assert float(made.std()) < 0.8 * float(run(gaussian(0.3, 0.04).network(SCHEDULE)).std())


class Counting(nn.Module):
    """Counts calls and remembers the labels; labels shift the answer."""

    def __init__(self, channels: int = 1, slope: float = 0.7) -> None:
        super().__init__()
        self.channels, self.slope, self.labels = channels, slope, list[list[int] | None]()

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        self.labels.append(None if label is None else label.tolist())
        shift = t / 1000 if label is None else t / 1000 + label
        answer = torch.tanh(self.slope * x_t + shift[:, None, None, None].to(x_t))
        return torch.cat([answer * (1 + 0.1 * k) for k in range(self.channels)], dim=1)


def sample(
    main: nn.Module, weak: nn.Module | None, *, name: str = "ddim", labelled: bool = True, **options: Any
) -> Tensor:
    ids = torch.arange(3)
    schedule = options.pop("guide_schedule", SCHEDULE)
    return generate(
        DiffusionModel(network=main, schedule=SCHEDULE, image_shape=(1, 4, 4)),
        SAMPLERS[name](num_steps=8, **options),
        seed=4,
        sample_ids=ids,
        label=ids % 2 if labelled else None,
        guide=None if weak is None else guide_of(weak, schedule),
    )


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpm_solver_2m", "heun"])
@pytest.mark.parametrize("labelled", [True, False])
def test_both_networks_are_called_once_per_evaluation_with_the_same_labels(name: str, labelled: bool) -> None:
    main, weak = Counting().eval(), Counting(slope=0.5).eval()
    made = sample(main, weak, labelled=labelled, name=name, guidance_scale=2.0, spacing="karras")
    calls = SAMPLERS[name](num_steps=8, spacing="karras").num_evaluations(SCHEDULE)  # type: ignore[call-arg]
    assert main.labels == weak.labels == [[0, 1, 0] if labelled else None] * calls
    assert not torch.equal(made, sample(main, None, labelled=labelled, name=name, spacing="karras"))


def test_a_guide_like_the_network_itself_changes_nothing() -> None:
    plain = sample(Counting().eval(), None)
    torch.testing.assert_close(sample(Counting().eval(), Counting().eval(), guidance_scale=3.0), plain)


def test_outside_the_interval_the_guide_is_not_asked() -> None:
    main, weak = Counting().eval(), Counting().eval()
    sample(main, weak, guidance_scale=2.0, guidance_interval=(0.2, 2.0))
    sigmas = SCHEDULE.sigma(torch.tensor(spaced_timesteps(SCHEDULE, 8, "linspace")))
    assert len(main.labels) == 8 and len(weak.labels) == int(((sigmas > 0.2) & (sigmas <= 2.0)).sum()) > 0


def test_rescaling_and_a_learned_variance_are_those_of_the_network() -> None:
    x_t, label = images(2, 4, 1, 3, 3), torch.tensor([0, 1, 0, 1])
    main, weak = Counting(channels=2), Counting(channels=2, slope=0.4)
    own, plain = main(x_t, T, label), guided(main, weak, 4.0)(x_t, T, label)
    assert plain.shape == (4, 2, 3, 3) and torch.equal(plain[:, 1:], own[:, 1:])
    torch.testing.assert_close(plain, guided(main, Counting(slope=0.4), 4.0)(x_t, T, label))
    rescaled = guided(main, weak, 4.0, rescale=1.0)(x_t, T, label)[:, :1]
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), own[:, :1].std(dim=(1, 2, 3)))


def test_low_precision_answers_are_combined_in_the_precision_of_x_t() -> None:
    def low(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return Counting()(x_t, t, label).to(torch.bfloat16)

    assert guided(low, low, 2.0, weak_kind="v")(images(7, 4, 1, 2, 2), T, None).dtype == torch.float64


def wide(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    return torch.zeros(len(x_t), 1, 5, 5)


OTHER = make_schedule(ScheduleConfig(name="cosine", num_timesteps=500))
NO_SIGNAL = make_schedule(ScheduleConfig(name="cosine", zero_terminal_snr=True))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"guide: .*1000 steps.*got 500 steps",
            lambda: sample(Counting().eval(), Counting().eval(), guidance_scale=2.0, guide_schedule=OTHER),
        ),
        (
            r"guide: .*1000 steps.*got 1000 steps.*to 0;",
            lambda: sample(Counting().eval(), Counting().eval(), guidance_scale=2.0, guide_schedule=NO_SIGNAL),
        ),
        (r"guide: .*no effect.*got one", lambda: sample(Counting().eval(), Counting().eval())),
        (r"guide: .*eval mode, got training", lambda: sample(Counting().eval(), Counting(), guidance_scale=2.0)),
        (r"network: .*eval mode, got training", lambda: sample(Counting(), Counting().eval(), guidance_scale=2.0)),
        (
            r"guide: must predict eps of shape \[4, 1, 2, 2\], got \[4, 1, 5, 5\]",
            lambda: guided(Counting(), wide, 2.0)(images(0, 4, 1, 2, 2), T, None),
        ),
        (
            r"prediction_type: .*zero terminal SNR, got 'eps'",
            lambda: GuidedNetwork(network=wide, schedule=NO_SIGNAL, guide=guide_of(wide, NO_SIGNAL), scale=2.0),
        ),
        (r"guidance_scale: .*got 2.0.*give a guide", lambda: sample(Counting().eval(), None, guidance_scale=2.0)),
    ],
)
def test_impossible_guides_are_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
