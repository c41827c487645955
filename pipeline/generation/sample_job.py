"""What an operator says about a generation run, and what it comes to: all that is checked before any cluster work."""

import functools
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from ddpm import DDIM, ModelConfig, flops_per_image, make_schedule
from ddpm.samplers.registry import AnySampler
from pipeline.cluster import ClusterConfig
from pipeline.config_io import refuse_empty
from pipeline.data.image_formats import AnyImageFormat, Png
from pipeline.errors import ConfigError
from pipeline.generation.making.shard_maker import Ingredients
from pipeline.generation.output.manifest import GenerationManifest, load_generation_manifest
from pipeline.generation.pool.pool_config import PoolConfig, check_room
from pipeline.generation.requests.edit_inputs import EditRequest, resolve_request
from pipeline.generation.requests.label_requests import LabelRequest, resolve_labels
from pipeline.generation.requests.requests import AnyRequest, Generate
from pipeline.generation.spec.sampling_plan import Container, SamplingSpec, ShardPlan, plan_shards
from pipeline.models.calibration import Calibration, read_calibration
from pipeline.models.model_files import ModelCard, ModelFiles, check_trust, read_card
from pipeline.models.model_uri import check_model_uris
from pipeline.models.network_pass import Precision
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import check_file_uris, check_uris, join_uri, open_store
from pipeline.tracking.tracking import TrackingConfig

_IMAGES_PER_CLASS = 100  # where nothing is said


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesConfig:
    """Which images to make, with what, and where they go."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("images_per_class", "num_images", "request.label_plan")
    """Each says how many images there are: one that a file or a flag gives takes the place of another that stood before
    (config_alternatives.py)."""

    model: str
    """models:/name@alias, models:/name/3, or a checkpoint's folder (local or s3://...); ?ema=HALFLIFE at the end: its
    further average of that half-life."""
    output: str
    """Folder or s3://bucket/prefix; each sampling spec gets a prefix of its own below it."""
    images_per_class: int | None = None
    """Images of each class that is asked for; the number of images when the model has no classes. Edits count by their
    inputs instead. 100 if neither this nor num_images nor a label plan is given."""
    num_images: int | None = None
    """Images in all, instead of images_per_class: the classes take turns, and the first ones may have one more."""
    request: AnyRequest = field(default_factory=Generate)
    """Images from nothing, or edits of given ones; --request.name chooses which."""
    guide_model: str | None = None
    """A weaker model to lead away from (autoguidance), named like model; sampler.guidance_scale says how far. Left out:
    guidance leads away from "no label"."""
    sampler: AnySampler = field(default_factory=DDIM)
    """Sampling method and its steps; --sampler.name chooses which."""
    calibration: str | None = None
    """The JSON file of jobs/calibrate.py for this model, which the analytic variance of ancestral sampling needs."""
    seed: int = 0
    """Seed of all noise, in [0, 2^64): same seed, same images."""
    format: AnyImageFormat = field(default_factory=Png)
    """How an image is stored; --format.name chooses: png and webp keep every pixel as it was made, jpeg does not."""
    container: Container = "webdataset"
    """What an output shard is: a tar of images in the WebDataset layout, or a Parquet file with a column of images that
    Hugging Face's datasets reads, with the names of the classes."""
    shard_size: int = 500
    """Images per output shard, the unit of work and of retry; a run grows only from a multiple of it."""
    batch_size: int = 125
    """Images per network evaluation; part of what decides the images' last bits, as are the next three."""
    precision: Precision = "float32"
    """How the network is evaluated: float32; tf32, where a GPU rounds to 10 bits what it multiplies; bf16, in which
    most operations compute. Noise and the steps of the sampler are float32 and float64 in all of them."""
    channels_last: bool = False
    """Keep images and convolutions' weights with the channels innermost, which is multiplied faster, bf16 above all."""
    compile: bool = False
    """Have PyTorch compile the network, which takes up to minutes in each process; on a GPU its operations are then
    launched at once, as a CUDA graph. Where it cannot be compiled the job ends: it would make other last bits."""
    num_actors: int = 1
    """Processes that make output shards, each with a copy of the network."""
    cpus_per_actor: int = 1
    """Logical CPUs, and threads of torch, of each process."""
    use_gpu: bool = False
    """Give each process one GPU."""
    accelerator_type: str | None = None
    """Kind of GPU by Ray's name for it, such as H100: bytes are equal only within a kind. Left out: any."""
    max_shard_retries: int = 4
    """Times that a shard is tried again, elsewhere if there is an elsewhere, after it has failed on a living node; then
    it is set aside. Nodes that are lost count against no shard."""
    shard_timeout_s: float = 900.0
    """A shard is given up when it takes longer than this and than ten times the median of the last hundred, seconds."""
    start_timeout_s: float = 7200.0
    """A process may take so long to load the model, and as long again for its first shard, seconds."""
    idle_limit_s: float = 1800.0
    """The job ends when nobody has been at work for so long: no room, nothing that starts, no storage, seconds."""
    contact_sheet_columns: int = 10
    """Images of each class on the contact sheet; without classes or with a label plan as many rows of as many, of an
    edit one row."""
    gallery_images: int = 1_000_000
    """Images that the gallery shows, the page index.html of the output, from the first on; 0: there is none."""
    orphan_age_s: float = 86_400.0
    """Age, seconds, from which the files of killed attempts are removed; longer than making and storing any shard."""

    def __post_init__(self) -> None:
        check_model_uris(self, "model", "guide_model")
        check_uris(self, "output")
        check_file_uris(self, "calibration")
        for name in (
            "images_per_class",
            "num_images",
            "shard_size",
            "batch_size",
            "num_actors",
            "cpus_per_actor",
            "contact_sheet_columns",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}; choose a positive number")
        for name in ("shard_timeout_s", "start_timeout_s", "idle_limit_s"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}; leave it out")
        refuse_empty(self, "accelerator_type")
        if self.accelerator_type is not None and not self.use_gpu:
            raise ValueError("accelerator_type: is a kind of GPU and goes with use_gpu; leave it out or set use_gpu")
        for name in ("max_shard_retries", "gallery_images", "orphan_age_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: must be in [0, 2^64), got {self.seed}; choose another seed")
        self._check_count()
        self.request.check_sampler(self.sampler)

    def _check_count(self) -> None:
        """Refuse two answers to how many images there are."""
        given = [f"{name} {value:,}" for name in _COUNTS if (value := getattr(self, name)) is not None]
        if len(given) == 2:
            raise ValueError(f"num_images: goes without images_per_class, got {' and '.join(given)}; leave one out")
        if isinstance(self.request, Generate):
            plan = self.request.label_plan
            if given and plan is not None:
                name, number = given[0].split()
                raise ValueError(f"{name}: the rows of {plan} say how many images, got {number}; leave one out")
        elif self.num_images is not None:
            raise ValueError(
                f"num_images: an edit has as many images as its inputs give, got {self.num_images}; leave it out, or "
                "say it as request.num_images"
            )

    def from_nothing(self) -> "ImagesConfig":
        """The same without an edit, for studies that measure images from nothing; labels stay as they were chosen."""
        return self if isinstance(self.request, Generate) else replace(self, request=Generate())

    @property
    def count(self) -> str:
        """How many images are asked for, in words."""
        if isinstance(self.request, Generate) and self.request.label_plan is not None:
            return f"one for each row of {self.request.label_plan}"
        if self.num_images is not None:
            return f"{self.num_images:,}"
        return f"{self.images_per_class or _IMAGES_PER_CLASS:,} per class"


_COUNTS = ("images_per_class", "num_images")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig(ImagesConfig):
    """Which images to make, and with what."""

    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    @property
    def pool(self) -> PoolConfig:
        """The part that says who makes them."""
        return PoolConfig(**{one.name: getattr(self, one.name) for one in fields(PoolConfig)})

    @property
    def images(self) -> ImagesConfig:
        """The part that says which images."""
        return ImagesConfig(**{one.name: getattr(self, one.name) for one in fields(ImagesConfig)})

    @classmethod
    def of(
        cls, images: ImagesConfig, tracking: TrackingConfig, cluster: ClusterConfig, *, trust_model_code: bool = False
    ) -> "SampleConfig":
        """The images of another job, made in its place."""
        options = {one.name: getattr(images, one.name) for one in fields(ImagesConfig)}
        return cls(**options, tracking=tracking, cluster=cluster, trust_model_code=trust_model_code)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleJob:
    """A resolved run: which model, which images, where, and what is known to be there."""

    model: ResolvedModel
    """The model, by version."""
    card: ModelCard
    """What the model is."""
    guide: ResolvedModel | None
    """The weaker model of autoguidance."""
    edit: EditRequest | None
    """What is edited, and how; None: images from nothing."""
    labels: LabelRequest
    """Which labels are asked for."""
    num_asked: int
    """Images that are asked for; there may be more already."""
    calibration: Calibration | None
    """What the analytic variance needs."""
    spec: SamplingSpec
    """All that decides the images."""
    plan: ShardPlan
    """The output shards: of as many images as are asked for, or as are there already if that is more."""
    store: ObjectStore
    """The output prefix."""
    manifest: GenerationManifest | None
    """That of an earlier run; None: none has finished there."""

    @property
    def models(self) -> list[ModelFiles]:
        """The model, and the guide if there is one."""
        return [self.model.files, *([] if self.guide is None else [self.guide.files])]

    @property
    def make_ingredients(self) -> "functools.partial[Ingredients]":
        """What the actors need beside the spec, with all but the models filled in: each fetches those itself."""
        return functools.partial(
            Ingredients,
            inputs=None if self.edit is None else self.edit.inputs,
            known=None if self.edit is None else self.edit.known,
            x_0_error=None if self.calibration is None else self.calibration.x_0_error,
            label_plan=self.labels.plan,
        )

    @property
    def ingredients(self) -> Ingredients:
        """All that is needed beside the spec."""
        return self.make_ingredients(model=self.model.files, guide=None if self.guide is None else self.guide.files)

    @property
    def evaluations_per_image(self) -> int:
        """Evaluations of the model, and with guidance as many of the weaker answer; with an interval an upper bound."""
        return self._model_evaluations * (1 if self.spec.sampler.guidance_scale == 1.0 else 2)

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of all evaluations, a guide's counted by its own size."""
        own = flops_per_image(self.card.config)
        if self.guide is None:
            return self.evaluations_per_image * own
        return self._model_evaluations * (own + flops_per_image(read_card(self.guide.files, self.guide.uri).config))

    @property
    def _model_evaluations(self) -> int:
        schedule, sampler = make_schedule(self.card.config.schedule), self.spec.sampler
        if self.spec.request is not None:
            return self.spec.request.num_evaluations(schedule, sampler)
        return sampler.num_evaluations(schedule)


def resolve_job(config: SampleConfig, model: ResolvedModel | None = None) -> SampleJob:
    """Look up the models, the inputs of an edit and the output; nothing is written.

    Raises:
        ConfigError: If sampler, guide, labels or inputs do not fit the model, or the seed or number of images is out of
            range.
        DatasetMissingError, DatasetError: If there are no inputs where they were named, or their manifest is damaged.
        OutputExistsError: If the output holds a run that cannot grow to this number of images.
        UntrustedCodeError: If a model brings code and is not trusted.
        ModelMissingError, CheckpointError, StorageError: If model or output cannot be read.
    """
    check_room(config.pool, config.cluster)
    if model is None:
        model = resolve_model(config.model, config.tracking, trust_model_code=config.trust_model_code)
    check_trust(model.files, model.uri)
    card = read_card(model.files, model.uri)
    network = card.config
    guide = _resolve_guide(config, card, model.uri)
    try:
        schedule = make_schedule(network.schedule)
        config.sampler.timesteps(schedule)
        _check_fits(config, network)
        calibration = None
        if config.calibration is not None:
            calibration = read_calibration(
                config.calibration,
                model.files.digest,
                network.schedule.num_timesteps,
                clip_x_0=config.sampler.clip_x_0,
            )
        edit = resolve_request(config.request, card, model.uri)
        labels = resolve_labels(config.request, card, model.uri)
        spec = SamplingSpec(
            model_digest=model.files.digest,
            guide_digest=None if guide is None else guide.files.digest,
            calibration_digest=None if calibration is None else calibration.digest,
            request=None if edit is None else edit.spec,
            sampler=config.sampler,
            sampler_revision=config.sampler.revision_on(schedule),
            seed=config.seed,
            label_rule=labels.rule,
            num_classes=network.num_classes,
            shard_size=config.shard_size,
            batch_size=config.batch_size,
            image_format=config.format,
            container=config.container,
            precision=config.precision,
            channels_last=config.channels_last,
            compile=config.compile,
            image_size=network.image_size,
            channels=network.channels,
            num_levels=network.num_levels,
        )
        num_asked = _num_asked(config, spec, edit, labels)
        plan = plan_shards(spec, num_asked)
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error
    store = open_store(join_uri(config.output, spec.digest[:16]))
    manifest = load_generation_manifest(store)
    if manifest and manifest.num_images > plan.num_images:
        plan = plan_shards(spec, manifest.num_images)
    return SampleJob(
        model=model,
        card=card,
        guide=guide,
        edit=edit,
        labels=labels,
        num_asked=num_asked,
        calibration=calibration,
        spec=spec,
        plan=plan,
        store=store,
        manifest=manifest,
    )


def _num_asked(config: SampleConfig, spec: SamplingSpec, edit: EditRequest | None, labels: LabelRequest) -> int:
    """Images that are asked for."""
    if edit is not None:
        return edit.num_asked
    fixed = labels.num_images or config.num_images
    return fixed or (config.images_per_class or _IMAGES_PER_CLASS) * (spec.label_rule.turn(spec.num_classes) or 1)


def _resolve_guide(config: SampleConfig, card: ModelCard, model_uri: str) -> ResolvedModel | None:
    """The weaker model, if one is named; it must make the same images from the same noise."""
    if config.guide_model is None:
        return None
    guide = resolve_model(config.guide_model, config.tracking, trust_model_code=config.trust_model_code)
    theirs, ours = read_card(guide.files, guide.uri), card
    for name in ("image_size", "channels", "num_levels", "num_classes", "schedule"):
        if getattr(theirs.config, name) != getattr(ours.config, name):
            raise ConfigError(
                f"guide_model: {guide.uri} has the {name} {getattr(theirs.config, name)}, {model_uri} "
                f"{getattr(ours.config, name)}; choose a weaker model that was trained for the same"
            )
    if theirs.class_names != ours.class_names:
        raise ConfigError(f"guide_model: {guide.uri} has other classes than {model_uri}; choose one with the same")
    return guide


def _check_fits(config: SampleConfig, network: ModelConfig) -> None:
    sampler = config.sampler
    if network.num_levels != 256:
        raise ValueError(
            f"model: images are stored with 256 levels, got a model of {network.num_levels}; choose another"
        )
    if config.guide_model is not None:
        if sampler.guidance_scale == 1.0:
            raise ValueError("guide_model: has no effect where sampler.guidance_scale is 1; raise it, such as to 1.5")
    elif sampler.guidance_scale != 1.0 and network.num_classes is None:
        raise ValueError(
            f"guidance_scale: the model has no classes to guide to, got {sampler.guidance_scale}; set it to 1, or "
            "name a guide_model"
        )
    if sampler.needs_learned_variance and not network.network.learned_variance:
        raise ValueError(
            "sampler.variance: the model has not learned one, got learned_range; choose fixed_small or fixed_large"
        )
    if sampler.needs_x_0_error != (config.calibration is not None):
        raise ValueError(
            f"calibration: goes with ancestral sampling and sampler.variance analytic, got {config.calibration} with "
            f"{sampler.name}; make it with jobs/calibrate.py, or leave both out"
        )
