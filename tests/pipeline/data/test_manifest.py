"""The dataset manifest: what its digest covers, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.config_io import to_json
from pipeline.data.manifest import MANIFEST_KEY, DatasetManifest, ShardRecord, Split, load_manifest
from pipeline.errors import DatasetError, DatasetMissingError, FormatVersionError
from pipeline.stores.storage import open_store


def shard(number: int, num_samples: int = 10) -> ShardRecord:
    return ShardRecord(key=f"train/{number:09d}.tar", size_bytes=2048, sha256=f"{number:064x}", num_samples=num_samples)


MANIFEST = DatasetManifest(
    name="digits",
    source="digits",
    image_size=(8, 8),
    channels=1,
    class_names=("zero", "one"),
    splits={"train": Split(shards=(shard(0), shard(1, 7))), "held_out": Split(shards=(shard(2, 3),))},
    num_quarantined=0,
)


def test_counts() -> None:
    assert MANIFEST.splits["train"].num_samples == 17 and MANIFEST.splits["held_out"].num_samples == 3
    assert MANIFEST.num_classes == 2
    assert dataclasses.replace(MANIFEST, class_names=()).num_classes is None


def test_a_stored_manifest_loads_as_it_was(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.create(MANIFEST_KEY, to_json(MANIFEST))
    loaded = load_manifest(store)
    assert loaded == MANIFEST and loaded.digest == MANIFEST.digest
    assert json.loads(store.read(MANIFEST_KEY))["format_version"] == 2


def test_digest_covers_what_readers_see_and_not_where_it_came_from() -> None:
    assert dataclasses.replace(MANIFEST, name="other", source="/somewhere/else").digest == MANIFEST.digest
    train, held_out = MANIFEST.splits["train"], MANIFEST.splits["held_out"]
    changed = [
        dataclasses.replace(MANIFEST, image_size=(9, 8)),
        dataclasses.replace(MANIFEST, image_size=(8, 9)),
        dataclasses.replace(MANIFEST, num_levels=65536),
        dataclasses.replace(MANIFEST, channels=3),
        dataclasses.replace(MANIFEST, class_names=("one", "zero")),
        dataclasses.replace(MANIFEST, num_quarantined=1),
        dataclasses.replace(MANIFEST, splits={"train": train}),
        dataclasses.replace(MANIFEST, splits={"train": Split(shards=train.shards[::-1]), "held_out": held_out}),
        dataclasses.replace(MANIFEST, splits={"train": Split(shards=(shard(0), shard(1, 8))), "held_out": held_out}),
        dataclasses.replace(MANIFEST, splits={"train": Split(shards=(shard(0), shard(3, 7))), "held_out": held_out}),
    ]
    assert len({MANIFEST.digest, *(manifest.digest for manifest in changed)}) == 1 + len(changed)


def test_no_dataset_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match="no dataset here") as caught:
        load_manifest(open_store(str(tmp_path / "nowhere")))
    assert caught.value.exit_code == 2 and str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "", "not valid JSON"),
        ('"channels":1', '"channels":2', "channels"),
        ('"image_size":[8,8]', '"image_size":8', "image_size"),
        ('"image_size":[8,8]', '"image_size":[8,0]', "image_size"),
        ('"num_levels":256', '"num_levels":1024', "num_levels"),
        ('"num_samples":7', '"num_samples":0', "num_samples"),
        ('"num_samples":7', '"num_samples":7.5', "num_samples"),
        (f'"sha256":"{1:064x}"', '"sha256":"abc"', "sha256"),
        ('"train":', '"test":', "needs a 'train' split"),
        ('"name":', '"nom":', "name"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = to_json(MANIFEST).decode()
    assert old in text
    (tmp_path / MANIFEST_KEY).write_text(text.replace(old, new, 1))
    with pytest.raises(DatasetError, match=r"manifest\.json: ") as caught:
        load_manifest(open_store(str(tmp_path)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("version", "advice"), [(1, "prepare the dataset again into an empty"), (3, "update this pr")])
def test_another_version_is_refused_by_its_number(tmp_path: Path, version: int, advice: str) -> None:
    text = (
        to_json(MANIFEST).decode().replace('"format_version":2', f'"format_version":{version}').replace("name", "nom")
    )
    (tmp_path / MANIFEST_KEY).write_text(text)
    with pytest.raises(FormatVersionError, match=rf"manifest\.json: has format_version {version}, .* 2; {advice}"):
        load_manifest(open_store(str(tmp_path)))
