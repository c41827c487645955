"""Listing and splitting of sources: what is held out, which classes there are, which folders are refused."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from pipeline.data.sources import Source, open_digits, open_folder
from pipeline.errors import ConfigError, DatasetMissingError
from pipeline.stores.storage import open_store
from tests.fixtures_s3 import S3Server


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    return str(folder)


def opened(uri: str, held_out_fraction: float | None = 0.25, seed: int = 0) -> Source:
    return open_folder(
        uri, image_size=(4, 4), channels=1, max_pixels=100, held_out_fraction=held_out_fraction, seed=seed
    )


def names(source: Source, split: str) -> list[str]:
    return [item.key for item in source.splits[split]]


def test_digits_are_split_by_the_fixed_permutation() -> None:
    source = open_digits()
    order = np.random.default_rng(0).permutation(1797)
    assert [int(item.key) for item in source.splits["train"]] == order[:1500].tolist()
    assert [int(item.key) for item in source.splits["held_out"]] == order[1500:].tolist()
    table = load_digits()
    for item in source.splits["held_out"]:
        assert item.label == table.target[int(item.key)]
    for row in (0, 5, 1796):
        pixels = source.reader.decode(source.reader.fetch(str(row)))
        # 17 grey levels; 8 * 255 / 16 = 127.5 is the only tie
        assert np.abs(pixels[:, :, 0] - table.images[row] * 255 / 16).max() <= 0.5


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    uri = write(
        tmp_path, "dog/1.png", "cat/deep/er/2.PNG", "cat/3.jpeg", "bird/4.webp", "bird/.hidden.png", ".git/5.png"
    )
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "cat/notes.md").write_text("x")
    source = opened(uri, held_out_fraction=0)
    assert source.class_names == ("bird", "cat", "dog") and list(source.splits) == ["train"]
    assert {item.key: item.label for item in source.splits["train"]} == {
        "bird/4.webp": 0, "cat/3.jpeg": 1, "cat/deep/er/2.PNG": 1, "dog/1.png": 2,
    }  # fmt: skip
    assert source.num_ignored == 2


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    source = opened(write(tmp_path, "a.png", "b.png", "c.jpg", "d.bmp"))
    assert source.class_names == () and {item.label for item in source.splits["train"]} == {None}


def test_a_folder_on_s3_is_the_same_source(tmp_path: Path, s3_server: S3Server) -> None:
    files = [f"{label}/image {number}.png" for label in ("cat", "dog") for number in range(6)]
    local = opened(write(tmp_path, *files))
    store = open_store(f"{s3_server.uri}/source-{tmp_path.name}")
    for name in files:
        store.write(name, png())
    remote = opened(store.uri)
    assert remote.splits == local.splits and remote.class_names == local.class_names
    assert remote.reader.fetch(files[0]) == png()


def test_the_held_out_share_is_stratified_and_depends_on_names_and_seed_only(tmp_path: Path) -> None:
    files = [f"{label}/{number:03d}.png" for label, count in (("a", 40), ("b", 8), ("c", 2)) for number in range(count)]
    source = opened(write(tmp_path / "x", *files))
    by_class = [[item.label for item in source.splits["held_out"]].count(label) for label in range(3)]
    assert by_class == [10, 2, 1]
    assert sorted(names(source, "train") + names(source, "held_out")) == files
    assert opened(write(tmp_path / "y", *reversed(files))).splits == source.splits
    assert opened(str(tmp_path / "x"), seed=1).splits != source.splits
    # every stretch of the training split holds a mixture of the classes
    labels = [item.label for item in source.splits["train"]]
    assert {0, 1} <= set(labels[:18]) and {0, 1} <= set(labels[18:])
    # what a file's neighbours are does not change its place in the order
    fewer = opened(write(tmp_path / "z", *[name for name in files if name != "a/000.png"]), held_out_fraction=0)
    assert names(fewer, "train") == [
        name for name in names(opened(str(tmp_path / "x"), 0), "train") if name != "a/000.png"
    ]


def test_folders_that_are_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    train = [f"train/{label}/{number}.png" for label in ("cat", "dog") for number in range(9)]
    val = [f"val/{label}/{number}.png" for label in ("cat", "dog") for number in range(3)]
    uri = write(tmp_path, *train, *val)
    source = opened(uri, None)
    assert source.class_names == ("cat", "dog") and list(source.splits) == ["train", "held_out"]
    assert sorted(names(source, "train")) == train and sorted(names(source, "held_out")) == val
    assert names(source, "train") != train, "in an order that mixes the classes"
    for item in (*source.splits["train"], *source.splits["held_out"]):
        assert source.class_names[item.label or 0] == item.key.split("/")[1]
    assert ("split held_out", "val/") in source.findings
    for fraction in (0.25, 0.0):
        with pytest.raises(
            ConfigError, match=r"^held_out_fraction: .* folder of held-out images, got 0\.\d+; leave it"
        ):
            opened(uri, fraction)
    for path in (tmp_path / "val").rglob("*.png"):
        path.unlink()
    alone = opened(uri, None)
    assert len(alone.splits["held_out"]) == 2, "a tenth of each class"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images at {uri} (nothing there)"),
        (["a.txt", "b/c.md"], "no images at {uri} (2 files, none of them .png"),
        (["a/.b.png"], "no images at {uri} (nothing there)"),
    ],
)
def test_folders_without_images(tmp_path: Path, files: list[str], message: str) -> None:
    uri = write(tmp_path / "folder", *files)
    with pytest.raises(DatasetMissingError) as caught:
        opened(uri)
    assert message.format(uri=uri) in str(caught.value) and caught.value.exit_code == 2


def test_images_beside_sub_folders_are_refused(tmp_path: Path) -> None:
    uri = write(tmp_path, "cat/1.png", "dog/1.png", "b.png", "a.png")
    with pytest.raises(
        ConfigError, match=r"2 images directly in it \(first: a\.png\) beside sub-folders \(first: cat/\)"
    ):
        opened(uri)


def test_a_split_must_not_be_empty(tmp_path: Path) -> None:
    uri = write(tmp_path, "a.png", "b.png")
    with pytest.raises(ConfigError, match=r"held_out_fraction: 0\.01 of 2 images leaves the split 'held_out' empty"):
        opened(uri, held_out_fraction=0.01)
    with pytest.raises(ConfigError, match=r"held_out_fraction: 0\.9 of 2 images leaves the split 'train' empty"):
        opened(uri, held_out_fraction=0.9)


def test_file_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / b"\xff.png".decode(errors="surrogateescape")).write_bytes(png())
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        opened(str(tmp_path))
    str(caught.value).encode()  # it can be printed
