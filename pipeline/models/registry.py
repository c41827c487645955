"""The model registry, read: a model's URI becomes its files.

A version's tag `ddpm.digest` says which bytes they are; what is downloaded is compared with it. An alias is resolved to
a version once, by the driver, so that a job works with one model even when the alias moves meanwhile.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import CheckpointError, ModelMissingError, PipelineError
from pipeline.models.model_files import (
    MODEL_JSON,
    SOURCE_JSON,
    WEIGHTS,
    ModelFiles,
    check_trust,
    read_card,
    read_model_files,
)
from pipeline.models.model_uri import RegisteredUri, parse_registered, split_average
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_causes import describe, is_outage, refusal
from pipeline.tracking.mlflow_client import (
    TrackingConfig,
    connect,
    has_tables,
    mlflow_errors,
    tracking_uri,
    waiting_for,
)
from pipeline.tracking.tracking import TrackingRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DIGEST_TAG, MODEL_ID_TAG = "ddpm.digest", "ddpm.model_id"
CHECKPOINT_TAG = "ddpm.checkpoint"
"""Tag of a version: the checkpoint that it was registered from, which may hold further averages."""


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
    run_id: str | None
    """The MLflow run that it comes from; None: it names none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A model's URI, followed to its end."""

    uri: str
    """models:/name/version, or the checkpoint's URI, each with the average that was asked for; never an alias."""
    version: RegisteredVersion | None
    """The registered version; None for a checkpoint and for a further average, whose figures are not the version's."""
    files: ModelFiles
    """The model, verified, with the permission to run its code where that was given."""


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
        TrackingUnavailableError: If the server does not answer for $DDPM_PATIENCE_MINUTES, or refuses.
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


def registered_checkpoints(run: TrackingRun) -> dict[str, str]:
    """The checkpoints that versions of a run were registered from: name in the registry by the checkpoint's URI.

    Raises:
        TrackingUnavailableError: If the server does not answer.
    """
    if run.run_id is None:
        return {}
    with mlflow_errors(run.uri):
        versions = connect(run.uri).search_model_versions(f"run_id = '{run.run_id}'")
    return {version.tags[CHECKPOINT_TAG]: version.name for version in versions if CHECKPOINT_TAG in version.tags}


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

        def find() -> "ModelVersion":
            if uri.alias is not None:
                return client.get_model_version_by_alias(uri.name, uri.alias)
            return client.get_model_version(uri.name, str(uri.version))

        try:
            found: ModelVersion = waiting_for(registry_uri)(find)
        except Exception as error:
            if refusal(error):
                known = _describe_registry(client, uri.name)
                raise ModelMissingError(f"{uri.text}: not in the registry at {registry_uri}; {known}") from error
            raise
        yield client, found, registered(registry_uri, uri.name, int(found.version), found.run_id)


def registered(uri: str, name: str, version: int, run_id: str | None) -> RegisteredVersion:
    """A version by its number, and the run that it comes from."""
    return RegisteredVersion(
        name=name, version=version, uri=f"models:/{name}/{version}", tracking_uri=uri, run_id=run_id
    )


def _download(client: "MlflowClient", found: "ModelVersion", version: RegisteredVersion) -> ModelFiles:
    """The files of a version, compared with the digest on its tag."""
    import mlflow

    digest, model_id = found.tags.get(DIGEST_TAG), found.tags.get(MODEL_ID_TAG)
    if digest is None or model_id is None:
        raise ModelMissingError(f"{version.uri}: was not registered by this project (it has no tag {DIGEST_TAG})")
    wait = waiting_for(version.tracking_uri)
    location = wait(client.get_logged_model, model_id).artifact_location
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as folder:
        try:
            wait(
                mlflow.artifacts.download_artifacts,
                f"{location}/artifacts",
                dst_path=folder,
                tracking_uri=version.tracking_uri,
            )
        except PipelineError:
            raise
        except Exception as error:
            if is_outage(error):
                raise
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
