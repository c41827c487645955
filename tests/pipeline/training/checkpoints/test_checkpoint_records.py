"""A record that can be parsed and makes no sense is damaged: it is left out, stops nothing and leads nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointError
from pipeline.stores.local_store import LocalStore
from pipeline.training.checkpoints.checkpoint_records import parse_record, record_key, step_of_key
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore, Retention
from tests.pipeline.training.checkpoint_cases import KEY_2, pieces

FILE = {"name": "a.bin", "sha256": "0", "size_bytes": 1}
NONSENSE: dict[str, dict[str, Any]] = {
    "another step": {"step": 7},
    "a step below 0": {"step": -2},
    **{
        f"the folder {prefix!r}": {"prefix": prefix}
        for prefix in ("../x", "/etc", "a//b", "", "a\0b", "_records", "step-000000002-a\0", "step-000000002-a/..")
    },
    "no files": {"files": []},
    "a file twice": {"files": [FILE, FILE]},
    **{f"the file {name!r}": {"files": [FILE | {"name": name}]} for name in (".", "..", "", "a/b", "../a", "a\0")},
    "a length below 0": {"files": [FILE | {"size_bytes": -1}]},
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_record_that_makes_no_sense_is_damaged(tmp_path: Path, nonsense: str) -> None:
    store, lines = LocalStore(tmp_path / "checkpoints"), list[str]()
    checkpoints = CheckpointStore(store, lines.append)
    good = checkpoints.save(1, pieces())
    checkpoints.save(2, pieces())
    data = json.dumps(json.loads(store.read(KEY_2)) | NONSENSE[nonsense]).encode()
    with pytest.raises(CheckpointError, match=f"{KEY_2}: ") as caught:
        parse_record(data, 2, f"{store.uri}/{KEY_2}")
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)
    store.write(KEY_2, data)
    assert checkpoints.newest() == good
    assert len(lines) == 1 and "checkpoint of step 2 is damaged and left out" in lines[0]
    checkpoints.prune(checkpoints.save(3, pieces()), Retention(last=1))
    assert checkpoints.remove_leftovers(older_than_s=-1) == 0, "it may name any folder"
    mine = checkpoints.save(2, pieces())
    assert [record.prefix for record in checkpoints.records()][1:] == [mine.prefix]


@pytest.mark.parametrize(("step", "key"), [(2, KEY_2), (10**9, "_records/step-1000000000.json")])
def test_a_step_and_its_key(step: int, key: str) -> None:
    assert record_key(step) == key and step_of_key(key) == step
    assert step_of_key(f"x{key}") is None and step_of_key(f"{key}.x") is None
