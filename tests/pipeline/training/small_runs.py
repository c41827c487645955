"""A training run's output folder made in a second: real steps on random gradients, real checkpoints, no Ray."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ddpm import ModelConfig, PowerEma, ScheduleConfig, UNetConfig, build_network
from pipeline.config_io import to_json
from pipeline.data.manifest import DatasetManifest, Split
from pipeline.data.shard_table import ShardRecord
from pipeline.models.model_files import ModelCard
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.checkpoints.ema_snapshots import SnapshotStore, parse_snapshots
from pipeline.training.checkpoints.state_files import (
    MAX_FILE_BYTES,
    SNAPSHOTS_JSON,
    STATE_JSON,
    decode_tensors,
    encode_state,
    parse_position,
    parts_of,
)
from pipeline.training.run_record import RUN_RECORD, RunRecord
from pipeline.training.train_config import OptimizerConfig, RunIdentity, TrainConfig
from pipeline.training.worker.background import BackgroundWriter
from pipeline.training.worker.training_state import TrainingState

MODEL = ModelConfig(
    network=UNetConfig(
        base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4
    ),
    schedule=ScheduleConfig(name="cosine", num_timesteps=20),
    image_size=(8, 8),
    channels=1,
    num_classes=10,
)
CARD = ModelCard(config=MODEL, class_names=tuple("0123456789"))
_BATCH = 16
_SHARD = ShardRecord(key="train/000000000-0123456789abcdef.tar", size_bytes=1, sha256="0" * 64, num_samples=100)


def manifest(*class_names: str) -> DatasetManifest:
    """A dataset of 100 grey images of 8 x 8 pixels."""
    return DatasetManifest(
        name="x",
        source="x",
        image_size=(8, 8),
        channels=1,
        class_names=class_names,
        splits={"train": Split(shards=(_SHARD,))},
        num_quarantined=0,
    )


def to_files(
    state: TrainingState, card: ModelCard, source: bytes | None = None, *, max_file_bytes: int = MAX_FILE_BYTES
) -> dict[str, bytes]:
    """All files of a checkpoint of a state."""
    snapshots = state.averages.snapshots if state.averages.is_tracking else None
    pieces = encode_state(state.parts(), card, source, snapshots, max_file_bytes=max_file_bytes)
    return {name: data for piece in pieces for name, data in piece().items()}


def restore(state: TrainingState, files: Mapping[str, bytes]) -> None:
    """Go on from the files of a checkpoint, without a store and without other ranks."""
    tensors = {}
    for file in state.files:
        parts = parts_of(file, files)
        if parts:
            tensors[file] = {name: t for part in parts for name, t in decode_tensors(files[part]).items()}
    position = parse_position(files[STATE_JSON], STATE_JSON)
    named = files.get(SNAPSHOTS_JSON)
    state.restore(position, tensors, parse_snapshots(named, SNAPSHOTS_JSON) if named else ())


def make_run(
    output: Path,
    *,
    steps: int = 128,
    interval: int = 4,
    directly: float | None = None,
    card: ModelCard = CARD,
    source: bytes | None = None,
) -> tuple[TrainingState, PowerEma | None]:
    """Train and take snapshots; the last step makes a checkpoint.

    Args:
        output: The run's folder.
        steps: Steps in all.
        interval: Steps between snapshots; 0 takes none.
        directly: Length of an average that is computed beside them.
        card: The model.
        source: That of a network of one's own.
    """
    network = build_network(card.config, seed=0)
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=0, ema_halflife_images=100)
    state = TrainingState(network, config, sigma_rels=(0.05, 0.10) if interval else ())
    beside = None if directly is None else PowerEma(network, directly)
    snapshots, writer = SnapshotStore.of_run(str(output)), BackgroundWriter(print)
    while state.step < steps:
        generator = torch.Generator().manual_seed(state.step // 8)  # the weights drift, as in training
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.apply_gradient(_BATCH)
        if beside is not None:
            beside.update(network, _BATCH)
        if interval and state.step % interval == 0:
            state.averages.take_snapshot(state.step, snapshots, "float32", writer)
    store = open_store(str(output))
    trained = TrainConfig(
        network=card.config.network, schedule=card.config.schedule, class_conditional=True, optimizer=config
    )
    identity = RunIdentity.of(trained, manifest(*card.class_names))
    writer.close()
    CheckpointStore.of_run(str(output)).save(steps, [lambda: to_files(state, card, source)])
    store.create(RUN_RECORD, to_json(RunRecord(run_id="0" * 32, identity=identity)))
    return state, beside
