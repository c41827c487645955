"""A finished run of 20 images in four shards, whose batches straddle nothing, and what is broken in it."""

import dataclasses
from pathlib import Path

from ddpm import DDIM
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.upkeep.verify import verify
from pipeline.stores.object_store import ObjectStore
from tests.pipeline.runs_in_process import run
from tests.pipeline.tiny_models import write_model


def small_config(folder: Path, **changes: object) -> SampleConfig:
    model = folder / "model"
    uri = str(model) if model.exists() else write_model(model, answers=True)
    config = SampleConfig(
        model=uri,
        output=str(folder / "out"),
        num_images=20,
        sampler=DDIM(num_steps=2),
        shard_size=6,
        batch_size=2,
        contact_sheet_columns=2,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def make_run(folder: Path, **changes: object) -> tuple[SampleConfig, ObjectStore]:
    """20 images in shards of 6, 6, 6 and 2, in batches of two."""
    config = small_config(folder, **changes)
    return config, run(config)[0].store


def contents(store: ObjectStore) -> dict[str, bytes]:
    return {info.key: store.read(info.key) for info in store.list()}


def tars(store: ObjectStore) -> list[str]:
    manifest = load_generation_manifest(store)
    assert manifest is not None
    return [shard.key for shard in read_shards(store, manifest.parts)]


def found(store: ObjectStore, *, quick: bool = False) -> list[tuple[str, str]]:
    return [(one.kind, one.key) for one in verify(store, quick=quick)]
