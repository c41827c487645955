"""The bound over a stream: any cut of it gives the same figures, and the model's own variance is used."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm import (
    BoundStatistics,
    DiffusionModel,
    LikelihoodConfig,
    ModelConfig,
    PredictionType,
    ScheduleConfig,
    UNetConfig,
    build_model,
    images_to_x_0,
    make_schedule,
    prediction_target,
    probability_flow_bound,
    q_sample,
)
from pipeline.data.image_stream import LabelledImages, join_images
from pipeline.measuring.bound import BoundMeter, eps_network

TINY = UNetConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
CPU = torch.device("cpu")


def model(num_classes: int | None = None, **network: object) -> DiffusionModel:
    return build_model(config(num_classes, **network))


def config(num_classes: int | None = None, **network: object) -> ModelConfig:
    return ModelConfig(
        network=replace(TINY, **network),  # type: ignore[arg-type]
        schedule=ScheduleConfig(name="cosine", num_timesteps=20),
        image_size=(8, 8),
        channels=1,
        num_classes=num_classes,
    )


def stream(num_classes: int | None = None) -> Iterator[LabelledImages]:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    labels = None if num_classes is None else np.arange(12) % num_classes
    for start in (0, 5):
        rows = slice(start, 5 if start == 0 else 12)
        yield LabelledImages(images=images[rows], labels=None if labels is None else labels[rows])


def measure(of: DiffusionModel, batch_size: int, **changes: object) -> BoundStatistics:
    bound = LikelihoodConfig(**changes)  # type: ignore[arg-type]
    meter = BoundMeter(model=of, seed=3, batch_size=batch_size, device=CPU)
    return meter.bound(stream(of.null_label), bound)


@pytest.mark.parametrize(
    "terms", [{}, *({"terms": terms, "terms_per_image": 4} for terms in ("stratified", "importance"))]
)
def test_any_cut_of_the_stream_gives_the_same_bound(terms: dict[str, object]) -> None:
    one, other = measure(model(num_classes=3), 12, **terms), measure(model(num_classes=3), 5, **terms)
    assert one.num_images == other.num_images == 12
    for name in ("bits_per_dim", "prior", "denoising", "decoder"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value, rel=1e-5), name
        assert getattr(one, name).standard_error == pytest.approx(getattr(other, name).standard_error, rel=1e-4), name


def test_a_learned_variance_is_used() -> None:
    of = model(learned_variance=True)
    assert isinstance(of.network, torch.nn.Module)
    final = [p for p in of.network.parameters() if p.shape[0] == 2]
    with torch.no_grad():
        final[-1][1] = -1.0  # v = -1: the posterior's variance
    learned = measure(of, 12)
    assert learned.config.variance == "learned_range"
    with torch.no_grad():
        final[-1][1] = 1.0  # v = 1: beta
    assert learned.bits_per_dim.value != pytest.approx(measure(of, 12).bits_per_dim.value, rel=1e-3)


@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
def test_a_network_of_any_prediction_predicts_eps(prediction_type: PredictionType) -> None:
    of = config(prediction_type=prediction_type)
    schedule = make_schedule(of.schedule)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn((6, 1, 8, 8), generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 1, 5, 10, 15, 18])
    answer = prediction_target(schedule, x_0, t, eps, prediction_type)
    predictor = eps_network(DiffusionModel.of(of, lambda x_t, t, label: answer))
    assert torch.allclose(predictor(q_sample(schedule, x_0, t, eps), t, None), eps, atol=1e-9)


def test_importance_agrees_with_every_term_and_is_surer_than_stratified() -> None:
    exact = measure(model(), 12)
    by_importance = measure(model(), 12, terms="importance", terms_per_image=40)
    stratified = measure(model(), 12, terms="stratified", terms_per_image=40)
    gap = by_importance.bits_per_dim.value - exact.bits_per_dim.value
    assert abs(gap) < 4 * by_importance.bits_per_dim.standard_error  # fixed seed; images' own spread is in it as well
    assert 0 < by_importance.bits_per_dim.standard_error < stratified.bits_per_dim.standard_error


def test_the_flow_agrees_with_the_function_it_is_made_of() -> None:
    of = model(num_classes=3)
    whole, cut = (
        BoundMeter(model=of, seed=3, batch_size=size, device=CPU).probability_flow(stream(3), 20) for size in (12, 5)
    )
    images = join_images(list(stream(3)))
    assert images.labels is not None
    found = probability_flow_bound(
        of,
        seed=3,
        sample_ids=torch.arange(12),
        x_0=images_to_x_0(torch.from_numpy(images.images)),
        label=torch.from_numpy(images.labels),
    )
    for moments in (whole, cut):
        assert int(moments.count[0]) == 12
        assert moments.estimate(0).value == pytest.approx(float(found.bits_per_dim.mean()), rel=1e-5)
        assert moments.estimate(1).value == pytest.approx(float(found.discretisation.mean()), abs=1e-5)
    assert abs(float(found.discretisation.mean())) > 1e-3, "half of 20 nodes are few enough to tell"


def test_no_image_is_refused() -> None:
    meter = BoundMeter(model=model(), seed=0, batch_size=4, device=CPU)
    with pytest.raises(ValueError, match="stream"):
        meter.bound(iter(()), LikelihoodConfig())
    with pytest.raises(ValueError, match="stream"):
        meter.probability_flow(iter(()), 20)
