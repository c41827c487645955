"""What an operator says about a generation run: which images, with what, by whom, and where they go."""

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

from ddpm import DDIM
from ddpm.samplers.registry import AnySampler
from pipeline.cluster import ClusterConfig
from pipeline.config_io import refuse_empty
from pipeline.data.image_formats import AnyImageFormat, Png
from pipeline.generation.pool.pool_config import PoolConfig
from pipeline.generation.requests.requests import AnyRequest, Generate
from pipeline.generation.spec.sampling_plan import Container
from pipeline.generation.spec.ticks import normal_tick, tick_seed
from pipeline.models.model_uri import check_model_uris
from pipeline.models.network_pass import Precision
from pipeline.stores.storage import check_file_uris, check_uris
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
    """A shard is given up when it takes longer than this and than ten times the median of the last hundred, seconds; a
    process that waits for storage has this time again."""
    start_timeout_s: float = 7200.0
    """A process may take so long to load the model, seconds; and as long again for its first shard, until others have
    made theirs: then ten times their median."""
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
            raise ValueError(
                f"accelerator_type: must go with use_gpu, got {self.accelerator_type!r} alone; leave it out, or set "
                "use_gpu"
            )
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

    throughput: float | None = None
    """Img·NFE/s (images times network evaluations of each) of one process, from which --dry-run foretells hours. None:
    what was measured for the model's version with these devices and this batch size."""
    price_per_device_hour: float | None = None
    """What an hour of a GPU costs, or of a CPU where no GPU is used; a dry run foretells money by it."""
    price_per_gb: float | None = None
    """What storing a GB (10^9 bytes) for a month costs; a dry run foretells money by it."""
    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tick: str | None = None
    """The moment that a scheduler asks for, such as 2026-11-22T03:00Z, the same in each attempt: it has images of its
    own, made once, and an alias of a model is looked up at its first attempt alone."""
    keep_last: int | None = None
    """After this tick, remove what earlier finished ticks made in this output, but for the newest so many, this one
    among them; nothing that is younger than a day. Left out: nothing is removed."""
    if_held: Literal["fail", "leave"] | None = None
    """Where another driver makes these images at this moment: fail (exit code 1) or leave (exit code 0). Left out:
    leave where a tick is given, else fail."""
    lease_s: float = 60.0
    """Seconds without a sign of life after which a driver counts as dead and another may take its place; 0: any number
    of drivers may work at once, which makes no other images and is a waste."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        ImagesConfig.__post_init__(self)  # super() does not find it from a class with slots
        for name in ("throughput", "price_per_device_hour", "price_per_gb"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: above 0, got {value}; leave it out where it is not known")
        if self.tick is not None:
            normal_tick(self.tick)
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"keep_last: must be at least 1, got {self.keep_last}; choose a positive number")
        if self.keep_last is not None and self.tick is None:
            raise ValueError(f"keep_last: counts ticks and goes with tick, got {self.keep_last}; leave it out")
        if not self.lease_s >= 0.0:
            raise ValueError(f"lease_s: must be at least 0, got {self.lease_s}; leave it out")

    @property
    def tick_utc(self) -> str | None:
        """The tick in its normal form."""
        return None if self.tick is None else normal_tick(self.tick)

    @property
    def noise_seed(self) -> int:
        """The seed of the images: of a tick its own."""
        return self.seed if self.tick_utc is None else tick_seed(self.seed, self.tick_utc)

    @property
    def leaves_if_held(self) -> bool:
        """Whether it is no failure that another driver makes these images: a scheduler comes again by itself."""
        return (self.if_held or ("fail" if self.tick is None else "leave")) == "leave"

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
