"""From images to a verified dataset: exact pixels, reproducible bytes, reruns, kills and refusals."""

import hashlib
import json
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from pipeline.config_io import read_toml, to_toml
from pipeline.data.data_order import DataConfig, DataOrder
from pipeline.data.ingest import rank_batches, read_buffer_bytes
from pipeline.data.manifest import DatasetManifest, load_manifest
from pipeline.data.prepare import PrepareConfig, describe_plan, open_source, prepare, prepare_source
from pipeline.data.shards import decode_png, read_shard
from pipeline.errors import (
    ConfigError,
    DatasetMissingError,
    OutputExistsError,
    ShardCorruptError,
    StorageAccessError,
    UndecodableImageError,
)
from pipeline.stores.storage import ObjectStore, join_uri, open_store
from tests.fixtures_s3 import S3Server
from tests.pipeline.webdataset_reader import read_with_webdataset

# Most tests run the stage without Ray, which only carries it out; two run all of it.


def prepare_here(config: PrepareConfig) -> DatasetManifest:
    return prepare_source(config, open_source(config), map)


def write_images(folder: Path, num_per_class: int = 6, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(num_per_class):
            pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


def folder_config(source: object, output: object, **changes: object) -> PrepareConfig:
    options: dict[str, object] = {"image_size": 8, "shard_size": 4, "held_out_fraction": 0.25} | changes
    return PrepareConfig(source=str(source), dataset=str(output), **options)  # type: ignore[arg-type]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def rows(store: ObjectStore, manifest: DatasetManifest, split: str) -> list[tuple[np.ndarray, int | None, str]]:
    return [
        (decode_png(sample.image), sample.cls, sample.meta["source"])
        for record in manifest.splits[split].shards
        for sample in read_shard(store, record)
    ]


# ---------------------------------------------------------------- digits


def check_digits(output: Path, manifest: DatasetManifest) -> None:
    """Every scan, exactly once, in the documented order, read by our reader and by the webdataset library."""
    table = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    assert (manifest.image_size, manifest.channels, manifest.num_classes) == ((8, 8), 1, 10)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 1500, "held_out": 297}
    store = open_store(str(output))
    for split, expected in (("train", order[:1500]), ("held_out", order[1500:])):
        read = rows(store, manifest, split)
        assert [int(source) for _, _, source in read] == expected.tolist()
        assert [label for _, label, _ in read] == table.target[expected].tolist()
        pixels = np.stack([image for image, _, _ in read])[..., 0]
        assert np.array_equal(np.rint(pixels / 255 * 16), table.images[expected])  # the scans themselves
        assert np.array_equal(pixels, np.rint(table.images[expected] * 255 / 16))
        theirs = read_with_webdataset([output / record.key for record in manifest.splits[split].shards])
        assert [(row["cls"], row["json"]["source"]) for row in theirs] == [row[1:] for row in read]
        assert np.array_equal(np.stack([np.asarray(row["png"].convert("L")) for row in theirs]), pixels)
    labels = Counter(label for _, label, _ in rows(store, manifest, "train"))
    assert [labels[label] for label in range(10)] == np.bincount(table.target[order[:1500]]).tolist()


def test_digits_on_ray(ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PrepareConfig(dataset=str(tmp_path / "ray"), shard_size=250)
    manifest = prepare(config)
    check_digits(tmp_path / "ray", manifest)
    # the same bytes again, elsewhere and without Ray
    elsewhere = prepare_here(PrepareConfig(dataset=str(tmp_path / "here"), shard_size=250))
    assert elsewhere == manifest and elsewhere.digest == manifest.digest
    first, second = snapshot(tmp_path / "ray"), snapshot(tmp_path / "here")
    assert {name: data for name, (data, _) in first.items()} == {name: data for name, (data, _) in second.items()}
    assert len(first) == 6 + 2 + 2 + 1  # shards, parts, manifest
    # a rerun checks and writes nothing
    assert prepare(config) == manifest
    assert snapshot(tmp_path / "ray") == first
    assert "already holds this dataset" in capsys.readouterr().out


def test_the_digits_dataset_is_pinned(tmp_path: Path) -> None:
    # Pixels, labels, order and ids of the dataset that every figure in this project is about. PNG bytes may change with
    # the zlib inside Pillow, which is why this does not pin the manifest's digest.
    manifest = prepare_here(PrepareConfig(dataset=str(tmp_path), shard_size=400))
    content = hashlib.sha256()
    for split in ("train", "held_out"):
        for pixels, label, source in rows(open_store(str(tmp_path)), manifest, split):
            content.update(pixels.tobytes() + f"{label}/{source};".encode())
    assert content.hexdigest() == "a6957bbf1279f13d02f63d65e2495e726560d05ecfd08d207015ffcc0e6f2813"


# ---------------------------------------------------------------- folders


def test_a_folder_on_ray_with_images_that_do_not_decode(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "source")
    (source / "cat/00.png").write_bytes(b"no image")
    (source / "dog/03.png").write_bytes((source / "dog/03.png").read_bytes()[:60])
    with pytest.raises(UndecodableImageError) as caught:
        prepare(folder_config(source, tmp_path / "out"))
    line = str(caught.value)
    assert "\n" not in line and "does not decode" in line and "max_quarantined" in line
    assert any(f"{source}/{name}: " in line for name in ("cat/00.png", "dog/03.png"))
    with pytest.raises(DatasetMissingError):
        load_manifest(open_store(str(tmp_path / "out")))

    manifest = prepare(folder_config(source, tmp_path / "out", max_quarantined=2))
    assert manifest.num_quarantined == 2
    assert sum(split.num_samples for split in manifest.splits.values()) == 10
    listed = json.loads((tmp_path / "out/quarantine.json").read_text())
    assert listed["format_version"] == 2
    assert set(listed["reasons"]) == {"cat/00.png", "dog/03.png"} and all(listed["reasons"].values())
    assert "2 images left out" in capsys.readouterr().out
    assert manifest == prepare_here(folder_config(source, tmp_path / "other", max_quarantined=5))


def test_a_folder_becomes_labelled_squares(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source")
    manifest = prepare_here(folder_config(source, tmp_path / "out", name="pets"))
    assert (manifest.name, manifest.source) == ("pets", str(source))
    assert manifest.class_names == ("cat", "dog")
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 8, "held_out": 4}
    assert [shard.num_samples for shard in manifest.splits["train"].shards] == [4, 4]
    store = open_store(str(tmp_path / "out"))
    seen = rows(store, manifest, "train") + rows(store, manifest, "held_out")
    assert sorted(name for _, _, name in seen) == sorted(
        str(path.relative_to(source)) for path in source.rglob("*.png")
    )
    for pixels, label, name in seen:
        assert manifest.class_names[label or 0] == name.split("/")[0]
        with PIL.Image.open(source / name) as image:
            expected = image.resize((8, 8), PIL.Image.Resampling.LANCZOS, box=(2, 0, 14, 12))
        assert np.array_equal(pixels, np.asarray(expected))


def test_images_need_not_be_squares(ray_session: None, tmp_path: Path) -> None:
    """End to end: from files of several shapes to the batches of two training workers."""
    source, rng = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    for number, (height, width) in enumerate([(24, 40), (48, 80), (50, 50), (12, 90)] * 5):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(source / f"{number:02d}.png")
    config = folder_config(source, tmp_path / "out", image_size="24x40", held_out_fraction=0.2)
    manifest = prepare(config)
    assert manifest.image_shape == (24, 40, 3) and manifest == load_manifest(open_store(str(tmp_path / "out")))
    assert prepare(config) == manifest, "a rerun checks it"
    with pytest.raises(OutputExistsError, match=r"its image shapes are \(24, 40, 3\), asked for \(40, 24, 3\)"):
        prepare_here(folder_config(source, tmp_path / "out", image_size="40x24", held_out_fraction=0.2))
    expected = [pixels for pixels, _, _ in rows(open_store(str(tmp_path / "out")), manifest, "train")]
    for pixels, _, name in rows(open_store(str(tmp_path / "out")), manifest, "train"):
        if int(name[:2]) % 4 == 0:  # it has that shape already
            with PIL.Image.open(source / name) as image:
                assert np.array_equal(pixels, np.asarray(image))
    order = DataOrder.for_split(manifest, "train", DataConfig(lanes=2, window_shards=2), seed=0, global_batch=4)
    assert read_buffer_bytes(manifest, order, 2) > 0
    for rank in range(2):
        batches = rank_batches(
            str(tmp_path / "out"), manifest, "train", order, DataConfig(lanes=2, window_shards=2),
            rank=rank, world=2, start_step=0, stop_step=6,
        )  # fmt: skip
        for batch in batches:
            assert batch.images.shape == (2, 24, 40, 3) and batch.labels is None
            for pixels, sample_id in zip(batch.images, batch.sample_ids, strict=True):
                assert np.array_equal(pixels, expected[sample_id])


def test_a_folder_without_classes_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "source", classes=("only",))
    manifest = prepare_here(folder_config(tmp_path / "source/only", tmp_path / "out"))
    assert manifest.num_classes is None
    assert {label for _, label, _ in rows(open_store(str(tmp_path / "out")), manifest, "train")} == {None}
    with tarfile.open(tmp_path / "out" / manifest.splits["train"].shards[0].key) as archive:
        assert not any(name.endswith(".cls") for name in archive.getnames())


def test_from_s3_to_s3(tmp_path: Path, s3_server: S3Server) -> None:
    source = write_images(tmp_path / "source")
    place = f"{s3_server.uri}/prepare-{tmp_path.name}"
    store = open_store(join_uri(place, "source"))
    for path in source.rglob("*.png"):
        store.write(str(path.relative_to(source)), path.read_bytes())
    remote = prepare_here(folder_config(store.uri, join_uri(place, "out")))
    local = prepare_here(folder_config(source, tmp_path / "out"))
    assert remote.splits == local.splits and remote.digest == local.digest
    out = open_store(join_uri(place, "out"))
    assert load_manifest(out) == remote
    assert len(rows(out, remote, "train")) == 8


# ---------------------------------------------------------------- reruns


def test_another_dataset_is_never_overwritten(tmp_path: Path) -> None:
    source, out = write_images(tmp_path / "source"), tmp_path / "out"
    prepare_here(folder_config(source, out))
    before = snapshot(out)
    for changes in ({"image_size": 4}, {"channels": 1}, {"shard_size": 5}, {"seed": 1}, {"held_out_fraction": 0.0}):
        with pytest.raises(OutputExistsError, match="holds another dataset") as caught:
            prepare_here(folder_config(source, out, **changes))
        assert str(out) in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    with pytest.raises(OutputExistsError):
        prepare_here(PrepareConfig(dataset=str(out)))
    (source / "cat/00.png").write_bytes((source / "cat/01.png").read_bytes())
    with pytest.raises(OutputExistsError, match="its digest is"):
        prepare_here(folder_config(source, out))
    assert snapshot(out) == before


def test_a_rerun_finds_a_lost_shard(tmp_path: Path) -> None:
    config = folder_config(write_images(tmp_path / "source"), tmp_path / "out")
    manifest = prepare_here(config)
    (tmp_path / "out" / manifest.splits["train"].shards[1].key).unlink()
    with pytest.raises(ShardCorruptError, match="missing or has another size"):
        prepare_here(config)
    (tmp_path / "out/manifest.json").unlink()  # as the message advises
    assert prepare_here(config) == manifest
    assert len(rows(open_store(str(tmp_path / "out")), manifest, "train")) == 8


KILLED = """
import os, signal, sys
from pipeline.config_io import read_toml
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source

def execute(work, tasks):
    for number, task in enumerate(tasks):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield work(task)

config = read_toml(PrepareConfig, sys.argv[1], "test")
prepare_source(config, open_source(config), execute)
"""


def test_a_killed_run_publishes_nothing_and_is_completed_by_the_next(tmp_path: Path) -> None:
    config = folder_config(write_images(tmp_path / "source"), tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, to_toml(config), "2"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = snapshot(tmp_path / "out")
    assert len(left) == 2 and not any("manifest" in name for name in left)
    with pytest.raises(DatasetMissingError):
        load_manifest(open_store(str(tmp_path / "out")))

    # one of the two was damaged meanwhile, and a run over other data left a tar of its own
    damaged = tmp_path / "out" / min(left)
    damaged.write_bytes(b"x" * len(left[min(left)][0]))
    (tmp_path / "out/train/000000000-0123456789abcdef.tar").write_bytes(b"other")
    (tmp_path / "out/train/notes.txt").write_bytes(b"not ours")
    manifest = prepare_here(config)
    assert manifest == prepare_here(folder_config(tmp_path / "source", tmp_path / "unbroken"))
    after, unbroken = snapshot(tmp_path / "out"), snapshot(tmp_path / "unbroken")
    assert after.pop("train/notes.txt")
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in unbroken.items()}
    assert after[max(left)] == left[max(left)], "what was done is not written again"


def test_two_runs_at_once_agree(tmp_path: Path) -> None:
    config = folder_config(write_images(tmp_path / "source"), tmp_path / "out")
    manifests = []

    def execute(work: Callable, tasks: list) -> list:  # type: ignore[type-arg]
        results = [work(task) for task in tasks]
        if not manifests:  # the other run finishes while this one is about to publish
            manifests.append(prepare_here(config))
        return results

    manifests.append(prepare_source(config, open_source(config), execute))
    assert manifests[0] == manifests[1]


# ---------------------------------------------------------------- refusals


def test_a_split_of_nothing_but_broken_images(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", num_per_class=2)
    for path in source.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UndecodableImageError, match="has none left"):
        prepare_here(folder_config(source, tmp_path / "out", max_quarantined=100, held_out_fraction=0.5))


def test_a_huge_image_counts_as_undecodable(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source")
    with pytest.raises(UndecodableImageError, match="16 x 12 pixels are more than max_pixels = 100"):
        prepare_here(folder_config(source, tmp_path / "out", max_pixels=100))


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageAccessError, match="cannot write") as caught:
        prepare_here(folder_config(source, tmp_path / "file"))
    assert "\n" not in str(caught.value)


def test_missing_sources_are_refused_before_anything_starts(tmp_path: Path) -> None:
    import ray

    running = ray.is_initialized()
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DatasetMissingError, match="no images at"):
            prepare(folder_config(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists() and ray.is_initialized() is running


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"source": ""}, "source"),
        ({"dataset": ""}, "dataset"),
        ({"image_size": 16}, "image_size"),
        ({"image_size": "8x9"}, "image_size"),
        ({"source": "x", "image_size": "24x"}, "image_size"),
        ({"channels": 3}, "channels"),
        ({"held_out_fraction": 0.1}, "held_out_fraction"),
        ({"source": "x"}, "image_size"),
        ({"source": "x", "image_size": 0}, "image_size"),
        ({"source": "x", "image_size": 8, "channels": 2}, "channels"),
        ({"source": "x", "image_size": 8, "held_out_fraction": 1.0}, "held_out_fraction"),
        ({"source": "x", "image_size": 8, "held_out_fraction": -0.1}, "held_out_fraction"),
        ({"shard_size": 0}, "shard_size"),
        ({"max_pixels": 10**9}, "max_pixels"),
        ({"max_quarantined": -1}, "max_quarantined"),
    ],
)
def test_impossible_values_name_their_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*; "):
        PrepareConfig(**({"dataset": "out"} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("toml", "shape"),
    [
        ("", (8, 8, 1)),
        ("image_size = '8'", (8, 8, 1)),
        ("source = 'x'\nimage_size = 32", (32, 32, 3)),
        ("source = 'x'\nimage_size = '24x40'\nchannels = 1", (24, 40, 1)),
    ],
)
def test_sizes_are_numbers_or_texts(toml: str, shape: tuple[int, int, int]) -> None:
    base = PrepareConfig(dataset="out")
    config = read_toml(PrepareConfig, toml, "x.toml", base)
    assert config.image_shape == shape and read_toml(PrepareConfig, to_toml(config), "x.toml", base) == config
    with pytest.raises(ConfigError, match=r"^x\.toml: image_size: must be height x width such as 24x40.*got '24x'; "):
        read_toml(PrepareConfig, "source = 'x'\nimage_size = '24x'", "x.toml", base)


def test_the_plan_reads_no_image_and_writes_nothing(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source")
    for path in source.rglob("*.png"):
        path.write_bytes(b"broken")
    (source / "cat/notes.txt").write_text("x")
    plan = dict(describe_plan(folder_config(source, tmp_path / "out")))
    assert "12 images, 1 other files ignored" in plan["source"] and plan["classes"] == "2"
    assert plan["splits"] == "train 8, held_out 4" and plan["shards"] == "3 of at most 4 samples"
    assert plan["images"].startswith("8 x 8 x 3, 2.2 KiB") and plan["dataset"] == str(tmp_path / "out")
    wide = dict(describe_plan(folder_config(source, tmp_path / "out", image_size="4x16")))
    assert wide["images"].startswith("4 x 16 x 3, 2.2 KiB")
    assert not (tmp_path / "out").exists()
    assert dict(describe_plan(PrepareConfig(dataset="out")))["splits"] == "train 1,500, held_out 297"
