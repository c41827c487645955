"""One attempt of a generation run: what it costs goes to the ledger, what it is and was to MLflow.

An attempt begins when something is found missing; a job that finds nothing to do leaves no trace. MLflow gets one run
for a generation run, whichever attempts there are, and only for a model of the registry, as for an evaluation: it is
found again by its key. Neither ledger nor MLflow ends a job: what fails there is a line.
"""

import hashlib
from types import TracebackType
from typing import Literal, Self

from pipeline.config_io import plain
from pipeline.errors import PipelineError
from pipeline.generation.output.ledger import LEDGER_KEY, DeviceCost, Ledger, add_attempt
from pipeline.generation.output.manifest import MANIFEST_KEY
from pipeline.generation.pool.pool_config import UNKNOWN_KIND, PoolStatistics
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob
from pipeline.models.registry import RegisteredVersion
from pipeline.models.sampling_rate import SamplingRate
from pipeline.models.version_records import link_version, put_sampling_rate
from pipeline.progress import say
from pipeline.stores.storage import join_uri
from pipeline.tracking.tracking import TrackingRun

RUN_TYPE_TAG, RUN_TYPE = "ddpm.run_type", "generation"
_BROKEN_PATIENCE_S = 10.0  # for storage that may be why the attempt broke, and whoever interrupts does not wait


class Attempt:
    """Counts, from its beginning, if there is one, to the end of the block.

    Args:
        config: What the attempt was asked for.
        job: What it came to.
    """

    def __init__(self, config: SampleConfig, job: SampleJob) -> None:
        """Begin nothing yet."""
        self._config, self._job = config, job
        self._pools: list[PoolStatistics] = []
        self._run: TrackingRun | None = None
        self._contact_sheet_key = self._gallery_key = ""
        self.has_begun = False
        self.num_images_kept = 0
        """Images that were made and are in the output: another writer may have been quicker, with other bytes."""

    def begin(self) -> None:
        """Something is missing and will be made; MLflow hears of it if it can. Safe to repeat."""
        if not self.has_begun:
            self.has_begun = True
            if self._job.model.version is not None:
                self._run = _open_run(self._config, self._job, self._job.model.version)

    def add_pool(self, statistics: PoolStatistics) -> None:
        """Count a pool, which may only begin its work: its statistics are read at the end."""
        self._pools.append(statistics)

    def published(self, *, contact_sheet_key: str, gallery_key: str) -> None:
        """Note where the pictures are: keys in the output prefix; empty: there is none."""
        self._contact_sheet_key, self._gallery_key = contact_sheet_key, gallery_key

    def share(self, *, is_broken: bool = False) -> Ledger:
        """What it has cost so far."""
        per_actor = 1 if self._config.use_gpu else self._config.cpus_per_actor
        devices: dict[str, DeviceCost] = {}
        for pool in self._pools:
            for kind, done in pool.of_kind.items():
                cost = DeviceCost(
                    device_s=done.actor_s * per_actor,
                    busy_s=done.busy_s,
                    num_images=done.num_images,
                    num_evaluations=done.num_images * self._job.evaluations_per_image,
                    num_bytes=done.num_bytes,
                )
                devices[kind] = devices[kind].plus(cost) if kind in devices else cost
        return Ledger.of(
            devices,
            sum(pool.making_s for pool in self._pools),
            num_broken=int(is_broken),
            num_retries=sum(pool.num_retries for pool in self._pools),
            num_lost=sum(pool.num_lost for pool in self._pools),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.has_begun:
            return
        share = self.share(is_broken=error is not None)
        store = self._job.store if error is None else self._job.store.with_patience(_BROKEN_PATIENCE_S)
        try:
            total = add_attempt(store, share)
        except PipelineError as reason:
            say(f"what this attempt cost is not in {join_uri(store.uri, LEDGER_KEY)} ({reason})")
            total = share
        if self._run is not None:
            self._report(self._run, share, total, "FINISHED" if error is None else _status(error))

    def _report(
        self, run: TrackingRun, share: Ledger, total: Ledger, status: Literal["FINISHED", "FAILED", "KILLED"]
    ) -> None:
        """The sums over all attempts, one point for each attempt; where there is what; the measured rates."""
        job, version = self._job, self._job.model.version
        assert version is not None, "a run is opened for versions alone"
        run.log_metrics(
            {
                "images": total.num_images,
                "images_per_s": total.images_per_s,
                "img_nfe_per_s": total.evaluations_per_s,
                "device_hours": total.device_s / 3600,
                "retries": total.num_retries,
                "nodes_lost": total.num_lost,
                "bytes": total.num_bytes,
                "attempts": total.num_attempts,
            },
            step=total.num_attempts,
        )
        for kind, cost in share.devices.items():
            if kind != UNKNOWN_KIND and cost.busy_s and job.guide is None:  # a guide is a network of another size
                put_sampling_rate(run, version, self._rate(kind, cost))
        if status == "FINISHED":
            run.tag("ddpm.manifest", join_uri(job.store.uri, MANIFEST_KEY))
            if self._gallery_key:
                run.tag("ddpm.gallery", join_uri(job.store.uri, self._gallery_key))
            if self._contact_sheet_key:
                try:
                    run.log_file(job.store.read(self._contact_sheet_key), self._contact_sheet_key)
                except PipelineError as error:
                    say(f"the contact sheet is not in MLflow ({error})")
        run.finish(status)

    def _rate(self, kind: str, cost: DeviceCost) -> SamplingRate:
        spec = self._job.spec
        return SamplingRate(
            device=kind,
            cpus_per_actor=self._config.cpus_per_actor,
            batch_size=spec.batch_size,
            precision=spec.precision,
            channels_last=spec.channels_last,
            compile=spec.compile,
            evaluations_per_s=cost.evaluations_per_actor_s,
            busy_s=cost.busy_s,
        )


def _status(error: BaseException) -> Literal["FAILED", "KILLED"]:
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _open_run(config: SampleConfig, job: SampleJob, version: RegisteredVersion) -> TrackingRun | None:
    """The run of this output prefix; None: the server refuses, which is said."""
    sampler = {f"sampler.{name}": value for name, value in plain(job.spec.sampler).items()}
    try:
        run = TrackingRun.open(
            config.tracking,
            f"{RUN_TYPE}-{hashlib.sha256(job.store.uri.encode()).hexdigest()[:32]}",
            f"{RUN_TYPE} {job.spec.digest[:16]}",
            params={
                "sampler": job.spec.sampler.name,
                **sampler,
                "seed": job.spec.seed,
                "images": job.plan.num_images,
                "spec_digest": job.spec.digest,
                "evaluations_per_image": job.evaluations_per_image,
                "batch_size": job.spec.batch_size,
                "precision": job.spec.precision,
                "request": "generate" if job.edit is None else job.edit.spec.name,
            },
            tags={
                RUN_TYPE_TAG: RUN_TYPE,
                "ddpm.model": version.uri,
                "ddpm.model_digest": job.spec.model_digest,
                "ddpm.spec_digest": job.spec.digest,
                "ddpm.output": job.store.uri,
            },
        )
    except PipelineError as error:
        say(f"this run is not in MLflow: {error}; the images are made all the same")
        return None
    link_version(run, version)
    return run
