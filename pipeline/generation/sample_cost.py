"""What a generation run will take, foretold for --dry-run: device-hours, bytes, requests, money."""

import math
from itertools import islice

from pipeline.errors import PipelineError
from pipeline.generation.output.commits import read_record
from pipeline.generation.output.inventory import Inventory
from pipeline.generation.output.manifest import list_parts, read_part
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob
from pipeline.models.sampling_rate import SamplingRate
from pipeline.models.version_records import sampling_rates
from pipeline.progress import format_bytes, format_duration

_KEYS_PER_LIST = 1000
_FEW_RECORDS = 16
_NUM_ENDS = 64  # records that a survey reads at most, see output/inventory.py
_NUM_LAST = 5  # plan.json, config.toml, manifest.json, contact_sheet.png, ledger.json
_GB = 1e9


def cost_plan(config: SampleConfig, job: SampleJob, inventory: Inventory) -> list[tuple[str, str]]:
    """Device-hours, bytes, requests and money as names and values; asks storage and the registry, changes nothing."""
    num_images, num_missing = job.plan.num_images, job.plan.num_images - inventory.num_images_done
    num_actors = min(config.num_actors, inventory.num_missing)
    device_hours, time_text = _device_hours(config, job, num_missing, num_actors)
    image_bytes = _bytes_per_image(job, inventory)
    if image_bytes is None:
        stored = "not known: there is no shard yet to tell the size of an image"
    else:
        each = f"{format_bytes(image_bytes)} an image, as in shards that are there"
        stored = f"about {format_bytes(num_images * image_bytes)} in all, {format_bytes(num_missing * image_bytes)} new"
        stored += f": {each}"
    lines = [("time", time_text), ("bytes", stored), ("requests", _describe_requests(job, inventory))]
    money = []
    if config.price_per_device_hour is not None:
        price = f"at {config.price_per_device_hour:,.4g} a device-hour"
        cost = "not known" if device_hours is None else f"about {device_hours * config.price_per_device_hour:,.2f}"
        money.append(f"{cost} for computing, {price}")
    if config.price_per_gb is not None:
        price = f"at {config.price_per_gb:,.4g} a GB"
        cost = (
            "not known" if image_bytes is None else f"about {num_images * image_bytes / _GB * config.price_per_gb:,.2f}"
        )
        money.append(f"{cost} a month for storing, {price}")
    return [*lines, *([("cost", "; ".join(money))] if money else [])]


def _device_hours(config: SampleConfig, job: SampleJob, num_missing: int, num_actors: int) -> tuple[float | None, str]:
    """Device-hours, None where no rate is known, and what is said of them. Starting is not in it."""
    if not num_missing:
        return 0.0, "none: nothing is missing"
    found = _throughput(config, job)
    if isinstance(found, str):
        return None, f"not known before it is measured{found}: {_how_to_measure(config)}"
    rate, source = found
    actor_s = num_missing * job.evaluations_per_image / rate
    hours = actor_s / 3600 * (1 if config.use_gpu else config.cpus_per_actor)
    unit = "GPU" if config.use_gpu else "CPU"
    wall = f"{format_duration(actor_s / num_actors)} on {num_actors} actor{'s' if num_actors > 1 else ''}"
    return hours, f"about {hours:,.3g} {unit}-hours, {wall}, at {rate:,.4g} img·NFE/s of each, {source}"


def _throughput(config: SampleConfig, job: SampleJob) -> tuple[float, str] | str:
    """Img·NFE/s of one actor and where that is from; else why that is not known."""
    if config.throughput is not None:
        return config.throughput, "as given"
    if job.model.version is None:
        return ""
    try:
        rates = [rate for rate in sampling_rates(job.model.version) if _is_of(rate, config)]
    except PipelineError as error:
        return f" ({error})"
    if not rates:
        return ""
    slowest = min(rates, key=lambda rate: rate.evaluations_per_s)
    beside = f", the slowest of {len(rates)} kinds of device" if len(rates) > 1 else ""
    measured = f"as measured on {slowest.device} over {format_duration(slowest.busy_s)}{beside}"
    return slowest.evaluations_per_s, measured


def _is_of(rate: SamplingRate, config: SampleConfig) -> bool:
    """Whether a rate was measured as this run will work; a GPU's name holds Ray's shorter one, such as H100."""
    names = ("cpus_per_actor", "batch_size", "precision", "channels_last", "compile")
    is_gpu = rate.device != "cpu"
    if is_gpu != config.use_gpu or any(getattr(rate, name) != getattr(config, name) for name in names):
        return False
    return config.accelerator_type is None or config.accelerator_type.partition("-")[0] in rate.device


def _how_to_measure(config: SampleConfig) -> str:
    flags = [f"--batch-size {config.batch_size}", f"--precision {config.precision}"]
    flags += [f"--num-threads {config.cpus_per_actor}"]
    given = [("--channels-last", config.channels_last), ("--compile", config.compile), ("--use-gpu", config.use_gpu)]
    flags += [flag for flag, is_given in given if is_given]
    return f"jobs/benchmark.py sample {' '.join(flags)} does; --throughput IMG_NFE_PER_S, of one actor, foretells it"


def _bytes_per_image(job: SampleJob, inventory: Inventory) -> float | None:
    """Of the last range that has a part, else of some committed shards; None: there is none."""
    parts = job.manifest.parts if job.manifest else list_parts(job.store)
    if parts:
        sizes = [(shard.size_bytes, shard.num_samples) for shard in read_part(job.store, parts[-1])]
    else:
        there = (index for index, is_done in enumerate(inventory.done) if is_done)
        records = [read_record(job.store, index) for index in islice(there, _FEW_RECORDS)]
        sizes = [(record.size_bytes, record.num_samples) for record in records]
    return sum(size for size, _ in sizes) / sum(number for _, number in sizes) if sizes else None


def _describe_requests(job: SampleJob, inventory: Inventory) -> str:
    """The requests of a run, by formula; gallery, contact sheet, models, inputs and large objects' parts not counted.

    With m shards missing, ranges r of 10,000 shards that have no part yet (s_r shards in each, c_r of them committed,
    c in all), and p parts:

        PUT   2 m + r + 5     image file and record of each shard, part of each range; plan, config, manifest, sheet,
                              ledger
        LIST  ceil(p / 1000) + [1 if c <= 1000 else 2 + sum ceil(c_r / 1000)] + sum ceil(s_r / 1000) + 2 + r
                              the parts; the records; the image files of a range when it is closed; each at least 1; the
                              removals, looked for in the run, in each range that is closed, and before the end
        GET   c + min(c, 64) + 2 p + r + 6   at most: records when a range is closed, ends of committed runs, the parts,
                              all of them again before the end; the manifest, and what stands at the five keys before
                              they are written
    """
    manifest = job.manifest
    ranges = inventory.open_ranges
    if not ranges and manifest is not None and manifest.num_images == job.plan.num_images:
        return "those of a look: nothing is missing, nothing is written"
    committed = [inventory.done.count(1, one.start, one.stop) for one in ranges]
    num_committed, num_parts = sum(committed), len(list_parts(job.store))
    records = 1 if num_committed <= _KEYS_PER_LIST else 2 + sum(map(_num_lists, committed))
    lists = _num_lists(num_parts) + (records if ranges else 0) + sum(_num_lists(len(one)) for one in ranges)
    lists += 2 + len(ranges)
    puts = 2 * inventory.num_missing + len(ranges) + _NUM_LAST
    gets = num_committed + min(num_committed, _NUM_ENDS) + 2 * num_parts + len(ranges) + 1 + _NUM_LAST
    return (
        f"{puts:,} PUT (2 for each missing shard, 1 for each range of 10,000, {_NUM_LAST} at the end), {lists:,} LIST "
        f"(1 for each 1,000 keys), at most {gets:,} GET; beside those for pictures, models and inputs"
    )


def _num_lists(num_keys: int) -> int:
    return max(1, math.ceil(num_keys / _KEYS_PER_LIST))
