"""keep_last removes complete older ticks and nothing else, whatever breaks in between."""

import dataclasses
import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpm import DDIM
from pipeline.config_io import to_json
from pipeline.errors import OutputExistsError, StorageError
from pipeline.generation import sample_job, tick_retention
from pipeline.generation.claim import claim
from pipeline.generation.output.commits import part_key, tar_key
from pipeline.generation.output.tick_records import TickRecord, read_tick, tick_key
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.tick_retention import MIN_AGE_S, removable_ticks, remove_old_ticks
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.stores.lease import hold_lease
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import TEMPORARY_PREFIX, ObjectInfo, Versioned
from pipeline.stores.storage import open_store
from tests.pipeline.generation.output.stores import CountingStore
from tests.pipeline.runs_in_process import make_in_process, snapshot
from tests.pipeline.storage_checks import WATCHED_S, looking_often
from tests.pipeline.tiny_models import write_model

TICKS = [f"2026-11-{day:02d}T03:00Z" for day in range(20, 26)]
LEASE_S = 1.0


def config_of(root: Path, tick: str, **changes: object) -> SampleConfig:
    """Three classes: 6 images in two shards."""
    config = SampleConfig(
        model=str(root / "model"),
        output=str(root / "out"),
        images_per_class=2,
        sampler=DDIM(num_steps=1),
        shard_size=4,
        batch_size=4,
        tick=tick,
        lease_s=LEASE_S,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def finish(config: SampleConfig, *, age_s: float) -> None:
    """Make a tick, of which the manifest is as old as that."""
    with claim(config, resolve_job(config)):
        pass
    make_in_process(config)
    prefix = Path(sample(config).store.uri)
    then = time.time() - age_s
    os.utime(prefix / "manifest.json", (then, then))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six ticks: old and done; never begun; old, done; begun alone; old, done; done just now."""
    root = tmp_path_factory.mktemp("series")
    write_model(root / "model")
    for tick in (TICKS[0], TICKS[2], TICKS[4]):
        finish(config_of(root, tick), age_s=2 * MIN_AGE_S)
    begun = config_of(root, TICKS[3])
    with claim(begun, resolve_job(begun)):
        pass
    finish(config_of(root, TICKS[5]), age_s=0)
    return root


@pytest.fixture
def root(series: Path, tmp_path: Path) -> Path:
    """A copy with its times of change; the foreign things in it are nobody's to delete."""
    copy = tmp_path / "series"
    shutil.copytree(series, copy)
    out = copy / "out"
    (out / "notes.txt").write_text("mine")
    (out / "0123456789abcdef").mkdir()
    (out / "0123456789abcdef" / "manifest.json").write_text("a prefix without a tick's record")
    os.utime(out / "0123456789abcdef" / "manifest.json", (0, 0))
    (out / "_ticks" / "README").write_text("mine")
    return copy


def output(root: Path) -> LocalStore:
    return LocalStore(root / "out")


def record(root: Path, tick: str) -> TickRecord:
    found = read_tick(output(root), tick)
    assert found is not None
    return found


def prefix(root: Path, tick: str) -> Path:
    return root / "out" / record(root, tick).prefix


def ticks(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "out" / "_ticks").glob("*.json"))


def of_others(root: Path, gone: list[Path]) -> dict[str, bytes]:
    """Every file below the output but for those of some prefixes and their ticks."""
    return {
        str(path): path.read_bytes()
        for path in (root / "out").rglob("*")
        if path.is_file() and not any(path.is_relative_to(one) for one in gone) and path.name != "lease.json"
    }


def removable(root: Path, keep_last: int, present: str = TICKS[5]) -> list[str]:
    return [one.record.tick for one in removable_ticks(output(root), record(root, present), keep_last)]


def remove(root: Path, keep_last: int, present: str = TICKS[5], *, lease_s: float = LEASE_S) -> list[str]:
    return remove_old_ticks(output(root), record(root, present), keep_last, lease_s=lease_s)


def test_only_complete_older_ticks_beyond_the_newest_are_chosen(root: Path) -> None:
    before = snapshot(root)
    assert removable(root, 1) == [TICKS[0], TICKS[2], TICKS[4]]
    assert removable(root, 2) == [TICKS[0], TICKS[2]], "the present one is among those that stay"
    assert removable(root, 3) == [TICKS[0]] and removable(root, 4) == removable(root, 10**6) == []
    assert removable(root, 1, present=TICKS[2]) == [TICKS[0]], "what is later than the present tick is not looked at"
    assert snapshot(root) == before, "to look changes nothing"


def test_what_was_finished_within_a_day_stays_by_the_clock_of_the_store(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prefix(root, TICKS[2]) / "manifest.json"
    newest = (prefix(root, TICKS[5]) / "manifest.json").stat().st_mtime
    os.utime(manifest, (newest - MIN_AGE_S + 60,) * 2)
    monkeypatch.setattr(time, "time", lambda: newest + 10**9)  # a driver whose clock is wrong by decades
    assert TICKS[2] not in removable(root, 1)
    os.utime(manifest, (newest - MIN_AGE_S - 60,) * 2)
    assert TICKS[2] in removable(root, 1)


def test_what_is_chosen_is_gone_and_all_else_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = [prefix(root, tick) for tick in (TICKS[0], TICKS[2])]
    (gone[1] / "my notes.txt").write_text("mine")
    records = [root / "out" / tick_key(tick) for tick in (TICKS[0], TICKS[2])]
    model = record(root, TICKS[5]).asked_model
    for tick in (TICKS[4], TICKS[5]):
        sample(config_of(root, tick, model=model))  # their galleries say where they are, which is in the copy now
    before = of_others(root, [*gone, *records])
    assert sample(config_of(root, TICKS[5], model=model, keep_last=2)).num_made == 0
    assert of_others(root, [*gone, *records]) == before and len(before) > 20
    assert ticks(root) == TICKS[3:]
    assert not any(path.is_file() for path in gone[0].rglob("*")), "a run writes nothing that its removal forgets"
    assert [path.name for path in gone[1].rglob("*") if path.is_file()] == ["my notes.txt"]
    said = capsys.readouterr().out
    assert f"removed tick {TICKS[0]}: " in said and f"removed tick {TICKS[2]}: " in said
    assert "1 objects that no run writes stay there, such as my notes.txt" in said
    assert remove(root, 2) == [] and capsys.readouterr().out == "", "nothing is left to do, or to say"
    for tick in TICKS[4:]:
        assert sample(config_of(root, tick, model=model)).num_made == 0, "what stays is whole"


def test_a_shard_that_was_lost_keeps_no_tick_from_its_turn(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The contact sheet cannot be made: that is a line, and earlier ticks go all the same."""
    model = record(root, TICKS[5]).asked_model
    sorted(prefix(root, TICKS[5]).glob("*.tar"))[0].unlink()
    made = sample(config_of(root, TICKS[5], model=model, keep_last=2))
    assert ticks(root) == TICKS[3:]
    assert made.contact_sheet_uri is None and not made.has_contact_sheet and made.num_pictures_failed >= 1
    assert f"jobs/output.py verify {made.store.uri} tells, and repair mends them" in capsys.readouterr().out


def test_a_prefix_in_which_somebody_works_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(prefix(root, TICKS[2]))
    with hold_lease(open_store(str(prefix(root, TICKS[2]))), duration_s=LEASE_S), looking_often():
        assert remove(root, 2, lease_s=WATCHED_S) == [TICKS[0]]
    assert f"tick {TICKS[2]} is not removed, since somebody works there" in capsys.readouterr().out
    assert {key for key in before if key != "lease.json"} <= snapshot(prefix(root, TICKS[2])).keys()
    assert not record(root, TICKS[2]).removal_begun
    assert remove(root, 2) == [TICKS[2]]


@pytest.mark.parametrize("damage", ["not JSON", "another's prefix", "another tick's"])
def test_a_damaged_record_removes_nothing(root: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "out" / tick_key(TICKS[0])
    text = path.read_text()
    theirs = record(root, TICKS[0]).prefix, record(root, TICKS[4]).prefix
    path.write_text(
        {
            "not JSON": text[:-10],
            "another's prefix": text.replace(f'"prefix":"{theirs[0]}"', f'"prefix":"{theirs[1]}"'),
            "another tick's": (root / "out" / tick_key(TICKS[4])).read_text(),
        }[damage]
    )
    assert path.read_text() != text
    before = snapshot(root)
    assert remove(root, 3) == []
    assert snapshot(root) == before
    assert f"what tick {TICKS[0]} made is not removed (" in capsys.readouterr().out


def test_a_tick_that_was_removed_can_be_made_again(root: Path) -> None:
    assert remove(root, 3) == [TICKS[0]]
    finish(config_of(root, TICKS[0]), age_s=0)
    assert removable(root, 3) == [], "it is young"


def test_who_comes_late_to_a_removal_takes_nothing_of_a_tick_that_was_begun_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two removals go on with the same one; the first ends it, and the tick is made again."""
    found = output(root).read_versioned(tick_key(TICKS[0]))
    marked = dataclasses.replace(record(root, TICKS[0]), removal_begun=True)
    output(root).replace(tick_key(TICKS[0]), to_json(marked), found.etag)
    late = removable_ticks(output(root), record(root, TICKS[5]), 3)
    assert remove(root, 3) == [TICKS[0]]
    finish(config_of(root, TICKS[0]), age_s=0)
    before = snapshot(prefix(root, TICKS[0]) / "_parts")
    monkeypatch.setattr(tick_retention, "removable_ticks", lambda *_: late)
    assert remove(root, 3) == []
    assert TICKS[0] in ticks(root) and (prefix(root, TICKS[0]) / "manifest.json").exists()
    assert snapshot(prefix(root, TICKS[0]) / "_parts") == before


@pytest.mark.parametrize("is_done", [True, False], ids=["removed", "begun"])
def test_an_attempt_whose_tick_goes_while_its_model_is_fetched_makes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    """It has read the tick's record, and the removal has not seen its lease: there is none yet."""
    old = prefix(root, TICKS[0])

    def fetch(*arguments: Any, **options: Any) -> ResolvedModel:
        if is_done:
            assert remove(root, 3) == [TICKS[0]]
        else:
            found = output(root).read_versioned(tick_key(TICKS[0]))
            marked = dataclasses.replace(record(root, TICKS[0]), removal_begun=True)
            output(root).replace(tick_key(TICKS[0]), to_json(marked), found.etag)
            (old / "manifest.json").unlink()
        return resolve_model(*arguments, **options)

    monkeypatch.setattr(sample_job, "resolve_model", fetch)
    monkeypatch.setattr("pipeline.generation.sample.ray_session", lambda _: pytest.fail("it would be made"))
    config = config_of(root, TICKS[0], model=record(root, TICKS[0]).asked_model)
    with pytest.raises(OutputExistsError, match=r"was removed meanwhile" if is_done else r"is being removed"):
        sample(config)
    assert not (old / "manifest.json").exists() and (TICKS[0] in ticks(root)) is not is_done
    assert [path.name for path in old.rglob("*") if path.is_file()] == ["lease.json"] if is_done else True


def test_what_killed_attempts_have_left_in_a_prefix_goes_with_it(root: Path) -> None:
    old = prefix(root, TICKS[0])
    unfinished = old / f"{TEMPORARY_PREFIX}0123"
    unfinished.write_bytes(b"half a tar")
    os.utime(unfinished, (0, 0))
    assert remove(root, 3) == [TICKS[0]]
    assert list(old.rglob("*")) == []


class Vast(CountingStore):
    """The prefix of a tick of many shards, of which nothing is kept, deleted or not."""

    num_shards = 50_000

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        assert prefix == ""
        for index in range(self.num_shards):
            yield ObjectInfo(key=tar_key(index, "0" * 64), size_bytes=1, modified_s=0.0)
        for index in range(self.num_shards):
            yield ObjectInfo(key=part_key(index), size_bytes=1, modified_s=0.0)
        yield ObjectInfo(key="notes", size_bytes=1, modified_s=0.0)


def test_a_tick_of_any_size_is_removed_in_little_memory_and_few_requests(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present = record(root, TICKS[5])
    old = removable_ticks(output(root), present, 3)
    vast = Vast()
    monkeypatch.setattr(tick_retention, "open_store", lambda _: vast)
    monkeypatch.setattr(tick_retention, "removable_ticks", lambda *_: old)
    tracemalloc.start()
    try:
        assert remove_old_ticks(output(root), present, 3, lease_s=0.0) == [TICKS[0]]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 << 20, "the keys alone take 16 MB"
    assert vast.requests == {"LIST": 101, "DELETE": 100 + 2, "HEAD": 1}, "manifest and lease by themselves"
    assert "100,000 objects" in capsys.readouterr().out


class Breaking(LocalStore):
    """Every operation counts; one of them fails, before it was done or after."""

    lock = threading.Lock()
    num_left = 0
    is_after = False

    @classmethod
    def _passes(cls, *, after: bool) -> None:
        with cls.lock:
            if after == cls.is_after:
                cls.num_left -= 1
                if cls.num_left == 0:
                    raise StorageError("the store went away")

    def read(self, key: str) -> bytes:
        self._passes(after=False)
        data = super().read(key)
        self._passes(after=True)
        return data

    def read_versioned(self, key: str) -> Versioned:
        self._passes(after=False)
        found = super().read_versioned(key)
        self._passes(after=True)
        return found

    def create(self, key: str, data: bytes) -> bool:
        self._passes(after=False)
        is_new = super().create(key, data)
        self._passes(after=True)
        return is_new

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        self._passes(after=False)
        replaced = super().replace(key, data, etag)
        self._passes(after=True)
        return replaced

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._passes(after=False)
        yield from super().list(prefix)
        self._passes(after=True)

    def stat(self, key: str) -> ObjectInfo | None:
        self._passes(after=False)
        info = super().stat(key)
        self._passes(after=True)
        return info

    def delete(self, key: str) -> None:
        self._passes(after=False)
        super().delete(key)
        self._passes(after=True)


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
def test_broken_at_every_operation_and_run_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_after: bool
) -> None:
    """Readers trust the manifest: while it is there all images are, in every state on the way."""
    monkeypatch.setattr(tick_retention, "open_store", lambda uri: Breaking(Path(uri)))
    monkeypatch.setattr(Breaking, "is_after", is_after)
    for number in range(1, 1000):
        copy = tmp_path / f"{number}"
        shutil.copytree(root, copy)
        old, kept = prefix(copy, TICKS[0]), [prefix(copy, tick) for tick in TICKS[2:]]
        before = [snapshot(one) for one in kept]
        present = record(copy, TICKS[5])
        images = {path.name for path in old.glob("*.tar")}
        Breaking.num_left = number
        first = remove_old_ticks(Breaking(copy / "out"), present, 3, lease_s=0.0)
        if Breaking.num_left > 0:
            assert first == [TICKS[0]] and number > 15
            break
        if (old / "manifest.json").exists():
            assert {path.name for path in old.glob("*.tar")} == images
        else:
            assert TICKS[0] not in ticks(copy) or record(copy, TICKS[0]).removal_begun
        if TICKS[0] not in ticks(copy):
            assert not any(path.is_file() for path in old.rglob("*")), "the record goes last"
        Breaking.num_left = 10**9
        assert remove_old_ticks(Breaking(copy / "out"), present, 3, lease_s=0.0) in ([TICKS[0]], [])
        assert ticks(copy) == TICKS[2:] and not any(path.is_file() for path in old.rglob("*"))
        assert [snapshot(one) for one in kept] == before
        shutil.rmtree(copy)
    else:
        raise AssertionError("it never ends")
