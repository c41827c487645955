"""Generation: any number of images from a model, each exactly once, as output shards in object storage.

    <output>/_ticks/<tick>.json    of a scheduled run: what it was begun with, see output/tick_records.py
    <output>/<spec digest>/    NNNNNNNNN-<sha256>.tar (or .parquet), _parts/NNNNNNNNN.json    see output/commits.py
                               lease.json           who works there, see stores/lease.py
                               plan.json            how many images are wanted, see output/plan_record.py
                               config.toml          the configuration that the manifest was made with
                               manifest.json        last; readers trust only this
                               contact_sheet.png    the first images of each class, read back through the manifest
                               index.html, gallery/    a page of images and their origin, see viewing/gallery.py
                               ledger.json          what the attempts did cost, see output/ledger.py

The driver looks what is missing, has it made by a pool of actors, looks again, and publishes the manifest. It may be
killed at any moment, or be started twice: running it again makes only what is missing, and writes nothing when nothing
is.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from pipeline.cluster import ray_session
from pipeline.config_sections import write_section
from pipeline.data.image_stream import LabelledImages, stream_images
from pipeline.data.shard_parts import PartRecord
from pipeline.errors import PipelineError
from pipeline.generation.attempt import Attempt
from pipeline.generation.claim import Claim, claim
from pipeline.generation.output.inventory import Inventory, collect_orphans
from pipeline.generation.output.manifest import GenerationManifest, publish, read_shards, write_if_changed
from pipeline.generation.output.plan_record import PlanRecord, write_plan
from pipeline.generation.pictures import Pictures, make_pictures
from pipeline.generation.pool.node_models import MODELS_FOLDER, stage_model
from pipeline.generation.pool.sampling_pool import SamplingPool
from pipeline.generation.pool.shard_actor import WorkOrder
from pipeline.generation.pool.shard_queue import Retried
from pipeline.generation.requests.edit_inputs import EditRequest
from pipeline.generation.requests.label_requests import LabelRequest
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob, resolve_job
from pipeline.generation.tick_retention import remove_old_ticks
from pipeline.generation.viewing.contact_sheet import CONTACT_SHEET_KEY
from pipeline.generation.viewing.gallery import PAGE_KEY
from pipeline.models.registry import ResolvedModel
from pipeline.progress import Progress, say
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri, open_store
from pipeline.stores.waiting import told_of_outages

CONFIG_KEY = "config.toml"
_MAX_ROUNDS = 3
_MAX_NAMED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleResult:
    """Where the images are, and what it took."""

    store: ObjectStore
    """The output prefix: manifest, shards, contact sheet."""
    manifest: GenerationManifest
    """What is there."""
    edit: EditRequest | None
    """What was edited; None: images from nothing."""
    labels: LabelRequest
    """Which labels were asked for."""
    num_asked: int
    """Images that were asked for; the manifest may name more."""
    num_made: int
    """Images that this run made."""
    wall_s: float
    """Time of the whole run, seconds."""
    evaluations_per_s: float
    """Images made times network evaluations per image, per second from the first shard given to an actor to the last
    one made, without the start of Ray and of actors; 0 when nothing was missing."""

    has_contact_sheet: bool
    """Whether the contact sheet is as it should be."""
    has_gallery: bool
    """Whether there is a gallery, as it should be."""
    num_pictures_failed: int
    """Contact sheet and gallery: which of them could not be made, lines have said."""

    @property
    def gallery_uri(self) -> str | None:
        """The page of the images; None where none was wanted, or it could not be made."""
        return join_uri(self.store.uri, PAGE_KEY) if self.has_gallery else None

    @property
    def contact_sheet_uri(self) -> str | None:
        """A PNG with the first images of each class, or of an edit below their inputs; None: it could not be made."""
        return join_uri(self.store.uri, CONTACT_SHEET_KEY) if self.has_contact_sheet else None

    @property
    def is_independent(self) -> bool:
        """Whether each image was drawn by itself: edits share their inputs, and a label plan may repeat noise."""
        return self.edit is None and not (self.labels.plan is not None and self.labels.plan.repeats_noise)

    def images(self) -> Iterator[LabelledImages]:
        """The images that were asked for, in the order of their ids, one verified shard after the other."""
        return stream_images(self.store, read_shards(self.store, self.manifest.parts), stop=self.num_asked)


def sample(config: SampleConfig, *, model: ResolvedModel | None = None) -> SampleResult:
    """Make the images that are missing, and the manifest and contact sheet if they are not up to date.

    Args:
        config: What to make.
        model: The model that config.model names, if it has been resolved already.

    Returns:
        Where the images are.

    Raises:
        OutputExistsError: If the output holds a run that cannot grow to this number of images; nothing is changed.
        LeaseHeldError: If another driver makes these images at this moment; nothing is changed.
        PipelineError: As its subclasses say; shards that are committed stay, and running again goes on from there.
    """
    started_s = time.monotonic()
    job = resolve_job(config, model)
    for warning in job.calibration.warnings if job.calibration else ():
        say(f"warning: calibration {config.calibration}: {warning}")
    with claim(config, job) as claimed:
        job = claimed.job
        result = _work(config, claimed, started_s)
    if config.keep_last is not None and job.tick is not None:
        remove_old_ticks(open_store(config.output), job.tick, config.keep_last, lease_s=config.lease_s)
    return result


def _work(config: SampleConfig, claimed: Claim, started_s: float) -> SampleResult:
    """What `sample` does while nobody else works there, or nothing where nothing is to be done."""
    job, pictures = claimed.job, Pictures()
    with Attempt(config, job) as attempt:
        if claimed.may_write:
            manifest = _make_all(config, job, claimed.inventory, attempt)
            pictures = make_pictures(config, job, manifest)
            attempt.published(
                contact_sheet_key=CONTACT_SHEET_KEY if pictures.has_contact_sheet else "",
                gallery_key=PAGE_KEY if pictures.has_gallery and config.gallery_images else "",
            )
        else:
            assert job.manifest is not None, "it is finished"
            manifest = job.manifest
    return SampleResult(
        store=job.store,
        manifest=manifest,
        edit=job.edit,
        labels=job.labels,
        num_asked=job.num_asked,
        num_made=attempt.num_images_kept,
        has_contact_sheet=pictures.has_contact_sheet,
        has_gallery=pictures.has_gallery and config.gallery_images > 0,
        num_pictures_failed=len(pictures.failed),
        wall_s=time.monotonic() - started_s,
        evaluations_per_s=attempt.share().evaluations_per_s,
    )


def _make_all(config: SampleConfig, job: SampleJob, inventory: Inventory, attempt: Attempt) -> GenerationManifest:
    """Shards and manifest, as far as they are missing, and what killed attempts have left."""
    try:
        for _ in range(_MAX_ROUNDS):
            if inventory.num_missing:
                attempt.begin()
                _make_missing(config, job, inventory, attempt)
            if (parts := inventory.finish()) is not None:
                break
        else:
            raise PipelineError(f"{job.store.uri}: shards go as they are made; does something else delete there?")
    finally:
        inventory.stop()
    manifest = _publish(config, job, parts)
    _clear_up(config, job, inventory)
    return manifest


def _make_missing(config: SampleConfig, job: SampleJob, inventory: Inventory, attempt: Attempt) -> None:
    """Have the missing shards made."""
    done, num_images = inventory.num_images_done, job.plan.num_images
    say(f"sampling {num_images - done:,} of {num_images:,} images with {job.model.uri} into {job.store.uri}")
    write_plan(
        job.store, PlanRecord(spec_digest=job.spec.digest, shard_size=job.spec.shard_size, num_images=num_images)
    )
    output = open_store(config.output)
    for files in job.models:
        stage_model(output, files)
    order = WorkOrder(
        spec=job.spec,
        store_uri=job.store.uri,
        models_uri=output.uri,
        trusts_code=any(files.trusted for files in job.models),
        make_ingredients=job.make_ingredients,
        num_threads=config.cpus_per_actor,
        use_gpu=config.use_gpu,
    )
    num_lost = 0
    inventory.close_complete()
    with ray_session(config.cluster), Progress("sampling", num_images, "img", done=done) as progress:
        num_missing, is_proven = inventory.num_missing, inventory.num_missing < job.plan.num_shards
        pool = SamplingPool(order, inventory.missing(), config.pool, num_missing, is_proven=is_proven)
        attempt.add_pool(pool.statistics)
        with closing(pool.commits()) as commits:  # however this ends, its actors end and are counted
            for commit in told_of_outages(commits, [job.store], "shard"):
                record = commit.record
                inventory.add(record)
                attempt.num_images_kept += record.num_samples if commit.outcome != "lost" else 0
                progress.advance(record.num_samples, f"shard {record.index}")
                if commit.outcome == "lost":
                    num_lost += 1
                    if num_lost == 1:
                        say(
                            f"shard {record.index} was committed first on {record.made.host} ({record.made.device}), "
                            "with other bytes: that commit stands, ours is removed"
                        )
    if num_lost > 1:
        say(f"{num_lost} shards were committed first elsewhere, with other bytes: those commits stand")
    if pool.set_aside:
        raise PipelineError(_what_is_missing(job, pool.set_aside))


def _what_is_missing(job: SampleJob, set_aside: Sequence[Retried]) -> str:
    """The last line of a job that has made all but some shards."""
    failed = sorted(set_aside, key=lambda one: one.shard.index)
    named = ", ".join(str(one.shard.index) for one in failed[:_MAX_NAMED])
    more = f" and {len(failed) - _MAX_NAMED} more" if len(failed) > _MAX_NAMED else ""
    return (
        f"{job.store.uri}: of {job.plan.num_shards} output shards {len(failed)} could not be made: {named}{more}; all "
        f"others are committed. The first failed {len(failed[0].places)} times, at last: {failed[0].error}; run again "
        "to try them once more"
    )


def _publish(config: SampleConfig, job: SampleJob, parts: Sequence[PartRecord]) -> GenerationManifest:
    """The manifest that stands: this one, unless it has stood before."""
    if job.manifest is not None and job.manifest.num_images >= job.plan.num_images:
        return job.manifest
    write_if_changed(job.store, CONFIG_KEY, write_section(config, "sample").encode())
    return publish(
        job.store,
        GenerationManifest(
            spec=job.spec,
            spec_digest=job.spec.digest,
            model_uri=job.model.uri,
            guide_uri=None if job.guide is None else job.guide.uri,
            class_names=job.card.class_names,
            num_images=job.plan.num_images,
            parts=tuple(parts),
        ),
    )


def _clear_up(config: SampleConfig, job: SampleJob, inventory: Inventory) -> None:
    """Delete what killed attempts have left, as far as it is old enough that none of them can still be at work."""
    unnamed = list({info.key: info for info in inventory.unnamed}.values())  # a range may have been closed twice
    orphans = collect_orphans(job.store, unnamed, older_than_s=config.orphan_age_s, now_s=time.time())
    if orphans:
        say(f"removed {len(orphans)} shards of killed attempts, which no record names")
    if num_young := len(unnamed) - len(orphans):
        say(
            f"shards of killed attempts, which no record names: {num_young} of them are too young to be removed "
            f"(orphan_age_s); later jobs/output.py repair {job.store.uri} removes them"
        )
    num_unfinished = job.store.remove_unfinished("", older_than_s=config.orphan_age_s)
    num_unfinished += open_store(config.output).remove_unfinished(f"{MODELS_FOLDER}/", older_than_s=config.orphan_age_s)
    if num_unfinished:
        say(f"removed {num_unfinished} unfinished files of killed attempts")
