"""The registry: a version is what was registered, a URI is followed to the right bytes, and the pyfunc stands alone."""

import dataclasses
import json
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm import (
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    UNetConfig,
    build_model,
    generate,
    make_schedule,
    x_0_to_images,
)
from pipeline.errors import CheckpointError, ConfigError, ModelMissingError, TrackingUnavailableError
from pipeline.mlflow_client import connect
from pipeline.model_files import ModelCard, ModelFiles, encode_model, load_network
from pipeline.model_source import collect_source
from pipeline.registry import log_version_metrics, register_model, registered_version_of_run, resolve_model
from pipeline.storage import open_store
from pipeline.tracking import TrackingConfig, TrackingRun, check_server
from tests.fixtures_services import free_port, mlflow_server

_UNET = UNetConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
CONFIG = ModelConfig(
    unet=_UNET, schedule=ScheduleConfig(name="cosine", num_timesteps=20), image_size=8, channels=1, num_classes=3
)


def model_files(seed: int, config: ModelConfig = CONFIG, source: bytes | None = None) -> ModelFiles:
    network = build_model(config, seed=seed)
    with torch.no_grad():  # the last convolution of a fresh U-Net is zero: its images would not depend on the label
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    card = ModelCard(config=config, class_names=("a", "b", "c") if config.num_classes else (), train_step=10 * seed)
    return encode_model(card, network.state_dict(), source)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One database for the module; each test has its own model name."""
    config = TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db")
    check_server(config)
    return config


@pytest.fixture
def run(registry: TrackingConfig) -> TrackingRun:
    return TrackingRun.create(registry)


def test_what_is_registered_is_what_is_resolved(registry: TrackingConfig, run: TrackingRun) -> None:
    files = model_files(1)
    version = register_model(run, files, "round")
    assert (version.name, version.version, version.uri) == ("round", 1, "models:/round/1")
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


def test_registering_again_makes_no_second_version(registry: TrackingConfig, run: TrackingRun) -> None:
    assert registered_version_of_run(run, "again") is None
    first = register_model(run, model_files(1), "again")
    assert register_model(run, model_files(1), "again") == first
    assert registered_version_of_run(run, "again") == first
    assert registered_version_of_run(TrackingRun.create(registry), "again") is None
    assert register_model(run, model_files(2), "again").version == 2
    assert registered_version_of_run(run, "again").version == 2  # type: ignore[union-attr]


def test_the_alias_moves_forward_only(registry: TrackingConfig, run: TrackingRun) -> None:
    register_model(run, model_files(1), "alias")
    connect(run.uri).delete_registered_model_alias("alias", "candidate")  # a driver killed before it could set it
    registered_version_of_run(run, "alias")
    assert resolve_model("models:/alias@candidate", registry).uri == "models:/alias/1"
    newer = TrackingRun.create(registry)
    register_model(newer, model_files(2), "alias")
    register_model(run, model_files(1), "alias")
    registered_version_of_run(run, "alias")
    assert resolve_model("models:/alias@candidate", registry).uri == "models:/alias/2"
    assert resolve_model("models:/alias/1", registry).files == model_files(1)


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
    registry: TrackingConfig, run: TrackingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if uri == "models:/missing/7":
        register_model(run, model_files(1), "missing")
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


def test_a_version_of_another_project_is_refused(registry: TrackingConfig, run: TrackingRun, tmp_path: Path) -> None:
    client = connect(run.uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(tmp_path))
    with pytest.raises(ModelMissingError, match="not registered by this project"):
        resolve_model("models:/foreign/1", registry)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a@b", "it's", "two words"])
def test_names_that_no_uri_could_hold_are_refused(run: TrackingRun, name: str) -> None:
    with pytest.raises(ConfigError, match="model name: "):
        register_model(run, model_files(1), name)


@pytest.mark.parametrize("alias", ["", "latest", "v3", "a b", "a/b"])
def test_aliases_that_mlflow_reserves_are_refused(run: TrackingRun, alias: str) -> None:
    with pytest.raises(ConfigError, match="alias: "):
        register_model(run, model_files(1), "names", alias)


def test_figures_of_a_version(registry: TrackingConfig, run: TrackingRun) -> None:
    version = register_model(run, model_files(5), "figures")
    log_version_metrics(version, {"eval/frechet_distance": 0.25, "eval/agreement": 0.99}, {"ddpm.report": "s3://b/r"})
    client = connect(run.uri)
    stored = client.get_model_version("figures", "1")
    model = client.get_logged_model(stored.tags["ddpm.model_id"])
    figures = {metric.key: (metric.value, metric.step) for metric in model.metrics or []}
    assert figures == {"eval/frechet_distance": (0.25, 50), "eval/agreement": (0.99, 50)}
    assert client.get_run(run.run_id).data.metrics["eval/frechet_distance"] == 0.25
    assert stored.tags["ddpm.report"] == "s3://b/r"


def test_a_server_that_is_away_is_one_line() -> None:
    config = TrackingConfig(uri="http://no-such-host.invalid:1")
    with pytest.raises(TrackingUnavailableError, match=r"Name or service not known|name resolution"):
        resolve_model("models:/ddpm/1", config)


# The pyfunc, in a process that has neither this project nor anything that is not in its requirements.

_ALONE = """
    import importlib.abc, json, sys

    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("ray", "boto3", "webdataset", "tyro", "tenacity", "sklearn", "tqdm"):
                raise ModuleNotFoundError(f"No module named {name!r}: not in the requirements", name=name)

    sys.meta_path.insert(0, Blocked())
    import importlib.util
    for name in ("ddpm", "pipeline", "jobs", "my_network"):
        assert importlib.util.find_spec(name) is None, f"{name} is importable"

    import mlflow, numpy as np, pandas as pd, torch
    from io import BytesIO
    from PIL import Image
    torch.set_num_threads(1)
    uri, out = sys.argv[1:3]
    calls, bad = json.load(sys.stdin)
    model = mlflow.pyfunc.load_model(uri)
    import ddpm
    assert "/code/" in ddpm.__file__, ddpm.__file__
    images = {}
    for index, (rows, params) in enumerate(calls):
        frame = pd.DataFrame(rows)
        answer = model.predict(frame, params)
        assert list(answer.columns) == [*frame.columns, "png"], answer.columns
        assert all((answer[name] == frame[name]).all() for name in frame.columns)
        pixels = [np.asarray(Image.open(BytesIO(png))) for png in answer["png"]]
        images[str(index)] = np.stack([p[..., None] if p.ndim == 2 else p for p in pixels])
    np.savez(out, **images)
    refused = []
    for rows, params in bad:
        try:
            model.predict(pd.DataFrame(rows), params)
        except mlflow.exceptions.MlflowException as error:
            refused.append([error.error_code, str(error)])
        else:
            refused.append(["accepted", ""])
    print(json.dumps(refused))
"""

Call = tuple[dict[str, list[float]], dict[str, object]]


def predict_alone(
    uri: str, tmp_path: Path, calls: list[Call], bad: list[Call]
) -> tuple[list[np.ndarray], list[list[str]]]:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "images.npz"
    elsewhere.mkdir()
    script = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n" + textwrap.dedent(_ALONE)
    # -I -S: neither the current folder nor the .pth files that make this project importable.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, uri, str(out)],
        input=json.dumps([calls, bad]), cwd=elsewhere, capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(out) as images:
        return [images[str(index)] for index in range(len(calls))], json.loads(done.stdout)


def expected(files: ModelFiles, rows: dict[str, list[float]], params: dict[str, object]) -> np.ndarray:
    card, network = load_network(files)
    options = {"num_steps": 20} | params
    seed, batch_size = int(str(options.pop("seed", 0))), int(str(options.pop("batch_size", 64)))
    options["name"] = options.pop("sampler", "ddim")
    ids = torch.tensor(rows["sample_id"])
    label = torch.tensor(rows["label"]) if "label" in rows else None
    images = [
        x_0_to_images(
            generate(
                network,
                make_schedule(card.config.schedule),
                SamplerConfig(**options),  # type: ignore[arg-type]
                seed=seed,
                sample_ids=ids[start : start + batch_size],
                label=None if label is None else label[start : start + batch_size],
                image_shape=(card.config.channels, card.config.image_size, card.config.image_size),
            )
        )
        for start in range(0, len(ids), batch_size)
    ]
    return torch.cat(images).numpy()


def artifact_path(run: TrackingRun, name: str) -> str:
    """Where the pyfunc lies: a copy of the folder is all that a server needs."""
    client = connect(run.uri)
    model_id = client.get_model_version(name, "1").tags["ddpm.model_id"]
    return str(client.get_logged_model(model_id).artifact_location)


def test_the_pyfunc_stands_alone(run: TrackingRun, tmp_path: Path) -> None:
    files = model_files(6)
    register_model(run, files, "alone")
    rows: dict[str, list[float]] = {"sample_id": [0, 5, 2**48 - 1, 7, 5], "label": [0, 1, 2, 2, 2]}
    calls: list[Call] = [
        (rows, {}),
        (rows, {"seed": 2**40, "batch_size": 2, "num_steps": 7, "eta": 0.0, "spacing": "trailing", "clip_x_0": False}),
        (rows, {"sampler": "ancestral", "variance": "fixed_large", "num_steps": 20}),
    ]
    ok: dict[str, list[float]] = {"sample_id": [1], "label": [1]}
    bad: list[tuple[Call, str]] = [
        (({"sample_id": [1]}, {}), "label"),
        (({"label": [1]}, {}), "sample_id"),
        (({"sample_id": [-1], "label": [1]}, {}), "sample_id: must be in [0, 281474976710655], got -1"),
        (({"sample_id": [2**48], "label": [1]}, {}), "sample_id: must be in"),
        (({"sample_id": [1], "label": [3]}, {}), "label: must be in [0, 2], got 3"),
        (({"sample_id": [1], "label": [-1]}, {}), "label: must be in [0, 2], got -1"),
        (({"sample_id": [1.5], "label": [1]}, {}), "sample_id"),
        ((ok, {"num_steps": 21}), "20"),
        ((ok, {"num_steps": 0}), "num_steps: must be at least 1"),
        ((ok, {"eta": 1.5}), "eta: must be in [0, 1]"),
        ((ok, {"sampler": "euler"}), "ddim"),
        ((ok, {"seed": -1}), "seed: must not be negative"),
        ((ok, {"batch_size": 0}), "batch_size: must be at least 1"),
        ((ok, {"num_steps": "many"}), "num_steps"),
    ]
    images, refused = predict_alone(artifact_path(run, "alone"), tmp_path, calls, [call for call, _ in bad])
    for (frame, params), made in zip(calls, images, strict=True):
        assert np.array_equal(made, expected(files, frame, params))
    assert not np.array_equal(images[0][1], images[0][4]), "the label matters"
    for (call, reason), (code, message) in zip(bad, refused, strict=True):
        assert code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"), (call, code, message)
        assert reason in message, (call, message)


def test_a_network_of_your_own_travels_with_its_source(
    run: TrackingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "user/my_network"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from my_network.layers import Shift\n")
    (package / "layers.py").write_text(
        textwrap.dedent("""
            import torch

            class Shift(torch.nn.Module):
                def __init__(self, channels, gain):
                    super().__init__()
                    self.gain = gain
                    self.convolution = torch.nn.Conv2d(channels, channels, 3, padding=1)

                def forward(self, x_t, t, label):
                    return self.gain * self.convolution(x_t) + t.view(-1, 1, 1, 1) / 20

            def make(*, image_size, channels, num_classes, gain):
                assert num_classes is None
                return Shift(channels, gain)
        """)
    )
    monkeypatch.syspath_prepend(str(package.parent))
    config = dataclasses.replace(
        CONFIG,
        model="my_network.layers:make",
        model_options={"gain": 0.5},
        unet=UNetConfig(),
        channels=3,
        num_classes=None,
    )
    files = model_files(7, config, collect_source(config.model))
    assert files.source is not None
    register_model(run, files, "own")
    calls: list[Call] = [({"sample_id": [3, 1, 4]}, {"seed": 9})]
    bad: list[Call] = [({"sample_id": [1]}, {"num_steps": 999})]
    images, refused = predict_alone(artifact_path(run, "own"), tmp_path, calls, bad)
    assert images[0].shape == (3, 8, 8, 3)
    assert np.array_equal(images[0], expected(files, *calls[0]))
    assert refused[0][0] == "INVALID_PARAMETER_VALUE"


@pytest.mark.services
def test_through_a_server(tmp_path: Path) -> None:
    """Files go to the server and come back by HTTP; MLflow's own loader finds the model by its registry URI."""
    with mlflow_server(f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artifacts"), tmp_path) as uri:
        config = TrackingConfig(uri=uri)
        run = TrackingRun.create(config)
        files = model_files(8)
        version = register_model(run, files, "ddpm")
        assert register_model(run, files, "ddpm") == version
        assert resolve_model("models:/ddpm@candidate", config).files == files
        log_version_metrics(version, {"eval/frechet_distance": 0.5})
        assert connect(uri).get_run(run.run_id).data.metrics == {"eval/frechet_distance": 0.5}
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
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), uri], cwd=tmp_path, check=True, timeout=300)


@pytest.mark.services
def test_registering_waits_for_a_server_that_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port, database = free_port(), f"sqlite:///{tmp_path}/server.db"
    with mlflow_server(database, str(tmp_path / "artifacts"), tmp_path, port=port) as uri:
        run = TrackingRun.create(TrackingConfig(uri=uri))
    with ThreadPoolExecutor(1) as pool:
        registered = pool.submit(register_model, run, model_files(9), "ddpm")
        with mlflow_server(database, str(tmp_path / "artifacts"), tmp_path, port=port):
            assert registered.result(120).version == 1
            assert resolve_model("models:/ddpm@candidate", TrackingConfig(uri=uri)).files == model_files(9)
    assert "registering ddpm waits for it" in capsys.readouterr().out
    monkeypatch.setattr("pipeline.registry._REGISTER_PATIENCE_S", 1)
    with pytest.raises(TrackingUnavailableError, match="Connection refused"):
        register_model(run, model_files(10), "ddpm")
