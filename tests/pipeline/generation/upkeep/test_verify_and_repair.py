"""What is broken on purpose is found, and mended to the same bytes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.output import main
from pipeline.config_io import to_json
from pipeline.generation.output.commits import read_record
from pipeline.generation.output.manifest import MANIFEST_KEY
from pipeline.generation.upkeep.repair import repair
from pipeline.generation.upkeep.stored_run import ModelAccess
from pipeline.stores.object_store import ObjectStore
from tests.pipeline.generation.upkeep.small_run import contents, found, make_run, tars

CONTAINERS = ["webdataset", "parquet"]


@pytest.fixture(params=CONTAINERS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return make_run(tmp_path, container=request.param)[1]


def mend(store: ObjectStore) -> list[str]:
    done = repair(store, ModelAccess(), use_gpu=None, orphan_age_s=None)
    assert done.unmended == []
    return done.mended


def flip(store: ObjectStore, key: str) -> None:
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.write(key, bytes(data))


def edit(store: ObjectStore, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads(store.read(MANIFEST_KEY))
    change(manifest)
    store.write(MANIFEST_KEY, json.dumps(manifest).encode())


def part_of(store: ObjectStore) -> str:
    return next(info.key for info in store.list("_manifest/"))


def without_provenance(store: ObjectStore) -> dict[str, bytes]:
    """Records that are written again say who mended them, which is no part of what is compared."""
    there = contents(store)
    for key in [key for key in there if key.startswith("_parts/")]:
        record = json.loads(there[key])
        del record["made"]
        there[key] = json.dumps(record).encode()
    return there


def test_a_run_as_it_was_made_is_clean(store: ObjectStore) -> None:
    before = contents(store)
    assert found(store) == [] and found(store, quick=True) == []
    assert mend(store) == [] and contents(store) == before


def test_a_deleted_shard(store: ObjectStore) -> None:
    before, key = contents(store), tars(store)[1]
    store.delete(key)
    assert found(store) == found(store, quick=True) == [("missing", key)]
    assert mend(store) == [key] and contents(store) == before


def test_a_flipped_byte(store: ObjectStore) -> None:
    before, key = contents(store), tars(store)[3]
    flip(store, key)
    assert found(store) == [("altered", key)] and found(store, quick=True) == []
    assert mend(store) == [key] and contents(store) == before


def test_a_shard_cut_short(store: ObjectStore) -> None:
    before, key = contents(store), tars(store)[0]
    store.write(key, store.read(key)[:-1])
    assert found(store) == found(store, quick=True) == [("altered", key)]
    assert mend(store) == [key] and contents(store) == before


@pytest.mark.parametrize("how", ["deleted", "damaged", "of other bytes"])
def test_a_record(store: ObjectStore, how: str) -> None:
    before, key = without_provenance(store), "_parts/000000002.json"
    record = read_record(store, 2)
    if how == "deleted":
        store.delete(key)
        assert found(store, quick=True) == [("record", key)]
    elif how == "damaged":
        store.write(key, b"{")
    else:
        altered = json.loads(to_json(record)) | {"sha256": "0" * 64, "key": f"000000002-{'0' * 64}.tar"}
        store.write(key, json.dumps(altered).encode())
    assert found(store) == [("record", key)]
    assert mend(store) == [key] and without_provenance(store) == before
    assert read_record(store, 2).tar == record.tar


@pytest.mark.parametrize("how", ["deleted", "altered"])
def test_a_part(store: ObjectStore, how: str) -> None:
    before, key = contents(store), part_of(store)
    if how == "deleted":
        store.delete(key)
    else:
        flip(store, key)
    assert found(store) == [("part", key)]
    assert mend(store) == [key] and contents(store) == before


EDITS: dict[str, Callable[[dict[str, object]], object]] = {
    "spec_digest": lambda manifest: manifest.update(spec_digest="0" * 64),
    "spec": lambda manifest: manifest["spec"].update(seed=7),  # type: ignore[attr-defined]
    "number of images": lambda manifest: manifest.update(num_images=7),
    "a few images": lambda manifest: manifest.update(num_images=19),
    "parts": lambda manifest: manifest.update(parts=[]),
    "an unknown field": lambda manifest: manifest.update(more=1),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest(store: ObjectStore, name: str) -> None:
    before = contents(store)
    edit(store, EDITS[name])
    assert ("manifest", MANIFEST_KEY) in found(store)
    mend(store)
    assert contents(store) == before and found(store) == []


def test_a_manifest_that_is_no_json(store: ObjectStore) -> None:
    before = contents(store)
    store.write(MANIFEST_KEY, b"nothing")
    assert found(store) == [("manifest", MANIFEST_KEY)]
    mend(store)
    assert contents(store) == before


def test_strangers_are_named_and_stay_orphans_go_when_they_are_old(store: ObjectStore) -> None:
    before = contents(store)
    young, old = (f"00000000{index}-{'0' * 64}.tar" for index in (1, 2))
    for key in (young, old, "notes.txt"):
        store.write(key, b"foreign")
    os.utime(Path(store.uri, old), (0, time.time() - 90_000))
    assert found(store) == [("orphan", young), ("orphan", old), ("stranger", "notes.txt")]
    assert mend(store) == []
    assert contents(store) == before | {young: b"foreign", "notes.txt": b"foreign"}


def test_everything_at_once(store: ObjectStore) -> None:
    before = without_provenance(store)
    keys = tars(store)
    edit(store, EDITS["spec"])
    store.delete("_parts/000000000.json")
    flip(store, keys[1])
    store.delete(keys[2])
    assert {kind for kind, _ in found(store)} >= {"manifest", "record", "missing", "altered"}
    mend(store)
    assert without_provenance(store) == before and found(store) == []


def test_bytes_that_differ_are_said_and_nothing_is_changed(tmp_path: Path) -> None:
    """As on other hardware: the records name bytes that this machine does not make."""
    config, store = make_run(tmp_path)
    key, model = tars(store)[0], Path(config.model)
    store.delete(key)
    for staged in (Path(config.output) / "_models").glob("*"):  # no Ray, so nothing is staged; the hint is what is left
        raise AssertionError(staged)
    (model / "weights.safetensors").rename(tmp_path / "weights")
    assert main(["repair", store.uri]) == 1 and not Path(store.uri, key).exists()
    (tmp_path / "weights").rename(model / "weights.safetensors")
    record = json.loads(store.read("_parts/000000000.json"))
    other = key.replace(record["sha256"], "1" * 64)
    store.write("_parts/000000000.json", json.dumps(record | {"sha256": "1" * 64, "key": other}).encode())
    store.delete(part_of(store))
    done = repair(store, ModelAccess(), use_gpu=None, orphan_age_s=None)
    assert [other in line and "makes other bytes" in line for line in done.unmended] == [True]
    assert key not in contents(store) and other not in contents(store)


def test_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, store = make_run(tmp_path)
    report = tmp_path / "report.json"
    assert main(["verify", store.uri, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["findings"] == []
    store.delete(tars(store)[0])
    assert main(["verify", store.uri, "--json", str(report)]) == 1
    assert json.loads(report.read_text())["counts"] == {"missing": 1}
    assert "1 findings (1 missing); jobs/output.py repair" in capsys.readouterr().err
    assert main(["repair", store.uri]) == 0 and main(["verify", store.uri]) == 0
    capsys.readouterr()
    for argv, said in (
        (["verify", str(tmp_path)], "prefix: must hold a manifest.json"),
        (["verify", "s3:/x"], "prefix: "),
        (["verify"], "prefix"),
        (["repair", store.uri, "--orphan-age-s", "-1"], "orphan-age-s"),
        (["mend", store.uri], "mend"),
        (["remake", store.uri, "--ids", "x"], "ids: must be whole numbers"),
        (["remake", store.uri, "--ids", "20"], "ids: must be below 20"),
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
