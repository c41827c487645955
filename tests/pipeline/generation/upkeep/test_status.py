"""How far a run is, told from listings."""

import os
from pathlib import Path

import pytest

from jobs.output import main
from pipeline.config_io import to_json
from pipeline.errors import ConfigError
from pipeline.generation.output.commits import part_key
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.upkeep.status import read_status
from pipeline.stores.lease import LEASE_KEY, LeaseRecord
from tests.pipeline.generation.upkeep.small_run import make_run, small_config
from tests.pipeline.runs_in_process import make_in_process


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
