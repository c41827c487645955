"""What is recorded about a registered version after it was made: figures and pictures, in the run that trained it."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.models.registry import MODEL_ID_TAG, RegisteredVersion
from pipeline.tracking.mlflow_client import connect, mlflow_errors, waiting_for


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
