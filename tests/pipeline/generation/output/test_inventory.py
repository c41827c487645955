"""What is found in an output prefix, and what is written there last."""

import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config_io import from_json, to_json
from pipeline.data.manifest import ShardRecord
from pipeline.errors import ConfigError, FormatVersionError, ObjectMissingError, OutputExistsError
from pipeline.generation.output.commits import part_key, tar_key, write_once
from pipeline.generation.output.inventory import (
    MANIFEST_KEY,
    GenerationManifest,
    load_generation_manifest,
    publish,
    survey,
    write_if_changed,
)
from pipeline.generation.spec.sampling_plan import OutputShard, ShardPlan, plan_shards
from pipeline.stores.object_store import ObjectInfo, ObjectStore
from pipeline.stores.storage import open_store
from tests.pipeline.generation.output.test_commits import made_by
from tests.pipeline.generation.spec.test_sampling_plan import make_spec

SPEC = make_spec(shard_size=10)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "output"))


def commit_all(store: ObjectStore, plan: ShardPlan) -> dict[int, ShardRecord]:
    tars = {}
    for shard in plan.missing(bytes(plan.num_shards)):
        tars[shard.index] = write_once(store, SPEC, shard, f"tar {shard.index}".encode(), made_by("a")).record.tar
    return tars


def manifest_of(tars: dict[int, ShardRecord], num_images: int) -> GenerationManifest:
    return GenerationManifest(
        spec=SPEC, spec_digest=SPEC.digest, class_names=(), num_images=num_images, shards=tuple(tars.values())
    )


def test_survey_finds_what_is_committed_and_nothing_else(store: ObjectStore) -> None:
    plan = plan_shards(SPEC, 95)
    assert survey(store, plan, {}).done == bytes(10)
    tars = commit_all(store, plan)
    store.delete(part_key(2))  # killed before the record
    store.delete(tars[5].key)  # lost
    store.write(tars[6].key, b"cut")
    store.write("contact_sheet.png", b"")
    store.write("notes/000000001-x.tar", b"")
    found = survey(store, plan, {})
    assert [i for i in range(10) if not found.done[i]] == [2, 5, 6]
    assert found.lost == (5, 6)
    assert found.tars == {i: tars[i] for i in (0, 1, 3, 4, 7, 8, 9)}
    assert sorted(item.key for item in found.unnamed) == [tars[2].key]


def test_known_shards_are_believed_without_a_record_but_not_without_a_tar(store: ObjectStore) -> None:
    plan = plan_shards(SPEC, 40)
    tars = commit_all(store, plan)
    store.delete(part_key(0))
    store.delete(tars[1].key)
    found = survey(store, plan, tars)
    assert list(found.done) == [1, 0, 1, 1] and found.lost == (1,)


def test_records_beyond_the_plan_are_left_alone_and_ragged_ones_in_it_are_refused(store: ObjectStore) -> None:
    """An unfinished longer run is no obstacle, unless its last shard is short where this plan needs more."""
    commit_all(store, plan_shards(SPEC, 35))
    found = survey(store, plan_shards(SPEC, 30), {})
    assert list(found.done) == [1, 1, 1]
    assert [item.key[:9] for item in found.unnamed] == ["000000003"]
    with pytest.raises(OutputExistsError, match=r"shard 3 is committed with 5 images"):
        survey(store, plan_shards(SPEC, 40), {})


def test_the_manifest_is_written_only_when_it_says_something_new(store: ObjectStore, tmp_path: Path) -> None:
    assert load_generation_manifest(store) is None
    short, long = plan_shards(SPEC, 20), plan_shards(SPEC, 40)
    tars = commit_all(store, long)
    assert publish(store, manifest_of({i: tars[i] for i in range(2)}, short.num_images))
    assert publish(store, manifest_of(tars, long.num_images))
    written = (tmp_path / "output" / MANIFEST_KEY).stat()
    assert not publish(store, manifest_of(tars, long.num_images))
    assert not publish(store, manifest_of({i: tars[i] for i in range(2)}, short.num_images)), "a run never shrinks"
    now = (tmp_path / "output" / MANIFEST_KEY).stat()
    assert (now.st_mtime_ns, now.st_ino) == (written.st_mtime_ns, written.st_ino)
    assert load_generation_manifest(store) == manifest_of(tars, long.num_images)


def test_the_manifest_names_no_machine_and_no_time(store: ObjectStore) -> None:
    tars = commit_all(store, plan_shards(SPEC, 20))
    data = to_json(manifest_of(tars, 20))
    assert b"host" not in data and b"started" not in data and b'_s"' not in data.replace(b"image_size", b"")
    assert from_json(GenerationManifest, data, "x") == manifest_of(tars, 20)


def test_write_if_changed_compares_bytes(store: ObjectStore) -> None:
    assert [write_if_changed(store, "key", data) for data in (b"1", b"1", b"2")] == [True, False, True]


class CountingStore:
    """A store in memory that counts requests, as many as S3 would bill."""

    def __init__(self) -> None:
        self.uri = "memory"
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()

    def read(self, key: str) -> bytes:
        self.requests["GET"] += 1
        if key not in self.objects:
            raise ObjectMissingError(key)
        return self.objects[key]

    def write(self, key: str, data: bytes) -> None:
        self.requests["PUT"] += 1
        self.objects[key] = data

    def create(self, key: str, data: bytes) -> bool:
        self.requests["PUT"] += 1
        return self.objects.setdefault(key, data) is data

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        self.requests["LIST"] += max(1, -(-len(keys) // 1000))
        for key in keys:
            yield ObjectInfo(key=key, size_bytes=len(self.objects[key]), modified_s=0.0)

    def stat(self, key: str) -> ObjectInfo | None:
        self.requests["HEAD"] += 1
        return None if key not in self.objects else ObjectInfo(key=key, size_bytes=len(self.objects[key]), modified_s=0)

    def delete(self, key: str) -> None:
        self.requests["DELETE"] += 1
        self.objects.pop(key, None)


def test_requests_and_memory_grow_with_the_shards_alone() -> None:
    """20,000 shards: two PUTs each, one LIST per 1,000 objects and survey; a rerun reads no record."""
    num_shards = 20_000
    plan, store = ShardPlan(shard_size=10, num_images=10 * num_shards), CountingStore()
    tars = {}
    for index in range(num_shards):
        digest = hashlib.sha256(b"%d" % index).hexdigest()
        shard = OutputShard(index=index, first_id=10 * index, num_samples=10)
        tars[index] = ShardRecord(key=tar_key(index, digest), size_bytes=1, sha256=digest, num_samples=10)
        store.objects[tars[index].key] = b"x"
        if index < 10:  # the rest of the records would be as empty of news, and slow
            write_once(store, SPEC, shard, b"x", made_by("a"))
    assert store.requests == {"PUT": 20}
    store.requests.clear()
    tracemalloc.start()
    found = survey(store, plan, tars)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 not in found.done
    assert set(store.requests) == {"LIST"} and store.requests["LIST"] == -(-len(store.objects) // 1000)
    assert peak_bytes < 1000 * num_shards


def test_manifests_and_records_of_another_version_are_refused_by_name(store: ObjectStore) -> None:
    plan = plan_shards(SPEC, 20)
    manifest = manifest_of(commit_all(store, plan), 20)
    publish(store, manifest)
    text = store.read(MANIFEST_KEY)
    own, of_spec = (json.loads(text) for _ in range(2))
    own["format_version"], of_spec["spec"]["format_version"] = 1, 1
    for other in (own, of_spec):
        store.write(MANIFEST_KEY, to_json(other))
        with pytest.raises(FormatVersionError, match=r"manifest\.json: .*; make the images again into another output"):
            load_generation_manifest(store)
    store.write(MANIFEST_KEY, text[:-9])
    with pytest.raises(ConfigError, match=r"manifest\.json: not valid JSON"):
        load_generation_manifest(store)
    store.write(part_key(1), store.read(part_key(1)).replace(b'"format_version":2', b'"format_version":3'))
    with pytest.raises(FormatVersionError, match=r"000000001\.json: has format_version 3.*; update this program"):
        survey(store, plan, {})


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from pipeline.generation.output.inventory import survey
from pipeline.stores.local_store import LocalStore
from tests.pipeline.generation.output.test_inventory import SPEC, plan_shards

class Away(LocalStore):
    def read(self, key):
        time.sleep(600)

threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    survey(Away(Path(sys.argv[1])), plan_shards(SPEC, 95), {})
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupted_survey_waits_for_no_request(store: ObjectStore) -> None:
    """Whose store may be away, and waited for; nor does the process, at its end."""
    commit_all(store, plan_shards(SPEC, 95))
    script = [sys.executable, "-c", INTERRUPTED, store.uri]
    done = subprocess.run(script, cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
