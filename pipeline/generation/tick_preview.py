"""What --dry-run says of a tick: how far it is, who holds it, and what would be removed after it."""

from pipeline.generation.claim import is_finished, new_tick_record
from pipeline.generation.output.inventory import Inventory
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob
from pipeline.generation.tick_retention import removable_ticks
from pipeline.stores.lease import current_holder
from pipeline.stores.storage import open_store


def describe_tick(config: SampleConfig, job: SampleJob, inventory: Inventory) -> list[tuple[str, str]]:
    """Names and values; nothing without a tick and while nobody works there. Errors as `removable_ticks`."""
    rows = []
    if config.tick_utc is not None:
        if job.tick is None:
            state = "not begun"
        elif is_finished(job, inventory):
            state = "done"
        else:
            state = f"begun with {job.tick.model_uri}, not done"
        rows.append(("tick", f"{config.tick_utc}, {state}; its seed is {job.spec.seed}"))
    holder = current_holder(job.store)
    if holder is not None:
        rows.append(("held by", f"{holder}; if it is dead a run takes over after {config.lease_s:.0f} s"))
    elif config.tick is not None:
        rows.append(("held by", "nobody"))
    if config.keep_last is not None:
        present = job.tick or new_tick_record(config, job)
        old = [one.record.tick for one in removable_ticks(open_store(config.output), present, config.keep_last)]
        rows.append(("removed after it", ", ".join(old) or "nothing yet"))
    return rows
