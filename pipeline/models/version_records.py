"""What is recorded about a registered version after it was made: figures and pictures, in the run that trained it."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config_io
from pipeline.errors import PipelineError
from pipeline.models.registry import MODEL_ID_TAG, RegisteredVersion
from pipeline.models.sampling_rate import SamplingRate
from pipeline.tracking.mlflow_client import connect, mlflow_errors, waiting_for
from pipeline.tracking.tracking import TrackingRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

RATE_TAG = "ddpm.sampling_rate."
"""Start of the tags of a version that hold a SamplingRate each; the setting's name follows."""


def log_version_metrics(
    version: RegisteredVersion, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None
) -> None:
    """Record figures of a version: as metrics of its model and its run, and tags on the version.

    Args:
        version: The version.
        metrics: Values by name, such as `eval/frechet_distance`.
        tags: Tags by name.

    Raises:
        TrackingUnavailableError: If the server does not answer for $DDPM_PATIENCE_MINUTES, or refuses.
    """
    from mlflow.entities import Metric

    with mlflow_errors(version.tracking_uri):
        client, wait = connect(version.tracking_uri), waiting_for(version.tracking_uri)
        found = wait(client.get_model_version, version.name, str(version.version))
        assert found.run_id is not None, "register_model sets it"
        model = wait(client.get_logged_model, found.tags[MODEL_ID_TAG])
        step = int(model.params.get("train_step", 0))
        now_ms = time.time_ns() // 1_000_000
        points = [Metric(key, float(value), now_ms, step, model_id=model.model_id) for key, value in metrics.items()]
        wait(client.log_batch, found.run_id, metrics=points)
        for key, value in (tags or {}).items():
            wait(client.set_model_version_tag, version.name, str(version.version), key, value)


def log_version_files(version: RegisteredVersion, files: Mapping[str, bytes], folder: str) -> None:
    """Put files among the artifacts of the run that trained a version; equal names are replaced.

    Args:
        version: The version.
        files: Contents by file name.
        folder: Where among the artifacts, such as `figures`.

    Raises:
        TrackingUnavailableError: If the server does not answer for $DDPM_PATIENCE_MINUTES, or refuses.
    """
    with mlflow_errors(version.tracking_uri), tempfile.TemporaryDirectory(prefix="ddpm-upload-") as temporary:
        for name, data in files.items():
            (Path(temporary) / name).write_bytes(data)
        client, wait = connect(version.tracking_uri), waiting_for(version.tracking_uri)
        found = wait(client.get_model_version, version.name, str(version.version))
        assert found.run_id is not None, "register_model sets it"
        wait(client.log_artifacts, found.run_id, temporary, folder)


def link_version(run: TrackingRun, version: RegisteredVersion) -> None:
    """Queue that a run, of the same MLflow, works with a version: its model is an input of the run."""

    def link(client: "MlflowClient") -> None:
        from mlflow.entities import LoggedModelInput

        run_id = run.require_id()
        model_id = client.get_model_version(version.name, str(version.version)).tags[MODEL_ID_TAG]
        inputs = client.get_run(run_id).inputs
        if inputs is None or model_id not in {one.model_id for one in inputs.model_inputs}:
            client.log_inputs(run_id, models=[LoggedModelInput(model_id)])

    run.put(f"the link to {version.uri}", link)


def put_sampling_rate(run: TrackingRun, version: RegisteredVersion, rate: SamplingRate) -> None:
    """Queue, with a run of the same MLflow, how fast a version was sampled from; see SamplingRate.replaces."""

    def record(client: "MlflowClient") -> None:
        key = f"{RATE_TAG}{rate.setting}"
        text = client.get_model_version(version.name, str(version.version)).tags.get(key)
        standing = None if text is None else _parse_rate(text, key)
        if standing is None or rate.replaces(standing):
            client.set_model_version_tag(version.name, str(version.version), key, config_io.to_json(rate).decode())

    run.put(f"the sampling rate of {version.uri}", record)


def sampling_rates(version: RegisteredVersion) -> list[SamplingRate]:
    """How fast a version was sampled from, one figure for each setting that was measured; nothing is changed.

    Raises:
        TrackingUnavailableError: If the server does not answer, or refuses.
    """
    with mlflow_errors(version.tracking_uri):
        found = connect(version.tracking_uri).get_model_version(version.name, str(version.version))
    rates = [_parse_rate(text, key) for key, text in sorted(found.tags.items()) if key.startswith(RATE_TAG)]
    return [rate for rate in rates if rate is not None]


def _parse_rate(text: str, key: str) -> SamplingRate | None:
    """The figure of a tag; None for one of another version of this program, or that a person wrote."""
    try:
        return config_io.read_record(SamplingRate, text.encode(), key, remedy="measure it again")
    except PipelineError:
        return None
