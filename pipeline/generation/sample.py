"""Generation: any number of images from a model, each exactly once, as output shards in object storage.

    <output>/<spec digest>/    NNNNNN-<sha256>.tar, _parts/NNNNNN.json    see pipeline/generation/commits.py
                               config.toml          the configuration that the manifest was made with
                               manifest.json        last; readers trust only this
                               contact_sheet.png    the first images of each class, read back through the manifest

The driver looks what is missing, has it made by a pool of actors, looks again, and publishes the manifest. It may be
killed at any moment, or be started twice: running it again makes only what is missing, and writes nothing when nothing
is.
"""

import time
from dataclasses import dataclass, field

from ddpm import ModelConfig, SamplerConfig, make_schedule, num_evaluations
from ddpm.model import count_parameters, flops_per_image
from pipeline.cluster import ClusterConfig, ray_session
from pipeline.config_io import to_toml
from pipeline.data.image_stream import read_images
from pipeline.data.manifest import ShardRecord
from pipeline.errors import ConfigError, PipelineError
from pipeline.generation.inventory import (
    GenerationManifest,
    Survey,
    collect_orphans,
    load_generation_manifest,
    publish,
    survey,
    write_if_changed,
)
from pipeline.generation.pictures import class_grid, image_grid
from pipeline.generation.sampling_plan import OutputShard, SamplingSpec, ShardPlan, check_same_shard, plan_shards
from pipeline.generation.sampling_pool import PoolConfig, make_shards
from pipeline.models.model_files import ModelCard, load_network, read_card
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.progress import Progress, say
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri, open_store
from pipeline.tracking.tracking import TrackingConfig

CONTACT_SHEET_KEY = "contact_sheet.png"
CONFIG_KEY = "config.toml"
_MAX_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Which images to make, and with what."""

    model: str
    """models:/name@alias, models:/name/3, or a checkpoint's folder (local or s3://...); ?ema=HALFLIFE at the end: its
    further average of that half-life."""
    output: str
    """Folder or s3://bucket/prefix; each sampling spec gets a prefix of its own below it."""
    images_per_class: int = 100
    """Images of each class; the number of images when the model has no classes."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Sampling method and its steps."""
    seed: int = 0
    """Seed of all noise, in [0, 2^64): same seed, same images."""
    shard_size: int = 500
    """Images per output shard, the unit of work and of retry; a run grows only from a multiple of it."""
    batch_size: int = 125
    """Images per network evaluation; part of what decides the images' last bits."""
    num_actors: int = 1
    """Processes that make output shards, each with a copy of the network."""
    cpus_per_actor: int = 1
    """Logical CPUs, and threads of torch, of each process."""
    use_gpu: bool = False
    """Give each process one GPU."""
    max_shard_retries: int = 4
    """Times that a shard is tried again after its process or its machine has died."""
    contact_sheet_columns: int = 10
    """Images of each class on the contact sheet."""
    orphan_age_s: float = 86_400.0
    """Age, seconds, from which the files of killed attempts are removed; longer than making and storing any shard."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        for name in (
            "images_per_class",
            "shard_size",
            "batch_size",
            "num_actors",
            "cpus_per_actor",
            "contact_sheet_columns",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; choose a positive number")
        for name in ("max_shard_retries", "orphan_age_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: must be in [0, 2^64), got {self.seed}; choose another seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleResult:
    """Where the images are, and what it took."""

    uri: str
    """The output prefix: manifest, shards, contact sheet."""
    num_images: int
    """Images in the manifest."""
    num_made: int
    """Images that this run made."""
    contact_sheet_uri: str
    """A PNG with the first images of each class."""
    wall_s: float
    """Time of the whole run, seconds."""
    evaluations_per_s: float
    """Images made times network evaluations per image, per second of making; 0 when nothing was missing."""


def sample(config: SampleConfig, *, model: ResolvedModel | None = None) -> SampleResult:
    """Make the images that are missing, and the manifest and contact sheet if they are not up to date.

    Args:
        config: What to make.
        model: The model that config.model names, if it has been resolved already.

    Returns:
        Where the images are.

    Raises:
        OutputExistsError: If the output holds a run that cannot grow to this number of images; nothing is changed.
        PipelineError: As its subclasses say; shards that are committed stay, and running again goes on from there.
    """
    started_s = time.monotonic()
    job = resolve_job(config, model)
    known, made, making_s = dict(job.known), _Made(), 0.0
    for _ in range(_MAX_ROUNDS):
        found = survey(job.store, job.plan, known)
        if 0 not in found.done:
            break
        round_started_s = time.monotonic()
        known = {**found.tars, **_make_missing(config, job, found, made)}
        making_s += time.monotonic() - round_started_s
    else:
        raise PipelineError(f"{job.store.uri}: shards disappear as they are made; does something else delete there?")
    _publish(config, job, found)
    return SampleResult(
        uri=job.store.uri,
        num_images=job.plan.num_images,
        num_made=made.num_images,
        contact_sheet_uri=join_uri(job.store.uri, CONTACT_SHEET_KEY),
        wall_s=time.monotonic() - started_s,
        evaluations_per_s=made.num_sampled * _evaluations_per_image(job) / making_s if made.num_sampled else 0.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleJob:
    """A resolved run: which model, which images, where, and what is known to be there."""

    model: ResolvedModel
    """The model, by version."""
    card: ModelCard
    """What the model is."""
    spec: SamplingSpec
    """All that decides the images."""
    plan: ShardPlan
    """The output shards: of as many images as are asked for, or as are there already if that is more."""
    store: ObjectStore
    """The output prefix."""
    known: dict[int, ShardRecord]
    """The shards that the manifest of an earlier run names."""


def resolve_job(config: SampleConfig, model: ResolvedModel | None = None) -> SampleJob:
    """Look up the model and the output; nothing is written.

    Raises:
        ConfigError: If the sampler does not fit the model, or the seed or number of images is out of range.
        OutputExistsError: If the output holds a run that cannot grow to this number of images.
        ModelMissingError, CheckpointError, StorageError: If model or output cannot be read.
    """
    model = model or resolve_model(config.model, config.tracking)
    card = read_card(model.files, model.uri)
    network = card.config
    try:
        num_evaluations(make_schedule(network.schedule), config.sampler)
        _check_fits(config.sampler, network)
        spec = SamplingSpec(
            model_digest=model.files.digest,
            sampler=config.sampler,
            seed=config.seed,
            num_classes=network.num_classes,
            shard_size=config.shard_size,
            batch_size=config.batch_size,
            image_size=network.image_size,
            channels=network.channels,
        )
        plan = plan_shards(spec, config.images_per_class * (network.num_classes or 1))
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error
    store = open_store(join_uri(config.output, spec.digest[:16]))
    manifest = load_generation_manifest(store)
    known = dict(enumerate(manifest.shards)) if manifest else {}
    if manifest and manifest.num_images >= plan.num_images:
        plan = plan_shards(spec, manifest.num_images)
    elif manifest:
        last = OutputShard(
            index=len(known) - 1,
            first_id=(len(known) - 1) * spec.shard_size,
            num_samples=manifest.shards[-1].num_samples,
        )
        check_same_shard(plan.shard(last.index), last, plan.num_images, store.uri)
    return SampleJob(model=model, card=card, spec=spec, plan=plan, store=store, known=known)


@dataclass(kw_only=True, slots=True)
class _Made:
    """What this run has made so far."""

    num_sampled: int = 0
    num_images: int = 0
    """Those of num_sampled that are in the output: another writer may have been quicker, with other bytes."""


def _make_missing(config: SampleConfig, job: SampleJob, found: Survey, made: _Made) -> dict[int, ShardRecord]:
    """Have the missing shards made; their tars by index."""
    if found.lost:
        say(f"{len(found.lost)} committed shards have lost their tar (the first is {found.lost[0]}): making them again")
    done = sum(tar.num_samples for tar in found.tars.values())
    num_images = job.plan.num_images
    say(f"sampling {num_images - done:,} of {num_images:,} images with {job.model.uri} into {job.store.uri}")
    pool = PoolConfig(
        num_actors=config.num_actors,
        cpus_per_actor=config.cpus_per_actor,
        use_gpu=config.use_gpu,
        max_shard_retries=config.max_shard_retries,
        ray_logs=config.cluster.ray_logs,
    )
    tars: dict[int, ShardRecord] = {}
    num_lost = 0
    with ray_session(config.cluster), Progress("sampling", num_images, "img", done=done) as progress:
        missing = job.plan.missing(found.done)
        for commit in make_shards(job.model.files, job.spec, job.store.uri, missing, pool):
            record = commit.record
            tars[record.index] = record.tar
            made.num_sampled += record.num_samples
            made.num_images += record.num_samples if commit.outcome != "lost" else 0
            progress.advance(record.num_samples, f"shard {record.index}")
            if commit.outcome == "lost":
                num_lost += 1
                if num_lost == 1:
                    say(
                        f"shard {record.index} was committed first on {record.made.host} ({record.made.device}), with "
                        "other bytes: that commit stands, ours is removed"
                    )
    if num_lost > 1:
        say(f"{num_lost} shards were committed first elsewhere, with other bytes: those commits stand")
    return tars


def _publish(config: SampleConfig, job: SampleJob, found: Survey) -> None:
    """Manifest, contact sheet, orphans: each only if there is something to change."""
    manifest = GenerationManifest(
        spec=job.spec,
        spec_digest=job.spec.digest,
        class_names=job.card.class_names,
        num_images=job.plan.num_images,
        shards=tuple(found.tars[index] for index in range(job.plan.num_shards)),
    )
    if [*job.known.values()] != [*manifest.shards]:
        write_if_changed(job.store, CONFIG_KEY, to_toml(config).encode())
        publish(job.store, manifest)
    write_if_changed(job.store, CONTACT_SHEET_KEY, _contact_sheet(job.store, manifest, config.contact_sheet_columns))
    orphans = collect_orphans(job.store, found.unnamed, older_than_s=config.orphan_age_s, now_s=time.time())
    if orphans:
        say(f"removed {len(orphans)} shards of killed attempts, which no record names")


def _contact_sheet(store: ObjectStore, manifest: GenerationManifest, columns: int) -> bytes:
    """The first images of each class, read back as any reader would."""
    num_classes = manifest.spec.num_classes
    stop = min(columns * (num_classes or columns), manifest.num_images)
    images = read_images(store, manifest.shards, stop).images
    return image_grid(images, columns) if num_classes is None else class_grid(images, num_classes, columns)


def _evaluations_per_image(job: SampleJob) -> int:
    """A guided call evaluates each image twice; with a guidance interval this is an upper bound."""
    calls = num_evaluations(make_schedule(job.card.config.schedule), job.spec.sampler)
    return calls * (1 if job.spec.sampler.guidance_scale == 1.0 else 2)


def _check_fits(sampler: SamplerConfig, network: ModelConfig) -> None:
    if sampler.guidance_scale != 1.0 and network.num_classes is None:
        raise ValueError(
            f"guidance_scale: the model has no classes to guide to, got {sampler.guidance_scale}; set it to 1"
        )
    if sampler.variance == "learned_range" and not network.learned_variance:
        raise ValueError(
            "variance: the model has not learned one, got learned_range; choose fixed_small or fixed_large"
        )


def describe_plan(config: SampleConfig) -> list[tuple[str, str]]:
    """What a run would do, as names and values; reads the model and the output's listing, starts nothing."""
    job = resolve_job(config)
    found = survey(job.store, job.plan, job.known)
    missing = job.plan.num_images - sum(tar.num_samples for tar in found.tars.values())
    num_missing_shards = found.done.count(0)
    evaluations = missing * _evaluations_per_image(job)
    return [
        ("model", f"{job.model.uri}, {count_parameters(load_network(job.model.files)[1]):,} parameters"),
        ("output", job.store.uri),
        ("images", f"{job.plan.num_images:,}, of which {missing:,} are missing"),
        ("output shards", f"{job.plan.num_shards:,}, of which {num_missing_shards:,} are missing"),
        ("network evaluations", f"{evaluations:,} images, {evaluations * flops_per_image(job.card.config):.3g} FLOP"),
        ("workers", f"{min(config.num_actors, num_missing_shards)} actors, {config.cpus_per_actor} CPUs each"),
        ("requests", f"{2 * num_missing_shards:,} PUTs and one LIST per 1,000 objects, twice"),
    ]
