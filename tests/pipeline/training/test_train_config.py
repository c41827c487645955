"""Refusals of a training configuration, and what makes a run this run."""

import ast
import dataclasses
import inspect
import itertools
import textwrap

import pytest

from ddpm import DiTConfig, ObjectiveConfig, OwnNetworkConfig, UNetConfig
from pipeline.config_io import from_json, to_json
from pipeline.data.data_order import DataConfig
from pipeline.errors import ConfigError
from pipeline.presets import PRESETS, digits
from pipeline.training.checkpoints.ema_snapshots import PostHocEmaConfig
from pipeline.training.train_config import OptimizerConfig, RunIdentity, TrainConfig, WorkerConfig, model_config
from tests.pipeline.training.small_runs import manifest

HYBRID = ObjectiveConfig(name="hybrid")


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
        ({"skip_window_steps": 0}, "skip_window_steps"),
        ({"lease_s": 0.0}, "lease_s"),
        ({"start_over": True}, "start_over"),
        ({"new_run": True}, "new_run"),
        ({"fork_from": "s3:/x"}, "fork_from"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"keep_every_steps": -1}, "keep_every_steps"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        TrainConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0},
        {"grad_clip_norm": 0.0},
        {"grad_clip_norm": float("nan")},
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
    config = TrainConfig(network=UNetConfig(channel_multipliers=(1,), attention_resolutions=()), class_conditional=True)
    assert model_config(config, manifest("a", "b", "c")).num_classes == 3
    assert model_config(dataclasses.replace(config, class_conditional=False), manifest("a")).num_classes is None
    with pytest.raises(ValueError, match=r"^class_conditional:"):
        model_config(config, manifest())


def test_what_is_computed_is_identity_and_where_and_how_long_is_not() -> None:
    config, data = digits().train, manifest("a")
    same = dataclasses.replace(
        config,
        steps=9,
        output="elsewhere",
        workers=WorkerConfig(num_workers=1),
        resume=True,
        log_interval_steps=1,
        keep_checkpoints=1,
        keep_every_steps=7,
    )
    identity = RunIdentity.of(config, data)
    assert RunIdentity.of(same, data) == identity
    assert RunIdentity.of(dataclasses.replace(config, gradient_checkpointing=True), data) == identity
    assert RunIdentity.of(dataclasses.replace(config, data=DataConfig(lanes=4, cache_bytes=0)), data) != identity
    reads_otherwise = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_bytes=0))
    assert RunIdentity.of(reads_otherwise, data) == identity
    changes: list[dict[str, object]] = [
        {"network": DiTConfig(depth=3)},
        {"network": dataclasses.replace(config.network, learned_variance=True), "objective": HYBRID},
        {"schedule": dataclasses.replace(config.schedule, num_timesteps=500)},
        {"objective": ObjectiveConfig(weighting="min_snr")},
        {"class_conditional": False, "label_drop": 0.0},
        {"label_drop": 0.2},
        {"horizontal_flip": True},
        {"global_batch": 64},
        {"seed": 1},
        {"optimizer": dataclasses.replace(config.optimizer, ema_ramp_up_ratio=0.1)},
        {"data": DataConfig(lanes=2)},
        {"post_hoc_ema": PostHocEmaConfig(snapshot_interval_steps=10)},
        {"fork_from": "models:/ddpm/3"},
    ]
    changed = {next(iter(change)) for change in changes}
    assert changed | {"dataset_digest"} == {field.name for field in dataclasses.fields(RunIdentity)}
    for change in changes:
        other = dataclasses.replace(config, **change)  # type: ignore[arg-type]
        assert RunIdentity.of(other, data) != identity, change
    assert RunIdentity.of(config, manifest("b")) != identity


def test_the_help_says_what_may_change_on_resume() -> None:
    """A field of the identity may not, all others may; of two a part is of the identity, and the help says which."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(TrainConfig))).body
    assert isinstance(tree, ast.ClassDef)
    helps = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    identity = {field.name for field in dataclasses.fields(RunIdentity)}
    of_resuming = {"resume", "start_over", "new_run", "output"}  # what resuming is, and which run
    assert helps.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    for name, text in helps.items():
        may_change = "ay change on resume" in text or "on resume too" in text
        in_part = name in {"data", "post_hoc_ema"}
        assert may_change is (in_part or name not in identity | of_resuming), name


def test_a_recorded_identity_is_read_back_and_one_of_another_form_refused() -> None:
    identity = RunIdentity.of(digits().train, manifest("a"))
    stored = to_json(identity)
    assert from_json(RunIdentity, stored, "run.json") == identity
    for damaged in (stored.replace(b'"name":"unet"', b'"name":"u-net"'), stored.replace(b'"seed"', b'"seeed"')):
        with pytest.raises(ConfigError, match=r"^run\.json: (network\.name|seeed): "):
            from_json(RunIdentity, damaged, "run.json")


def test_the_networks_config_is_what_the_run_asks_for() -> None:
    config = dataclasses.replace(digits().train, network=DiTConfig(patch_size=4, depth=2))
    network = model_config(config, manifest("a", "b"))
    assert (network.network, network.image_size, network.channels) == (config.network, (8, 8), 1)
    own = OwnNetworkConfig(factory="nets:make", prediction_type="v")
    assert model_config(dataclasses.replace(config, network=own), manifest("a", "b")).network == own
    with pytest.raises(ValueError, match=r"^image_size: must be a multiple of network\.patch_size \(3\), got 8"):
        model_config(dataclasses.replace(config, network=DiTConfig(patch_size=3)), manifest("a", "b"))


def test_an_objective_that_does_not_fit_the_network_is_refused() -> None:
    """A learned variance needs an objective that trains it, and the other way round."""
    with pytest.raises(ValueError, match=r"^objective\."):
        TrainConfig(network=UNetConfig(learned_variance=True))
    with pytest.raises(ValueError, match=r"^objective\."):
        TrainConfig(objective=HYBRID)
    assert TrainConfig(network=DiTConfig(learned_variance=True), objective=HYBRID).network.learned_variance


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_one_model_and_one_dataset(name: str) -> None:
    preset = PRESETS[name]()
    assert preset.prepare.dataset == preset.train.dataset == preset.evaluate.dataset
    assert preset.sample.model == f"models:/{preset.train.register_as}@candidate"
    assert preset.evaluate.sample == preset.sample.images
    assert preset.evaluate.sampling == preset.sample
