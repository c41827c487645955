"""Contact sheets: the first images of a run, each in its place, and those of edits below their inputs."""

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ddpm import DDIM
from pipeline.data.image_stream import read_images
from pipeline.data.pictures import class_grid
from pipeline.data.shards import decode_image
from pipeline.errors import ShardCorruptError
from pipeline.generation.output.manifest import GenerationManifest, write_part
from pipeline.generation.requests.requests import Inpaint, Interpolate, Partial
from pipeline.generation.sample import SampleResult
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.viewing import contact_sheet as contact_sheet_module
from pipeline.generation.viewing.contact_sheet import contact_sheet
from tests.pipeline.edit_fixtures import editing_config, write_editing_model
from tests.pipeline.generation.viewing.synthetic_runs import SyntheticRun
from tests.pipeline.generation.viewing.synthetic_runs import make_run as make_synthetic
from tests.pipeline.runs_in_process import run
from tests.pipeline.small_datasets import SmallDataset, make_dataset
from tests.pipeline.tiny_models import write_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    return make_dataset(tmp_path_factory.mktemp("data"), [7, 5, 9])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_editing_model(tmp_path_factory.mktemp("models") / "model")


def plain_config(model: str, output: Path) -> SampleConfig:
    return SampleConfig(
        model=model,
        output=str(output),
        images_per_class=20,
        sampler=DDIM(num_steps=4),
        shard_size=15,
        batch_size=4,
        contact_sheet_columns=6,
    )


def sheet_of(result: SampleResult, scale: int) -> np.ndarray:
    """The stored sheet, one pixel for each of an image; cells are 9 apart."""
    return np.asarray(PIL.Image.open(result.contact_sheet_uri))[::scale, ::scale]


def test_it_shows_the_first_images_of_each_class_in_a_row(tmp_path: Path) -> None:
    result, images = run(plain_config(write_model(tmp_path / "model", channels=3), tmp_path / "out"))
    assert result.manifest.class_names == ("0", "1", "2")
    sheet = sheet_of(result, 4)
    assert sheet.shape == (3 * 9 - 1, 6 * 9 - 1, 3)
    assert images.labels is not None
    for k in range(3):
        for column, image in enumerate(images.images[images.labels == k][:6]):
            assert (sheet[k * 9 : k * 9 + 8, column * 9 : column * 9 + 8] == image).all()


def test_without_classes_it_shows_the_first_images(tmp_path: Path) -> None:
    config = plain_config(write_model(tmp_path / "model", num_classes=None, answers=True), tmp_path / "out")
    result, images = run(config)
    sheet = sheet_of(result, 4)
    assert sheet.shape == (4 * 9 - 1, 6 * 9 - 1), "20 images in rows of 6"
    for index, image in enumerate(images.images):
        row, column = divmod(index, 6)
        assert (sheet[row * 9 : row * 9 + 8, column * 9 : column * 9 + 8] == image[..., 0]).all()


def test_of_a_longer_run_it_shows_as_many_images_as_it_has_room_for(tmp_path: Path) -> None:
    result, images = run(plain_config(write_model(tmp_path / "model", num_classes=None), tmp_path / "out"))
    small = np.asarray(PIL.Image.open(_written(contact_sheet(result.manifest, None, result.store, 2), tmp_path)))
    assert small[::4, ::4].shape == (2 * 9 - 1, 2 * 9 - 1)
    assert (small[::4, ::4][9:, 9:] == images.images[3, ..., 0]).all()


def _written(png: bytes, folder: Path) -> Path:
    (folder / "sheet.png").write_bytes(png)
    return folder / "sheet.png"


def test_of_an_inpainting_it_has_inputs_hidden_inputs_and_results(
    dataset: SmallDataset, model: str, tmp_path: Path
) -> None:
    request = Inpaint(inputs=dataset.uri, mask="lower_half", jump_length=2, num_resamples=2)
    result, made = run(editing_config(model, tmp_path / "out", request, contact_sheet_columns=4))
    sheet = sheet_of(result, 8)
    assert sheet.shape == (3 * 9 - 1, 4 * 9 - 1)
    for i in range(4):
        given, hidden, new = (sheet[9 * row : 9 * row + 8, 9 * i : 9 * i + 8] for row in range(3))
        assert (given == dataset.images[i, ..., 0]).all() and (new == made.images[i, ..., 0]).all()
        assert (hidden[:4] == given[:4]).all() and (hidden[4:] == 128).all()


def test_of_a_partial_diffusion_it_has_inputs_and_results(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    request = Partial(inputs=dataset.uri, num_images=3)
    result, made = run(editing_config(model, tmp_path / "out", request))
    sheet = sheet_of(result, 8)
    assert sheet.shape == (2 * 9 - 1, 3 * 9 - 1), "three images are fewer than there is room for"
    for i in range(3):
        assert (sheet[:8, 9 * i : 9 * i + 8] == dataset.images[i, ..., 0]).all()
        assert (sheet[9:, 9 * i : 9 * i + 8] == made.images[i, ..., 0]).all()


def test_of_interpolations_it_has_a_row_for_each_pair(dataset: SmallDataset, model: str, tmp_path: Path) -> None:
    request = Interpolate(inputs=dataset.uri, weights=(0.0, 0.4, 1.0))
    result, made = run(editing_config(model, tmp_path / "out", request, sampler=DDIM(num_steps=5, eta=0.0)))
    sheet = sheet_of(result, 8)
    assert sheet.shape == (4 * 9 - 1, 5 * 9 - 1), "ten images are three pairs and one of the fourth"
    assert (sheet[9:17, :8] == dataset.images[2, ..., 0]).all()
    assert (sheet[9:17, 36:44] == dataset.images[3, ..., 0]).all()
    assert (sheet[9:17, 18:26] == made.images[4, ..., 0]).all()
    assert (sheet[27:35, 9:17] == made.images[9, ..., 0]).all() and (sheet[27:35, 18:35] == 255).all()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    decoded: list[str] = []

    def decode(data: bytes, extension: str) -> np.ndarray:
        decoded.append(extension)
        return decode_image(data, extension)

    monkeypatch.setattr(contact_sheet_module, "decode_image", decode)
    return decoded


def test_of_many_classes_only_those_that_are_shown_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 classes: the rows of the first hundred; the bytes are those of the grid of all images."""
    run = make_synthetic(tmp_path / "run", 400, class_names=tuple(f"c{k}" for k in range(150)))
    manifest = manifest_of_run(run)
    decoded = counted(monkeypatch)
    sheet = contact_sheet(manifest, None, run.store, 5)
    assert len(decoded) == 300
    assert sheet == class_grid(read_images(run.store, run.shards).images, 150, 5)


def test_without_classes_there_are_no_more_rows_than_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_synthetic(tmp_path / "run", 40, class_names=())
    monkeypatch.setattr(contact_sheet_module, "MAX_ROWS", 2)
    decoded = counted(monkeypatch)
    contact_sheet(manifest_of_run(run), None, run.store, 4)
    assert len(decoded) == 8


def test_an_image_of_another_shape_is_named(tmp_path: Path) -> None:
    run = make_synthetic(tmp_path / "run", 40)
    manifest = manifest_of_run(run)
    spec = dataclasses.replace(manifest.spec, image_size=(16, 16))
    with pytest.raises(
        ShardCorruptError, match=r"000000000000: is an image of \[8, 8, 1\], the run's are \[16, 16, 1\]"
    ):
        contact_sheet(dataclasses.replace(manifest, spec=spec), None, run.store, 4)


def manifest_of_run(run: SyntheticRun) -> GenerationManifest:
    return GenerationManifest(
        spec=run.spec,
        spec_digest=run.spec.digest,
        model_uri="models:/shapes/3",
        guide_uri=None,
        class_names=run.class_names,
        num_images=run.num_images,
        parts=(write_part(run.store, 0, run.shards),),
    )
