"""The inputs of an edit: found by their manifest, checked before any work, read row by row and verified."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config_fields import variants_of
from pipeline.data.shards import encode_png
from pipeline.errors import ConfigError, DatasetError, DatasetMissingError, ShardCorruptError, UsageError
from pipeline.generation.requests.edit_inputs import RowReader, known_pixels, resolve_request
from pipeline.generation.requests.requests import AnyRequest, Edit, Generate
from pipeline.models.model_files import ModelCard, read_card, read_model_files
from pipeline.stores.storage import open_store
from tests.pipeline.edit_fixtures import write_editing_model
from tests.pipeline.small_datasets import SmallDataset, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    return make_dataset(tmp_path_factory.mktemp("data"), [5, 3, 4])


def card_of(tmp_path: Path, **changes: Any) -> ModelCard:
    return read_card(read_model_files(open_store(write_editing_model(tmp_path / "model", **changes))))


def request(dataset: SmallDataset | Path, name: str = "partial", **changes: Any) -> Edit:
    uri = dataset.uri if isinstance(dataset, SmallDataset) else str(dataset)
    edit: Edit = variants_of(AnyRequest)[name](**{"inputs": uri, **changes})
    return edit


def test_plain_generation_has_no_inputs(tmp_path: Path) -> None:
    assert resolve_request(Generate(), card_of(tmp_path), "model") is None


def test_a_dataset_is_found_and_its_digest_is_its_contents(dataset: SmallDataset, tmp_path: Path) -> None:
    card = card_of(tmp_path)
    found = resolve_request(request(dataset), card, "model")
    assert found is not None and found.known is None
    assert found.inputs.shards == dataset.shards and found.spec.num_inputs == 12 == found.spec.num_images
    copy = make_dataset(tmp_path / "copy", [5, 3, 4])
    moved, other = (
        resolve_request(request(place), card, "model") for place in (copy, make_dataset(tmp_path / "other", [5, 4, 3]))
    )
    assert moved is not None and moved.spec == found.spec, "the same images elsewhere"
    assert other is not None and other.spec != found.spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "held_out"}, r"^request.split: .* has train, got 'held_out'"),
        ({"num_images": 13}, r"^request.num_images: 12 inputs .* give 12 images, got 13; ask for fewer"),
        ({"label": 7}, r"^request.label: must be below 7.*got 7"),
        ({"name": "inpaint", "mask": "/nowhere.png"}, r"^request.mask: '/nowhere.png' is neither a file nor"),
        ({"inputs": "/nowhere"}, r"^request.inputs: no manifest.json in /nowhere; name a prepared dataset"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line_and_exit_code_2(
    dataset: SmallDataset, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        resolve_request(request(dataset, **changes), card_of(tmp_path), "models:/m/1")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        ({"image_size": (16, 16)}, {}, r"^request.inputs: .* holds .* 8 x 8 x 1 .*, models:/m/1 makes 16 x 16 x 1"),
        ({"image_size": (8, 16)}, {}, r"^request.inputs: .* holds .* 8 x 8 x 1 .*, models:/m/1 makes 8 x 16 x 1"),
        ({"channels": 3}, {}, r"^request.inputs: .* 8 x 8 x 1 \(height, width, .*, models:/m/1 makes 8 x 8 x 3"),
        ({"num_classes": None}, {"label": 2}, r"^request.label: models:/m/1 has no classes, got 2"),
        ({"class_names": "abc", "num_classes": 3}, {}, r"^request.label: .*\(a, b, c, d, e, ...\).*\(a, b, c\)"),
        ({"class_names": "abcdefx"}, {}, r"^request.label: .*choose a label for all"),
        ({"class_names": "gfedcba"}, {}, r"^request.label: .*choose a label for all"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_the_model_are_refused(
    dataset: SmallDataset, tmp_path: Path, model: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_request(request(dataset, **config), card_of(tmp_path, **model), "models:/m/1")


def test_a_label_for_all_makes_other_classes_fit(dataset: SmallDataset, tmp_path: Path) -> None:
    card = card_of(tmp_path, class_names="abc", num_classes=3)
    found = resolve_request(request(dataset, label=2), card, "model")
    assert found is not None and found.spec.label == 2
    unlabelled = make_dataset(tmp_path / "unlabelled", [4], labelled=False)
    assert resolve_request(request(unlabelled, label=0), card, "model") is not None
    with pytest.raises(ConfigError, match=r"^request.label: the classes of .*\(none\)"):
        resolve_request(request(unlabelled), card, "model")


def test_pairs_need_two_images(tmp_path: Path) -> None:
    single = make_dataset(tmp_path / "single", [1])
    with pytest.raises(ConfigError, match=r"needs pairs, got 1 image"):
        resolve_request(request(single, "interpolate"), card_of(tmp_path), "model")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format_version": 3, "name": 3}'])
def test_damaged_manifests_are_said_to_be(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"manifest.json"):
        resolve_request(request(tmp_path / "data"), card_of(tmp_path), "model")
    with pytest.raises(DatasetMissingError):
        resolve_request(request(tmp_path / "elsewhere"), card_of(tmp_path / "again"), "model")


REGIONS = {"upper_half": 12, "lower_half": 18, "left_half": 12, "right_half": 18, "centre": 12}


@pytest.mark.parametrize("region", REGIONS)
def test_regions_cover_what_their_name_says(region: str) -> None:
    """Of 5 x 6 and, turned, of 6 x 5 pixels; two halves are the whole."""
    size = (5, 6) if region.endswith(("upper_half", "lower_half", "centre")) else (6, 5)
    new = ~known_pixels(region, size)
    assert new.sum() == REGIONS[region]
    partners = {"upper_half": "lower_half", "left_half": "right_half"}
    if region in partners:
        assert (known_pixels(partners[region], size) == new).all()
        assert new[0, 0] and not new[-1, -1]
    if region == "centre":
        assert not new[0].any() and not new[:, 0].any() and new[2, 3]


@pytest.mark.parametrize("channels", [1, 3])
def test_white_pixels_of_a_file_are_made_anew(tmp_path: Path, channels: int) -> None:
    pixels = np.zeros((4, 6, channels), dtype=np.uint8)
    pixels[1, 2], pixels[3, 5], pixels[0, 0] = 255, 128, 127
    (tmp_path / "mask.png").write_bytes(encode_png(pixels))
    new = ~known_pixels(str(tmp_path / "mask.png"), (4, 6))
    assert sorted(map(tuple, np.argwhere(new).tolist())) == [(1, 2), (3, 5)]
    with pytest.raises(ConfigError, match=r"has 4 x 6 pixels, the images 6 x 4"):
        known_pixels(str(tmp_path / "mask.png"), (6, 4))


def test_masks_that_say_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "black.png").write_bytes(encode_png(np.zeros((4, 4, 1), dtype=np.uint8)))
    (tmp_path / "text.png").write_bytes(b"text")
    with pytest.raises(ConfigError, match="no white pixel"):
        known_pixels(str(tmp_path / "black.png"), (4, 4))
    with pytest.raises(ConfigError, match=r"text\.png: png: is no PNG[^<>]*$"):
        known_pixels(str(tmp_path / "text.png"), (4, 4))


def test_the_mask_is_known_by_its_pixels(dataset: SmallDataset, tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 1), dtype=np.uint8)
    pixels[4:] = 255
    (tmp_path / "mask.png").write_bytes(encode_png(pixels))
    card = card_of(tmp_path)
    by_name, by_file, other = (
        resolve_request(request(dataset, "inpaint", mask=mask), card, "model")
        for mask in ("lower_half", str(tmp_path / "mask.png"), "upper_half")
    )
    assert by_name is not None and by_file is not None and other is not None
    assert by_name.spec == by_file.spec != other.spec


def test_rows_are_read_as_asked_and_only_their_shards(dataset: SmallDataset, tmp_path: Path) -> None:
    found = resolve_request(request(dataset), card_of(tmp_path), "model")
    assert found is not None
    rows = [4, 5, 0, 11, 7, 7]
    read = RowReader(found.inputs).read(rows)
    assert (read.images == dataset.images[rows]).all() and read.labels is not None
    assert read.labels.tolist() == [row % 7 for row in rows]

    lacking = make_dataset(tmp_path / "lacking", [5, 3, 4])
    lacking.path(1).unlink()
    inputs = dataclasses.replace(found.inputs, uri=lacking.uri)
    assert (RowReader(inputs).read([0, 4, 8]).images == lacking.images[[0, 4, 8]]).all()


def test_altered_inputs_are_never_edited(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", [5, 3])
    found = resolve_request(request(data), card_of(tmp_path), "model")
    assert found is not None
    wrong = dataclasses.replace(found.inputs, image_shape=(8, 8, 3))
    with pytest.raises(ShardCorruptError, match=r"shape \(8, 8, 1\), the manifest says \(8, 8, 3\)"):
        RowReader(wrong).read([0])
    whole = data.path(1).read_bytes()
    data.path(1).write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    reader = RowReader(found.inputs)
    reader.read([0, 4])
    with pytest.raises(ShardCorruptError, match="sha256"):
        reader.read([5])
