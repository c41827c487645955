"""What is found in an output prefix: by listings alone, closed range by range."""

import hashlib
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config_io import to_json
from pipeline.data.shard_parts import PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import FormatVersionError, OutputExistsError, StorageAccessError, StorageError
from pipeline.generation.output import inventory as inventory_module
from pipeline.generation.output.commits import CommitRecord, part_key, read_record, tar_key, write_once
from pipeline.generation.output.inventory import ClosedRange, Inventory
from pipeline.generation.output.manifest import publish, read_shards, write_part
from pipeline.generation.spec.sampling_plan import ShardPlan, plan_shards
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from tests.pipeline.generation.output.stores import CountingStore, VastStore
from tests.pipeline.generation.output.test_commits import made_by
from tests.pipeline.generation.output.test_manifest import SPEC, manifest_of


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "output"))


def commit(store: ObjectStore, plan: ShardPlan, index: int) -> CommitRecord:
    return write_once(store, SPEC, plan.shard(index), f"tar {index}".encode(), made_by("a")).record


def commit_all(store: ObjectStore, plan: ShardPlan) -> dict[int, ShardRecord]:
    return {shard.index: commit(store, plan, shard.index).tar for shard in plan.missing(bytes(plan.num_shards))}


def missing(inventory: Inventory) -> list[int]:
    return [shard.index for shard in inventory.missing()]


def test_what_is_committed_is_found_and_nothing_else(store: ObjectStore) -> None:
    plan = plan_shards(SPEC, 95)
    assert missing(Inventory(store, plan, None)) == list(range(10))
    tars = commit_all(store, plan)
    store.delete(part_key(2))  # killed before the record
    store.delete(part_key(9))
    store.write("contact_sheet.png", b"")
    store.write("notes/000000001-x.tar", b"")
    inventory = Inventory(store, plan, None)
    assert missing(inventory) == [2, 9]
    assert (inventory.num_missing, inventory.num_images_done) == (2, 80)
    assert inventory.finish() is None
    for index in (2, 9):
        inventory.add(commit(store, plan, index))
    assert inventory.num_images_done == 95
    parts = inventory.finish()
    assert parts is not None and list(read_shards(store, parts)) == list(tars.values())


def test_tars_that_are_gone_or_cut_short_are_found_when_the_range_is_closed(
    store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_shards(SPEC, 95)
    tars = commit_all(store, plan)
    store.delete(tars[5].key)
    store.write(tars[6].key, b"cut")
    inventory = Inventory(store, plan, None)
    assert missing(inventory) == []
    assert inventory.finish() is None
    assert (
        missing(inventory) == [5, 6]
        and "2 committed shards have lost their tar (the first is 5)" in capsys.readouterr().out
    )
    for index in (5, 6):
        inventory.add(commit(store, plan, index))
    parts = inventory.finish()
    assert parts is not None and list(read_shards(store, parts)) == list(tars.values())


def test_tars_without_a_record_are_candidates_for_orphans(store: ObjectStore) -> None:
    plan = plan_shards(SPEC, 30)
    commit_all(store, plan)
    strange = f"000000001-{'0' * 64}.tar"
    store.write(strange, b"of other hardware")
    inventory = Inventory(store, plan, None)
    inventory.finish()
    assert [info.key for info in inventory.unnamed] == [strange]


def test_shards_of_the_manifest_are_believed_without_a_record_but_not_without_a_tar(store: ObjectStore) -> None:
    """A run of four shards grows: what its manifest names is known, and looked at when the range is closed."""
    tars = commit_all(store, plan_shards(SPEC, 40))
    manifest = publish(store, manifest_of([write_part(store, 0, list(tars.values()))], 40))
    store.delete(part_key(0))
    store.delete(tars[1].key)
    plan = plan_shards(SPEC, 60)
    inventory = Inventory(store, plan, manifest)
    assert missing(inventory) == [4, 5]
    for index in (4, 5):
        inventory.add(commit(store, plan, index))
    assert inventory.finish() is None and missing(inventory) == [1]


def test_records_beyond_the_plan_are_left_alone_and_ragged_ones_in_it_are_refused(store: ObjectStore) -> None:
    """An unfinished longer run is no obstacle, unless its last shard is short where this plan needs more."""
    commit_all(store, plan_shards(SPEC, 35))
    inventory = Inventory(store, plan_shards(SPEC, 30), None)
    assert missing(inventory) == [] and inventory.finish() is not None
    assert [item.key[:9] for item in inventory.unnamed] == ["000000003"]
    with pytest.raises(OutputExistsError, match=r"shard 3 is committed with 5 images"):
        Inventory(store, plan_shards(SPEC, 60), None)


def test_a_ragged_record_that_was_not_looked_at_is_refused_when_its_range_is_closed(store: ObjectStore) -> None:
    commit_all(store, plan_shards(SPEC, 35))
    plan = plan_shards(SPEC, 60)
    for index in (4, 5):
        commit(store, plan, index)
    inventory = Inventory(store, plan, None)
    with pytest.raises(OutputExistsError, match=r"shard 3 is committed with 5 images"):
        inventory.finish()


def test_a_manifest_with_a_ragged_end_does_not_grow(store: ObjectStore) -> None:
    tars = commit_all(store, plan_shards(SPEC, 35))
    manifest = publish(store, manifest_of([write_part(store, 0, list(tars.values()))], 35))
    with pytest.raises(OutputExistsError, match=r"shard 3 is committed with 5 images"):
        Inventory(store, plan_shards(SPEC, 60), manifest)


@pytest.mark.parametrize("number", [31, 38, 40])
@pytest.mark.parametrize("is_published", [True, False])
def test_a_run_does_not_grow_inside_its_last_shard(store: ObjectStore, number: int, is_published: bool) -> None:
    """As many shards as the old plan has: its manifest, or its part alone, is not that of the new one."""
    part = write_part(store, 0, list(commit_all(store, plan_shards(SPEC, 35)).values()))
    manifest = publish(store, manifest_of([part], 35)) if is_published else None
    with pytest.raises(OutputExistsError, match=rf"shard 3 is committed with 5 images, a run of {number}"):
        Inventory(store, plan_shards(SPEC, number), manifest)


def test_nor_does_it_shrink_inside_a_shard_whose_part_a_killed_run_left(store: ObjectStore) -> None:
    write_part(store, 0, list(commit_all(store, plan_shards(SPEC, 40)).values()))
    with pytest.raises(OutputExistsError, match=r"shard 3 is committed with 10 images, a run of 35"):
        Inventory(store, plan_shards(SPEC, 35), None)


def test_what_is_known_of_a_range_is_forgotten_when_its_part_is_written() -> None:
    plan, store = ShardPlan(shard_size=10, num_images=10 * 20_010), CountingStore()
    inventory, most = Inventory(store, plan, None), 0  # type: ignore[arg-type]
    for shard in plan.missing(bytes(plan.num_shards)):
        inventory.add(commit_unseen(store, plan, shard.index))
        most = max(most, inventory.num_known)
    assert inventory.finish() is not None
    assert 10_000 <= most <= 20_010 and inventory.num_known == 0
    assert store.requests["GET"] == 0, "it has all come by"


@pytest.mark.parametrize("error", [StorageError("away"), StorageAccessError("denied")], ids=["outage", "refusal"])
def test_an_outage_while_a_range_is_closed_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: StorageError
) -> None:
    """The first of two ranges is complete when the store does not answer for once; what it refuses, it will again."""
    plan, store, calls = ShardPlan(shard_size=10, num_images=10 * 10_002), CountingStore(), list[range]()
    close_range = inventory_module.close_range

    def close(store: ObjectStore, plan: ShardPlan, indices: range, known: dict[int, ShardRecord]) -> ClosedRange:
        calls.append(indices)
        if len(calls) == 1:
            raise error
        return close_range(store, plan, indices, known)

    monkeypatch.setattr(inventory_module, "close_range", close)
    inventory = Inventory(store, plan, None)  # type: ignore[arg-type]
    for index in range(10_000):
        inventory.add(commit_unseen(store, plan, index))
    inventory._closing[0].wait(60)
    if isinstance(error, StorageAccessError):
        with pytest.raises(StorageAccessError, match="denied"):
            inventory.add(commit_unseen(store, plan, 10_000))
        inventory.stop()
        return
    for index in range(10_000, 10_002):
        inventory.add(commit_unseen(store, plan, index))
    parts = inventory.finish()
    assert parts is not None and [part.num_shards for part in parts] == [10_000, 2]
    assert sorted(indices.start for indices in calls) == [0, 0, 10_000]
    assert "range 0 of the output shards is closed later: away" in capsys.readouterr().out


def commit_unseen(store: CountingStore, plan: ShardPlan, index: int) -> CommitRecord:
    """A shard as `write_once` leaves it, without its requests."""
    shard, digest = plan.shard(index), hashlib.sha256(b"%d" % index).hexdigest()
    record = CommitRecord(
        index=index, first_id=shard.first_id, num_samples=shard.num_samples, key=tar_key(index, digest), size_bytes=1,
        sha256=digest, model_digest=SPEC.model_digest, spec_digest=SPEC.digest, made=made_by("a"),
    )  # fmt: skip
    store.objects |= {record.key: b"x", part_key(index): to_json(record)}
    return record


def test_a_range_is_closed_once_it_is_complete_and_never_looked_into_again() -> None:
    """20,010 shards: two full ranges and one of ten. A rerun asks for the list of parts and for open ranges alone."""
    plan, store = ShardPlan(shard_size=10, num_images=10 * 20_010), CountingStore()
    tars = {index: commit_unseen(store, plan, index).tar for index in range(plan.num_shards)}
    first = Inventory(store, plan, None)  # type: ignore[arg-type]
    assert store.requests == {"LIST": 1 + 1 + 2 + 10 + 10 + 1, "GET": 3}, "parts, removals, a look, three ranges"
    store.requests.clear()
    parts = first.finish()
    assert parts is not None and [part.num_shards for part in parts] == [10_000, 10_000, 10]
    assert store.requests == {"GET": 20_010, "LIST": 3 + 10 + 10 + 1, "PUT": 3}, "records and tars once, removals"

    del store.objects[part_key(20_009)], store.objects[parts[2].key]
    store.requests.clear()
    again = Inventory(store, plan, None)  # type: ignore[arg-type]
    assert missing(again) == [20_009]
    assert store.requests == {"LIST": 1 + 1 + 2 + 1, "GET": 3}, "records: the last of two parts, and of a run"
    store.requests.clear()
    again.add(commit_unseen(store, plan, 20_009))
    assert again.finish() == parts
    assert store.requests["GET"] == 9, "this run's own commit is known"
    assert list(read_shards(store, parts)) == list(tars.values())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_shards", "num_parts"),
    [(200_000, 18), pytest.param(10_000_000, 900, marks=pytest.mark.slow)],
    ids=["200 thousand", "10 million"],
)
def test_a_plan_of_millions_is_looked_through_by_listings(num_shards: int, num_parts: int) -> None:
    """Nine tenths are done and have parts; of the rest every tenth shard is committed."""
    plan = ShardPlan(shard_size=500, num_images=500 * num_shards)
    store = VastStore(num_shards, num_parts, every=10)
    inventory_module.read_record, kept = _no_record, inventory_module.read_record
    started_s = time.monotonic()
    try:
        inventory = Inventory(store, plan, None)  # type: ignore[arg-type]
    finally:
        inventory_module.read_record = kept
    took_s, num_open = time.monotonic() - started_s, num_shards // 10_000 - num_parts
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{num_shards:,} shards: {took_s:.1f} s, {store.requests}, this process at most {peak_mb:.0f} MB")
    assert inventory.num_missing == (num_shards // 10) * 9 // 10
    first = next(inventory.missing())
    assert first.index == num_parts * 10_000 + 1
    assert store.requests == {"LIST": -(-num_parts // 1000) + 1 + 2 + num_open}


def _no_record(store: object, index: int) -> CommitRecord:
    shard = ShardPlan(shard_size=500, num_images=500 * 10**9).shard(index)
    return CommitRecord(
        index=index, first_id=shard.first_id, num_samples=500, key="", size_bytes=1, sha256="", model_digest="",
        spec_digest="", made=made_by("a"),
    )  # fmt: skip


def test_records_of_another_version_are_refused_by_name(store: ObjectStore) -> None:
    plan = plan_shards(SPEC, 20)
    commit_all(store, plan)
    store.write(part_key(1), store.read(part_key(1)).replace(b'"format_version":2', b'"format_version":3'))
    with pytest.raises(FormatVersionError, match=r"000000001\.json: has format_version 3.*; update this program"):
        Inventory(store, plan, None)
    assert read_record(store, 0).index == 0


def test_parts_of_other_plans_are_left_alone(store: ObjectStore) -> None:
    """Of a longer run that was killed, and of a shorter one whose manifest was never written."""
    plan = plan_shards(SPEC, 30)
    tars = list(commit_all(store, plan).values())
    write_part(store, 0, tars[:2])
    write_part(store, 0, [*tars, *tars])
    write_part(store, 7, tars)
    inventory = Inventory(store, plan, None)
    parts = inventory.finish()
    assert parts is not None and list(read_shards(store, parts)) == tars
    assert PartRecord(key=parts[0].key).num_shards == 3


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from pipeline.generation.output.inventory import Inventory
from pipeline.stores.local_store import LocalStore
from tests.pipeline.generation.output.test_inventory import SPEC, plan_shards

class Away(LocalStore):
    def read(self, key):
        time.sleep(600)

    def list(self, prefix=""):
        if prefix == sys.argv[2]:
            time.sleep(600)
        return super().list(prefix)

threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    Inventory(Away(Path(sys.argv[1])), plan_shards(SPEC, 95), None).finish()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("listing", ["nothing", "00000"], ids=["reading records", "closing a range"])
def test_an_interrupted_look_waits_for_no_request(store: ObjectStore, listing: str) -> None:
    """Whose store may be away, and waited for; nor does the process, at its end."""
    commit_all(store, plan_shards(SPEC, 95))
    script = [sys.executable, "-c", INTERRUPTED, store.uri, listing]
    done = subprocess.run(script, cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
