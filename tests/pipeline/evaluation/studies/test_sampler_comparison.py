"""Samplers side by side: figures against their definitions, from images that are made once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ddpm import DDIM, Sampler, ScheduleConfig, frechet_distance, make_schedule
from pipeline.config_io import from_json
from pipeline.data.image_stream import LabelledImages, join_images, read_images
from pipeline.data.manifest import load_manifest
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.studies.sampler_comparison import (
    COMPARED,
    REFERENCE,
    SamplerComparisonConfig,
    compare_samplers,
    describe_plan,
    most_steps,
)
from pipeline.evaluation.studies.sampler_table import SamplerComparison, SamplerRow, draw_comparison
from pipeline.generation.requests.requests import Partial
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import ImagesConfig, SampleConfig
from pipeline.measuring.measures import pixel_moments
from pipeline.stores.storage import open_store
from tests.pipeline.tiny_models import write_model


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", dataset=str(tmp_path_factory.mktemp("digits")), shard_size=250)
    prepare_source(config, open_source(config), map)
    return config.dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "model", num_classes=10, num_timesteps=40, answers=True)


def config_of(dataset: str, model: str, output: Path, **changes: object) -> SamplerComparisonConfig:
    images = ImagesConfig(model=model, output=str(output), images_per_class=4, shard_size=20, batch_size=20)
    options: dict[str, object] = {"samplers": ("ddim, eta 0", "ddim, eta 1", "heun"), "evaluations": (8,)}
    return SamplerComparisonConfig(dataset=dataset, sample=images, **{**options, **changes})  # type: ignore[arg-type]


def images_of(config: SamplerComparisonConfig, sampler: Sampler) -> LabelledImages:
    """The images of one sampler, which must be there."""
    images = dataclasses.replace(config.sample, sampler=sampler)  # type: ignore[arg-type]
    made = sample(SampleConfig.of(images, config.tracking, config.cluster))
    assert made.num_made == 0
    return join_images(list(made.images()))


def bytes_of_shards(output: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*.tar")}


@pytest.mark.usefixtures("ray_session")
def test_figures_are_those_of_the_images_and_are_made_once(digits: str, model: str, tmp_path: Path) -> None:
    config = config_of(digits, model, tmp_path / "out")
    found = compare_samplers(config)
    assert [(row.sampler, row.max_evaluations, row.num_evaluations) for row in found.rows] == [
        ("ddim, eta 0", 8, 8),
        ("ddim, eta 1", 8, 8),
        ("heun", 8, 8),
    ]
    made = images_of(config, dataclasses.replace(COMPARED["ddim, eta 0"], num_steps=8))
    reference = images_of(config, dataclasses.replace(REFERENCE, num_steps=40)).images / 255
    row = found.rows[0]
    assert row.rms_to_reference == pytest.approx(np.sqrt(((made.images / 255 - reference) ** 2).mean()), abs=1e-12)
    assert [row.rms_to_reference is None for row in found.rows] == [False, True, False]
    held_out = read_images(open_store(digits), load_manifest(open_store(digits)).splits["held_out"].shards)
    assert row.frechet_pixels == pytest.approx(
        frechet_distance(pixel_moments([made], None)[0], pixel_moments([held_out], None)[0]), rel=1e-9
    )
    assert 0.98 < found.real_label_agreement < 1
    assert found.real_frechet_pixels < min(row.frechet_pixels for row in found.rows)
    assert (found.num_compared_images, found.num_real_sets) == (40, 10)
    assert found.real_frechet_pixels > 4 * 0.1406, "of 40 real images, which have 0.14 if they are 1,500"
    assert all(0 < (row.frechet_standard_error or 0) < 0.2 * row.frechet_pixels for row in found.rows)
    assert len(found.warnings) == 1 and "does not say what it was trained on" in found.table()
    stored = (tmp_path / "out" / "samplers.json").read_bytes()
    assert from_json(SamplerComparison, stored, "samplers.json") == found
    before = bytes_of_shards(tmp_path / "out")
    again = compare_samplers(dataclasses.replace(config, samplers=(*config.samplers, "dpm_solver_2m, trailing")))
    after = bytes_of_shards(tmp_path / "out")
    assert again.rows[:3] == found.rows
    assert {path: after[path] for path in before} == before, "what exists is not made again"
    assert len(after) == len(before) + 2
    both = compare_samplers(dataclasses.replace(config, samplers=("ddim, eta 0",), num_seeds=2))
    other_seed = dataclasses.replace(config, sample=dataclasses.replace(config.sample, seed=1))
    second = compare_samplers(dataclasses.replace(other_seed, samplers=("ddim, eta 0",)))
    one, two = found.rows[0], second.rows[0]
    assert both.rows[0].frechet_pixels == pytest.approx((one.frechet_pixels + two.frechet_pixels) / 2)
    assert both.rows[0].label_agreement == pytest.approx((one.label_agreement + two.label_agreement) / 2)
    errors = [one.frechet_standard_error, two.frechet_standard_error]
    assert both.rows[0].frechet_standard_error == pytest.approx(np.linalg.norm(errors) / 2)  # type: ignore[arg-type]
    assert both.real_frechet_pixels == found.real_frechet_pixels, "the same real images, as many as those of a seed"


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("evaluations", [1, 2, 5, 10, 250, 1000])
def test_a_sampler_takes_all_the_steps_that_it_may(name: str, evaluations: int) -> None:
    schedule = make_schedule(ScheduleConfig(name="cosine"))
    steps = most_steps(schedule, COMPARED[name], evaluations)
    taken = dataclasses.replace(COMPARED[name], num_steps=steps).num_evaluations(schedule)
    assert evaluations - 1 <= taken <= evaluations
    if steps < schedule.num_timesteps:
        assert dataclasses.replace(COMPARED[name], num_steps=steps + 1).num_evaluations(schedule) > evaluations


def test_wrong_use_is_one_line(digits: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samplers: .* got 'dimm'"):
        config_of(digits, model, tmp_path, samplers=("dimm",))
    with pytest.raises(ValueError, match="evaluations: "):
        config_of(digits, model, tmp_path, evaluations=())
    with pytest.raises(ValueError, match=r"sample\.request\.name: .* got partial"):
        config = config_of(digits, model, tmp_path)
        request = Partial(inputs=digits)
        dataclasses.replace(config, sample=dataclasses.replace(config.sample, request=request))
    for name, reason in (("ancestral, learned_range", "not learned"), ("ancestral, analytic", "sample.calibration")):
        with pytest.raises(ConfigError, match=reason):
            describe_plan(config_of(digits, model, tmp_path, samplers=(name,)))
    with pytest.raises(ValueError, match=r"^num_seeds: "):
        config_of(digits, model, tmp_path, num_seeds=0)
    reordered = write_model(tmp_path / "reordered", num_classes=10, class_names=tuple("1023456789"))
    with pytest.raises(ConfigError, match=r"^dataset: .*the same classes in another order"):
        compare_samplers(config_of(digits, reordered, tmp_path / "out"))
    unconditional = write_model(tmp_path / "model", num_classes=None)
    with pytest.raises(ConfigError, match="classes"):
        compare_samplers(config_of(digits, unconditional, tmp_path / "out"))


@pytest.mark.parametrize("change", [{"calibration": "nowhere.json"}, {"guide_model": "nowhere"}])
def test_what_a_later_run_needs_is_looked_up_before_the_first(
    digits: str, model: str, tmp_path: Path, change: dict[str, str]
) -> None:
    config = config_of(digits, model, tmp_path / "out", samplers=())
    guided = DDIM(guidance_scale=2.0) if "guide_model" in change else DDIM()
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, sampler=guided, **change))
    for act in (describe_plan, compare_samplers):
        with pytest.raises(PipelineError, match="nowhere"):
            act(config)
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_every_run(digits: str, model: str, tmp_path: Path) -> None:
    plan = dict(describe_plan(config_of(digits, model, tmp_path, evaluations=(1, 8))))
    assert plan["runs"].startswith("6 of 40 images")
    assert plan["network evaluations"].startswith(f"{40 * (3 * 9 + 40):,} images")


def test_table_and_chart_show_every_row() -> None:
    rows = [
        SamplerRow(
            sampler=name,
            max_evaluations=evaluations,
            num_evaluations=evaluations,
            frechet_pixels=1 / evaluations,
            label_agreement=0.5,
            rms_to_reference=None if name == "b" else 0.25,
        )
        for name, evaluations in (("a", 5), ("a", 10), ("b", 10))
    ]
    found = SamplerComparison(
        model="models:/m/1",
        model_digest="0",
        dataset_digest="0",
        num_images=10,
        wall_s=61,
        real_frechet_pixels=0.1,
        real_label_agreement=0.99,
        rows=tuple(rows),
    )
    table = found.table().splitlines()
    assert "- 10 evaluations, Frechet distance: all" in table
    surely = dataclasses.replace(
        found,
        rows=(found.rows[0], dataclasses.replace(found.rows[1], frechet_better_than=("b",)), found.rows[2]),
        num_compared_images=10,
        real_frechet_standard_error=0.02,
    )
    assert "- 10 evaluations, Frechet distance: a" in surely.table().splitlines()
    assert "- 10 evaluations, agreement: all" in surely.table().splitlines()
    assert "Frechet distance, 10 images each (real: 0.100 +- 0.020)" in surely.table()
    assert "| a | 0.200 | 0.100 |" in table and "| b |  | 0.100 |" in table
    assert sum(line.startswith("| b |") for line in table) == 2, "no RMS for a sampler that adds noise"
    assert draw_comparison(found)[:8] == b"\x89PNG\r\n\x1a\n"
    noisy = dataclasses.replace(found, rows=found.rows[2:])
    assert "RMS" in found.table() and "RMS" not in noisy.table()
    assert draw_comparison(noisy)[:8] == b"\x89PNG\r\n\x1a\n"
