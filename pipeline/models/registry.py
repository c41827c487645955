"""The model registry: a trained network becomes a version, and a model's URI becomes its files.

A version is an MLflow pyfunc whose artifacts are the three files of `model_files`, with this project's code beside
them. Its tag `ddpm.digest` says which bytes they are; what is downloaded is compared with it. An alias is resolved to a
version once, by the driver, so that a job works with one model even when the alias moves meanwhile.
"""

import contextlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tenacity

import ddpm
from pipeline.errors import CheckpointError, ModelMissingError, PipelineError
from pipeline.models.model_files import (
    MODEL_JSON,
    SOURCE_JSON,
    WEIGHTS,
    ModelCard,
    ModelFiles,
    check_trust,
    read_card,
    read_model_files,
)
from pipeline.models.model_source import requirements
from pipeline.models.model_uri import RegisteredUri, check_model_name, parse_registered, split_average
from pipeline.models.sampler_params import DEFAULT_SAMPLER, TRUST, is_interval, sampler_options
from pipeline.progress import say
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_client import (
    TrackingConfig,
    connect,
    describe,
    environment,
    has_tables,
    is_outage,
    mlflow_errors,
    refusal,
    tracking_uri,
)
from pipeline.tracking.tracking import TrackingRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DIGEST_TAG, MODEL_ID_TAG = "ddpm.digest", "ddpm.model_id"
CHECKPOINT_TAG = "ddpm.checkpoint"
"""Tag of a version: the checkpoint that it was registered from, which may hold further averages."""
_REGISTER_PATIENCE_S = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    """Name in the registry."""
    version: int
    """Version number."""
    uri: str
    """models:/name/version."""
    tracking_uri: str = field(repr=False)
    """The MLflow that it is registered with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A model's URI, followed to its end."""

    uri: str
    """models:/name/version, or the checkpoint's URI, each with the average that was asked for; never an alias."""
    version: RegisteredVersion | None
    """The registered version; None for a checkpoint and for a further average, whose figures are not the version's."""
    files: ModelFiles
    """The model, verified, with the permission to run its code where that was given."""


def register_model(
    run: TrackingRun,
    files: ModelFiles,
    name: str,
    alias: str | None = "candidate",
    *,
    tags: Mapping[str, str] | None = None,
) -> RegisteredVersion:
    """Register a model as a pyfunc and move the alias to it. Safe to repeat: equal files of a run are one version.

    A server that cannot be reached is given two minutes to come back: hours of training may lie behind the model.

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
        TrackingUnavailableError: If the server does not answer.
    """
    check_model_name(name, alias)
    card = read_card(files)

    def wait_for_server(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number == 1 and error is not None:
            say(f"MLflow at {run.uri} does not answer ({describe(error)}); registering {name} waits for it")

    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_outage),
        stop=tenacity.stop_after_delay(_REGISTER_PATIENCE_S),
        wait=tenacity.wait_exponential(max=15),
        before_sleep=wait_for_server,
        reraise=True,
    )
    with mlflow_errors(run.uri):
        version = patiently(_register, connect(run.uri), run, files, card, name, alias, dict(tags or {}))
    return _registered(run.uri, name, version)


def resolve_model(uri: str, tracking: TrackingConfig, *, trust_model_code: bool = False) -> ResolvedModel:
    """Follow a model's URI to a version or checkpoint, and read and verify its files.

    Args:
        uri: models:/name@alias, models:/name/3, or the folder of a checkpoint (local path, file:// or s3://). With
            ?ema=HALFLIFE at its end, a further average of that checkpoint, or of the one that the version comes from.
        tracking: Where the registry is.
        trust_model_code: Whether code that comes with the model may run: that of a network of one's own.

    Raises:
        UntrustedCodeError: If the model brings code and is not trusted.
        ModelMissingError: If there is no such model, version, alias or checkpoint, or the URI is malformed.
        CheckpointError: If its files are incomplete or altered.
        TrackingUnavailableError: If the server does not answer.
    """
    found = _resolve(uri, tracking)
    files = replace(found.files, trusted=trust_model_code)
    check_trust(files, found.uri)
    return replace(found, files=files)


def _resolve(uri: str, tracking: TrackingConfig) -> ResolvedModel:
    """The model with its files verified; nobody has trusted it yet."""
    place, halflife_images = split_average(uri)
    registered = parse_registered(place)
    if registered is None:
        store = open_store(place)
        files = read_model_files(store, ema_halflife_images=halflife_images)
        return ResolvedModel(uri=_with_average(store.uri, halflife_images), version=None, files=files)
    with _found(registered, tracking) as (client, found, version):
        if halflife_images is None:
            return ResolvedModel(uri=version.uri, version=version, files=_download(client, found, version))
        checkpoint = found.tags.get(CHECKPOINT_TAG)
    if checkpoint is None:
        raise ModelMissingError(
            f"{version.uri}: does not say which checkpoint holds its further averages, such as that of "
            f"half-life {halflife_images} images; name the checkpoint's folder with ?ema={halflife_images} instead"
        )
    files = read_model_files(open_store(checkpoint), ema_halflife_images=halflife_images)
    return ResolvedModel(uri=_with_average(version.uri, halflife_images), version=None, files=files)


def _with_average(uri: str, halflife_images: int | None) -> str:
    return uri if halflife_images is None else f"{uri}?ema={halflife_images}"


@contextlib.contextmanager
def _found(
    uri: RegisteredUri, tracking: TrackingConfig
) -> "Iterator[tuple[MlflowClient, ModelVersion, RegisteredVersion]]":
    """The version that a registry's URI names, while its server is asked."""
    registry_uri = tracking_uri(tracking)
    if registry_uri.startswith("sqlite:///") and not has_tables(registry_uri):  # MLflow would make them to look into
        raise ModelMissingError(
            f"{uri.text}: there is no registry at {registry_uri} yet; train a model, or name a server"
        )
    with mlflow_errors(registry_uri):
        client = connect(registry_uri)
        try:
            if uri.alias is not None:
                found = client.get_model_version_by_alias(uri.name, uri.alias)
            else:
                found = client.get_model_version(uri.name, str(uri.version))
        except Exception as error:
            if refusal(error):
                known = _describe_registry(client, uri.name)
                raise ModelMissingError(f"{uri.text}: not in the registry at {registry_uri}; {known}") from error
            raise
        yield client, found, _registered(registry_uri, uri.name, int(found.version))


def _register(
    client: "MlflowClient",
    run: TrackingRun,
    files: ModelFiles,
    card: ModelCard,
    name: str,
    alias: str | None,
    tags: dict[str, str],
) -> int:
    _make_registered_model(client, name)
    version = _find_version(client, name, run.run_id, files.digest)
    if version is None:
        version = _create_version(client, run, files, card, name, tags)
    if alias is not None:
        _raise_alias(client, name, alias, int(version.version))
    return int(version.version)


def _create_version(
    client: "MlflowClient", run: TrackingRun, files: ModelFiles, card: ModelCard, name: str, tags: dict[str, str]
) -> "ModelVersion":
    """Uploads the pyfunc and makes the version; a failure leaves a model marked FAILED and no version."""
    from mlflow.entities import LoggedModelOutput

    tags = tags | {
        DIGEST_TAG: files.digest,
        "ddpm.training.train_step": str(card.train_step),
        "ddpm.dataset": card.dataset_digest,
    }
    model = client.create_logged_model(
        run.experiment_id,
        name=name.replace(".", "-"),  # MLflow takes dots in the names of registered models, not in those of logged ones
        source_run_id=run.run_id,
        tags=tags,
        params={"train_step": str(card.train_step), "network": card.config.network.title},
        model_type="diffusion",
    )
    try:
        with tempfile.TemporaryDirectory(prefix="ddpm-register-") as folder:
            _save_pyfunc(Path(folder), files, card, run.run_id, model)
            client.log_model_artifacts(model.model_id, str(Path(folder, "pyfunc")))
    except BaseException:
        with contextlib.suppress(Exception):  # the server may be what failed
            client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step=card.train_step)])
    tags |= {MODEL_ID_TAG: model.model_id}
    with environment(MLFLOW_TRACKING_URI=run.uri):  # MLflow's database store looks nowhere else for the model
        version = client.create_model_version(
            name, f"models:/{model.model_id}", run_id=run.run_id, tags=tags, model_id=model.model_id
        )
    link = json.dumps([{"name": name, "version": int(version.version)}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
    return version


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


def _make_registered_model(client: "MlflowClient", name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version(client: "MlflowClient", name: str, run_id: str, digest: str) -> "ModelVersion | None":
    """The newest version of a run with these bytes."""
    versions = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'")
    ours = [v for v in versions if v.tags.get(DIGEST_TAG) == digest]
    return max(ours, key=lambda v: int(v.version), default=None)


def _raise_alias(client: "MlflowClient", name: str, alias: str, version: int) -> None:
    """Moves the alias forward: a repeated registration must not take it from a newer version."""
    present = client.get_registered_model(name).aliases.get(alias)
    if present is None or int(present) < version:
        client.set_registered_model_alias(name, alias, str(version))


def _registered(uri: str, name: str, version: int) -> RegisteredVersion:
    return RegisteredVersion(name=name, version=version, uri=f"models:/{name}/{version}", tracking_uri=uri)


def _download(client: "MlflowClient", found: "ModelVersion", version: RegisteredVersion) -> ModelFiles:
    """The files of a version, compared with the digest on its tag."""
    import mlflow

    digest, model_id = found.tags.get(DIGEST_TAG), found.tags.get(MODEL_ID_TAG)
    if digest is None or model_id is None:
        raise ModelMissingError(f"{version.uri}: was not registered by this project (it has no tag {DIGEST_TAG})")
    location = client.get_logged_model(model_id).artifact_location
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as folder:
        try:
            mlflow.artifacts.download_artifacts(
                f"{location}/artifacts", dst_path=folder, tracking_uri=version.tracking_uri
            )
        except PipelineError:
            raise
        except Exception as error:
            raise CheckpointError(f"{version.uri}: its files could not be downloaded ({describe(error)})") from error
        contents = {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    missing = [name for name in (MODEL_JSON, WEIGHTS) if name not in contents]
    if missing:
        raise CheckpointError(f"{version.uri}: {missing[0]} is missing from its artifacts at {location}")
    files = ModelFiles(card_json=contents[MODEL_JSON], weights=contents[WEIGHTS], source=contents.get(SOURCE_JSON))
    if files.digest != digest:
        raise CheckpointError(
            f"{version.uri}: the files at {location} have digest {files.digest[:16]}, the version says {digest[:16]}; "
            "they were altered, use another version"
        )
    read_card(files, version.uri)
    return files


def _describe_registry(client: "MlflowClient", name: str) -> str:
    """What there is instead, for the message of a model that is missing."""
    try:
        model = client.get_registered_model(name)
    except Exception:
        names = sorted(m.name for m in client.search_registered_models(max_results=20))
        return f"registered models: {', '.join(names) or 'none'}"
    newest = max((int(v.version) for v in client.search_model_versions(f"name = '{name}'")), default=0)
    aliases = ", ".join(f"{alias} -> {version}" for alias, version in sorted(model.aliases.items()))
    return f"{name} has {f'versions up to {newest}' if newest else 'no version'}, aliases: {aliases or 'none'}"
