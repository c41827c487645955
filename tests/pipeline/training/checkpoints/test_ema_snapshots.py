"""Snapshots: stored as they were, named by checkpoints, never mixed between attempts."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ddpm import ModelConfig, UNetConfig, build_network
from pipeline.config_io import from_json, to_json
from pipeline.errors import CheckpointError, FormatVersionError
from pipeline.models.model_files import ModelCard
from pipeline.presets import digits
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.ema_snapshots import (
    PostHocEmaConfig,
    SnapshotList,
    SnapshotRecord,
    SnapshotStore,
    parse_snapshots,
)
from pipeline.training.checkpoints.state_files import SNAPSHOTS_JSON
from pipeline.training.train_config import OptimizerConfig, RunIdentity, TrainConfig
from pipeline.training.worker.background import BackgroundWriter
from pipeline.training.worker.training_state import TrainingState
from tests.pipeline.training.small_runs import manifest, restore, to_files

MODEL = ModelConfig(
    network=UNetConfig(
        base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4
    ),
    image_size=(8, 8),
    channels=1,
)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0, ema_halflife_images=100)
SIGMA_RELS = (0.05, 0.10)


def make_state(seed: int = 0) -> TrainingState:
    return TrainingState(build_network(MODEL, seed=seed), OPTIMIZER, sigma_rels=SIGMA_RELS)


def train(state: TrainingState, store: SnapshotStore, *, until: int, interval: int = 2, skip: int = -1) -> None:
    """Steps with random gradients, as rank 0 takes them; the step `skip` has a gradient that is not finite."""
    writer = BackgroundWriter(print)
    while state.step < until:
        generator = torch.Generator().manual_seed(state.step)
        for parameter in state.network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if state.step == skip:
                parameter.grad *= torch.nan
        state.apply_gradient(num_images=16)
        if state.step % interval == 0:
            state.averages.take_snapshot(state.step, store, "float32", writer)
    writer.finish()
    writer.close()


def files_of(state: TrainingState) -> dict[str, bytes]:
    return to_files(state, ModelCard(config=MODEL))


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore.of_run(str(tmp_path))


def snapshots_of(state: TrainingState) -> list[SnapshotRecord]:
    return state.averages.snapshots


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2e-3)])
def test_what_was_tracked_is_what_is_read(store: SnapshotStore, dtype: str, tolerance: float) -> None:
    averages = {s: {"w": torch.randn(3, 2), "n": torch.tensor(7)} for s in SIGMA_RELS}
    record = store.save(5, 80, averages, dtype)
    assert store.save(5, 80, averages, dtype) == record, "equal contents are one snapshot"
    for sigma_rel, state in averages.items():
        read = store.read(record, sigma_rel)
        assert read["w"].dtype == getattr(torch, dtype) and read["n"].dtype == torch.int64
        torch.testing.assert_close(read["w"].float(), state["w"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("damage", ["altered", "cut short", "missing"])
def test_a_damaged_snapshot_is_refused_by_name(tmp_path: Path, store: SnapshotStore, damage: str) -> None:
    record = store.save(1, 16, {0.05: {"w": torch.zeros(4)}}, "float32")
    path = tmp_path / "ema_snapshots" / record.prefix / record.files[0].name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "cut short" else data[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"sigma_rel-0\.05\.safetensors"):
        store.read(record, 0.05)


def test_a_resumed_run_takes_the_snapshots_that_an_unbroken_one_takes(tmp_path: Path) -> None:
    """With a skipped batch before the break: its images are in no average, and the averages know how many are."""
    unbroken_store, broken_store = (SnapshotStore.of_run(str(tmp_path / name)) for name in ("unbroken", "broken"))
    unbroken, broken, resumed = make_state(), make_state(), make_state(seed=9)
    train(unbroken, unbroken_store, until=12, skip=3)
    train(broken, broken_store, until=6, skip=3)
    restore(resumed, files_of(broken))
    train(resumed, broken_store, until=12)
    assert snapshots_of(resumed) == snapshots_of(unbroken)
    assert [record.num_images for record in snapshots_of(unbroken)] == [32, 48, 80, 112, 144, 176]
    final = files_of(unbroken)
    assert files_of(resumed) == final
    assert from_json(SnapshotList, final[SNAPSHOTS_JSON], "").snapshots == tuple(snapshots_of(unbroken))


def test_a_wrong_count_gives_other_averages(store: SnapshotStore) -> None:
    state = make_state()
    train(state, store, until=4)
    files = files_of(state)
    wrong = files | {
        "state.json": files["state.json"].replace(b'"num_averaged_images":64', b'"num_averaged_images":80')
    }
    assert wrong["state.json"] != files["state.json"]
    prefixes = []
    for checkpoint in (files, wrong):
        restored = make_state()
        restore(restored, checkpoint)
        train(restored, store, until=6)
        prefixes.append(snapshots_of(restored)[-1].prefix)
    train(state, store, until=6)
    assert prefixes[0] == snapshots_of(state)[-1].prefix != prefixes[1]


def test_what_a_killed_attempt_took_later_is_not_mixed_in(tmp_path: Path, store: SnapshotStore) -> None:
    """The attempt after it comes by the same steps with other weights, as with another number of workers."""
    killed = make_state()
    train(killed, store, until=4)
    files = files_of(killed)
    train(killed, store, until=8)  # two more snapshots, and then it dies: no checkpoint names them
    resumed = make_state()
    restore(resumed, files)
    with torch.no_grad():
        next(resumed.network.parameters()).add_(1e-3)
    train(resumed, store, until=8)
    mine, theirs = snapshots_of(resumed), snapshots_of(killed)
    assert mine[:2] == theirs[:2]
    assert [r.step for r in mine] == [r.step for r in theirs] and mine[2:] != theirs[2:]
    for record in mine + theirs:  # nobody has overwritten anybody's
        assert set(store.read(record, 0.05)) == set(resumed.network.state_dict())
    assert store.remove_all_but(mine) == 4
    left = {info.key.partition("/")[0] for info in open_store(str(tmp_path / "ema_snapshots")).list()}
    assert left == {record.prefix for record in mine}


def test_an_unchanged_average_is_not_taken_twice(store: SnapshotStore) -> None:
    state, writer = make_state(), BackgroundWriter(print)
    state.averages.take_snapshot(0, store, "float32", writer)
    assert not writer._jobs, "no step yet"
    train(state, store, until=3, interval=1, skip=1)
    assert [record.step for record in snapshots_of(state)] == [1, 3]


def test_a_checkpoint_without_its_tracked_averages_is_refused() -> None:
    files = files_of(make_state())
    del files["power-ema-0.05.safetensors"]
    with pytest.raises(CheckpointError, match="does not fit"):
        restore(make_state(), files)


def test_a_list_of_another_version_is_refused_by_name_and_a_damaged_one_as_damaged() -> None:
    data = to_json(SnapshotList(snapshots=()))
    assert parse_snapshots(data, SNAPSHOTS_JSON) == ()
    with pytest.raises(
        FormatVersionError, match=r"^ema_snapshots\.json: has format_version 1, .* reads 2; train again"
    ):
        parse_snapshots(data.replace(b":2", b":1"), SNAPSHOTS_JSON)
    with pytest.raises(CheckpointError, match=r"^ema_snapshots\.json: not valid JSON"):
        parse_snapshots(data[:-4], SNAPSHOTS_JSON)


@pytest.mark.parametrize(
    "changes", [{"snapshot_interval_steps": -1}, {"sigma_rels": ()}, {"sigma_rels": (0.1, 0.1)}, {"sigma_rels": (0.5,)}]
)
def test_impossible_values_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))[:9]}"):
        PostHocEmaConfig(**changes)  # type: ignore[arg-type]


def test_what_is_tracked_is_identity_and_how_often_is_not() -> None:
    def identity(**changes: object) -> RunIdentity:
        post_hoc_ema = PostHocEmaConfig(**changes)  # type: ignore[arg-type]
        config: TrainConfig = dataclasses.replace(digits().train, post_hoc_ema=post_hoc_ema)
        return RunIdentity.of(config, manifest("a"))

    assert identity() == RunIdentity.of(digits().train, manifest("a")) == identity(sigma_rels=(0.2,))
    on = identity(snapshot_interval_steps=10)
    assert on == identity(snapshot_interval_steps=50, dtype="float16")
    assert on != identity() and on != identity(snapshot_interval_steps=10, sigma_rels=(0.05,))
