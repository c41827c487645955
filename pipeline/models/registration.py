"""Registration: a trained network becomes a version of a registered model.

A version is an MLflow pyfunc whose artifacts are the three files of `model_files`, with this project's code beside
them. Each request is safe to repeat, because its answer may be lost: what it would make is looked for first.
"""

import contextlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ddpm
from pipeline.models.model_files import ModelCard, ModelFiles, read_card
from pipeline.models.model_source import requirements
from pipeline.models.model_uri import check_model_name
from pipeline.models.registry import DIGEST_TAG, MODEL_ID_TAG, RegisteredVersion, registered
from pipeline.models.sampler_params import DEFAULT_SAMPLER, TRUST, is_interval, sampler_options
from pipeline.stores.patience import patiently
from pipeline.tracking.mlflow_causes import describe, is_outage, refusal
from pipeline.tracking.mlflow_client import connect, environment, mlflow_errors
from pipeline.tracking.tracking import TrackingRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.logged_model import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

T = TypeVar("T")

MODEL_TYPE = "diffusion"
"""Of a run's logged models, what the model itself is called; its checkpoints are of another type."""


def register_model(
    run: TrackingRun,
    files: ModelFiles,
    name: str,
    alias: str | None = "candidate",
    *,
    tags: Mapping[str, str] | None = None,
) -> RegisteredVersion:
    """Register a model as a pyfunc and move the alias to it. Safe to repeat: equal files of a run are one version.

    A server that is busy or away is waited for ($DDPM_PATIENCE_MINUTES, for each request): hours of training may lie
    behind the model. So is a run that is not opened yet.

    `mlflow.pyfunc.log_model` is not used: it reads the whole history of every metric of the run, and it needs
    process-wide state. These are the steps that it takes.

    Args:
        run: The run that made the model.
        files: The model.
        name: Name in the registry; made if there is none.
        alias: Alias to move; it never moves back to an older version. None moves none.
        tags: Further tags of a version that is made now: where the model comes from.

    Raises:
        ConfigError: If name or alias is none that MLflow takes.
        TrackingUnavailableError: If the server does not answer in that time, or refuses.
    """
    check_model_name(name, alias)
    with mlflow_errors(run.uri):
        version = _Registration(run, files, name, tags or {}).version(alias)
    return registered(run.uri, name, version, run.require_id())


class _Registration:
    """The steps of registering one model, each waited for by itself."""

    def __init__(self, run: TrackingRun, files: ModelFiles, name: str, tags: Mapping[str, str]) -> None:
        self._run, self._files, self._card, self._name = run, files, read_card(files), name
        self._client = connect(run.uri)
        self._tags = dict(tags) | {
            DIGEST_TAG: files.digest,
            "ddpm.training.train_step": str(self._card.train_step),
            "ddpm.dataset": self._card.dataset_digest,
        }
        where = f"MLflow at {run.uri}: registering {name}"
        self._patiently = patiently(is_outage, where, describe=describe)

    def version(self, alias: str | None) -> int:
        """The number of the version, made if there is none."""
        self._ask(self._run.require_id)
        self._ask(lambda: make_registered_model(self._client, self._name))
        version = self._ask(self._find_version) or self._make_version()
        if alias is not None:
            self._ask(lambda: _raise_alias(self._client, self._name, alias, int(version.version)))
        return int(version.version)

    def _ask(self, request: Callable[[], T]) -> T:
        answer: T = self._patiently(request)
        return answer

    def _make_version(self) -> "ModelVersion":
        """Uploads the pyfunc and makes the version; a failure leaves a model marked FAILED and no version."""
        client, model = self._client, self._ask(self._find_or_make_model)
        try:
            with tempfile.TemporaryDirectory(prefix="ddpm-register-") as folder:
                _save_pyfunc(Path(folder), self._files, self._card, self._run.require_id(), model)
                self._upload(model, Path(folder, "pyfunc"))
        except BaseException:
            with contextlib.suppress(Exception):  # the server may be what failed
                client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self._ask(lambda: client.finalize_logged_model(model.model_id, "READY"))
        self._ask(lambda: self._link_to_run(model))
        version = self._ask(lambda: self._find_version() or self._create_version(model))
        link = json.dumps([{"name": self._name, "version": int(version.version)}])
        self._ask(lambda: client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link}))
        return version

    def _upload(self, model: "LoggedModel", folder: Path) -> None:
        """File by file: of some hundred, each is waited for by itself."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            place = file.parent.relative_to(folder).as_posix()
            path = None if place == "." else place
            self._ask(partial(self._client.log_model_artifact, model.model_id, str(file), path))

    def _find_or_make_model(self) -> "LoggedModel":
        """The logged model that an earlier attempt left, or a new one."""
        run, client = self._run, self._client
        name = self._name.replace(".", "-")  # MLflow takes dots in the names of registered models, not of logged ones
        mine = f"source_run_id = '{run.require_id()}' AND tags.`{DIGEST_TAG}` = '{self._files.digest}'"
        for found in client.search_logged_models([run.experiment_id], filter_string=mine):
            if found.name == name and found.model_type == MODEL_TYPE:
                return found
        return client.create_logged_model(
            run.experiment_id,
            name=name,
            source_run_id=run.require_id(),
            tags=self._tags,
            params={"train_step": str(self._card.train_step), "network": self._card.config.network.title},
            model_type=MODEL_TYPE,
        )

    def _link_to_run(self, model: "LoggedModel") -> None:
        from mlflow.entities import LoggedModelOutput

        run_id = self._run.require_id()
        outputs = self._client.get_run(run_id).outputs
        if not outputs or model.model_id not in {output.model_id for output in outputs.model_outputs}:
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=self._card.train_step)])

    def _find_version(self) -> "ModelVersion | None":
        """The newest version of the run with these bytes."""
        mine = f"name = '{self._name}' AND run_id = '{self._run.require_id()}'"
        ours = [v for v in self._client.search_model_versions(mine) if v.tags.get(DIGEST_TAG) == self._files.digest]
        return max(ours, key=lambda v: int(v.version), default=None)

    def _create_version(self, model: "LoggedModel") -> "ModelVersion":
        with environment(MLFLOW_TRACKING_URI=self._run.uri):  # MLflow's database store looks nowhere else for the model
            return self._client.create_model_version(
                self._name,
                f"models:/{model.model_id}",
                run_id=self._run.require_id(),
                tags=self._tags | {MODEL_ID_TAG: model.model_id},
                model_id=model.model_id,
            )


def make_registered_model(client: "MlflowClient", name: str) -> None:
    """Make a registered model, if there is none. Safe to repeat; raises what MLflow's client raises."""
    # First: a user may be allowed to change this one, and to make none. And not in the block of the exception, which
    # would be the context of the next one, and taken for its cause.
    if _has_registered_model(client, name):
        return
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise


def _has_registered_model(client: "MlflowClient", name: str) -> bool:
    try:
        client.get_registered_model(name)
    except Exception as error:
        if refusal(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _raise_alias(client: "MlflowClient", name: str, alias: str, version: int) -> None:
    """Moves the alias forward: a repeated registration must not take it from a newer version."""
    present = client.get_registered_model(name).aliases.get(alias)
    if present is None or int(present) < version:
        client.set_registered_model_alias(name, alias, str(version))


def _save_pyfunc(folder: Path, files: ModelFiles, card: ModelCard, run_id: str, model: Any) -> None:
    """Writes the pyfunc to `folder`/pyfunc."""
    import mlflow

    artifacts = {}
    for file_name, data in files.as_dict().items():
        folder.joinpath(file_name).write_bytes(data)
        artifacts[file_name] = str(folder / file_name)
    code = []
    for package in (Path(ddpm.__file__).parent, Path(__file__).parents[1]):
        copy = shutil.copytree(package, folder / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        code.append(str(copy))
    with warnings.catch_warnings():  # MLflow asks for type hints and an input example; the signature is explicit
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            path=str(folder / "pyfunc"),
            mlflow_model=mlflow.models.Model(
                artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
            ),
            python_model=str(Path(__file__).with_name("sampler_model.py")),
            artifacts=artifacts,
            code_paths=code,
            signature=_signature(card),
            pip_requirements=requirements(card.config.network),
            model_config={TRUST: False},  # without it MLflow would not hear whoever loads the model
        )
    for cache in list(folder.joinpath("pyfunc").rglob("__pycache__")):
        shutil.rmtree(cache)


def _signature(card: ModelCard) -> Any:
    """Columns and parameters, with the defaults that `sample` has."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    ids = [ColSpec(DataType.long, "sample_id")]
    if card.config.num_classes is not None:
        ids.append(ColSpec(DataType.long, "label"))
    params = [
        ParamSpec("seed", DataType.long, 0),
        ParamSpec("batch_size", DataType.long, 64),
        ParamSpec("sampler", DataType.string, DEFAULT_SAMPLER.name),
    ]
    types = {bool: DataType.boolean, int: DataType.long, float: DataType.double, str: DataType.string}
    for name, default in sampler_options().items():
        if is_interval(name):  # empty: everywhere
            params.append(ParamSpec(name, DataType.double, list(default or ()), shape=(-1,)))
        elif name == "num_steps":
            params.append(ParamSpec(name, DataType.long, min(default, card.config.schedule.num_timesteps)))
        else:  # what is off by default is a number
            params.append(ParamSpec(name, types.get(type(default), DataType.double), default))
    outputs = [*ids, ColSpec(DataType.binary, "png")]
    return ModelSignature(inputs=Schema([*ids]), outputs=Schema([*outputs]), params=ParamSchema(params))
