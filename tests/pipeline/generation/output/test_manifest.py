"""The manifest and its parts: small, verified, and only ever replaced by a longer one."""

import dataclasses
import hashlib
import json
import threading
from pathlib import Path

import pyarrow.parquet
import pytest

from pipeline.config_io import from_json, to_json
from pipeline.data.shard_parts import PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import ConfigError, FormatVersionError, OutputExistsError, ShardCorruptError
from pipeline.generation.output.commits import tar_key
from pipeline.generation.output.manifest import (
    MANIFEST_KEY,
    GenerationManifest,
    load_generation_manifest,
    publish,
    read_part,
    read_shards,
    write_if_changed,
    write_part,
)
from pipeline.generation.output.removals import RemovalRecord, removal_key
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from tests.pipeline.generation.spec.test_sampling_plan import make_spec

SPEC = make_spec(shard_size=10)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "output"))


def shards_of(number: int, first: int = 0) -> list[ShardRecord]:
    records = []
    for index in range(first, first + number):
        sha256 = hashlib.sha256(b"%d" % index).hexdigest()
        records.append(
            ShardRecord(key=tar_key(index, sha256), size_bytes=10**10 + index, sha256=sha256, num_samples=10)
        )
    return records


def manifest_of(parts: list[PartRecord], num_images: int) -> GenerationManifest:
    return GenerationManifest(
        spec=SPEC,
        spec_digest=SPEC.digest,
        model_uri="models:/ddpm/1",
        guide_uri=None,
        class_names=(),
        num_images=num_images,
        parts=tuple(parts),
    )


def test_a_part_gives_back_its_shards(store: ObjectStore) -> None:
    first, second = shards_of(10_000), shards_of(3, 10_000)
    parts = [write_part(store, 0, first), write_part(store, 1, second)]
    assert [(part.range_index, part.num_shards) for part in parts] == [(0, 10_000), (1, 3)]
    assert [info.key for info in store.list()] == [part.key for part in parts]
    assert list(read_shards(store, parts)) == first + second
    assert write_part(store, 1, second) == parts[1], "equal shards, equal bytes"
    manifest = manifest_of(parts, 100_030)
    assert manifest.num_shards == 10_003 and from_json(GenerationManifest, to_json(manifest), "x") == manifest


def test_a_part_can_be_read_by_others(store: ObjectStore, tmp_path: Path) -> None:
    part = write_part(store, 0, shards_of(3))
    table = pyarrow.parquet.read_table(tmp_path / "output" / part.key)
    assert table.column_names == ["sha256", "size_bytes", "num_samples"] and len(table) == 3
    assert table["sha256"][1].as_py() == hashlib.sha256(b"1").digest()


def test_a_part_is_read_when_it_is_reached(store: ObjectStore) -> None:
    parts = [write_part(store, 0, shards_of(2)), PartRecord(key=f"_manifest/00001-00001-{'0' * 64}.parquet")]
    shards = read_shards(store, parts)
    assert [next(shards), next(shards)] == shards_of(2)


def test_a_part_that_was_altered_is_not_used(store: ObjectStore) -> None:
    part = write_part(store, 0, shards_of(3))
    data = bytearray(store.read(part.key))
    data[len(data) // 2] ^= 1
    store.write(part.key, bytes(data))
    with pytest.raises(ShardCorruptError, match=r"_manifest/00000-00003-\w+\.parquet: was altered .*repair"):
        read_part(store, part)


def test_the_manifest_is_replaced_only_by_a_longer_one(store: ObjectStore, tmp_path: Path) -> None:
    assert load_generation_manifest(store) is None
    short, long = (manifest_of([write_part(store, 0, shards_of(n))], 10 * n) for n in (2, 4))
    assert publish(store, short) == short
    assert publish(store, long) == long
    written = (tmp_path / "output" / MANIFEST_KEY).stat()
    assert publish(store, dataclasses.replace(long, model_uri="elsewhere")) == long
    assert publish(store, short) == long, "a run never shrinks"
    now = (tmp_path / "output" / MANIFEST_KEY).stat()
    assert (now.st_mtime_ns, now.st_ino) == (written.st_mtime_ns, written.st_ino)
    assert load_generation_manifest(store) == long


@pytest.mark.parametrize("order", ["short last", "long last"])
def test_of_two_drivers_that_publish_at_once_the_longer_stays(store: ObjectStore, order: str) -> None:
    """Both have looked, and found nothing or the same, before either writes."""
    manifests = [manifest_of([write_part(store, 0, shards_of(n))], 10 * n) for n in (1, 3, 2)]
    publish(store, manifests[0])
    both_have_read = threading.Barrier(2, timeout=300)
    last_may_write = threading.Event()

    class Held:
        def __init__(self, is_last: bool) -> None:
            self.is_last, self.num_reads = is_last, 0

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def read_versioned(self, key: str) -> object:
            found = store.read_versioned(key)
            self.num_reads += 1
            if self.num_reads == 1:
                both_have_read.wait()
                if self.is_last:
                    last_may_write.wait(300)
            return found

    def publish_in(number: int, is_last: bool) -> None:
        publish(Held(is_last), manifests[number])  # type: ignore[arg-type]
        last_may_write.set()

    last = 2 if order == "short last" else 1
    threads = [threading.Thread(target=publish_in, args=(number, number == last)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_generation_manifest(store) == manifests[1]


def test_the_manifest_names_no_machine_and_no_time(store: ObjectStore) -> None:
    data = to_json(manifest_of([write_part(store, 0, shards_of(2))], 20))
    assert b"host" not in data and b"started" not in data and b'_s"' not in data.replace(b"image_size", b"")


def test_manifests_of_another_version_or_edited_ones_are_refused_by_name(store: ObjectStore) -> None:
    publish(store, manifest_of([write_part(store, 0, shards_of(2))], 20))
    text = store.read(MANIFEST_KEY)
    own, of_spec, edited = (json.loads(text) for _ in range(3))
    own["format_version"], of_spec["spec"]["format_version"] = 1, 1
    edited["parts"][0]["key"] = "../secret"
    for other in (own, of_spec):
        store.write(MANIFEST_KEY, to_json(other))
        with pytest.raises(FormatVersionError, match=r"manifest\.json: .*; make the images again into another output"):
            load_generation_manifest(store)
    store.write(MANIFEST_KEY, to_json(edited))
    with pytest.raises(ConfigError, match=r"manifest\.json: parts\.0\.key: must be _manifest/.*; do not edit it"):
        load_generation_manifest(store)
    store.write(MANIFEST_KEY, text[:-9])
    with pytest.raises(ConfigError, match=r"manifest\.json: not valid JSON"):
        load_generation_manifest(store)


def test_write_if_changed_compares_bytes(store: ObjectStore) -> None:
    assert [write_if_changed(store, "key", data) for data in (b"1", b"1", b"2")] == [True, False, True]


def test_what_its_parts_do_not_hold_is_not_published(store: ObjectStore) -> None:
    """Counted with what was removed from them, whether the part names the tar before a removal or after it."""
    before = shards_of(2)
    taken = dataclasses.replace(before[1], key=tar_key(1, "a" * 64), sha256="a" * 64, num_samples=7)
    record = RemovalRecord(
        index=1,
        sequence=0,
        ids=(11, 12, 19),
        reason="asked for",
        old_key=before[1].key,
        old_sha256=before[1].sha256,
        old_size_bytes=before[1].size_bytes,
        key=taken.key,
        sha256=taken.sha256,
        size_bytes=taken.size_bytes,
        num_samples=7,
        removed_at_utc="",
    )
    for rows in (before, [before[0], taken]):
        part = write_part(store, 0, rows)
        for removal in (None, record):
            store.delete(MANIFEST_KEY)
            store.delete(removal_key(1, 0))
            if removal is not None:
                store.create(removal_key(1, 0), to_json(removal))
            num_listed = 17 if rows[1] is taken and removal is None else 20
            for number in {17, 20, 23} - {num_listed}:
                with pytest.raises(OutputExistsError, match=rf"list {num_listed} images of {number}, as a run of"):
                    publish(store, manifest_of([part], number))
            assert store.stat(MANIFEST_KEY) is None
            publish(store, manifest_of([part], num_listed))
