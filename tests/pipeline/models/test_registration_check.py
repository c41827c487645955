"""The start check finds what the end would: another version, artifacts that cannot be stored, no permission."""

import re
import urllib.request
from base64 import b64encode
from pathlib import Path

import pytest

from pipeline.errors import TrackingUnavailableError
from pipeline.models import registration_check
from pipeline.models.registration_check import check_registration
from pipeline.tracking.mlflow_causes import is_outage
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.run_opening import START_CHECK_TAG
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.faulty_proxy import Answer, FaultyProxy, Stall
from tests.fixtures_services import mlflow_server
from tests.pipeline.registered_models import download_artifacts
from tests.pipeline.tracking.test_mlflow_causes import NOT_FOUND_PAGE

CONFIG_TOML = "größe = 1\n"


def check_passes(run: TrackingRun, name: str, folder: Path) -> None:
    """Twice, as after a lost answer; it leaves the registered model and config.toml, and no logged model."""
    for _ in range(2):
        check_registration(run, name, CONFIG_TOML)
    client = connect(run.uri)
    assert client.get_registered_model(name).tags == {START_CHECK_TAG: run.run_id}
    assert client.search_model_versions(f"name = '{name}'") == []
    assert client.search_logged_models([run.experiment_id]) == []
    assert download_artifacts(run, "config.toml", folder).read_text(encoding="utf-8") == CONFIG_TOML


def test_an_embedded_registry(tmp_path: Path) -> None:
    run = TrackingRun.open(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), new_run_key())
    check_passes(run, "embedded", tmp_path / "copy")
    (tmp_path / "mlruns").rename(tmp_path / "moved")
    (tmp_path / "mlruns").write_text("a file where the folder should be")
    with pytest.raises(TrackingUnavailableError, match="artifact folder cannot be used") as caught:
        check_registration(run, "embedded", CONFIG_TOML)
    assert not is_outage(caught.value)


@pytest.mark.services
def test_through_a_server(served: str, tmp_path: Path) -> None:
    config = TrackingConfig(uri=served, experiment="start-check")  # of others there are logged models
    check_passes(TrackingRun.open(config, new_run_key()), "served", tmp_path)


@pytest.mark.services
def test_a_server_of_2_22(served: str) -> None:
    """It accepts the run, and answers 404 to whatever is about logged models; 2.22.5 gave these very bytes."""
    with FaultyProxy(served) as proxy:
        proxy.add(
            Answer(404, NOT_FOUND_PAGE, (("Content-Type", "text/html; charset=utf-8"),)),
            path=re.compile("^/api/2.0/mlflow/logged-models"),
        )
        with pytest.raises(TrackingUnavailableError) as caught:
            TrackingRun.open(
                TrackingConfig(uri=proxy.endpoint),
                new_run_key(),
                check=lambda run: check_registration(run, "old", CONFIG_TOML),
            )
    message = str(caught.value)
    assert "registering 'old' was tried, and failed while making a logged model: server too old (HTTP 404" in message
    assert message.endswith("update the MLflow server to 3.x")
    assert not is_outage(caught.value)


@pytest.mark.services
def test_a_model_that_is_there_need_not_be_made(served: str) -> None:
    """By somebody who may change it, and make none."""
    connect(served).create_registered_model("theirs")
    with FaultyProxy(served) as proxy:
        proxy.add(Answer(403, b"Permission denied"), path="registered-models/create")
        run = TrackingRun.open(TrackingConfig(uri=proxy.endpoint), new_run_key())
        check_registration(run, "theirs", CONFIG_TOML)
        with pytest.raises(TrackingUnavailableError, match="making the registered model: permission denied"):
            check_registration(run, "of nobody", CONFIG_TOML)
        run.close()


@pytest.mark.services
def test_a_run_whose_check_is_refused_is_deleted_and_made_again(served: str) -> None:
    key = new_run_key()
    with FaultyProxy(served) as proxy:
        proxy.add(Answer(403, b"Permission denied"), path="registered-models/set-tag")
        with pytest.raises(TrackingUnavailableError, match=r"needs the permission to update it: permission denied"):
            TrackingRun.open(
                TrackingConfig(uri=proxy.endpoint, experiment="refused"),
                key,
                check=lambda run: check_registration(run, "refused", CONFIG_TOML),
            )
    client = connect(served)
    experiment = client.get_experiment_by_name("refused")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id]) == []
    again = TrackingRun.open(
        TrackingConfig(uri=served, experiment="refused"),
        key,
        check=lambda run: check_registration(run, "refused", CONFIG_TOML),
    )
    stored = client.get_run(str(again.run_id))
    assert (again.run_id, stored.info.status) == (stored.info.run_id, "RUNNING")
    assert START_CHECK_TAG not in stored.data.tags


@pytest.mark.services
def test_artifacts_that_a_server_cannot_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    with mlflow_server(f"sqlite:///{tmp_path}/server.db", str(tmp_path / "file" / "artifacts"), tmp_path) as uri:
        run = TrackingRun.open(TrackingConfig(uri=uri), new_run_key())
        with pytest.raises(
            TrackingUnavailableError, match="storing a file of the logged model: artifact store"
        ) as caught:
            check_registration(run, "blocked", CONFIG_TOML)
        # It answers before it has read all that is sent, which may reach the sender as a reset.
        assert "HTTP 500: Internal Server Error" in str(caught.value) or "reset by peer" in str(caught.value)
        assert "--artifacts-destination" in str(caught.value)
        assert not is_outage(caught.value), "it is not over when the server is back: it is there"


@pytest.mark.services
def test_a_dead_artifact_store_keeps_nobody_waiting(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registration_check._LONGEST_S <= 60
    monkeypatch.setattr(registration_check, "_LONGEST_S", 5)
    run = TrackingRun.open(TrackingConfig(uri=served), new_run_key())
    with FaultyProxy(served) as proxy:
        proxy.add(Stall(), path="mlflow-artifacts")
        through = TrackingRun(proxy.endpoint, run.run_id)
        with pytest.raises(TrackingUnavailableError, match=r"artifact store fails \(no answer within 5 s\)") as caught:
            check_registration(through, "dead", CONFIG_TOML)
        assert not is_outage(caught.value)
        proxy.clear()
        proxy.add(Stall())
        with pytest.raises(TrackingUnavailableError, match=r"no answer within 5 s\)") as caught:
            check_registration(through, "dead", CONFIG_TOML)
        assert is_outage(caught.value), "the server itself is away"


@pytest.mark.services
def test_a_server_that_is_busy_meanwhile_is_an_outage(served: str) -> None:
    run = TrackingRun.open(TrackingConfig(uri=served), new_run_key())
    with FaultyProxy(served) as proxy:
        for path in ("registered-models/create", "registered-models/set-tag", "logged-models", "mlflow-artifacts"):
            proxy.clear()
            proxy.add(Answer(503, b"busy"), path=path)
            with pytest.raises(TrackingUnavailableError, match="HTTP 503: busy") as caught:
                check_registration(TrackingRun(proxy.endpoint, run.run_id), "busy-check", CONFIG_TOML)
            assert is_outage(caught.value), path


@pytest.mark.services
def test_a_user_who_may_only_read_the_registered_model(tmp_path: Path) -> None:
    admin, bob = ("admin", "admin-password-1234"), ("bob", "bob-password-5678")
    (tmp_path / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/auth.db\n"
        f"admin_username = {admin[0]}\nadmin_password = {admin[1]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": admin[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key of this test",
    }
    database, artifacts = f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artifacts")
    with mlflow_server(database, artifacts, tmp_path, environment=environment, app="basic-auth") as uri:

        def post(path: str, body: str) -> None:
            token = b64encode(":".join(admin).encode()).decode()
            headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{uri}{path}", body.encode(), headers)) as answer:
                assert answer.status == 200

        post("/api/2.0/mlflow/users/create", f'{{"username": "{bob[0]}", "password": "{bob[1]}"}}')
        post("/api/2.0/mlflow/registered-models/create", '{"name": "theirs"}')
        config = TrackingConfig(uri=uri.replace("://", f"://{':'.join(bob)}@"), experiment="of-bob")
        run = TrackingRun.open(config, new_run_key())
        check_registration(run, "of-bob", CONFIG_TOML)
        with pytest.raises(TrackingUnavailableError) as caught:
            check_registration(run, "theirs", CONFIG_TOML)
        assert "tagging the registered model, which needs the permission to update it: permission denied" in str(
            caught.value
        )
        assert bob[1] not in str(caught.value)
        for wrong in (uri, uri.replace("://", "://bob:no-password@")):
            with pytest.raises(TrackingUnavailableError, match="credentials refused") as caught:
                TrackingRun.open(TrackingConfig(uri=wrong), new_run_key())
            assert "no-password" not in str(caught.value)
