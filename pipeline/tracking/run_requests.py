"""What is asked of MLflow for one run, in requests that are safe to repeat; they raise what its client raises."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PARAMS_PER_REQUEST, _MAX_PARAM_LENGTH = 100, 6000  # limits of MLflow's API


def log_params(client: "MlflowClient", run_id: str, params: Mapping[str, object]) -> None:
    """Log parameters; where the run has another value already, the tag `resumed.<name>` says ours."""
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    texts = {key: redact(str(value))[:_MAX_PARAM_LENGTH] for key, value in params.items()}
    new = [Param(key, text) for key, text in texts.items() if key not in known]
    changed = [RunTag(f"resumed.{key}", text) for key, text in texts.items() if key in known and known[key] != text]
    for start in range(0, len(new), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=new[start : start + _PARAMS_PER_REQUEST])
    for start in range(0, len(changed), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, tags=changed[start : start + _PARAMS_PER_REQUEST])


REDONE_METRIC = "learning_rate"
"""Logged whenever anything is: its history tells how far redone steps have been logged."""


def last_logged_step(client: "MlflowClient", run_id: str, redone: tuple[int, int] | None = None) -> int:
    """The highest step that any metric of the run has; -1 if there is none.

    Args:
        client: Of the run's server.
        run_id: The run.
        redone: First and last of steps that are logged a second time: of these, those count that are there twice.
    """
    last = max((metric.step for metric in client.get_run(run_id).to_proto().data.metrics), default=-1)
    if redone is None or last > redone[1]:
        return last
    counts = Counter(metric.step for metric in client.get_metric_history(run_id, REDONE_METRIC))
    twice = [step for step, count in counts.items() if redone[0] <= step <= redone[1] and count > 1]
    return max(twice, default=min(last, redone[0] - 1))


def delete_tag(client: "MlflowClient", run_id: str, key: str) -> None:
    """Take a tag away, if the run has it."""
    if key in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, key)


def upload(client: "MlflowClient", run_id: str, data: bytes, path: str) -> None:
    """Store a file among the run's artifacts."""
    folder, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
    with tempfile.TemporaryDirectory(prefix="ddpm-upload-") as temporary:
        file = Path(temporary) / name
        file.write_bytes(data)
        client.log_artifact(run_id, str(file), None if folder == "." else folder)


def log_dataset(
    client: "MlflowClient",
    run_id: str,
    *,
    name: str,
    digest: str,
    uri: str,
    context: str,
    profile: Mapping[str, object],
) -> None:
    """Make a dataset an input of the run; the same one twice is one.

    Args:
        client: Of the run's server.
        run_id: The run.
        name: Of the dataset.
        digest: Of its manifest; MLflow takes 36 characters of it, the profile holds all.
        uri: Where it is.
        context: What the run does with it: "training".
        profile: What else is to be shown.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=redact(name),
        digest=digest[:36],
        source_type="s3" if uri.startswith("s3://") else "local",
        source=json.dumps({"uri": redact(uri)}),
        profile=json.dumps({**profile, "digest": digest}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def link_checkpoint(client: "MlflowClient", run_id: str, experiment_id: str, step: int, uri: str, digest: str) -> None:
    """What `mlflow.create_external_model` does, on this run's own server and safe to repeat."""
    from mlflow.entities import LoggedModelOutput

    key = hashlib.sha256(uri.encode()).hexdigest()[:16]  # MLflow's filters have no escape for a quote
    mine = f"source_run_id = '{run_id}' AND tags.`ddpm.uri_key` = '{key}'"
    found = client.search_logged_models([experiment_id], filter_string=mine, max_results=1)
    model = found[0] if found else None
    if model is None:
        model = client.create_logged_model(
            experiment_id,
            name=f"step-{step:09d}",
            source_run_id=run_id,
            tags={"mlflow.model.isExternal": "true", "ddpm.uri": uri, "ddpm.uri_key": key, "ddpm.digest": digest},
            params={"step": str(step)},
            model_type="checkpoint",
        )
    outputs = client.get_run(run_id).outputs
    if not outputs or model.model_id not in {output.model_id for output in outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
    client.finalize_logged_model(model.model_id, "READY")
    client.set_tag(run_id, "ddpm.checkpoint", uri)
    client.set_tag(run_id, "ddpm.checkpoint_digest", digest)


def end_if_running(client: "MlflowClient", run_id: str | None, status: str) -> None:
    """Give a run its final status, if it is there and RUNNING."""
    if run_id is not None and client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, status)
