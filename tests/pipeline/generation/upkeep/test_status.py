"""How far a run is, told from listings."""

import dataclasses
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from jobs.output import main
from pipeline.config_io import to_json
from pipeline.errors import ConfigError
from pipeline.generation.output.commits import part_key
from pipeline.generation.output.plan_record import PLAN_KEY, PlanRecord
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.upkeep.status import read_status
from pipeline.stores.lease import LEASE_KEY, LeaseRecord
from tests.pipeline.generation.output.stores import VastStore
from tests.pipeline.generation.upkeep.small_run import found, make_run, small_config
from tests.pipeline.runs_in_process import count_lists, make_in_process, run


def test_a_run_under_way(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    store = resolve_job(config).store
    with pytest.raises(ConfigError, match="must hold a run"):
        read_status(store)
    make_in_process(config)
    store.delete(part_key(3))
    os.utime(Path(store.uri, part_key(0)), (0, 1_000))
    status = read_status(store, num_images=30)
    assert (status.num_shards_done, status.num_shards, status.num_last_hour) == (3, 5, 2)
    assert not status.is_published and status.holder is None and status.shard_size == 6
    rows = dict(status.rows())
    assert rows["output shards"] == "3 of 5 done, 2 missing, of up to 6 images"
    assert rows["time left"] == "about 1 h 00 min at that rate"
    unknown = dict(read_status(store).rows())
    assert unknown["images"] == "unknown" and "--num-images says" in unknown["output shards"]


def test_a_finished_run_and_who_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, store = make_run(tmp_path)
    store.write(LEASE_KEY, to_json(LeaseRecord(token="x", holder="process 7 on here", duration_s=60)))
    assert main(["status", store.uri]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 done, 0 missing" in said and "published" in said and "process 7 on here" in said
    store.write(LEASE_KEY, to_json(LeaseRecord(token="x", holder="process 7", duration_s=60, released=True)))
    assert read_status(store).holder is None
    assert main(["status", store.uri, "--num-images", "0"]) == 2


class Gone(Exception):
    """The driver is gone as soon as Ray starts."""


def begin(config: SampleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise Gone

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.generation.sample.ray_session", interrupt)
        with pytest.raises(Gone):
            sample(config)


def test_what_is_missing_is_known_before_there_is_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)
    store = resolve_job(config).store
    begin(config, monkeypatch)
    rows = dict(read_status(store).rows())
    assert rows["images"] == "20" and rows["output shards"] == "0 of 4 done, 4 missing, of up to 6 images"
    assert rows["manifest"] == "not published yet"
    make_in_process(config)
    store.delete(part_key(2))
    assert dict(read_status(store).rows())["output shards"].startswith("3 of 4 done, 1 missing")
    store.write(PLAN_KEY, b"damaged")
    assert read_status(store).num_images is None


def test_a_run_that_grows_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, store = make_run(tmp_path, num_images=18)
    longer = dataclasses.replace(config, num_images=30)
    begin(longer, monkeypatch)
    status = read_status(store)
    assert (status.num_shards_done, status.num_shards, status.is_published) == (3, 5, False)
    assert dict(status.rows())["manifest"] == "published with 18 images, the others not yet"
    run(longer)
    assert read_status(store).is_published and found(store) == []


def test_what_has_an_old_part_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records are older than it; those of a young part may be of the last hour."""
    _, store = make_run(tmp_path)
    looked: list[str] = []
    count_lists(monkeypatch, Path(store.uri), looked)
    status = read_status(store)
    assert (status.num_shards_done, status.num_last_hour) == (4, 4) and looked == ["_manifest/", "_parts/00000"]
    looked.clear()
    status = read_status(store, now_s=time.time() + 4000)
    assert (status.num_shards_done, status.num_last_hour) == (4, 0) and looked == ["_manifest/"]


def test_a_run_of_any_size_is_counted_by_listings_of_open_ranges() -> None:
    """200,000 shards: 18 ranges have parts, two are a tenth done. Nothing is kept of a shard."""
    store = VastStore(200_000, 18, every=10)
    plan = PlanRecord(spec_digest="0" * 64, shard_size=500, num_images=100_000_000)
    store.objects[PLAN_KEY] = to_json(plan)
    tracemalloc.start()
    try:
        status = read_status(store)  # type: ignore[arg-type]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (status.num_shards_done, status.num_shards) == (182_000, 200_000)
    assert store.requests["LIST"] == 1 + 2 and peak_bytes < 1 << 20
