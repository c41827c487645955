"""A finished run, opened by its prefix: its manifest, its configuration, and what its images are made of."""

import dataclasses
from dataclasses import dataclass

from pipeline.config_io import parse_toml
from pipeline.config_sections import read_section
from pipeline.errors import CheckpointError, ConfigError, ObjectMissingError
from pipeline.generation.making.shard_maker import Ingredients
from pipeline.generation.output.manifest import MANIFEST_KEY, GenerationManifest, load_generation_manifest
from pipeline.generation.pool.node_models import read_staged
from pipeline.generation.requests.edit_inputs import resolve_request
from pipeline.generation.requests.label_requests import resolve_labels
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.spec.labels import PlannedLabels
from pipeline.generation.spec.sampling_plan import SamplingSpec
from pipeline.models.calibration import read_calibration
from pipeline.models.model_files import ModelFiles, check_trust, read_card
from pipeline.models.registry import resolve_model
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import fault_of, open_store
from pipeline.tracking.tracking import TrackingConfig

CONFIG_KEY = "config.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAccess:
    """How models that are not staged beside the run are reached."""

    tracking_uri: str | None = None
    """The registry; None: what the run's config.toml says, or the environment."""
    trust_model_code: bool = False
    """Whether code that comes with a model may run."""


def open_prefix(prefix: str) -> ObjectStore:
    """The store of a run's prefix.

    Raises:
        ConfigError: If it is no URI that can be opened.
    """
    if fault := fault_of(prefix):
        raise ConfigError(f"prefix: {fault}, got {prefix!r}")
    return open_store(prefix.rstrip("/") or prefix)


def require_run(store: ObjectStore) -> None:
    """Refuse a place where no run has finished.

    Raises:
        ConfigError: If there is no manifest.
        StorageError: If the store fails.
    """
    if store.stat(MANIFEST_KEY) is None:
        raise ConfigError(
            f"prefix: must hold a {MANIFEST_KEY}, got {store.uri} without one; name the prefix of a finished run, the "
            "folder of 16 digits below its output, or let jobs/sample.py finish it"
        )


def load_run(store: ObjectStore) -> GenerationManifest:
    """The manifest of a run that can be worked with.

    Raises:
        ConfigError: If no run has finished there, or its manifest is damaged or edited.
    """
    require_run(store)
    manifest = load_generation_manifest(store)
    assert manifest is not None, "it was there a moment ago"
    if manifest.spec_digest != manifest.spec.digest:
        raise ConfigError(
            f"{store.uri}/{MANIFEST_KEY}: spec_digest: must be {manifest.spec.digest}, that of its spec, got "
            f"{manifest.spec_digest}; jobs/output.py repair makes the manifest again"
        )
    return manifest


def stored_config(store: ObjectStore) -> SampleConfig | None:
    """The configuration that the run was made with, without passwords; None if it is not there or cannot be read."""
    where = f"{store.uri}/{CONFIG_KEY}"
    try:
        tables = parse_toml(store.read(CONFIG_KEY), where)
        return read_section(SampleConfig(model="unknown", output="unknown"), "sample", tables, where)
    except (ObjectMissingError, ConfigError):
        return None


def find_ingredients(
    store: ObjectStore, manifest: GenerationManifest, config: SampleConfig | None, access: ModelAccess
) -> Ingredients:
    """What the images of a run are made of, each part compared with the digest in its spec.

    Args:
        store: The run's prefix.
        manifest: The run's manifest.
        config: What `stored_config` gave: says where inputs, label plan and calibration are.
        access: How models are reached that are not staged.

    Raises:
        CheckpointError: If a model is neither staged nor where the manifest hints, in the digest of the spec.
        UntrustedCodeError: If a model brings code and is not trusted.
        ConfigError: If inputs, label plan or calibration cannot be found, or are others than the run was made with.
        StorageError: If something cannot be read.
    """
    spec = manifest.spec
    tracking = TrackingConfig() if config is None else config.tracking
    if access.tracking_uri is not None:
        try:
            tracking = dataclasses.replace(tracking, uri=access.tracking_uri)
        except ValueError as error:
            raise ConfigError(f"tracking-{error}") from None
    model = _find_model(store, spec.model_digest, manifest.model_uri, tracking, access)
    guide = None
    if spec.guide_digest is not None:
        guide = _find_model(store, spec.guide_digest, manifest.guide_uri or "", tracking, access)
    ingredients = Ingredients(model=model, guide=guide)
    if spec.request is None and spec.calibration_digest is None and not isinstance(spec.label_rule, PlannedLabels):
        return ingredients
    if config is None:
        raise ConfigError(
            f"{store.uri}/{CONFIG_KEY}: must say where inputs, label plan or calibration are, got no such file that "
            "can be read; put it back"
        )
    return _with_inputs(ingredients, store, spec, config, manifest.model_uri)


def _with_inputs(
    ingredients: Ingredients, store: ObjectStore, spec: SamplingSpec, config: SampleConfig, model_uri: str
) -> Ingredients:
    """What an edit, a label plan or a calibration adds."""
    card = read_card(ingredients.model)
    edit = resolve_request(config.request, card, model_uri)
    labels = resolve_labels(config.request, card, model_uri)
    calibration = None
    if config.calibration is not None:
        num_timesteps = card.config.schedule.num_timesteps
        calibration = read_calibration(
            config.calibration, spec.model_digest, num_timesteps, clip_x_0=spec.sampler.clip_x_0
        )
    for what, found, expected in (
        ("request", None if edit is None else edit.spec, spec.request),
        ("label rule", labels.rule, spec.label_rule),
        ("calibration", None if calibration is None else calibration.digest, spec.calibration_digest),
    ):
        if found != expected:
            raise ConfigError(
                f"{store.uri}/{CONFIG_KEY}: its {what} is no longer what the run was made with (got {found}, the "
                f"manifest says {expected}); put the files that it names back"
            )
    return dataclasses.replace(
        ingredients,
        inputs=None if edit is None else edit.inputs,
        known=None if edit is None else edit.known,
        x_0_error=None if calibration is None else calibration.x_0_error,
        label_plan=labels.plan,
    )


def _find_model(
    store: ObjectStore, digest: str, hint: str, tracking: TrackingConfig, access: ModelAccess
) -> ModelFiles:
    """A model by its digest: staged beside the run, else where the manifest hints."""
    parent = store.uri.rpartition("/")[0] or "/"
    try:
        files = read_staged(open_store(parent), digest, trusted=access.trust_model_code)
        check_trust(files, hint)
        return files
    except (ObjectMissingError, CheckpointError):
        pass  # it may have been removed there, or altered: the digest tells
    found = resolve_model(hint, tracking, trust_model_code=access.trust_model_code)
    if found.files.digest != digest:
        raise CheckpointError(
            f"{hint}: is another model by now (digest {found.files.digest[:16]}, the run was made with {digest[:16]}), "
            f"and there is none in {parent}/_models; put that model's files there, in a folder called by its digest"
        )
    return found.files
