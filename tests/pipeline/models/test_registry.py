"""The registry: a version is what was registered, a URI is followed to the right bytes, and the pyfunc stands alone."""

import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError, ModelMissingError, TrackingUnavailableError
from pipeline.models.registration import register_model
from pipeline.models.registry import CHECKPOINT_TAG, resolve_model
from pipeline.models.version_records import log_version_files, log_version_metrics
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.faulty_proxy import Answer, FaultyProxy
from tests.pipeline.registered_models import download_artifacts, model_files


def test_what_is_registered_is_what_is_resolved(registry: TrackingConfig, run: TrackingRun) -> None:
    files = model_files(1)
    version = register_model(run, files, "round")
    assert (version.name, version.version, version.uri) == ("round", 1, "models:/round/1")
    assert version.run_id == run.run_id
    for uri in ("models:/round@candidate", "models:/round/1"):
        model = resolve_model(uri, registry)
        assert model.uri == "models:/round/1", "an alias is resolved once"
        assert model.version == version
        assert model.files == files
    client = connect(run.uri)
    stored = client.get_model_version("round", "1")
    assert stored.tags["ddpm.digest"] == files.digest
    assert stored.run_id == run.run_id
    logged = client.get_run(run.run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in logged] == [(stored.tags["ddpm.model_id"], 10)]


@pytest.fixture(scope="module")
def missing(registry: TrackingConfig) -> None:
    """A model of one version, whichever test of this module runs first in its process."""
    register_model(TrackingRun.open(registry, new_run_key()), model_files(1), "missing")


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("models:/missing/7", "missing has versions up to 1, aliases: candidate -> 1"),
        ("models:/missing@champion", "aliases: candidate -> 1"),
        ("models:/no-such-model/1", "registered models: "),
        ("models:/no-such-model@candidate", "registered models: "),
        ("models:/missing", "is no model URI"),
        ("models:/missing/latest", "is no model URI"),
        ("models:/missing/0", "is no model URI"),
        ("models:/m-0123456789abcdef0123456789abcdef", "is no model URI"),
        ("models:missing/1", "is no model URI"),
        ("no/such/folder", "no model.json there"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(
    registry: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelMissingError) as caught:
        resolve_model(uri, registry)
    message = str(caught.value)
    assert uri in message
    assert reason in message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_a_model(registry: TrackingConfig, tmp_path: Path) -> None:
    files, store = model_files(3), open_store(str(tmp_path))
    for name, data in files.as_dict().items():
        store.write(f"checkpoints/step-000000030-ab/{name}", data)
    model = resolve_model(f"{tmp_path}/checkpoints/step-000000030-ab", registry)
    assert (model.version, model.files) == (None, files)
    assert model.uri == f"{tmp_path}/checkpoints/step-000000030-ab"


def test_a_further_average_is_a_model_of_a_checkpoint_and_of_its_version(
    registry: TrackingConfig, run: TrackingRun, tmp_path: Path
) -> None:
    main, further = model_files(3), model_files(4)
    folder, store = f"{tmp_path}/checkpoints/step-000000030-ab", open_store(str(tmp_path))
    files = main.as_dict() | {"ema-5000.json": further.card_json, "ema-5000.safetensors": further.weights}
    for name, data in files.items():
        store.write(f"checkpoints/step-000000030-ab/{name}", data)
    register_model(run, main, "averages", tags={CHECKPOINT_TAG: folder})
    register_model(run, model_files(7), "averages")
    assert resolve_model(folder, registry).files == main
    for uri, resolved in (
        (f"{folder}?ema=5000", f"{folder}?ema=5000"),
        ("models:/averages/1?ema=5000", "models:/averages/1?ema=5000"),
    ):
        model = resolve_model(uri, registry)
        assert (model.uri, model.version, model.files) == (resolved, None, further)
    for uri, reason in (
        (f"{folder}?ema=1", "half-life of 1 images; there are 5000"),
        ("models:/averages/1?ema=1", "there are 5000"),
        ("models:/averages@candidate?ema=5000", "models:/averages/2: does not say which checkpoint"),
        ("models:/averages/2?ema=5000", "images; name the checkpoint's folder with ?ema=5000 instead"),
        ("models:/averages@candidate?ema=abc", "?ema=: a whole number of images above 0, got 'abc'"),
        (f"{tmp_path}/nothing?ema=5000", "no model.json there"),
    ):
        with pytest.raises(ModelMissingError, match=re.escape(reason)):
            resolve_model(uri, registry)
    store.write("checkpoints/step-000000030-ab/ema-5000.safetensors", further.weights[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"ema=5000: .*altered"):
        resolve_model(f"{folder}?ema=5000", registry)


@pytest.mark.parametrize(
    ("name", "error"), [("weights.safetensors", "altered"), ("model.json", "altered"), ("model.json", "missing")]
)
def test_altered_artifacts_are_refused(registry: TrackingConfig, run: TrackingRun, name: str, error: str) -> None:
    register_model(run, model_files(4), f"damaged-{name}-{error}")
    version = resolve_model(f"models:/damaged-{name}-{error}/1", registry)
    model_id = connect(run.uri).get_model_version(f"damaged-{name}-{error}", "1").tags["ddpm.model_id"]
    location = connect(run.uri).get_logged_model(model_id).artifact_location
    file = Path(location.removeprefix("file://")) / "artifacts" / name
    data = file.read_bytes()
    if error == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(CheckpointError, match=error) as caught:
        resolve_model(version.uri, registry)
    assert "\n" not in str(caught.value)
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError, match=f"models:/damaged-{name}-{error}/1"):
        resolve_model(version.uri, registry)


def test_another_whole_model_in_its_place_is_refused(registry: TrackingConfig, run: TrackingRun) -> None:
    register_model(run, model_files(4), "swapped")
    client = connect(run.uri)
    location = client.get_logged_model(client.get_model_version("swapped", "1").tags["ddpm.model_id"]).artifact_location
    for name, data in model_files(5).as_dict().items():
        Path(location.removeprefix("file://"), "artifacts", name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"the version says {model_files(4).digest[:16]}"):
        resolve_model("models:/swapped@candidate", registry)


def test_a_version_of_another_project_is_refused(registry: TrackingConfig, run: TrackingRun, tmp_path: Path) -> None:
    client = connect(run.uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(tmp_path))
    with pytest.raises(ModelMissingError, match="not registered by this project"):
        resolve_model("models:/foreign/1", registry)


def test_a_server_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    config = TrackingConfig(uri="http://no-such-host.invalid:1")
    with pytest.raises(TrackingUnavailableError, match=r"Name or service not known|name resolution"):
        resolve_model("models:/ddpm/1", config)


@pytest.mark.services
def test_a_server_that_is_busy_is_waited_for(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = model_files(8)
    version = register_model(TrackingRun.open(TrackingConfig(uri=served), new_run_key()), files, "busy-registry")
    with FaultyProxy(served) as proxy:
        config, behind = TrackingConfig(uri=proxy.endpoint), replace(version, tracking_uri=proxy.endpoint)
        monkeypatch.setenv(PATIENCE_VARIABLE, "0")
        proxy.add(Answer(503))
        with pytest.raises(TrackingUnavailableError):
            resolve_model("models:/busy-registry@candidate", config)
        with pytest.raises(TrackingUnavailableError):
            log_version_metrics(behind, {"eval/frechet_distance": 0.5})
        proxy.clear()
        monkeypatch.setenv(PATIENCE_VARIABLE, "1")
        for path in (
            "registered-models/alias",
            "logged-models/",
            "mlflow-artifacts",
            "model-versions/get",
            "log-batch",
        ):
            proxy.add(Answer(503), path=re.compile(path), times=4)  # more than its client repeats by itself
        assert resolve_model("models:/busy-registry@candidate", config).files == files
        log_version_metrics(behind, {"eval/frechet_distance": 0.5})
        log_version_files(behind, {"chart.png": b"picture"}, "figures")
        assert proxy.count(Answer) >= 20


@pytest.mark.services
def test_through_a_server(served: str, tmp_path: Path) -> None:
    """Files go to the server and come back by HTTP; MLflow's own loader finds the model by its registry URI."""
    config = TrackingConfig(uri=served)
    run = TrackingRun.open(config, new_run_key())
    files = model_files(8)
    version = register_model(run, files, "ddpm")
    assert register_model(run, files, "ddpm") == version
    assert resolve_model("models:/ddpm@candidate", config).files == files
    log_version_metrics(version, {"eval/frechet_distance": 0.5})
    log_version_files(version, {"chart.png": b"picture"}, "figures")
    stored = download_artifacts(run, "figures/chart.png", tmp_path)
    assert stored.read_bytes() == b"picture"
    assert connect(served).get_run(run.run_id).data.metrics == {"eval/frechet_distance": 0.5}
    with pytest.raises(ModelMissingError, match="aliases: candidate -> 1"):
        resolve_model("models:/ddpm@champion", config)
    code = """
        import os, sys, pandas as pd
        os.environ["MLFLOW_TRACKING_URI"] = sys.argv[1]
        import mlflow
        model = mlflow.pyfunc.load_model("models:/ddpm@candidate")
        answer = model.predict(pd.DataFrame({"sample_id": [1, 2], "label": [0, 1]}), {"num_steps": 3})
        assert answer["png"][0][:4] == b"\\x89PNG" and len(answer) == 2
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), served], cwd=tmp_path, check=True, timeout=300)
