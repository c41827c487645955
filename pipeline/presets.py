"""Configurations that are known to work, as plain functions: change what differs, by a TOML file or by flags.

Places are relative to the folder in which a job is started. Hyperparameters of the three networks of Ho et al. are
those of their appendix B; batch sizes are global.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ddpm import SamplerConfig, ScheduleConfig, UNetConfig
from pipeline.data.data_order import DataConfig
from pipeline.data.prepare import PrepareConfig
from pipeline.evaluation.evaluate import EvaluateConfig
from pipeline.generation.sample import SampleConfig
from pipeline.training.train_config import OptimizerConfig, TrainConfig, WorkerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One configuration for each job, over the same dataset and model."""

    prepare: PrepareConfig
    """Make the dataset."""
    train: TrainConfig
    """Train on it."""
    sample: SampleConfig
    """Make images with the registered model."""
    evaluate: EvaluateConfig
    """Measure it."""


def digits() -> Preset:
    """scikit-learn's 8x8 scans with a class-conditional network of about a million parameters: minutes on two CPUs."""
    dataset = "artifacts/digits/dataset"
    sampler = SamplerConfig(name="ddim", num_steps=50, eta=1.0)
    sample = SampleConfig(
        model="models:/ddpm-digits@candidate",
        output="artifacts/digits/samples",
        images_per_class=100,
        sampler=sampler,
        shard_size=125,
        batch_size=125,
        num_actors=2,
    )
    return Preset(
        prepare=PrepareConfig(source="digits", output=dataset, shard_size=250),
        train=TrainConfig(
            dataset=dataset,
            output="artifacts/digits/train",
            unet=UNetConfig(
                base_channels=40,
                channel_multipliers=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(4,),
                num_groups=8,
                dropout=0.0,
            ),
            schedule=ScheduleConfig(name="cosine"),
            class_conditional=True,
            steps=800,
            global_batch=128,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, ema_halflife_images=10_000),
            data=DataConfig(lanes=4, window_shards=2),
            workers=WorkerConfig(num_workers=2),
            checkpoint_interval_steps=400,
            log_interval_steps=20,
            grid_interval_steps=400,
            grid_sampler=SamplerConfig(name="ddim", num_steps=20, eta=1.0),
            register_as="ddpm-digits",
            run_name="digits",
        ),
        sample=sample,
        evaluate=EvaluateConfig(dataset=dataset, sample=sample),
    )


def cifar10() -> Preset:
    """32x32 colour images with the 35.7 M network of Ho et al.; bring the images as a folder."""
    return _ho_et_al(
        "cifar10",
        image_size=32,
        unet=UNetConfig(channel_multipliers=(1, 2, 2, 2), dropout=0.1),
        steps=800_000,
        global_batch=128,
        learning_rate=2e-4,
        horizontal_flip=True,
    )


def celebahq256() -> Preset:
    """256x256 colour images with the 113.7 M network of Ho et al.; bring the images as a folder."""
    return _ho_et_al(
        "celebahq256",
        image_size=256,
        unet=UNetConfig(channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0),
        steps=500_000,
        global_batch=64,
        learning_rate=2e-5,
        horizontal_flip=True,
    )


def _ho_et_al(
    name: str,
    *,
    image_size: int,
    unet: UNetConfig,
    steps: int,
    global_batch: int,
    learning_rate: float,
    horizontal_flip: bool,
) -> Preset:
    dataset = f"artifacts/{name}/dataset"
    sample = SampleConfig(
        model=f"models:/ddpm-{name}@candidate",
        output=f"artifacts/{name}/samples",
        images_per_class=50_000,
        sampler=SamplerConfig(name="ancestral", num_steps=1000, variance="fixed_large"),
        shard_size=1000,
        batch_size=64,
    )
    return Preset(
        prepare=PrepareConfig(source=f"data/{name}", output=dataset, image_size=image_size, shard_size=1000),
        train=TrainConfig(
            dataset=dataset,
            output=f"artifacts/{name}/train",
            unet=unet,
            schedule=ScheduleConfig(name="linear"),
            horizontal_flip=horizontal_flip,
            steps=steps,
            global_batch=global_batch,
            # their decay of 0.9999 per step is a half-life of 6,931 steps
            optimizer=OptimizerConfig(
                learning_rate=learning_rate, warmup_steps=5000, ema_halflife_images=6931 * global_batch
            ),
            data=DataConfig(lanes=8),
            register_as=f"ddpm-{name}",
            run_name=name,
        ),
        sample=sample,
        evaluate=EvaluateConfig(dataset=dataset, sample=sample),
    )


PRESETS: dict[str, Callable[[], Preset]] = {"digits": digits, "cifar10": cifar10, "celebahq256": celebahq256}
