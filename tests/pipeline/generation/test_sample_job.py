"""What is asked for, and all that is checked of it before any work: against itself, the models and the output."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ddpm import (
    DDIM,
    Ancestral,
    DPMSolver2M,
    DPMSolver2MSDE,
    Heun,
    ModelConfig,
    Sampler,
    ScheduleConfig,
    flops_per_image,
    make_schedule,
)
from pipeline.cluster import ClusterConfig
from pipeline.errors import ConfigError, ModelMissingError
from pipeline.generation.requests.requests import Edit, Inpaint, Interpolate, Partial
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import ImagesConfig, SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.models.model_files import read_card, read_model_files
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig
from tests.pipeline.edit_fixtures import editing_config, write_editing_model
from tests.pipeline.runs_in_process import make_in_process
from tests.pipeline.small_datasets import SmallDataset, make_dataset
from tests.pipeline.tiny_models import TINY_UNET, write_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    return make_dataset(tmp_path_factory.mktemp("data"), [7, 5, 9])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_editing_model(tmp_path_factory.mktemp("models") / "model")


def config_of(model: str, output: Path, **changes: Any) -> SampleConfig:
    return SampleConfig(**{"model": model, "output": str(output), "sampler": DDIM(num_steps=4), **changes})


@pytest.mark.parametrize(
    "field",
    ["images_per_class", "shard_size", "batch_size", "num_actors", "cpus_per_actor", "contact_sheet_columns"],
)
@pytest.mark.parametrize("kind", [ImagesConfig, SampleConfig])
def test_impossible_configurations_are_refused_by_name(kind: type[ImagesConfig], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*got 0"):
        kind(model="m", output="o", **{field: 0})
    with pytest.raises(ValueError, match=r"^seed: "):
        kind(model="m", output="o", seed=-1)


@pytest.mark.parametrize("field", ["model", "output", "guide_model", "calibration"])
def test_empty_places_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: must not be empty"):
        SampleConfig(**{"model": "m", "output": "o", field: ""})


def test_request_and_sampler_are_checked_against_each_other(dataset: SmallDataset) -> None:
    for request, sampler, words in (
        (Partial(inputs="x", strength=1e-10), DDIM(num_steps=5), r"^request\.strength: takes none of the 5 steps"),
        (Inpaint(inputs="x", mask="centre"), DPMSolver2M(), r"^sampler\.name: inpainting walks with ancestral or ddim"),
        (Interpolate(inputs="x"), DDIM(), r"^sampler\.name: interpolation needs a sampler without noise"),
    ):
        with pytest.raises(ValueError, match=words):
            SampleConfig(model="m", output="o", request=request, sampler=sampler)


def test_a_job_of_other_images_is_made_of_their_part() -> None:
    tracking, cluster = TrackingConfig(uri="sqlite:///x.db"), ClusterConfig(num_cpus=3)
    config = SampleConfig(
        model="m", output="o", seed=4, request=Partial(inputs="x"), sampler=Heun(), tracking=tracking, cluster=cluster
    )
    images = config.images
    assert type(images) is ImagesConfig
    names = {field.name for field in dataclasses.fields(ImagesConfig)}
    assert {name: getattr(images, name) for name in names} == {name: getattr(config, name) for name in names}
    assert SampleConfig.of(images, tracking, cluster) == config
    assert SampleConfig.of(images, TrackingConfig(), cluster) != config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": DDIM(num_steps=101)}, r"^sample: num_steps: .*101"),
        ({"model": "/nowhere"}, r"/nowhere"),
        ({"output": "ftp://host/x"}, r"^output: ftp: .*, got .ftp://host/x.$"),
        ({"sampler": Ancestral(num_steps=4, variance="learned_range")}, r"sampler\.variance: .* not learned one"),
        (
            {"sampler": Ancestral(num_steps=4, variance="analytic")},
            r"calibration: goes with .* got None with ancestral",
        ),
        ({"calibration": "/nowhere.json"}, r"calibration: goes with .* got /nowhere\.json with ddim"),
        ({"images_per_class": 2**48}, r"num_images: must be in \[1, 2\^48\]"),
    ],
    ids=["steps", "model", "output", "variance", "no calibration", "calibration", "images"],
)
def test_mistakes_are_found_before_anything_is_started(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    with pytest.raises((ConfigError, ModelMissingError, ValueError), match=message):
        sample(dataclasses.replace(config, **change))
    assert not (tmp_path / "out").exists()


def test_guidance_needs_classes_or_a_guide(tmp_path: Path) -> None:
    guided = DDIM(num_steps=4, guidance_scale=2.0)
    without = write_model(tmp_path / "model", num_classes=None)
    config = config_of(without, tmp_path / "out", sampler=guided)
    with pytest.raises(ConfigError, match=r"guidance_scale: the model has no classes to guide to, got 2\.0"):
        resolve_job(config)
    assert resolve_job(dataclasses.replace(config, guide_model=without)).guide is not None


@pytest.mark.parametrize(
    ("guide", "changes", "words"),
    [
        ({"num_classes": 3, "class_names": "abc"}, {}, r"^guide_model: .* num_classes 3, .* 7; choose"),
        ({"class_names": "gfedcba"}, {}, r"^guide_model: .*other classes"),
        ({"image_size": (16, 16)}, {}, r"^guide_model: .*image_size \(16, 16\)"),
        ({"image_size": (8, 16)}, {}, r"^guide_model: .*image_size \(8, 16\)"),
        ({"num_levels": 65_536}, {}, r"^guide_model: .*num_levels 65536"),
        ({}, {"guidance_scale": 1.0}, r"guide_model: has no effect where sampler.guidance_scale is 1"),
    ],
)
def test_guides_that_do_not_fit_are_refused(
    model: str, tmp_path: Path, guide: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    config = config_of(
        model,
        tmp_path / "out",
        sampler=DDIM(**({"guidance_scale": 2.0, "num_steps": 5} | changes)),
        guide_model=write_editing_model(tmp_path / "guide", **guide),
    )
    with pytest.raises(ConfigError, match=words):
        sample(config)
    assert not (tmp_path / "out").exists()


def test_a_guide_may_predict_something_else_with_another_network(model: str, tmp_path: Path) -> None:
    other = dataclasses.replace(TINY_UNET, base_channels=16, prediction_type="v")
    guide = write_editing_model(tmp_path / "guide", network=other)
    config = config_of(model, tmp_path / "out", sampler=DDIM(num_steps=4, guidance_scale=2.0), guide_model=guide)
    job = resolve_job(config)
    assert job.spec.guide_digest == read_model_files(open_store(guide)).digest
    assert job.flops_per_image == 4 * (flops(model) + flops(guide)) and job.evaluations_per_image == 8


def flops(folder: str) -> int:
    return flops_per_image(model_config(folder))


def model_config(folder: str) -> ModelConfig:
    return read_card(read_model_files(open_store(folder))).config


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        (DDIM(num_steps=4), 4),
        (DDIM(num_steps=4, guidance_scale=2.0), 8),
        (DPMSolver2MSDE(num_steps=6), 6),
        (Heun(num_steps=5, spacing="trailing"), None),
    ],
    ids=["plain", "guided", "solver", "heun"],
)
def test_the_cost_of_an_image_is_its_samplers(
    model: str, tmp_path: Path, sampler: Sampler, evaluations: int | None
) -> None:
    job = resolve_job(config_of(model, tmp_path / "out", sampler=sampler))
    if evaluations is None:  # a second evaluation for most steps, by the sampler's own count
        assert 5 < job.evaluations_per_image <= 10
    else:
        assert job.evaluations_per_image == evaluations
    assert job.flops_per_image == job.evaluations_per_image * flops(model)


def test_the_spec_says_what_decides_the_images(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", sampler=Heun(num_steps=4), seed=9, shard_size=6, batch_size=4)
    spec = resolve_job(config).spec
    assert spec.model_digest == read_model_files(open_store(model)).digest
    assert (spec.sampler, spec.sampler_revision, spec.seed) == (config.sampler, Heun.revision, 9)
    assert (spec.image_size, spec.channels, spec.num_levels, spec.num_classes) == ((8, 8), 1, 256, 7)
    assert (spec.shard_size, spec.batch_size, spec.request, spec.guide_digest) == (6, 4, None, None)
    ways = [{"num_actors": 7}, {"shard_timeout_s": 5.0}, {"images_per_class": 1}, {"contact_sheet_columns": 2}]
    for way in ways:
        assert resolve_job(dataclasses.replace(config, **way)).spec == spec, "who makes how many is no part of it"


def test_two_steps_in_log_snr_are_another_revision_where_no_signal_is_left() -> None:
    """There they were T-2 and T-1 once; everywhere else the images, and so the digests, are what they were."""
    plain, zero = (make_schedule(ScheduleConfig(zero_terminal_snr=no_signal)) for no_signal in (False, True))
    two = Heun(num_steps=2, spacing="log_snr")
    assert two.revision_on(zero) == Heun.revision + 1
    assert two.revision_on(plain) == Heun.revision
    for other in (Heun(num_steps=3, spacing="log_snr"), Heun(num_steps=2), Heun(num_steps=1, spacing="log_snr")):
        assert other.revision_on(zero) == Heun.revision


def test_a_new_revision_of_a_sampler_makes_other_runs(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(model, tmp_path / "out", images_per_class=1, shard_size=7, batch_size=7)
    make_in_process(config)
    before = sample(config)
    monkeypatch.setattr(DDIM, "revision", 2)
    assert resolve_job(config).store.uri != before.store.uri and resolve_job(config).manifest is None


@pytest.mark.parametrize(
    ("request_", "values", "words"),
    [
        (Inpaint, {"mask": "lower_half", "label": 7}, r"^request\.label: must be below 7"),
        (Interpolate, {"num_images": 31}, r"^request\.num_images: 21 inputs .* give 30 images, got 31"),
    ],
)
def test_edits_that_do_not_fit_their_inputs_are_refused_before_any_work(
    dataset: SmallDataset, model: str, tmp_path: Path, request_: type[Edit], values: dict[str, Any], words: str
) -> None:
    request = request_(inputs=dataset.uri, **values)
    config = editing_config(model, tmp_path / "out", request, sampler=DDIM(num_steps=15, eta=0.0))
    with pytest.raises(ConfigError, match=words):
        sample(config)
    assert not (tmp_path / "out").exists()
