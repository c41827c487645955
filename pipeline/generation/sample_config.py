"""What an operator says about a generation run."""

from dataclasses import dataclass, field

from ddpm import SamplerConfig
from pipeline.cluster import ClusterConfig
from pipeline.config_io import refuse_empty
from pipeline.generation.requests import RequestConfig, check_steps
from pipeline.tracking.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Which images to make, and with what."""

    model: str
    """models:/name@alias, models:/name/3, or a checkpoint's folder (local or s3://...); ?ema=HALFLIFE at the end: its
    further average of that half-life."""
    output: str
    """Folder or s3://bucket/prefix; each sampling spec gets a prefix of its own below it."""
    images_per_class: int = 100
    """Images of each class; the number of images when the model has no classes. Edits count by their inputs instead."""
    request: RequestConfig = field(default_factory=RequestConfig)
    """Images from nothing, or edits of given ones."""
    guide_model: str | None = None
    """A weaker model to lead away from (autoguidance), named like model; sampler.guidance_scale says how far. Left out:
    guidance leads away from "no label"."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Sampling method and its steps."""
    calibration: str | None = None
    """The JSON file of jobs/calibrate.py for this model, which the analytic variance of ancestral sampling needs."""
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
    """Images of each class on the contact sheet; of an edit, images in all."""
    orphan_age_s: float = 86_400.0
    """Age, seconds, from which the files of killed attempts are removed; longer than making and storing any shard."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        refuse_empty(self, "model", "output", "guide_model", "calibration")
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
        check_steps(self.request, self.sampler)
