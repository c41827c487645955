"""The registered pyfunc, in a process that has neither this project nor any package that is not in its requirements."""

import dataclasses
import json
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm import SAMPLERS, OwnNetworkConfig, generate, x_0_to_images
from pipeline.models.model_files import ModelFiles, load_model
from pipeline.models.model_source import collect_source
from pipeline.models.registration import register_model
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingRun
from tests.pipeline.registered_models import CONFIG, model_files

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
    calls, bad, trust = json.load(sys.stdin)
    if trust:
        try:
            mlflow.pyfunc.load_model(uri)
        except Exception as error:
            assert type(error).__name__ == "UntrustedCodeError" and "my_network.layers:make" in str(error), error
        else:
            raise AssertionError("its code ran")
        assert "my_network" not in sys.modules
    model = mlflow.pyfunc.load_model(uri, model_config={"trust_model_code": True} if trust else None)
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
    uri: str, tmp_path: Path, calls: list[Call], bad: list[Call], *, trust: bool = False
) -> tuple[list[np.ndarray], list[list[str]]]:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "images.npz"
    elsewhere.mkdir()
    script = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n" + textwrap.dedent(_ALONE)
    # -I -S: neither the current folder nor the .pth files that make this project importable.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, uri, str(out)],
        input=json.dumps([calls, bad, trust]), cwd=elsewhere, capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(out) as images:
        return [images[str(index)] for index in range(len(calls))], json.loads(done.stdout)


def expected(files: ModelFiles, rows: dict[str, list[float]], params: dict[str, object]) -> np.ndarray:
    model = load_model(dataclasses.replace(files, trusted=True))[1]
    options = {"num_steps": 20} | params
    seed, batch_size = int(str(options.pop("seed", 0))), int(str(options.pop("batch_size", 64)))
    sampler = SAMPLERS[str(options.pop("sampler", "ddim"))](**options)  # type: ignore[arg-type]
    ids = torch.tensor(rows["sample_id"])
    label = torch.tensor(rows["label"]) if "label" in rows else None
    images = [
        x_0_to_images(
            generate(
                model,
                sampler,
                seed=seed,
                sample_ids=ids[start : start + batch_size],
                label=None if label is None else label[start : start + batch_size],
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
        (rows, {"sampler": "heun", "churn": 4.0, "churn_interval": [0.1, 9.0], "num_steps": 6}),
        (rows, {"sampler": "dpm_solver_3m", "guidance_scale": 2.0, "guidance_interval": [0.5, 5.0], "num_steps": 5}),
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
        ((ok, {"churn": 3.0}), "churn: is no option of ddim, got 3.0; leave it out or choose another sampler"),
        ((ok, {"sampler": "heun", "eta": 0.5}), "eta: is no option of heun, got 0.5"),
        ((ok, {"sampler": "heun", "churn_interval": [1.0]}), "churn_interval: must be two numbers, got (1.0,)"),
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
    network = OwnNetworkConfig(factory="my_network.layers:make", options={"gain": 0.5})
    config = dataclasses.replace(CONFIG, network=network, channels=3, num_classes=None)
    files = model_files(7, config, collect_source(network))
    assert files.source is not None
    register_model(run, files, "own")
    calls: list[Call] = [({"sample_id": [3, 1, 4]}, {"seed": 9})]
    bad: list[Call] = [({"sample_id": [1]}, {"num_steps": 999})]
    images, refused = predict_alone(artifact_path(run, "own"), tmp_path, calls, bad, trust=True)
    assert images[0].shape == (3, 8, 8, 3)
    assert np.array_equal(images[0], expected(files, *calls[0]))
    assert refused[0][0] == "INVALID_PARAMETER_VALUE"
