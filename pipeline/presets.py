"""Configurations that are known to work, as plain functions: change what differs, by a TOML file or by flags.

Places are relative to the folder in which a job is started. Where a network is a paper's, so are the
hyperparameters, as its authors' code has them: presets.md sets both beside ours, field by field, and says why where
they differ. Batch sizes are global. Each preset says how large its network is, and what one forward pass costs in
operations, a multiplication and an addition counted as two; a training step takes three times as many for each image.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ddpm import DDIM, Ancestral, DiTConfig, ObjectiveConfig, ScheduleConfig, UNetConfig
from ddpm.samplers.registry import AnySampler
from pipeline.data.data_order import DataConfig
from pipeline.data.prepare import PrepareConfig
from pipeline.evaluation.evaluate import EvaluateConfig
from pipeline.generation.sample_config import SampleConfig
from pipeline.preset_networks import ADM_64, DIT_B_4, HO_256, HO_CIFAR10
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
    """scikit-learn's 8x8 scans with a class-conditional U-Net: minutes on two CPUs.

    1,095,721 parameters, 0.050 GFLOP per image.
    """
    dataset = "artifacts/digits/dataset"
    sampler = DDIM(num_steps=50, eta=1.0)
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
        prepare=PrepareConfig(source="digits", dataset=dataset, shard_size=250),
        train=TrainConfig(
            dataset=dataset,
            output="artifacts/digits/train",
            network=UNetConfig(
                base_channels=40,
                channel_multipliers=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(4,),
                num_groups=8,
                dropout=0.0,
            ),
            schedule=ScheduleConfig(name="cosine"),
            class_conditional=True,
            label_drop=0.1,
            steps=800,
            global_batch=128,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, ema_halflife_images=10_000),
            data=DataConfig(lanes=4, window_shards=2),
            workers=WorkerConfig(num_workers=2),
            checkpoint_interval_steps=400,
            log_interval_steps=20,
            grid_interval_steps=400,
            grid_sampler=DDIM(num_steps=20, eta=1.0),
            register_as="ddpm-digits",
            run_name="digits",
        ),
        sample=sample,
        evaluate=EvaluateConfig(dataset=dataset, sample=sample.images),
    )


def digits_dit() -> Preset:
    """The same scans with a DiT of about the U-Net's size on 16 patches of 2x2 pixels.

    1,058,500 parameters, 0.023 GFLOP per image.
    """
    unet = digits()
    train = replace(
        unet.train,
        output="artifacts/digits_dit/train",
        network=DiTConfig(patch_size=2, hidden_size=96, depth=6, num_heads=4),
        steps=1600,  # it learns more slowly than the U-Net
        optimizer=replace(unet.train.optimizer, learning_rate=3e-3),
        register_as="ddpm-digits_dit",
        run_name="digits_dit",
    )
    sample = replace(unet.sample, model="models:/ddpm-digits_dit@candidate", output="artifacts/digits_dit/samples")
    evaluate = replace(unet.evaluate, sample=sample.images)
    return Preset(prepare=unet.prepare, train=train, sample=sample, evaluate=evaluate)


def cifar10() -> Preset:
    """32x32 colour images with the network of Ho et al. 2020 (appendix B); bring the images as a folder.

    35,746,307 parameters, 12.44 GFLOP per image.
    """
    return _of_a_folder(
        "cifar10",
        image_size=32,
        train=_ho_et_al(
            HO_CIFAR10,
            steps=800_000,
            global_batch=128,
            learning_rate=2e-4,
        ),
        sampler=Ancestral(num_steps=1000, variance="fixed_large"),
        images_per_class=50_000,
    )


def celebahq256() -> Preset:
    """256x256 colour images with the network of Ho et al. 2020 (appendix B); bring the images as a folder.

    113,673,219 parameters, 497.03 GFLOP per image.
    """
    return _of_a_folder(
        "celebahq256",
        image_size=256,
        shard_size=400,  # about 50 MiB; a window of larger ones would not fit the read buffer
        train=_ho_et_al(
            HO_256,
            steps=500_000,
            global_batch=64,
            learning_rate=2e-5,
        ),
        sampler=Ancestral(num_steps=1000, variance="fixed_small"),
        images_per_class=50_000,
    )


def imagenet64() -> Preset:
    """64x64 colour images of 1000 classes with the ADM U-Net of Dhariwal & Nichol 2021; bring one folder per class.

    295,905,222 parameters, 219.36 GFLOP per image. Of the parameters 768 stand for "no label", which the paper has not.
    Training holds about 160 MiB of activations per image, without gradient checkpointing about 780.
    """
    return _of_a_folder(
        "imagenet64",
        image_size=64,
        train=TrainConfig(
            network=ADM_64,
            schedule=ScheduleConfig(name="cosine"),
            objective=ObjectiveConfig(name="hybrid"),
            class_conditional=True,
            horizontal_flip=True,
            steps=540_000,
            global_batch=2048,
            optimizer=OptimizerConfig(
                learning_rate=3e-4, warmup_steps=0, grad_clip_norm=None, ema_halflife_images=_HALFLIFE_STEPS * 2048
            ),
            gradient_checkpointing=True,
            data=DataConfig(lanes=32),
        ),
        sampler=Ancestral(num_steps=250, variance="learned_range"),
        images_per_class=50,
    )


def imagenet64_dit() -> Preset:
    """The same images with the DiT-B/4 of Peebles & Xie 2023, on their pixels; drops labels, for guidance.

    130,389,600 parameters, 46.05 GFLOP per image. The schedule is the U-Net's, since theirs was chosen for latents.
    """
    return _of_a_folder(
        "imagenet64_dit",
        image_size=64,
        source="imagenet64",
        train=TrainConfig(
            network=DIT_B_4,
            schedule=ScheduleConfig(name="cosine"),
            objective=ObjectiveConfig(name="hybrid"),
            class_conditional=True,
            label_drop=0.1,
            horizontal_flip=True,
            steps=400_000,
            global_batch=256,
            optimizer=OptimizerConfig(
                learning_rate=1e-4, warmup_steps=0, grad_clip_norm=None, ema_halflife_images=_HALFLIFE_STEPS * 256
            ),
            data=DataConfig(lanes=32),
        ),
        sampler=Ancestral(num_steps=250, variance="learned_range", guidance_scale=1.5),
        images_per_class=50,
    )


_HALFLIFE_STEPS = 6931  # of a moving average that decays by 0.9999 per step, as all these papers have it


def _ho_et_al(unet: UNetConfig, *, steps: int, global_batch: int, learning_rate: float) -> TrainConfig:
    return TrainConfig(
        network=unet,
        schedule=ScheduleConfig(name="linear"),
        horizontal_flip=True,
        steps=steps,
        global_batch=global_batch,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, warmup_steps=5000, ema_halflife_images=_HALFLIFE_STEPS * global_batch
        ),
        data=DataConfig(lanes=8),
    )


def _of_a_folder(
    name: str,
    *,
    image_size: int,
    train: TrainConfig,
    sampler: AnySampler,
    images_per_class: int,
    source: str | None = None,
    shard_size: int = 1000,
) -> Preset:
    """The preset of that name over the images in data/source, or data/name."""
    source = source or name
    dataset = f"artifacts/{source}/dataset"
    sample = SampleConfig(
        model=f"models:/ddpm-{name}@candidate",
        output=f"artifacts/{name}/samples",
        images_per_class=images_per_class,
        sampler=sampler,
        shard_size=1000,
        batch_size=64,
    )
    return Preset(
        prepare=PrepareConfig(source=f"data/{source}", dataset=dataset, image_size=image_size, shard_size=shard_size),
        train=replace(
            train, dataset=dataset, output=f"artifacts/{name}/train", register_as=f"ddpm-{name}", run_name=name
        ),
        sample=sample,
        evaluate=EvaluateConfig(dataset=dataset, sample=sample.images),
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    preset.__name__: preset for preset in (digits, digits_dit, cifar10, celebahq256, imagenet64, imagenet64_dit)
}
