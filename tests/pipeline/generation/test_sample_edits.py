"""Edits end to end: the right inputs, labels and pixels, the same bytes in every attempt, committed exactly once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm import DDIM, images_to_x_0, interpolate_images, repaint, x_0_to_images
from jobs.cli import run_job
from jobs.sample import JOB
from pipeline.data.shards import read_shard
from pipeline.errors import ConfigError, OutputExistsError, PipelineError
from pipeline.generation.output.manifest import read_shards
from pipeline.generation.requests.requests import Inpaint, Interpolate, Partial
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_preview import describe_plan
from pipeline.models.model_files import load_model, read_model_files
from pipeline.stores.storage import open_store
from tests.pipeline.edit_fixtures import editing_config, write_editing_model
from tests.pipeline.runs_in_process import digests, make_in_process, run, snapshot
from tests.pipeline.small_datasets import SmallDataset, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    return make_dataset(tmp_path_factory.mktemp("data"), [7, 5, 9])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_editing_model(tmp_path_factory.mktemp("models") / "model")


def inpaint(inputs: str, **changes: Any) -> Inpaint:
    return Inpaint(**{"inputs": inputs, "mask": "lower_half", "jump_length": 2, "num_resamples": 2, **changes})


def test_inpainting_keeps_known_pixels_and_labels(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    _, made = run(editing_config(model, tmp_path / "out", inpaint(dataset.uri)))
    assert (made.images[:, :4] == dataset.images[:, :4]).all()
    assert not (made.images[:, 4:] == dataset.images[:, 4:]).all(axis=(1, 2, 3)).any()
    assert made.labels is not None and made.labels.tolist() == [i % 7 for i in range(21)]
    _, relabelled = run(editing_config(model, tmp_path / "out", inpaint(dataset.uri, label=3)))
    assert relabelled.labels is not None and set(relabelled.labels.tolist()) == {3}
    assert (relabelled.images[made.labels == 3] == made.images[made.labels == 3]).all()
    assert not (relabelled.images[made.labels != 3] == made.images[made.labels != 3]).all(axis=(1, 2, 3)).any()


def test_the_images_are_those_of_the_library(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    """By hand, for one batch of ids in the middle of a shard."""
    _, made = run(editing_config(model, tmp_path / "out", inpaint(dataset.uri), seed=3))
    known = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    known[:, :, :4] = True
    ids = torch.arange(6, 10)
    x_0 = repaint(
        load_model(read_model_files(open_store(model)))[1],
        DDIM(num_steps=5),
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
        return run(editing_config(model, tmp_path / "out", Partial(inputs=uri, strength=strength)))[1].images

    other = make_dataset(tmp_path / "other", [7, 14])
    assert (edited(0.0) == dataset.images).all()
    assert (edited(1.0) == edited(1.0, other.uri)).all() and not (other.images == dataset.images[:21]).all()
    assert not (edited(0.5) == edited(0.5, other.uri)).all(axis=(1, 2, 3)).any()


def test_interpolation_has_an_image_for_each_weight_and_pair(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    sampler = DDIM(num_steps=5, eta=0.0)
    request = Interpolate(inputs=dataset.uri, weights=(0.0, 0.4, 1.0))
    result, made = run(editing_config(model, tmp_path / "out", request, sampler=sampler))
    assert (result.manifest.num_images, result.num_asked) == (30, 30) and made.labels is not None
    assert made.labels[:6].tolist() == [0, 0, 1, 2, 2, 3], "the nearer one's"

    x_0 = images_to_x_0(torch.from_numpy(dataset.images))
    rows = torch.tensor([2, 2, 4, 4])
    by_hand = interpolate_images(
        load_model(read_model_files(open_store(model)))[1],
        sampler,
        x_0[rows],
        x_0[rows + 1],
        torch.tensor([0.4, 1.0, 0.0, 0.4]),
        first_label=rows % 7,
        second_label=(rows + 1) % 7,
        sample_ids=torch.arange(4, 8),
    )
    assert (x_0_to_images(by_hand[:2]).numpy() == made.images[4:6]).all(), "the second batch of the first shard"


def test_a_generation_run_is_edited_like_a_dataset(model: str, tmp_path: Path) -> None:
    plain = SampleConfig(
        model=model,
        output=str(tmp_path / "plain"),
        images_per_class=2,
        sampler=DDIM(num_steps=5),
        shard_size=6,
        batch_size=4,
    )
    first, inputs = run(plain)
    request = Inpaint(inputs=first.store.uri, mask="right_half", num_resamples=1)
    second, made = run(editing_config(model, tmp_path / "edited", request))
    assert (made.images[:, :, :4] == inputs.images[:, :, :4]).all()
    assert made.labels is not None and inputs.labels is not None and (made.labels == inputs.labels).all()
    third, again = run(editing_config(model, tmp_path / "edited", Partial(inputs=second.store.uri, strength=0.0)))
    assert (again.images == made.images).all() and again.labels is not None
    with pytest.raises(ConfigError, match=r"^request.split: .*generation run, which has none, got 'train'"):
        sample(editing_config(model, tmp_path / "edited", Partial(inputs=third.store.uri, split="train")))


def test_fewer_images_are_the_first_ones_and_a_run_grows(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    def asked(num_images: int | None) -> SampleConfig:
        return editing_config(model, tmp_path / "out", inpaint(dataset.uri, num_images=num_images))

    result, few = run(asked(12))
    assert len(few) == 12
    grown, every = run(asked(None))
    assert grown.store.uri == result.store.uri and (every.images[:12] == few.images).all() and len(every) == 21
    before = snapshot(tmp_path / "out")
    shorter = sample(asked(12))
    assert (shorter.manifest.num_images, shorter.num_asked) == (21, 12) and snapshot(tmp_path / "out") == before
    assert sum(len(group) for group in shorter.images()) == 12, "those that were asked for"
    run(editing_config(model, tmp_path / "ragged", inpaint(dataset.uri, num_images=10)))
    with pytest.raises(OutputExistsError, match="multiple of shard_size"):
        sample(editing_config(model, tmp_path / "ragged", inpaint(dataset.uri)))


def test_samples_say_what_they_were_made_of(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    result, _ = run(editing_config(model, tmp_path / "out", inpaint(dataset.uri)))
    spec = result.manifest.spec
    assert spec.request is not None and result.edit is not None and result.edit.spec == spec.request
    for sample_ in read_shard(result.store, list(read_shards(result.store, result.manifest.parts))[1]):
        assert sample_.meta["input_rows"] == [sample_.meta["sample_id"]]
        assert sample_.meta["request"] == json.loads(json.dumps(dataclasses.asdict(spec.request)))


def test_the_plan_counts_evaluations(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    def rows(request: Any, **changes: Any) -> dict[str, str]:
        return dict(describe_plan(editing_config(model, tmp_path / "out", request, **changes)))

    plain = rows(inpaint(dataset.uri))
    assert plain["network evaluations"].startswith(f"{21 * (5 + 2 * 2):,} images")
    assert plain["edit"].startswith("inpaint of images in ")
    partial = rows(Partial(inputs=dataset.uri, strength=0.5))
    assert partial["network evaluations"].startswith(f"{21 * 3} images")
    interpolated = rows(Interpolate(inputs=dataset.uri), sampler=DDIM(num_steps=5, eta=0.0))
    assert interpolated["network evaluations"].startswith(f"{30 * 15} images")
    guided = rows(inpaint(dataset.uri), sampler=DDIM(num_steps=5, guidance_scale=2.0), guide_model=model)
    assert guided["network evaluations"].startswith(f"{2 * 21 * 9} images") and guided["guide"] == guided["model"]
    flops = [float(words["network evaluations"].split()[2]) for words in (plain, guided)]
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01)
    assert not (tmp_path / "out").exists()


def test_a_guide_changes_the_images_and_their_place(model: str, tmp_path: Path) -> None:
    def images(**changes: Any) -> tuple[str, np.ndarray]:
        sampler = DDIM(num_steps=5, guidance_scale=changes.pop("scale", 2.0))
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
        return result.store.uri, made.images

    plain, by_itself = images(scale=1.0), images(guide_model=model)
    other = images(guide_model=write_editing_model(tmp_path / "weak", seed=2))
    without_label = images()
    assert len({uri for uri, _ in (plain, by_itself, other, without_label)}) == 4
    assert np.abs(by_itself[1].astype(int) - plain[1]).max() <= 1, "a guide like the model leads nowhere"
    assert not (other[1] == plain[1]).all() and not (other[1] == without_label[1]).all()


def test_flags_and_files_ask_for_edits(
    dataset: SmallDataset, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an operator does: a mistake is one line and exit code 2, a plan starts nothing."""

    def job(*flags: str) -> tuple[int, str, str]:
        common = ("--model", model, "--output", str(tmp_path / "out"), "--sampler.num-steps", "5")
        code = run_job(JOB, [*flags, *common])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    flags = ("--request.name", "inpaint", "--request.mask", "centre", "--request.jump-length", "2", "--request.inputs")
    code, out, _ = job("--dry-run", *flags, dataset.uri)
    assert code == 0 and "# images               21, of which 21 are missing" in out
    text = f'[sample.request]\nname = "interpolate"\ninputs = "{dataset.uri}"\nweights = [0.5]\n'
    (tmp_path / "mine.toml").write_text(text + "[sample.sampler]\neta = 0.0\n")
    code, out, _ = job("--config", str(tmp_path / "mine.toml"), "--dry-run")
    assert code == 0 and "# images               10, of which 10 are missing" in out
    for wrong in ((*flags, str(tmp_path / "nowhere")), (*flags, dataset.uri, "--request.strength", "0.1")):
        code, _, err = job(*wrong)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_session")
def test_actors_edit_with_a_guide_exactly_once_and_resume(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    """Both models, the mask and the place of the inputs travel to the actors; bytes are those made in this process."""
    guide = write_editing_model(tmp_path / "weak", seed=2)
    sampler = DDIM(num_steps=5, guidance_scale=1.5)

    def config(output: str, **changes: Any) -> SampleConfig:
        request = inpaint(dataset.uri, **changes)
        return editing_config(model, tmp_path / output, request, sampler=sampler, guide_model=guide)

    expected = make_in_process(config("in process"))
    result = sample(config("out", num_images=12))
    assert (result.manifest.num_images, result.num_made) == (12, 12)
    first = Path(result.store.uri, "_parts", "000000000.json").read_bytes()
    result = sample(config("out"))
    assert (result.manifest.num_images, result.num_made) == (21, 9) and digests(result) == expected
    assert Path(result.store.uri, "_parts", "000000000.json").read_bytes() == first
    before = snapshot(tmp_path / "out")
    assert sample(config("out")).num_made == 0 and snapshot(tmp_path / "out") == before

    damaged = make_dataset(tmp_path / "damaged", [7, 5, 9])
    damaged.path(2).write_bytes(b"cut short")
    with pytest.raises(PipelineError, match=r"000002.tar: size in bytes is 9"):
        sample(editing_config(model, tmp_path / "damaged out", inpaint(damaged.uri)))
