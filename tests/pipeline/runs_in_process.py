"""Generation runs made in this process, without Ray, and what is compared of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.image_stream import LabelledImages, join_images
from pipeline.generation.making.shard_maker import ShardMaker
from pipeline.generation.output.manifest import read_shards
from pipeline.generation.sample import SampleResult, sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectInfo


def make_in_process(config: SampleConfig) -> dict[int, str]:
    """Make and commit every shard without Ray; the digest of each, by index."""
    job = resolve_job(config)
    make = ShardMaker(job.ingredients, job.spec, job.store, num_threads=1, device="cpu")
    return {s.index: make(s).record.sha256 for s in job.plan.missing(bytes(job.plan.num_shards))}


def run(config: SampleConfig) -> tuple[SampleResult, LabelledImages]:
    """Make the images in this process: nothing is missing then, so that no Ray is started."""
    make_in_process(config)
    result = sample(config)
    assert result.num_made == 0
    return result, join_images(list(result.images()))


def digests(result: SampleResult) -> dict[int, str]:
    """The digest of each shard of a finished run, by index."""
    return {index: shard.sha256 for index, shard in enumerate(read_shards(result.store, result.manifest.parts))}


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file and folder: time of change, inode, content. A temporary file would change its folder's time."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }


def count_lists(monkeypatch: pytest.MonkeyPatch, folder: Path, into: list[str]) -> None:
    """Note each listing below a folder by its prefix."""
    real = LocalStore.list

    def list_noted(store: LocalStore, prefix: str = "") -> Iterator[ObjectInfo]:
        if store.uri == str(folder):
            into.append(prefix)
        return real(store, prefix)

    monkeypatch.setattr(LocalStore, "list", list_noted)
