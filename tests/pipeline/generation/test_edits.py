"""Edits end to end: the right inputs, labels and pixels, the same bytes in every attempt, committed exactly once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from ddpm import (
    SamplerConfig,
    images_to_x_0,
    interpolate_images,
    make_schedule,
    repaint,
    sampling_denoiser,
    x_0_to_images,
)
from jobs.cli import run_job
from pipeline.cluster import ClusterConfig
from pipeline.data.image_stream import LabelledImages, read_images
from pipeline.data.shards import read_shard
from pipeline.errors import ConfigError, OutputExistsError, PipelineError
from pipeline.generation.inventory import load_generation_manifest
from pipeline.generation.requests import RequestConfig
from pipeline.generation.sample import SampleConfig, SampleResult, describe_plan, sample
from pipeline.models.model_files import load_network, read_model_files
from pipeline.stores.storage import open_store
from tests.pipeline.edit_fixtures import write_editing_model
from tests.pipeline.generation.test_sample import digests, make_in_process, snapshot
from tests.pipeline.small_datasets import SmallDataset, make_dataset

INPAINT: dict[str, Any] = {"kind": "inpaint", "mask": "lower_half", "jump_length": 2, "num_resamples": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    return make_dataset(tmp_path_factory.mktemp("data"), [7, 5, 9])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_editing_model(tmp_path_factory.mktemp("models") / "model")


def config_of(model: str, inputs: str, output: Path, request: dict[str, Any], **changes: Any) -> SampleConfig:
    """Output shards of 6, batches of 4: neither divides the 21 inputs, nor do their shards of 7, 5 and 9."""
    config = SampleConfig(
        model=model,
        output=str(output),
        sampler=SamplerConfig(num_steps=5),
        request=RequestConfig(inputs=inputs, **request),
        shard_size=6,
        batch_size=4,
        num_actors=2,
        cluster=ClusterConfig(num_cpus=2),
    )
    return dataclasses.replace(config, **changes)


def run(config: SampleConfig) -> tuple[SampleResult, LabelledImages]:
    """Make the images in this process: nothing is missing then, so that no Ray is started."""
    make_in_process(config)
    result = sample(config)
    assert result.num_made == 0
    return result, made_by(result)


def made_by(result: SampleResult) -> LabelledImages:
    manifest = load_generation_manifest(open_store(result.uri))
    assert manifest is not None and manifest.num_images == result.num_images
    return read_images(open_store(result.uri), manifest.shards)


def test_inpainting_keeps_known_pixels_and_labels(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    _, made = run(config_of(model, dataset.uri, tmp_path / "out", INPAINT))
    assert (made.images[:, :4] == dataset.images[:, :4]).all()
    assert not (made.images[:, 4:] == dataset.images[:, 4:]).all(axis=(1, 2, 3)).any()
    assert made.labels is not None and made.labels.tolist() == [i % 7 for i in range(21)]
    _, relabelled = run(config_of(model, dataset.uri, tmp_path / "out", INPAINT | {"label": 3}))
    assert relabelled.labels is not None and set(relabelled.labels.tolist()) == {3}
    assert (relabelled.images[made.labels == 3] == made.images[made.labels == 3]).all()
    assert not (relabelled.images[made.labels != 3] == made.images[made.labels != 3]).all(axis=(1, 2, 3)).any()


def test_the_images_are_those_of_the_library(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    """By hand, for one batch of ids in the middle of a shard."""
    _, made = run(config_of(model, dataset.uri, tmp_path / "out", INPAINT, seed=3))
    card, network = load_network(read_model_files(open_store(model)))
    schedule, sampler = make_schedule(card.config.schedule), SamplerConfig(num_steps=5)
    known = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    known[:, :, :4] = True
    ids = torch.arange(6, 10)
    x_0 = repaint(
        sampling_denoiser(network, schedule, sampler),
        schedule,
        sampler,
        images_to_x_0(torch.from_numpy(dataset.images[6:10])),
        known,
        ids % 7,
        jump_length=2,
        num_resamples=2,
        seed=3,
        sample_ids=ids,
    )
    assert (x_0_to_images(x_0).numpy() == made.images[6:10]).all()


def test_partial_diffusion_goes_from_the_input_to_nothing_of_it(
    dataset: SmallDataset, model: str, tmp_path: Path
) -> None:
    def edited(strength: float, uri: str = dataset.uri) -> np.ndarray:
        return run(config_of(model, uri, tmp_path / "out", {"kind": "partial", "strength": strength}))[1].images

    other = make_dataset(tmp_path / "other", [7, 14])
    assert (edited(0.0) == dataset.images).all()
    assert (edited(1.0) == edited(1.0, other.uri)).all() and not (other.images == dataset.images[:21]).all()
    assert not (edited(0.5) == edited(0.5, other.uri)).all(axis=(1, 2, 3)).any()


def test_interpolation_has_an_image_for_each_weight_and_pair(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    sampler = SamplerConfig(num_steps=5, eta=0.0)
    request = {"kind": "interpolate", "weights": (0.0, 0.4, 1.0)}
    result, made = run(config_of(model, dataset.uri, tmp_path / "out", request, sampler=sampler))
    assert result.num_images == 30 and made.labels is not None
    assert made.labels[:6].tolist() == [0, 0, 1, 2, 2, 3], "the nearer one's"

    card, network = load_network(read_model_files(open_store(model)))
    schedule, x_0 = make_schedule(card.config.schedule), images_to_x_0(torch.from_numpy(dataset.images))
    rows = torch.tensor([2, 2, 4, 4])
    by_hand = interpolate_images(
        sampling_denoiser(network, schedule, sampler),
        schedule,
        sampler,
        x_0[rows],
        x_0[rows + 1],
        torch.tensor([0.4, 1.0, 0.0, 0.4]),
        first_label=rows % 7,
        second_label=(rows + 1) % 7,
        sample_ids=torch.arange(4, 8),
    )
    assert (x_0_to_images(by_hand[:2]).numpy() == made.images[4:6]).all(), "the second batch of the first shard"
    sheet = np.asarray(PIL.Image.open(result.contact_sheet_uri))[::8, ::8]
    assert sheet.shape == (4 * 9 - 1, 5 * 9 - 1), "ten images are three pairs and one of the fourth"
    assert (sheet[9:17, :8] == dataset.images[2, ..., 0]).all()
    assert (sheet[9:17, 36:44] == dataset.images[3, ..., 0]).all()
    assert (sheet[9:17, 18:26] == made.images[4, ..., 0]).all()


def test_a_generation_run_is_edited_like_a_dataset(model: str, tmp_path: Path) -> None:
    plain = SampleConfig(
        model=model,
        output=str(tmp_path / "plain"),
        images_per_class=2,
        sampler=SamplerConfig(num_steps=5),
        shard_size=6,
        batch_size=4,
    )
    first, inputs = run(plain)
    request = {"kind": "inpaint", "mask": "right_half", "num_resamples": 1}
    second, made = run(config_of(model, first.uri, tmp_path / "edited", request))
    assert (made.images[:, :, :4] == inputs.images[:, :, :4]).all()
    assert made.labels is not None and inputs.labels is not None and (made.labels == inputs.labels).all()
    third, again = run(config_of(model, second.uri, tmp_path / "edited", {"kind": "partial", "strength": 0.0}))
    assert (again.images == made.images).all() and again.labels is not None
    with pytest.raises(ConfigError, match=r"^request.split: .*generation run, which has none, got 'train'"):
        sample(config_of(model, third.uri, tmp_path / "edited", {"kind": "partial", "split": "train"}))


def test_fewer_images_are_the_first_ones_and_a_run_grows(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    def asked(num_images: int | None) -> SampleConfig:
        return config_of(model, dataset.uri, tmp_path / "out", INPAINT | {"num_images": num_images})

    result, few = run(asked(12))
    assert len(few) == 12
    grown, every = run(asked(None))
    assert grown.uri == result.uri and (every.images[:12] == few.images).all() and len(every) == 21
    before = snapshot(tmp_path / "out")
    assert sample(asked(12)).num_images == 21 and snapshot(tmp_path / "out") == before
    ragged = config_of(model, dataset.uri, tmp_path / "ragged", INPAINT | {"num_images": 10})
    run(ragged)
    with pytest.raises(OutputExistsError, match="multiple of shard_size"):
        sample(config_of(model, dataset.uri, tmp_path / "ragged", INPAINT))


def test_samples_say_what_they_were_made_of(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    result, _ = run(config_of(model, dataset.uri, tmp_path / "out", INPAINT))
    manifest = load_generation_manifest(open_store(result.uri))
    assert manifest is not None and manifest.spec.request is not None
    for sample_ in read_shard(open_store(result.uri), manifest.shards[1]):
        assert sample_.meta["input_rows"] == [sample_.meta["sample_id"]]
        assert sample_.meta["request"] == json.loads(json.dumps(dataclasses.asdict(manifest.spec.request)))


def test_the_contact_sheet_has_inputs_hidden_inputs_and_results(
    dataset: SmallDataset, model: str, tmp_path: Path
) -> None:
    result, made = run(config_of(model, dataset.uri, tmp_path / "out", INPAINT, contact_sheet_columns=4))
    sheet = np.asarray(PIL.Image.open(result.contact_sheet_uri))[::8, ::8]
    assert sheet.shape == (3 * 9 - 1, 4 * 9 - 1)
    for i in range(4):
        given, hidden, new = (sheet[9 * row : 9 * row + 8, 9 * i : 9 * i + 8] for row in range(3))
        assert (given == dataset.images[i, ..., 0]).all() and (new == made.images[i, ..., 0]).all()
        assert (hidden[:4] == given[:4]).all() and (hidden[4:] == 128).all()


def test_the_plan_counts_evaluations(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    def rows(request: dict[str, Any], **changes: Any) -> dict[str, str]:
        return dict(describe_plan(config_of(model, dataset.uri, tmp_path / "out", request, **changes)))

    assert rows(INPAINT)["network evaluations"].startswith(f"{21 * (5 + 2 * 2):,} images")
    assert rows(INPAINT)["edit"].startswith("inpaint of images in ")
    assert rows({"kind": "partial", "strength": 0.5})["network evaluations"].startswith(f"{21 * 3} images")
    sampler = SamplerConfig(num_steps=5, eta=0.0)
    interpolate = rows({"kind": "interpolate"}, sampler=sampler)["network evaluations"]
    assert interpolate.startswith(f"{30 * 15} images")
    guided = SamplerConfig(num_steps=5, guidance_scale=2.0)
    plan = rows(INPAINT, sampler=guided, guide_model=model)
    assert plan["network evaluations"].startswith(f"{2 * 21 * 9} images") and plan["guide"] == plan["model"]
    flops = [float(words["network evaluations"].split()[2]) for words in (rows(INPAINT), plan)]
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- autoguidance


def test_a_guide_changes_the_images_and_their_place(model: str, tmp_path: Path) -> None:
    def images(**changes: Any) -> tuple[str, np.ndarray]:
        sampler = SamplerConfig(num_steps=5, guidance_scale=changes.pop("scale", 2.0))
        config = SampleConfig(
            model=model,
            output=str(tmp_path / "out"),
            images_per_class=1,
            sampler=sampler,
            shard_size=7,
            batch_size=7,
            **changes,
        )
        result, made = run(config)
        return result.uri, made.images

    plain, by_itself = images(scale=1.0), images(guide_model=model)
    other = images(guide_model=write_editing_model(tmp_path / "weak", seed=2))
    without_label = images()
    assert len({uri for uri, _ in (plain, by_itself, other, without_label)}) == 4
    assert np.abs(by_itself[1].astype(int) - plain[1]).max() <= 1, "a guide like the model leads nowhere"
    assert not (other[1] == plain[1]).all() and not (other[1] == without_label[1]).all()


@pytest.mark.parametrize(
    ("guide", "changes", "words"),
    [
        ({"num_classes": 3, "class_names": "abc"}, {}, r"^guide_model: .* num_classes 3, .* 7; choose"),
        ({"class_names": "gfedcba"}, {}, r"^guide_model: .*other classes"),
        ({"image_size": 16}, {}, r"^guide_model: .*image_size 16"),
        ({}, {"guidance_scale": 1.0}, r"guide_model: has no effect where sampler.guidance_scale is 1"),
    ],
)
def test_guides_that_do_not_fit_are_refused(
    model: str, tmp_path: Path, guide: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    config = SampleConfig(
        model=model,
        output=str(tmp_path / "out"),
        sampler=SamplerConfig(**({"guidance_scale": 2.0, "num_steps": 5} | changes)),
        guide_model=write_editing_model(tmp_path / "guide", **guide),
    )
    with pytest.raises(ConfigError, match=words):
        sample(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("request_", "sampler", "words"),
    [
        (INPAINT, {"name": "dpm_solver_2m"}, r"inpainting walks with ancestral or ddim, got dpm_solver_2m"),
        ({"kind": "interpolate"}, {}, r"eta: interpolation needs 0, got 1\.0 with ddim"),
    ],
)
def test_samplers_that_cannot_edit_are_refused_before_any_work(
    dataset: SmallDataset, model: str, tmp_path: Path, request_: dict[str, Any], sampler: dict[str, Any], words: str
) -> None:
    config = config_of(model, dataset.uri, tmp_path / "out", request_, sampler=SamplerConfig(num_steps=5, **sampler))
    with pytest.raises(ConfigError, match=words):
        sample(config)
    assert not (tmp_path / "out").exists()


def test_flags_and_files_ask_for_edits(
    dataset: SmallDataset, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an operator does: a mistake is one line and exit code 2, a plan starts nothing."""

    def job(*flags: str) -> tuple[int, str, str]:
        common = ("--model", model, "--output", str(tmp_path / "out"), "--sampler.num-steps", "5")
        code = run_job(
            [*flags, *common], lambda preset: preset.sample, lambda config: print(sample(config)), describe_plan
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    flags = ("--request.kind", "inpaint", "--request.mask", "centre", "--request.jump-length", "2", "--request.inputs")
    code, out, _ = job("--dry-run", *flags, dataset.uri)
    assert code == 0 and "# images               21, of which 21 are missing" in out
    text = f'[request]\nkind = "interpolate"\ninputs = "{dataset.uri}"\nweights = [0.5]\n[sampler]\neta = 0.0\n'
    (tmp_path / "mine.toml").write_text(text)
    code, out, _ = job("--config", str(tmp_path / "mine.toml"), "--dry-run")
    assert code == 0 and "# images               10, of which 10 are missing" in out
    for wrong in ((*flags, str(tmp_path / "nowhere")), (*flags, dataset.uri, "--request.strength", "0.1")):
        code, _, err = job(*wrong)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- on Ray


@pytest.mark.usefixtures("ray_session")
def test_actors_edit_with_a_guide_exactly_once_and_resume(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    """Both models, the mask and the place of the inputs travel to the actors; bytes are those made in this process."""
    guide = write_editing_model(tmp_path / "weak", seed=2)
    sampler = SamplerConfig(num_steps=5, guidance_scale=1.5)

    def config(output: str, **changes: Any) -> SampleConfig:
        return config_of(model, dataset.uri, tmp_path / output, INPAINT | changes, sampler=sampler, guide_model=guide)

    expected = make_in_process(config("in process"))
    result = sample(config("out", num_images=12))
    assert (result.num_images, result.num_made) == (12, 12)
    first = Path(result.uri, "_parts", "000000000.json").read_bytes()
    result = sample(config("out"))
    assert (result.num_images, result.num_made) == (21, 9) and digests(result) == expected
    assert Path(result.uri, "_parts", "000000000.json").read_bytes() == first
    before = snapshot(tmp_path / "out")
    assert sample(config("out")).num_made == 0 and snapshot(tmp_path / "out") == before

    damaged = make_dataset(tmp_path / "damaged", [7, 5, 9])
    damaged.path(2).write_bytes(b"cut short")
    with pytest.raises(PipelineError, match=r"000002.tar: size in bytes is 9"):
        sample(config_of(model, damaged.uri, tmp_path / "damaged out", INPAINT))
