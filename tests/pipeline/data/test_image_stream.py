"""Streams of verified images: order, limits, regrouping, damage."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.image_stream import LabelledImages, join_images, read_images, regroup, spread_shards, stream_images
from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import Sample, encode_png, pack_shard
from pipeline.errors import ShardCorruptError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store


def image(number: int) -> np.ndarray:
    return np.full((2, 3, 1), number, np.uint8)


def write_shards(store: ObjectStore, sizes: list[int], *, labelled: bool = True) -> list[ShardRecord]:
    """Shards of images that hold their own number, of which the label is the number modulo 5."""
    records, number = [], 0
    for index, size in enumerate(sizes):
        samples = [
            Sample(key=f"{n}", image=encode_png(image(n)), cls=n % 5 if labelled else None, meta={})
            for n in range(number, number + size)
        ]
        number += size
        data = pack_shard(samples)
        store.write(f"{index}.tar", data)
        sha256 = hashlib.sha256(data).hexdigest()
        records.append(ShardRecord(key=f"{index}.tar", size_bytes=len(data), sha256=sha256, num_samples=size))
    return records


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def numbers(images: LabelledImages) -> list[int]:
    return images.images[:, 0, 0, 0].tolist()


def test_images_come_shard_by_shard_in_order(store: ObjectStore) -> None:
    records = write_shards(store, [3, 1, 4])
    groups = list(stream_images(store, records))
    assert [numbers(group) for group in groups] == [[0, 1, 2], [3], [4, 5, 6, 7]]
    whole = read_images(store, records)
    assert whole.labels is not None and whole.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert whole.images.shape == (8, 2, 3, 1) and whole.images.dtype == np.uint8


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 9])
def test_a_limit_cuts_the_stream_and_fetches_nothing_beyond(store: ObjectStore, stop: int) -> None:
    records = write_shards(store, [3, 1, 4])
    for record, first in zip(records, (0, 3, 4), strict=True):
        if first >= stop:
            store.delete(record.key)
    assert numbers(read_images(store, records, stop)) == list(range(min(stop, 8)))


def test_shards_whose_samples_were_all_taken_down_are_passed_over(store: ObjectStore) -> None:
    records = write_shards(store, [0, 3, 0, 0, 2, 0])
    assert [numbers(group) for group in stream_images(store, records)] == [[0, 1, 2], [3, 4]]
    labels = read_images(store, records).labels
    assert labels is not None and labels.tolist() == [0, 1, 2, 3, 4]
    assert list(stream_images(store, write_shards(store, [0]))) == []


def test_images_without_labels_have_none(store: ObjectStore) -> None:
    assert read_images(store, write_shards(store, [2, 2], labelled=False)).labels is None


def test_damage_is_named(store: ObjectStore) -> None:
    records = write_shards(store, [2, 2])
    store.write("1.tar", store.read("1.tar")[:-1] + b"x")
    with pytest.raises(ShardCorruptError, match=r"1\.tar: sha256"):
        read_images(store, records)
    data = pack_shard([Sample(key="a", image=b"no image", meta={})])
    record = ShardRecord(key="bad.tar", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), num_samples=1)
    store.write("bad.tar", data)
    with pytest.raises(ShardCorruptError, match=r"bad\.tar: png: is no PNG"):
        read_images(store, [record])


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8), size=st.integers(1, 12))
def test_regrouping_keeps_every_image_in_order(sizes: list[int], size: int) -> None:
    parts, number = [], 0
    for n in sizes:
        ids = np.arange(number, number + n)
        parts.append(LabelledImages(images=np.stack([image(i % 256) for i in ids]), labels=ids))
        number += n
    groups = list(regroup(parts, size))
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1) and 0 < len(groups[-1]) <= size
    joined = join_images(groups)
    assert joined.labels is not None and joined.labels.tolist() == list(range(number))
    assert numbers(joined) == [i % 256 for i in range(number)]


@given(num_shards=st.integers(1, 200), num_images=st.integers(1, 3000))
def test_a_spread_takes_enough_shards_from_everywhere(num_shards: int, num_images: int) -> None:
    shards = [ShardRecord(key=f"{i}", size_bytes=1, sha256="0" * 64, num_samples=10) for i in range(num_shards)]
    kept = [int(shard.key) for shard in spread_shards(shards, num_images)]
    assert kept == sorted(set(kept)) and kept[0] == 0
    assert 10 * len(kept) >= min(num_images, 10 * num_shards) > 10 * (len(kept) - 1)
    gaps = np.diff([*kept, num_shards])
    assert gaps.max() - gaps.min() <= 1
