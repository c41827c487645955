"""Refusals of a training configuration, and what makes a run this run."""

import dataclasses

import pytest

from ddpm import DiTConfig, UNetConfig
from pipeline.data.data_order import DataConfig
from pipeline.data.manifest import DatasetManifest, ShardRecord, Split
from pipeline.presets import PRESETS, digits
from pipeline.training.train_config import (
    OptimizerConfig,
    TrainConfig,
    WorkerConfig,
    complete_identity,
    model_config,
    run_identity,
)

SHARD = ShardRecord(key="train/000000000-0123456789abcdef.tar", size_bytes=1, sha256="0" * 64, num_samples=100)


def manifest(*class_names: str) -> DatasetManifest:
    return DatasetManifest(
        name="x",
        source="x",
        image_size=(8, 8),
        channels=1,
        class_names=class_names,
        splits={"train": Split(shards=(SHARD,))},
        num_quarantined=0,
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"global_batch": 10, "data": DataConfig(lanes=4)}, "global_batch"),
        ({"label_drop": 0.1}, "label_drop"),
        ({"label_drop": 1.0, "class_conditional": True}, "label_drop"),
        ({"seed": -1}, "seed"),
        ({"workers": WorkerConfig(num_workers=9), "data": DataConfig(lanes=8)}, "workers.num_workers"),
        ({"max_skipped_batches": -1}, "max_skipped_batches"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        TrainConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0},
        {"beta_1": 1.0},
        {"warmup_steps": -1},
        {"more_ema_halflives_images": (0,)},
        {"more_ema_halflives_images": (5, 5)},
        {"more_ema_halflives_images": (900_000,)},
        {"ema_ramp_up_ratio": 0.0},
    ],
)
def test_impossible_optimisers_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}:"):
        OptimizerConfig(**changes)  # type: ignore[arg-type]


def test_classes_come_from_the_dataset_or_are_refused() -> None:
    config = TrainConfig(unet=UNetConfig(channel_multipliers=(1,), attention_resolutions=()), class_conditional=True)
    assert model_config(config, manifest("a", "b", "c")).num_classes == 3
    assert model_config(dataclasses.replace(config, class_conditional=False), manifest("a")).num_classes is None
    with pytest.raises(ValueError, match=r"^class_conditional:"):
        model_config(config, manifest())


def test_what_is_computed_is_identity_and_where_and_how_long_is_not() -> None:
    config, data = digits().train, manifest("a")
    same = dataclasses.replace(
        config, steps=9, output="elsewhere", workers=WorkerConfig(num_workers=1), resume=True, log_interval_steps=1
    )
    assert run_identity(config, data) == run_identity(same, data)
    assert run_identity(dataclasses.replace(config, gradient_checkpointing=True), data) == run_identity(config, data)
    for changes in (
        {"seed": 1},
        {"global_batch": 64},
        {"data": DataConfig(lanes=2)},
        {"horizontal_flip": True},
        {"dit": DiTConfig(depth=3)},
    ):
        other = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        assert run_identity(other, data) != run_identity(config, data)


def test_a_run_recorded_before_a_field_existed_had_its_default() -> None:
    identity = run_identity(digits().train, manifest("a"))
    older = {name: value for name, value in identity.items() if name != "dit"}
    new = ("num_head_channels", "adaptive_group_norm", "residual_resampling")
    older["unet"] = {name: value for name, value in identity["unet"].items() if name not in new}
    assert len(older["unet"]) == len(identity["unet"]) - 3
    adam = ("learning_rate", "warmup_steps", "beta_1", "beta_2", "grad_clip_norm", "ema_halflife_images")
    older["optimizer"] = {name: identity["optimizer"][name] for name in adam}
    assert complete_identity(older) == identity
    assert complete_identity(identity) == identity
    train = digits().train
    for changed in (
        dataclasses.replace(train, unet=dataclasses.replace(train.unet, num_head_channels=8)),
        dataclasses.replace(train, optimizer=dataclasses.replace(train.optimizer, ema_ramp_up_ratio=0.05)),
        dataclasses.replace(train, optimizer=dataclasses.replace(train.optimizer, more_ema_halflives_images=(1,))),
    ):
        assert complete_identity(older) != run_identity(changed, manifest("a"))


def test_the_networks_config_is_what_the_run_asks_for() -> None:
    config = dataclasses.replace(digits().train, model="dit", dit=DiTConfig(patch_size=4, depth=2))
    network = model_config(config, manifest("a", "b"))
    assert (network.model, network.dit, network.unet) == ("dit", config.dit, config.unet)
    with pytest.raises(ValueError, match=r"^image_size: must be a multiple of dit.patch_size \(3\), got 8"):
        model_config(dataclasses.replace(config, dit=DiTConfig(patch_size=3)), manifest("a", "b"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_one_model_and_one_dataset(name: str) -> None:
    preset = PRESETS[name]()
    assert preset.prepare.dataset == preset.train.dataset == preset.evaluate.dataset
    assert preset.sample.model == f"models:/{preset.train.register_as}@candidate"
    assert preset.evaluate.sample == preset.sample
