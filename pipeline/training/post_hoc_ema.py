"""Averages of a trained run that were not tracked: models made of its snapshots, one at a time.

What is read is the newest good checkpoint and the snapshots that it names, so that a run may be looked at while it goes
on. One snapshot is held at a time, beside the sum.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ddpm import PostHocFit, PowerProfile, combine_snapshots, fit_post_hoc_ema
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    FormatVersionError,
    ModelMissingError,
    ObjectMissingError,
    OutputExistsError,
)
from pipeline.models.model_files import MODEL_JSON, ModelFiles, encode_model, load_model
from pipeline.models.model_uri import check_model_name
from pipeline.models.registration import register_model
from pipeline.models.registry import DIGEST_TAG, RegisteredVersion, resolve_model
from pipeline.progress import Progress, say
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import ObjectStore, check_uris, join_uri, open_store
from pipeline.tracking.mlflow_client import find_model_version
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, check_server, new_run_key
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.checkpoints.ema_snapshots import SnapshotStore, parse_snapshots
from pipeline.training.checkpoints.state_files import SNAPSHOTS_JSON, TRAIN_WEIGHTS, decode_tensors, parts_of
from pipeline.training.run_record import read_run_record

_POOR_RESIDUAL = 0.05  # of the profile; a guess at where to warn. 32 snapshots of 0.05 and 0.10 give 0.03 at 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructConfig:
    """Make a model whose weights are averaged over a length that is chosen after training."""

    run: str
    """Output of a training run that took snapshots: a folder or s3:// URI."""
    output: str
    """Folder or s3:// URI for models; each length gets a folder of its own, which `sample` and `evaluate` take."""
    sigma_rel: float = 0.10
    """Length of the average: its standard deviation in time, as a share of the training."""
    register_as: str | None = None
    """Name in the model registry; no alias is moved. None: not registered."""
    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        check_uris(self, "run", "output")
        PowerProfile(num_images=1, sigma_rel=self.sigma_rel)
        if self.register_as is not None:
            try:
                check_model_name(self.register_as)
            except ConfigError as error:
                raise ValueError(f"register_as: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstructed:
    """A model that was made of snapshots."""

    uri: str
    """Its folder."""
    residual: float
    """Distance of its profile from the one that was wanted, as a share of that one's norm."""
    version: RegisteredVersion | None
    """The registered version, where one was asked for."""


def reconstruct(config: ReconstructConfig) -> Reconstructed:
    """Make the model, and register it where that is asked for. Safe to repeat: equal files are one version.

    Raises:
        ModelMissingError: If the run took no snapshots.
        OutputExistsError: If the output holds another model of this length; nothing is changed.
        PipelineError: As its subclasses say.
    """
    run = RunAverages(config.run, trust_model_code=config.trust_model_code)
    if config.register_as is not None:
        check_server(config.tracking)
    check_conditions(open_store(config.output))
    residual = run.fit(config.sigma_rel).residual
    store = open_store(join_uri(config.output, f"sigma_rel-{config.sigma_rel}"))
    files = run.model(config.sigma_rel)
    _write_once(store, files)
    version = None if config.register_as is None else _register(config, config.register_as, run, files, residual)
    return Reconstructed(uri=store.uri, residual=residual, version=version)


def describe_plan(config: ReconstructConfig) -> list[tuple[str, str]]:
    """What would be made of what, as names and values; reads the newest checkpoint, writes nothing."""
    run = RunAverages(config.run, trust_model_code=config.trust_model_code)
    fit = run.fit(config.sigma_rel)
    lengths = sorted({sigma_rel for record in run.snapshots for sigma_rel in record.sigma_rels})
    return [
        ("checkpoint", run.checkpoint_uri),
        ("snapshots", f"{len(run.snapshots)}, of sigma_rel {', '.join(map(str, lengths))}"),
        ("images", f"{run.num_images:,} behind the newest"),
        ("profile", f"reached within {fit.residual:.2%} of its norm; weights sum up to {_total(fit):.2f} in size"),
    ]


class RunAverages:
    """Every average of a trained run.

    Args:
        output: The run's output: a folder or s3:// URI.
        trust_model_code: Whether the code of a network of one's own may run.

    Raises:
        UntrustedCodeError: If the model brings code and is not trusted.
        ModelMissingError: If there is no checkpoint, or none that names a snapshot.
        CheckpointError: If the checkpoint's model cannot be read.
    """

    def __init__(self, output: str, *, trust_model_code: bool = False) -> None:
        """Read the newest good checkpoint."""
        checkpoints = CheckpointStore.of_run(output)
        self.uri, self._store = open_store(output).uri, SnapshotStore.of_run(output)
        for record in checkpoints.candidates():
            try:
                self._read(checkpoints, record, trust_model_code=trust_model_code)
                return
            except (CheckpointError, FormatVersionError) as error:
                checkpoints.leave_out(record.step, error)
        raise ModelMissingError(
            f"{output}: holds no checkpoint of a training run that can be used; name the output of jobs/train.py"
        )

    def _read(self, checkpoints: CheckpointStore, record: CheckpointRecord, *, trust_model_code: bool) -> None:
        self.checkpoint_uri = checkpoints.uri(record)
        there = SNAPSHOTS_JSON in record.names
        self.snapshots = parse_snapshots(checkpoints.read(record, SNAPSHOTS_JSON), SNAPSHOTS_JSON) if there else ()
        if not self.snapshots:
            raise ModelMissingError(
                f"{self.uri}: took no snapshots; train with --post-hoc-ema.snapshot-interval-steps above 0"
            )
        self.registered = dataclasses.replace(checkpoints.read_model(record), trusted=trust_model_code)
        self._card, model = load_model(self.registered, self.checkpoint_uri)
        assert isinstance(model.network, nn.Module), "built from the card"
        self._network = model.network
        self._last_weights: dict[str, Tensor] = {}
        for name in parts_of(TRAIN_WEIGHTS, record.names):
            self._last_weights |= decode_tensors(checkpoints.read(record, name))

    @property
    def num_images(self) -> int:
        """Images behind the newest snapshot, where the averages end."""
        return self.snapshots[-1].num_images

    def last_weights(self) -> ModelFiles:
        """The weights in training, not averaged: what an average of length 0 would be."""
        return self._encode(self._last_weights, "none: the weights in training")

    def fit(self, sigma_rel: float) -> PostHocFit:
        """How the snapshots combine into the average of a length.

        Raises:
            ValueError: If sigma_rel is out of range.
        """
        profiles = [
            PowerProfile(num_images=record.num_images, sigma_rel=tracked)
            for record in self.snapshots
            for tracked in record.sigma_rels
        ]
        return fit_post_hoc_ema(profiles, PowerProfile(num_images=self.num_images, sigma_rel=sigma_rel))

    def model(self, sigma_rel: float) -> ModelFiles:
        """The average of a length, ending at the newest snapshot.

        Raises:
            ValueError: If sigma_rel is out of range.
            CheckpointError: If a snapshot is missing, cut short or altered.
        """
        fit = self.fit(sigma_rel)
        if fit.residual > _POOR_RESIDUAL:
            say(
                f"sigma_rel {sigma_rel}: {len(self.snapshots)} snapshots reach its profile within {fit.residual:.1%} "
                "only; train with more snapshots, or choose a length nearer to those that were tracked"
            )
        with Progress(f"sigma_rel {sigma_rel}", len(fit.weights), "averages") as progress:

            def states() -> Iterator[dict[str, Tensor]]:
                for record in self.snapshots:
                    for tracked in record.sigma_rels:
                        yield self._store.read(record, tracked)
                        progress.advance(1)

            return self._encode(combine_snapshots(self._network, states(), fit.weights), f"sigma_rel {sigma_rel}")

    def _encode(self, state: dict[str, Tensor], average: str) -> ModelFiles:
        card = dataclasses.replace(self._card, average=average, train_step=self.snapshots[-1].step)
        made = encode_model(card, state, self.registered.source)
        return dataclasses.replace(made, trusted=self.registered.trusted)


def _total(fit: PostHocFit) -> float:
    """By how much rounding errors of the snapshots may grow."""
    return sum(abs(weight) for weight in fit.weights)


def _write_once(store: ObjectStore, files: ModelFiles) -> None:
    """The card last: without it there is no model."""
    try:
        there = store.read(MODEL_JSON)
    except ObjectMissingError:
        there = None
    if there not in (None, files.card_json):
        raise OutputExistsError(f"output: {store.uri} holds another model; name another output, or remove it")
    for name, data in reversed(files.as_dict().items()):
        store.write(name, data)


def _register(
    config: ReconstructConfig, name: str, averages: RunAverages, files: ModelFiles, residual: float
) -> RegisteredVersion:
    known = find_model_version(config.tracking, name, DIGEST_TAG, files.digest)
    if known is not None:
        uri = f"models:/{name}/{known}"
        version = resolve_model(uri, config.tracking, trust_model_code=config.trust_model_code).version
        assert version is not None, "a version's URI is resolved to a version"
        return version
    store = open_store(averages.uri)
    trained = read_run_record(store).run_id
    lineage = {
        "ddpm.average": f"sigma_rel {config.sigma_rel}",
        "ddpm.average_residual": f"{residual:.3g}",
        "ddpm.snapshots": f"{len(averages.snapshots)} in {averages.uri}",
        **({} if trained is None else {"ddpm.train_run": trained}),
        "ddpm.train_checkpoint": averages.checkpoint_uri,
    }
    run = TrackingRun.open(
        config.tracking,
        new_run_key(),
        f"average {config.sigma_rel}",
        params={"sigma_rel": config.sigma_rel, "train": averages.uri, "num_snapshots": len(averages.snapshots)},
        tags=lineage,
    )
    status: Literal["FINISHED", "FAILED"] = "FAILED"
    try:
        version = register_model(run, files, name, alias=None, tags=lineage)
        status = "FINISHED"
    finally:
        run.finish(status)
    return version
