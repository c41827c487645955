"""Registration: one version of one run's files, whatever answers are lost and however busy the server is."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, TrackingUnavailableError
from pipeline.models import registration
from pipeline.models.registration import MODEL_TYPE, register_model
from pipeline.models.registry import resolve_model
from pipeline.stores import patience
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.faulty_proxy import Answer, FaultyProxy, LoseAnswer
from tests.pipeline.registered_models import model_files
from tests.pipeline.storage_checks import wait_for_pauses


def test_registering_again_makes_no_second_version(registry: TrackingConfig, run: TrackingRun) -> None:
    first = register_model(run, model_files(1), "again")
    assert register_model(run, model_files(1), "again") == first
    assert register_model(run, model_files(2), "again").version == 2


def test_the_alias_moves_forward_only(registry: TrackingConfig, run: TrackingRun) -> None:
    register_model(run, model_files(1), "alias")
    connect(run.uri).delete_registered_model_alias("alias", "candidate")  # a driver killed before it could set it
    register_model(run, model_files(1), "alias")
    assert resolve_model("models:/alias@candidate", registry).uri == "models:/alias/1"
    newer = TrackingRun.open(registry, new_run_key())
    register_model(newer, model_files(2), "alias")
    register_model(run, model_files(1), "alias")
    assert resolve_model("models:/alias@candidate", registry).uri == "models:/alias/2"
    assert resolve_model("models:/alias/1", registry).files == model_files(1)


def test_a_version_without_an_alias_moves_none(registry: TrackingConfig, run: TrackingRun) -> None:
    register_model(run, model_files(1), "no-alias")
    assert register_model(run, model_files(2), "no-alias", None, tags={"ddpm.from": "here"}).version == 2
    assert resolve_model("models:/no-alias@candidate", registry).uri == "models:/no-alias/1"
    assert connect(run.uri).get_model_version("no-alias", "2").tags["ddpm.from"] == "here"


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a@b", "it's", "two words"])
def test_names_that_no_uri_could_hold_are_refused(run: TrackingRun, name: str) -> None:
    with pytest.raises(ConfigError, match="model name: "):
        register_model(run, model_files(1), name)


@pytest.mark.parametrize("alias", ["", "latest", "v3", "a b", "a/b"])
def test_aliases_that_mlflow_reserves_are_refused(run: TrackingRun, alias: str) -> None:
    with pytest.raises(ConfigError, match="alias: "):
        register_model(run, model_files(1), "names", alias)


@pytest.fixture
def little_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pyfunc comes with one file of this project's code instead of some hundred, each of them a request."""
    save = registration._save_pyfunc

    def save_with_little_code(folder: Path, *of_the_model: Any) -> None:
        save(folder, *of_the_model)
        code = sorted(path for path in (folder / "pyfunc" / "code").rglob("*") if path.is_file())
        assert len(code) > 100
        for path in code[1:]:
            path.unlink()

    monkeypatch.setattr(registration, "_save_pyfunc", save_with_little_code)


@pytest.fixture
def through_proxy(
    served: str, little_code: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultyProxy, TrackingRun]]:
    """A proxy before the server, and a run that is registered through it, with short pauses."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # what is repeated is repeated by registration
    there = TrackingRun.open(TrackingConfig(uri=served), new_run_key())
    with FaultyProxy(served) as proxy:
        yield proxy, TrackingRun(proxy.endpoint, there.run_id)


def check_registered_once(uri: str, run: TrackingRun, name: str) -> None:
    client = connect(uri)
    versions = client.search_model_versions(f"name = '{name}'")
    assert [version.version for version in versions] == ["1"]
    mine = f"source_run_id = '{run.run_id}'"
    models = [m for m in client.search_logged_models([run.experiment_id], filter_string=mine) if m.name == name]
    assert [(model.model_type, str(model.status)) for model in models] == [(MODEL_TYPE, "READY")]
    outputs = client.get_run(str(run.run_id)).outputs.model_outputs
    assert [output.model_id for output in outputs] == [models[0].model_id]
    assert resolve_model(f"models:/{name}@candidate", TrackingConfig(uri=uri)).files == model_files(1)


@pytest.mark.services
def test_the_answer_of_each_request_may_be_lost(served: str, through_proxy: tuple[FaultyProxy, TrackingRun]) -> None:
    proxy, run = through_proxy
    assert register_model(run, model_files(1), "undisturbed").version == 1
    calls = [(request.method, request.path) for request in proxy.requests]
    assert sum(path.endswith("/create") for _, path in calls) >= 2
    assert ("POST", "/api/2.0/mlflow/logged-models") in calls
    files = [number for number, (_, path) in enumerate(calls) if "/mlflow-artifacts/" in path]
    for number in sorted(set(range(len(calls))) - set(files[1:-1])):
        name, there = f"lost-{number}", TrackingRun.open(TrackingConfig(uri=served), new_run_key())
        lost = proxy.count(LoseAnswer)
        proxy.clear()
        proxy.add(LoseAnswer(), times=1, after=number)
        version = register_model(TrackingRun(proxy.endpoint, there.run_id), model_files(1), name)
        assert version.version == 1, calls[number]
        assert proxy.count(LoseAnswer) == lost + 1, calls[number]
        check_registered_once(served, there, name)


@pytest.mark.services
def test_a_server_that_is_busy_is_waited_for(
    served: str,
    through_proxy: tuple[FaultyProxy, TrackingRun],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every way in which a server, or what stands before it, says so: one after the other."""
    monkeypatch.setattr(patience, "_SILENT_S", 0.0)
    proxy, run = through_proxy
    for status in (statuses := (429, 500, 502, 503, 504)):
        proxy.add(Answer(status, b"made by the proxy"), times=1, after=1)
    assert register_model(run, model_files(1), "busy").version == 1
    assert Counter(request.status for request in proxy.requests if request.fault) == dict.fromkeys(statuses, 1)
    told = "gives no answer (HTTP 429: made by the proxy); tried again for up to 10 minutes"
    assert told in capsys.readouterr().out
    check_registered_once(served, run, "busy")


@pytest.mark.services
def test_patience_is_for_each_request_and_ends(
    through_proxy: tuple[FaultyProxy, TrackingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, run = through_proxy
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    for path in ("registered-models/create", "model-versions/search", "logged-models/search", "mlflow-artifacts"):
        proxy.add(Answer(503), path=path, times=2)
    assert register_model(run, model_files(1), "patience").version == 1
    proxy.clear()
    monkeypatch.setenv(PATIENCE_VARIABLE, str(1 / 60))
    proxy.add(Answer(503, b"for ever"))
    with pytest.raises(TrackingUnavailableError, match=r"server fails \(HTTP 503: for ever\)"):
        register_model(run, model_files(2), "patience")
    proxy.clear()
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    num_asked = len(proxy.requests)
    proxy.add(Answer(403, b"Permission denied"), path="model-versions/create")
    with pytest.raises(TrackingUnavailableError, match=r"permission denied \(HTTP 403: Permission denied\); give this"):
        register_model(run, model_files(2), "patience")
    assert sum(request.path.endswith("model-versions/create") for request in proxy.requests[num_asked:]) == 1
    proxy.clear()
    assert register_model(run, model_files(2), "patience").version == 2, "--resume registers later"


@pytest.mark.services
def test_registering_waits_for_a_server_that_comes_back(
    served: str,
    through_proxy: tuple[FaultyProxy, TrackingRun],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is known by its key; nobody answers at first, and then a server that has the run."""
    monkeypatch.setattr(patience, "_SILENT_S", 0.0)
    proxy, config = through_proxy[0], TrackingConfig(uri=served, experiment="late")
    there = TrackingRun.open(config, new_run_key())
    run = TrackingRun(proxy.endpoint, None, experiment="late", run_key=there.run_key)
    with ThreadPoolExecutor(1) as pool, proxy.down():
        registered = pool.submit(register_model, run, model_files(9), "late")
        wait_for_pauses(2)
        assert not registered.done()
        proxy.up()
        assert registered.result().version == 1
    assert resolve_model("models:/late@candidate", config).files == model_files(9)
    assert run.run_id == there.run_id
    assert "registering late gives no answer ([Errno 111] Connection refused); tried" in capsys.readouterr().out
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.01")
    with proxy.down(), pytest.raises(TrackingUnavailableError, match="Connection refused"):
        register_model(run, model_files(10), "late")
