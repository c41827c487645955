"""Where the model and the inputs of a stored run are found, and what is refused."""

import dataclasses
import uuid
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError, ConfigError, UntrustedCodeError
from pipeline.generation.pool.node_models import stage_model
from pipeline.generation.requests.requests import Generate
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.upkeep.remake import remake
from pipeline.generation.upkeep.remove import remove
from pipeline.generation.upkeep.repair import repair
from pipeline.generation.upkeep.stored_run import ModelAccess
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri, open_store
from tests.fixtures_s3 import S3Server
from tests.pipeline.generation.upkeep.small_run import contents, found, make_run, small_config, tars
from tests.pipeline.runs_in_process import run
from tests.pipeline.tiny_models import write_model, write_own_model


def faults(store: ObjectStore, ids: tuple[int, ...] = (3,), **access: bool) -> list[str | None]:
    return [one.fault for one in remake(store, ids, ModelAccess(**access), use_gpu=None)]


def test_the_model_beside_the_run_comes_first_and_its_digest_is_compared(tmp_path: Path) -> None:
    config, store = make_run(tmp_path)
    stage_model(open_store(config.output), resolve_job(config).model.files)
    model = Path(config.model)
    model.rename(tmp_path / "away")
    assert faults(store) == [None]
    write_model(model, num_timesteps=50)  # another model where the manifest hints
    assert faults(store) == [None]
    staged = next(Path(config.output, "_models").rglob("weights.safetensors"))
    staged.write_bytes(staged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is another model by now"):
        faults(store)


def test_a_network_of_ones_own_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_own_model(tmp_path / "own", monkeypatch, "nothing")
    config = dataclasses.replace(small_config(tmp_path), model=model, trust_model_code=True)
    store = run(config)[0].store
    with pytest.raises(UntrustedCodeError, match="--trust-model-code"):
        faults(store)
    assert faults(store, trust_model_code=True) == [None]
    stage_model(open_store(config.output), resolve_job(config).model.files)
    with pytest.raises(UntrustedCodeError, match="--trust-model-code"):
        faults(store)


def test_the_rows_of_a_label_plan_must_be_those_of_the_run(tmp_path: Path) -> None:
    plan = tmp_path / "plan.csv"
    plan.write_text("label\n" + "2\n0\n" * 10)
    _, store = make_run(tmp_path, num_images=None, request=Generate(label_plan=str(plan)))
    assert faults(store, (0, 7, 19)) == [None] * 3
    plan.write_text("label\n" + "1\n0\n" * 10)
    with pytest.raises(ConfigError, match=r"config.toml: its label rule is no longer what the run was made with"):
        faults(store)
    Path(store.uri, "config.toml").unlink()
    with pytest.raises(ConfigError, match=r"config.toml: must say where inputs, label plan or calibration are"):
        faults(store)


def test_all_of_it_in_a_bucket(tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    _, store = make_run(tmp_path, output=join_uri(s3_server.uri, uuid.uuid4().hex))
    before, keys = contents(store), tars(store)
    store.delete(keys[0])
    store.write(keys[1], store.read(keys[1])[:-3])
    assert found(store) == [("missing", keys[0]), ("altered", keys[1])]
    assert repair(store, ModelAccess(), use_gpu=None, orphan_age_s=None).mended == keys[:2]
    assert contents(store) == before
    assert remove(store, (2, 3), "asked for").num_removed == 2
    assert found(store) == [] and keys[0] not in contents(store) and faults(store, (4,)) == [None]
