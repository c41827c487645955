"""The dataset manifest: what its digest covers, what is stored of it, and what is refused."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import pyarrow.parquet
import pytest

from pipeline.data.manifest import MANIFEST_KEY, DatasetManifest, Split, load_manifest, write_manifest
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import DatasetError, DatasetMissingError, FormatVersionError, ShardCorruptError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store


def shard(number: int, num_samples: int = 10, *, split: str = "train", content: int | None = None) -> ShardRecord:
    sha256 = f"{number if content is None else content:064x}"
    key = f"{split}/{number:09d}-{sha256[:16]}.tar"
    return ShardRecord(key=key, size_bytes=2048 + number, sha256=sha256, num_samples=num_samples)


MANIFEST = DatasetManifest(
    name="digits",
    source="digits",
    image_size=(8, 8),
    channels=1,
    class_names=("zero", "one"),
    splits={"train": Split(shards=(shard(0), shard(1, 7))), "held_out": Split(shards=[shard(0, 3, split="held_out")])},
    num_quarantined=0,
)
DIGEST = "caf97ed608cdf91189d7c07cb187afeb90b97c0dedf81d463d1715f458c56d89"


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    store = open_store(str(tmp_path))
    assert write_manifest(store, MANIFEST) is not None
    return store


def part_of(store: ObjectStore, split: str) -> str:
    (part,) = json.loads(store.read(MANIFEST_KEY))["splits"][split]["parts"]
    return str(part["key"])


def test_counts() -> None:
    train = MANIFEST.splits["train"]
    assert train.num_samples == 17 and MANIFEST.splits["held_out"].num_samples == 3
    assert train.size_bytes == 2048 + 2049 and train.shard_sizes.tolist() == [10, 7]
    assert MANIFEST.num_classes == 2
    assert dataclasses.replace(MANIFEST, class_names=()).num_classes is None


def test_no_shard_of_a_dataset_is_empty() -> None:
    """One of a generation run may be, where its images were taken down."""
    with pytest.raises(ValueError, match=r"^num_samples: a shard must hold at least 1, got 0 in 'train/000000001-"):
        Split(shards=(shard(0), shard(1, 0)))


def test_a_stored_manifest_loads_as_it_was(store: ObjectStore) -> None:
    loaded = load_manifest(store)
    assert loaded == MANIFEST and loaded.digest == MANIFEST.digest
    assert list(loaded.splits["train"].shards) == [shard(0), shard(1, 7)]
    assert json.loads(store.read(MANIFEST_KEY))["format_version"] == 3


def test_the_first_manifest_stands(store: ObjectStore) -> None:
    other = dataclasses.replace(MANIFEST, splits={"train": Split(shards=[shard(0, 5)])})
    assert write_manifest(store, other) is None
    assert load_manifest(store) == MANIFEST


def test_the_parts_are_there_before_they_are_named(tmp_path: Path) -> None:
    class Watched:
        def __init__(self, store: ObjectStore) -> None:
            self.store, self.uri, self.created = store, store.uri, list[str]()

        def create(self, key: str, data: bytes) -> bool:
            self.created.append(key)
            return self.store.create(key, data)

    watched = Watched(open_store(str(tmp_path)))
    write_manifest(watched, MANIFEST)  # type: ignore[arg-type]
    assert [key.rpartition("/")[0] for key in watched.created] == ["_manifest/train", "_manifest/held_out", ""]
    assert watched.created[-1] == MANIFEST_KEY


def test_the_digest_is_this_one_for_ever() -> None:
    """Made again from what its text says."""

    def column(numbers: list[int]) -> bytes:
        return struct.pack(f"<{len(numbers)}q", *numbers)

    train = bytes(32) + (1).to_bytes(32, "big") + column([2048, 2049]) + column([10, 7])
    held_out = bytes(32) + column([2048]) + column([3])
    text = (
        '{"channels":1,"class_names":["zero","one"],"image_size":[8,8],"name":"","num_levels":256,"num_quarantined":0,'
        f'"source":"","splits":{{"held_out":{{"num_shards":1,"sha256":"{hashlib.sha256(held_out).hexdigest()}"}},'
        f'"train":{{"num_shards":2,"sha256":"{hashlib.sha256(train).hexdigest()}"}}}}}}\n'
    )
    assert MANIFEST.digest == hashlib.sha256(text.encode()).hexdigest() == DIGEST


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
        dataclasses.replace(MANIFEST, splits={"train": held_out, "held_out": train}),
        *(
            dataclasses.replace(MANIFEST, splits={"train": Split(shards=shards), "held_out": held_out})
            for shards in (
                train.shards[::-1],
                (shard(0), shard(1, 8)),
                (shard(0), shard(1, 7, content=3)),
                (shard(0), dataclasses.replace(shard(1, 7), size_bytes=9)),
            )
        ),
    ]
    assert len({MANIFEST.digest, *(manifest.digest for manifest in changed)}) == 1 + len(changed)


def test_the_digest_does_not_depend_on_how_the_parts_are_written(store: ObjectStore) -> None:
    """Another version of the library writes other bytes under another name, which say the same."""
    key, root = part_of(store, "train"), Path(store.uri)
    table = pyarrow.parquet.read_table(root / key)
    pyarrow.parquet.write_table(table, root / "other", compression="zstd", version="1.0", row_group_size=1)
    data = (root / "other").read_bytes()
    other = f"_manifest/train/00000-00002-{hashlib.sha256(data).hexdigest()}.parquet"
    assert other != key
    (root / "other").rename(root / other)
    (root / key).unlink()
    (root / MANIFEST_KEY).write_text((root / MANIFEST_KEY).read_text().replace(key, other))
    assert load_manifest(store) == MANIFEST and load_manifest(store).digest == DIGEST


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
        ("/train/00000-", "/train/00001-", "splits.train.parts: must list all ranges from 0"),
        ("/train/00000-", "/../00000-", "splits.train.parts.0.key: must be _manifest/"),
        ('"train":', '"test":', "needs a 'train' split"),
        ('"name":', '"nom":', "name"),
    ],
)
def test_damaged_manifests_are_refused(store: ObjectStore, old: str, new: str, message: str) -> None:
    text = store.read(MANIFEST_KEY).decode()
    assert old in text
    store.write(MANIFEST_KEY, text.replace(old, new, 1).encode())
    with pytest.raises(DatasetError, match=r"manifest\.json: .*prepare the dataset again") as caught:
        load_manifest(store)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_part_with_a_flipped_bit_is_named(store: ObjectStore, where: float) -> None:
    key = part_of(store, "held_out")
    data = bytearray(store.read(key))
    data[int(where * (len(data) - 1))] ^= 1
    store.write(key, bytes(data))
    with pytest.raises(ShardCorruptError, match=f"/{key}: was altered or cut short, .*; restore the file, or prepare"):
        load_manifest(store)


def test_a_part_that_is_gone_is_named(store: ObjectStore) -> None:
    key = part_of(store, "train")
    store.delete(key)
    with pytest.raises(DatasetError, match=f"/{key}: does not exist, and manifest.json names it; restore the file"):
        load_manifest(store)


@pytest.mark.parametrize(("version", "advice"), [(2, "prepare the dataset again into an empty"), (4, "update this pr")])
def test_another_version_is_refused_by_its_number(store: ObjectStore, version: int, advice: str) -> None:
    text = store.read(MANIFEST_KEY).decode()
    text = text.replace('"format_version":3', f'"format_version":{version}').replace("name", "nom")
    store.write(MANIFEST_KEY, text.encode())
    with pytest.raises(FormatVersionError, match=rf"manifest\.json: has format_version {version}, .* 3; {advice}"):
        load_manifest(store)
