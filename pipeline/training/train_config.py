"""Configuration of a training run, and the part of it that makes it this run and no other."""

from dataclasses import dataclass, field
from typing import Literal

from ddpm import DDIM, ModelConfig, ObjectiveConfig, ScheduleConfig, UNetConfig, make_schedule
from ddpm.added_field import added_field
from ddpm.networks.registry import AnyNetwork
from ddpm.samplers.registry import AnySampler
from ddpm.training.objectives import check_objective
from pipeline.cluster import ClusterConfig
from pipeline.data.data_order import DataConfig, DataOrder
from pipeline.data.manifest import DatasetManifest
from pipeline.models.model_uri import check_model_uris
from pipeline.models.network_pass import Precision
from pipeline.stores.storage import check_uris
from pipeline.tracking.tracking import TrackingConfig
from pipeline.training.checkpoints.ema_snapshots import PostHocEmaConfig
from pipeline.training.stop_request import parse_duration


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Adam with warm-up, gradient clipping and an exponential moving average of the weights."""

    learning_rate: float = 2e-4
    """Step size of Adam after the warm-up."""
    warmup_steps: int = 5000
    """Steps over which the step size rises linearly from 0."""
    beta_1: float = 0.9
    """Adam's decay of the first moment."""
    beta_2: float = 0.999
    """Adam's decay of the second moment."""
    grad_clip_norm: float | None = 1.0
    """Norm of the whole gradient above which it is scaled down to that. None: never."""
    ema_halflife_images: int = 900_000
    """Images after which a weight's share in the moving average has halved; this average is sampled and registered."""
    more_ema_halflives_images: tuple[int, ...] = ()
    """Half-lives of further averages, kept in the checkpoints; a checkpoint's URI with ?ema=HALFLIFE names one."""
    ema_ramp_up_ratio: float | None = 0.05
    """Each half-life is at most this share of the images seen before, so that the random first weights are forgotten
    early and a short run's average is no noise. None: constant half-lives."""

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "ema_halflife_images")
        if self.grad_clip_norm is not None and not self.grad_clip_norm > 0:
            raise ValueError(f"grad_clip_norm: above 0, got {self.grad_clip_norm}; None clips nothing")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: at least 0, got {self.warmup_steps}")
        for name in ("beta_1", "beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: in [0, 1), got {getattr(self, name)}")
        halflives = self.ema_halflives_images
        if min(halflives) < 1 or len(set(halflives)) < len(halflives):
            raise ValueError(
                f"more_ema_halflives_images: at least 1, distinct and not ema_halflife_images "
                f"({self.ema_halflife_images}), got {self.more_ema_halflives_images}; drop repeats"
            )
        if self.ema_ramp_up_ratio is not None and not self.ema_ramp_up_ratio > 0:
            raise ValueError(
                f"ema_ramp_up_ratio: above 0, got {self.ema_ramp_up_ratio}; 0.05 is usual, None is without"
            )

    @property
    def ema_halflives_images(self) -> tuple[int, ...]:
        """Every half-life, the registered average's first."""
        return (self.ema_halflife_images, *self.more_ema_halflives_images)

    def share_of_first_weights(self, num_images: int) -> float:
        """How much of the registered average are the weights before training, after so many images; 0 to 1."""
        # With a ramp-up the first step takes the place of all that was before.
        return 0.5 ** (num_images / self.ema_halflife_images) if self.ema_ramp_up_ratio is None else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """The training workers: one DDP rank each."""

    num_workers: int = 2
    """Ranks; the data order and the noise do not depend on it."""
    min_workers: int | None = None
    """Ranks to go on with while there is no room for all, as when a node is lost; they are made more again when there
    is. None: all are waited for."""
    resize_interval_s: float = 600.0
    """Least seconds between the start of the workers and a restart for more of them, which costs about half a
    minute."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    cpus_per_worker: int = 1
    """Logical CPUs, and threads of torch, of each worker."""
    max_failures: int = 3
    """Failures in a row, without a new checkpoint in between, after which workers are replaced; lost nodes and
    preemptions are not counted."""
    hang_timeout_s: float = 1800.0
    """Seconds without a step after which the workers are said to hang: it is logged where they stand, and they are
    replaced; twice as long for a start and an end. A tenth longer than servers are waited for, if that is more."""

    def __post_init__(self) -> None:
        _positive(self, "num_workers", "cpus_per_worker", "hang_timeout_s")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers: from 1 to num_workers ({self.num_workers}), got {self.min_workers}; leave it out to "
                "wait for all"
            )
        if self.resize_interval_s < 0:
            raise ValueError(f"resize_interval_s: at least 0, got {self.resize_interval_s}")
        if self.max_failures < 0:
            raise ValueError(f"max_failures: at least 0, got {self.max_failures}")

    @property
    def fewest(self) -> int:
        """Ranks that training goes on with."""
        return self.num_workers if self.min_workers is None else self.min_workers


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """The averaged model of checkpoints, measured on held-out images beside training, at the lowest priority."""

    num_images: int = 128
    """Held-out images; 0: nothing is measured."""
    draws: int = 10
    """Evaluations of the network for each image, for its loss and for its bits per dimension."""
    interval_s: float = 600.0
    """Least seconds between two measurements; the last checkpoint is measured in any case."""
    use_gpu: bool = False
    """Measure on a GPU of its own, in place of a CPU beside others' work."""

    def __post_init__(self) -> None:
        _positive(self, "draws")
        if self.num_images < 0 or self.num_images == 1:
            raise ValueError(f"num_images: at least 2, got {self.num_images}; 0 measures nothing")
        if self.interval_s < 0:
            raise ValueError(f"interval_s: at least 0, got {self.interval_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a DDPM on a prepared dataset, with checkpoints, an MLflow run and a registered model."""

    dataset: str = "artifacts/dataset"
    """Folder or s3:// URI that prepare_data wrote; may change on resume, to a copy of the same dataset."""
    output: str = "artifacts/train"
    """Folder or s3:// URI for checkpoints and the run's record."""
    network: AnyNetwork = field(default_factory=UNetConfig)
    """The network, and what it answers with; --network.name chooses which."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The forward process."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised, with which weighting, and how t is chosen."""
    class_conditional: bool = False
    """Give the network the class of each image; the dataset must have classes."""
    label_drop: float = 0.0
    """Share of images whose class is hidden from the network (classifier-free guidance needs about 0.1)."""
    horizontal_flip: bool = False
    """Mirror half of the images."""
    steps: int = 800_000
    """Optimiser steps in all; may change on resume."""
    global_batch: int = 128
    """Images per optimiser step over all workers."""
    micro_batch: int | None = None
    """Images of a worker that pass through the network at once; the gradients of such parts add up to that of the
    global batch, which takes less memory. None: all of a worker's on CPUs, and on a GPU the largest divisor of them
    that fits; a run that goes on keeps what it had. May change on resume."""
    seed: int = 0
    """Seed of the weights, the data order and the noise."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam, warm-up, clipping, EMA."""
    precision: Precision = "float32"
    """How the network is evaluated: float32; tf32, where a GPU rounds to 10 bits what it multiplies; bf16, in which
    most operations compute. Weights, optimiser, averages, noise and losses are float32 in all of them. May change on
    resume."""
    channels_last: bool = False
    """Keep images and convolutions' weights with the channels innermost, which GPUs multiply faster, bf16 above all;
    dropout's masks are others then. May change on resume."""
    compile: bool = False
    """Have PyTorch compile the network, which takes minutes at the start and makes steps on a GPU faster; where that
    fails it is said, and the network is interpreted as without it. Dropout's masks are others then. May change on
    resume."""
    gradient_checkpointing: bool = False
    """Keep a block's input only and compute the block again in the backward pass: a fraction of the memory for about a
    third more time, and the same numbers; may change on resume."""
    post_hoc_ema: PostHocEmaConfig = field(default_factory=PostHocEmaConfig)
    """Snapshots for averages whose length is chosen after training; all but the lengths may change on resume."""
    data: DataConfig = field(default_factory=DataConfig)
    """The order of the data, and how it is read, which may change on resume."""
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    """How many workers, and what each is given; may change on resume."""
    checkpoint_interval_steps: int = 5000
    """Steps between checkpoints; the last step always makes one. May change on resume."""
    keep_checkpoints: int = 3
    """Checkpoints kept; older ones are removed once a newer one is verified. May change on resume."""
    keep_every_steps: int = 0
    """A checkpoint whose step is a multiple of this is never removed; nor is one that was registered. 0: none of them.
    May change on resume."""
    log_interval_steps: int = 100
    """Steps over which logged metrics are averaged; may change on resume."""
    profile: int = 0
    """Steps of the first worker of which a trace and a table of where the time went are put into the MLflow run, after
    ten that are left alone; may change on resume. 0: none."""
    grid_interval_steps: int = 10_000
    """Steps between grids of samples in the MLflow run; the last step makes one too. 0: none. May change
    on resume."""
    grid_sampler: AnySampler = field(default_factory=DDIM)
    """How the grids are sampled; may change on resume."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """What is measured on held-out images; may change on resume."""
    max_skipped_batches: int = 3
    """Global batches of `skip_window_steps` with a loss or gradient that is not finite that are only left out; with
    more the run goes back to a checkpoint and past them, and the second time stops. May change on resume."""
    skip_window_steps: int = 1000
    """Steps over which `max_skipped_batches` counts, those up to each skipped one, looked at when losses are logged and
    before a checkpoint; may change on resume."""
    register_as: str = "ddpm"
    """Name in the model registry; the version gets the alias `candidate`. May change on resume."""
    run_name: str = "train"
    """Name of the MLflow run; of a new one on resume too."""
    resume: bool = False
    """Go on with the run that `output` holds, if it holds one. Fields that say so may change then, no others."""
    start_over: bool = False
    """With resume: begin at step 0 again where a run had checkpoints and none of them can be used."""
    new_run: bool = False
    """With resume: go on in a new MLflow run, where the old one was deleted or is on another server."""
    fork_from: str | None = None
    """Begin with the weights of this model (a checkpoint's folder, models:/name/3) in place of random ones: a new run,
    whose configuration may differ in all but the network."""
    if_held: Literal["fail", "leave"] = "fail"
    """Where another driver works in `output` at this moment: fail (exit code 1) or leave (exit code 0); may change on
    resume."""
    stop_after: str | None = None
    """End after a checkpoint, with exit code 3, once this driver has run for so long: 4h, 1h30m, 45s. For machines with
    a time limit; may change on resume."""
    lease_s: float = 60.0
    """Seconds without a sign of life after which a driver counts as dead and another may take its place; may change on
    resume."""
    throughput: float | None = None
    """Images per second of all workers, from which --dry-run foretells hours; may change on resume. None: what this
    output's run had, or a GPU in artifacts/benchmark_gpu."""
    price_per_device_hour: float | None = None
    """What an hour of a GPU costs, or of a CPU where no GPU is used, for --dry-run; may change on resume."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; may change on resume, with new_run."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ray; may change on resume."""

    def __post_init__(self) -> None:
        check_uris(self, "dataset", "output")
        check_model_uris(self, "fork_from")
        _positive(self, "steps", "global_batch", "checkpoint_interval_steps", "keep_checkpoints")
        _positive(self, "log_interval_steps", "skip_window_steps", "lease_s")
        for name in ("throughput", "price_per_device_hour"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: above 0, got {value}; leave it out where it is not known")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch: at least 1, got {self.micro_batch}; leave it out for all at once")
        if self.stop_after is not None:
            try:
                parse_duration(self.stop_after)
            except ValueError as error:
                raise ValueError(f"stop_after: {error}") from error
        if self.profile < 0:
            raise ValueError(f"profile: at least 0, got {self.profile}; 0 watches no step")
        if self.keep_every_steps < 0:
            raise ValueError(f"keep_every_steps: at least 0, got {self.keep_every_steps}; 0 keeps none for ever")
        if self.grid_interval_steps < 0:
            raise ValueError(f"grid_interval_steps: at least 0, got {self.grid_interval_steps}; 0 draws none")
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop: in [0, 1), got {self.label_drop}")
        if self.label_drop and not self.class_conditional:
            raise ValueError(f"label_drop: needs class_conditional, got {self.label_drop} without it; set it to 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: in [0, 2^63), got {self.seed}")
        for name in ("start_over", "new_run"):
            if getattr(self, name) and not self.resume:
                raise ValueError(f"{name}: needs resume, got it without; add --resume, or leave it out for a new run")
        if self.max_skipped_batches < 0:
            raise ValueError(f"max_skipped_batches: at least 0, got {self.max_skipped_batches}")
        try:
            check_objective(
                self.objective,
                "learned_range" if self.network.learned_variance else "fixed_small",
                make_schedule(self.schedule),
                self.network.prediction_type,
            )
        except ValueError as error:
            raise ValueError(f"objective.{error}") from error
        if self.global_batch % self.data.lanes:
            raise ValueError(
                f"global_batch: a multiple of data.lanes ({self.data.lanes}), got {self.global_batch}; change either"
            )
        if self.workers.num_workers > self.data.lanes:
            raise ValueError(
                f"workers.num_workers: at most data.lanes ({self.data.lanes}), got {self.workers.num_workers}; "
                "raise data.lanes"
            )


def model_config(config: TrainConfig, manifest: DatasetManifest) -> ModelConfig:
    """The network's configuration: what the run asks for, in the shape of the dataset.

    Raises:
        ValueError: If the run wants classes and the dataset has none; names the field.
    """
    if config.class_conditional and manifest.num_classes is None:
        raise ValueError(
            f"class_conditional: the dataset {manifest.name!r} has no classes; prepare one sub-folder per class"
        )
    return ModelConfig(
        network=config.network,
        schedule=config.schedule,
        image_size=manifest.image_size,
        channels=manifest.channels,
        num_levels=manifest.num_levels,
        num_classes=manifest.num_classes if config.class_conditional else None,
    )


def data_order(config: TrainConfig, manifest: DatasetManifest) -> DataOrder:
    """The order in which a run reads the dataset's train split.

    Raises:
        ValueError: If the dataset is too small for the lanes; names the field.
    """
    return DataOrder.for_split(manifest, "train", config.data, seed=config.seed, global_batch=config.global_batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataIdentity:
    """What of the data's configuration decides the order."""

    lanes: int
    """Row sequences that make up every global batch."""
    window_shards: int
    """Shards of a lane whose rows are shuffled together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PostHocEmaIdentity:
    """What of the snapshots' configuration a run must go on with: how often, and how exactly stored, may change."""

    sigma_rels: tuple[float, ...]
    """Lengths of the averages that are tracked; empty where no snapshots are taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """What a run computes: a resumed run may change how long, where and how it runs, and what it shows, but not this.

    Fields have the names that they have in TrainConfig, which the messages show.
    """

    network: AnyNetwork
    """As in TrainConfig, like all fields without a text of their own."""
    schedule: ScheduleConfig
    objective: ObjectiveConfig
    class_conditional: bool
    label_drop: float
    horizontal_flip: bool
    global_batch: int
    seed: int
    optimizer: OptimizerConfig
    data: DataIdentity
    post_hoc_ema: PostHocEmaIdentity
    dataset_digest: str
    """Digest of the dataset's manifest."""
    fork_from: str | None = added_field(default=None, pin=None)

    @classmethod
    def of(cls, config: TrainConfig, manifest: DatasetManifest) -> "RunIdentity":
        """The identity of a run of this configuration."""
        return cls(
            network=config.network,
            schedule=config.schedule,
            objective=config.objective,
            class_conditional=config.class_conditional,
            label_drop=config.label_drop,
            horizontal_flip=config.horizontal_flip,
            global_batch=config.global_batch,
            seed=config.seed,
            optimizer=config.optimizer,
            data=DataIdentity(lanes=config.data.lanes, window_shards=config.data.window_shards),
            post_hoc_ema=PostHocEmaIdentity(sigma_rels=config.post_hoc_ema.tracked),
            dataset_digest=manifest.digest,
            fork_from=config.fork_from,
        )


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{name}: above 0, got {value}")
