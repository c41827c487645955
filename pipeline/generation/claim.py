"""Whose a generation run is while it is made: a tick is begun once, and one driver at a time works in a prefix.

Both save work alone. What is committed is safe without them: by the records that are created once. Contact sheet and
gallery are written over, and so they are only written under the lease, which whoever removes images holds too.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.errors import OutputExistsError
from pipeline.generation.output.inventory import Inventory
from pipeline.generation.output.tick_records import PREFIX_DIGITS, TickRecord, create_tick, read_tick
from pipeline.generation.pictures import pictures_stand
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob, look_again, resolve_job
from pipeline.stores.lease import hold_lease, lease_version
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A run, and whether this driver may work at it."""

    job: SampleJob
    """What is asked for; another than was resolved where another driver has begun the tick meanwhile."""
    inventory: Inventory
    """What is there."""
    may_write: bool
    """False: all is there, images and pictures, so that nobody was kept away and nothing may be written."""


@contextlib.contextmanager
def claim(config: SampleConfig, job: SampleJob) -> Iterator[Claim]:
    """Hold what a run needs while the block makes what is missing; where nothing is, nothing is written.

    The output is looked through once, before anything is written; again only if another driver has held the lease
    since.

    Args:
        config: What is asked for.
        job: What that comes to.

    Yields:
        The run as it is now.

    Raises:
        LeaseHeldError: If another driver works there; nothing was made.
        LeaseLostError: If another driver took over, because this one could not renew its lease.
        OutputExistsError: If the tick was removed, or its removal was begun, while its model was fetched or the lease
            was watched; nothing was made.
        PipelineError: As `resolve_job` and `Inventory` say.
    """
    seen = lease_version(job.store)
    job = look_again(job)  # fetching the model may have taken minutes
    inventory = Inventory(job.store, job.plan, job.manifest)
    if is_finished(job, inventory) and (config.tick is None or job.tick is not None) and pictures_stand(config, job):
        yield Claim(job=job, inventory=inventory, may_write=False)
        return
    check_conditions(open_store(config.output))  # the record, the lease and every commit stand on them
    looked_at = job.store.uri
    job = _begin_tick(config, job)
    with hold_lease(job.store, duration_s=config.lease_s) if config.lease_s else contextlib.nullcontext() as lease:
        _check_tick(config, job)
        if job.store.uri != looked_at or (lease is not None and lease.followed != seen):
            job = look_again(job)  # while the lease was watched its holder may have made all
            inventory = Inventory(job.store, job.plan, job.manifest)
        yield Claim(job=job, inventory=inventory, may_write=True)


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


def _check_tick(config: SampleConfig, job: SampleJob) -> None:
    """Refuse a tick that is no longer there: what is made of it now no later tick would ever remove."""
    if job.tick is None:
        return
    output, where = open_store(config.output), f"tick {job.tick.tick} in {config.output}"
    record = read_tick(output, job.tick.tick)
    if record is None:
        raise OutputExistsError(f"tick: {where} was removed meanwhile (keep_last); run again to make it anew")
    record.refuse_others(model=config.model, guide_model=config.guide_model, seed=config.seed, where=where)
    record.refuse_other_spec(job.spec, where)


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
