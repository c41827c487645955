"""Whose a generation run is while it is made: a tick is begun once, and one driver at a time works in a prefix.

Both save work alone. What is committed is safe without them: by the records that are created once.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from pipeline.generation.output.inventory import Inventory
from pipeline.generation.output.tick_records import PREFIX_DIGITS, TickRecord, create_tick
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob, look_again, resolve_job
from pipeline.stores.lease import hold_lease
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import open_store


@contextlib.contextmanager
def claim(config: SampleConfig, job: SampleJob) -> Iterator[tuple[SampleJob, Inventory]]:
    """Hold what a run needs while the block makes what is missing; where nothing is, nothing is written.

    Args:
        config: What is asked for.
        job: What that comes to.

    Yields:
        The job, which is another where another driver has begun the tick meanwhile, and what is there now.

    Raises:
        LeaseHeldError: If another driver works there; nothing was made.
        LeaseLostError: If another driver took over, because this one could not renew its lease.
        PipelineError: As `resolve_job` and `Inventory` say.
    """
    inventory = Inventory(job.store, job.plan, job.manifest)
    if is_finished(job, inventory) and (config.tick is None or job.tick is not None):
        yield job, inventory
        return
    check_conditions(open_store(config.output))  # the record, the lease and every commit stand on them
    job = _begin_tick(config, job)
    lease = hold_lease(job.store, duration_s=config.lease_s) if config.lease_s else contextlib.nullcontext()
    with lease:
        job = look_again(job)  # while the lease was watched its holder may have made all
        yield job, Inventory(job.store, job.plan, job.manifest)


def is_finished(job: SampleJob, inventory: Inventory) -> bool:
    """Whether every shard is there, and the manifest that names them."""
    has_manifest = job.manifest is not None and job.manifest.num_images >= job.plan.num_images
    return has_manifest and inventory.num_missing == 0


def _begin_tick(config: SampleConfig, job: SampleJob) -> SampleJob:
    if config.tick is None or job.tick is not None:
        return job
    record = new_tick_record(config, job)
    if create_tick(open_store(config.output), record):
        return replace(job, tick=record)
    return resolve_job(config)  # another driver began it, perhaps with another version under the alias


def new_tick_record(config: SampleConfig, job: SampleJob) -> TickRecord:
    """What a tick is begun with; config must name one."""
    assert config.tick_utc is not None, "asked of a tick alone"
    digest = job.spec.digest
    return TickRecord(
        tick=config.tick_utc,
        asked_model=config.model,
        model_uri=job.model.uri,
        asked_guide_model=config.guide_model,
        guide_uri=None if job.guide is None else job.guide.uri,
        seed=config.seed,
        spec=job.spec,
        spec_digest=digest,
        prefix=digest[:PREFIX_DIGITS],
    )
