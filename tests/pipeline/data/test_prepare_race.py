"""Two prepares of different images into one place: the one that publishes first is left as it is."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import PIL.Image
import pytest

from pipeline.data.manifest import DatasetManifest, load_manifest
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.data.prepare_shard import ShardResult, ShardTask
from pipeline.errors import OutputExistsError, StorageAccessError
from pipeline.stores.local_store import LocalStore
from pipeline.stores.storage import open_store


def write_images(folder: Path, broken: str, seed: int) -> Path:
    """Eight images, one of which does not decode."""
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / f"{number}.png")
    (folder / broken).write_bytes(b"no image")
    return folder


def config(source: Path, dataset: Path) -> PrepareConfig:
    return PrepareConfig(
        source=str(source), dataset=str(dataset), image_size=8, held_out_fraction=0.25, seed=1, max_quarantined=1
    )


def prepare_after(first: Callable[[], object], asked: PrepareConfig) -> DatasetManifest:
    """A prepare that another one overtakes: it has found an empty place, made its shards, and not yet published."""

    def overtaken(work: Callable[[ShardTask], ShardResult], tasks: Sequence[ShardTask]) -> Iterator[ShardResult]:
        yield from [work(task) for task in tasks]
        first()

    return prepare_source(asked, open_source(asked), overtaken)


def listed(dataset: Path) -> list[str]:
    return list(json.loads((dataset / "quarantine.json").read_text())["reasons"])


def test_who_loses_the_race_leaves_the_winners_quarantine(tmp_path: Path) -> None:
    ours = config(write_images(tmp_path / "ours", "1.png", seed=1), tmp_path / "dataset")
    theirs = config(write_images(tmp_path / "theirs", "2.png", seed=2), tmp_path / "dataset")
    with pytest.raises(OutputExistsError, match="holds another dataset"):
        prepare_after(lambda: prepare_source(theirs, open_source(theirs), map), ours)
    assert listed(tmp_path / "dataset") == ["2.png"]
    assert load_manifest(open_store(theirs.dataset)).source == str(tmp_path / "theirs")


def test_two_of_the_same_images_agree(tmp_path: Path) -> None:
    same = config(write_images(tmp_path / "source", "1.png", seed=1), tmp_path / "dataset")
    made = prepare_after(lambda: prepare_source(same, open_source(same), map), same)
    assert made == load_manifest(open_store(same.dataset)) and listed(tmp_path / "dataset") == ["1.png"]


def test_a_run_that_was_killed_before_its_quarantine_is_completed_by_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(write_images(tmp_path / "source", "1.png", seed=1), tmp_path / "dataset")
    made = prepare_source(asked, open_source(asked), map)
    (tmp_path / "dataset" / "quarantine.json").unlink()
    assert prepare_source(asked, open_source(asked), map) == made and listed(tmp_path / "dataset") == ["1.png"]
    assert "only quarantine.json was missing, and is written" in capsys.readouterr().out


def test_a_store_that_forbids_deletes_keeps_shards_of_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(self: LocalStore, key: str) -> NoReturn:
        raise StorageAccessError(f"{key}: deleting is forbidden")

    monkeypatch.setattr(LocalStore, "delete", forbid)
    left = tmp_path / "out/train/000000007-0123456789abcdef.tar"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of an interrupted run")
    asked = config(write_images(tmp_path / "source", "3.png", 1), tmp_path / "out")
    prepare_source(asked, open_source(asked), map)
    assert left.exists() and capsys.readouterr().out.count("deleting is forbidden") == 1
