"""Measure what the analytic variance needs to know of a model: the error of x_0_hat on its training images."""

from dataclasses import dataclass, field

import torch

from ddpm import RunningMoments, images_to_x_0, x_0_error_table, x_0_errors
from pipeline.config_io import to_json
from pipeline.data.image_stream import regroup, spread_shards, stream_images
from pipeline.data.manifest import load_manifest
from pipeline.data.shards import check_levels
from pipeline.errors import ConfigError
from pipeline.measuring.evaluation_dataset import check_fits
from pipeline.models.calibration import Calibration
from pipeline.models.model_files import load_model, read_card
from pipeline.models.model_uri import check_model_uris
from pipeline.models.registry import resolve_model
from pipeline.progress import Progress, say
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import check_file_uris, check_uris, open_store, split_file_uri
from pipeline.tracking.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """Which model to calibrate, on what."""

    model: str
    """models:/name@alias, models:/name/3, or a checkpoint's folder (local or s3://...)."""
    dataset: str
    """Folder or s3://bucket/prefix of the prepared dataset that the model was trained on."""
    output: str
    """The JSON file to write, local or s3://...; sample's calibration names it."""
    max_images: int = 10_000
    """Training images, spread over the split, to measure."""
    terms_per_image: int = 10
    """Steps at which each image is measured, evaluations of the network."""
    clip_x_0: bool = True
    """Limit predicted images to [-1, 1], as the sampler will."""
    batch_size: int = 250
    """Images per evaluation of the network."""
    seed: int = 0
    """Seed of the noise and of the choice of steps, in [0, 2^64)."""
    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""

    def __post_init__(self) -> None:
        check_model_uris(self, "model")
        check_uris(self, "dataset")
        check_file_uris(self, "output")
        for name in ("max_images", "terms_per_image", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; choose a positive number")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: must be in [0, 2^64), got {self.seed}; choose another seed")


def calibrate(config: CalibrateConfig) -> Calibration:
    """Measure a model on the training images and write the file.

    Returns:
        What was written.

    Raises:
        ConfigError: If model and dataset do not fit each other, or an option does not fit the model.
        PipelineError: If model or dataset cannot be read, or the file cannot be written.
    """
    folder, name = split_file_uri(config.output)
    model = resolve_model(config.model, config.tracking, trust_model_code=config.trust_model_code)
    store = open_store(config.dataset)
    manifest = load_manifest(store)
    check_levels(manifest, store.uri)
    card = read_card(model.files, model.uri)
    network_config = card.config
    warnings = check_fits(manifest, card, config.dataset, model.uri)
    for warning in warnings:
        say(f"warning: {warning}")
    num_timesteps = network_config.schedule.num_timesteps
    if config.terms_per_image > num_timesteps:
        raise ConfigError(f"terms_per_image: must be at most {num_timesteps}, its steps, got {config.terms_per_image}")
    check_conditions(open_store(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model.files, model.uri)[1].to(device)
    shards = spread_shards(manifest.splits["train"].shards, config.max_images)
    num_images = min(sum(shard.num_samples for shard in shards), config.max_images)
    errors = RunningMoments.from_samples(torch.zeros(0, num_timesteps))
    start = 0
    with Progress("calibrating", num_images, "img") as progress:
        for group in regroup(stream_images(store, shards, num_images), config.batch_size):
            label = None
            if network_config.num_classes is not None and group.labels is not None:
                label = torch.from_numpy(group.labels).to(device)
            errors = errors + x_0_errors(
                loaded,
                seed=config.seed,
                sample_ids=torch.arange(start, start + len(group), device=device),
                x_0=images_to_x_0(torch.from_numpy(group.images).to(device), loaded.num_levels),
                label=label,
                clip_x_0=config.clip_x_0,
                terms_per_image=config.terms_per_image,
            )
            start += len(group)
            progress.advance(len(group))
    calibration = Calibration(
        model_digest=model.files.digest,
        dataset_digest=manifest.digest,
        num_images=num_images,
        clip_x_0=config.clip_x_0,
        x_0_error=tuple(x_0_error_table(errors).tolist()),
        warnings=warnings,
    )
    open_store(folder).write(name, to_json(calibration))
    return calibration


def describe_plan(config: CalibrateConfig) -> list[tuple[str, str]]:
    """What a calibration would do, as names and values; reads the dataset's manifest and the model, starts nothing."""
    model = resolve_model(config.model, config.tracking, trust_model_code=config.trust_model_code)
    num_images = min(load_manifest(open_store(config.dataset)).splits["train"].num_samples, config.max_images)
    return [
        ("model", model.uri),
        ("network evaluations", f"about {num_images * config.terms_per_image:,} images"),
        ("output", config.output),
    ]
