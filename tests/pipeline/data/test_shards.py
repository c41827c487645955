"""Shards: reproducible bytes, readable by others, and damage of every kind is found before a sample is used."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.data.manifest import DatasetManifest, Split
from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import (
    Sample,
    check_levels,
    decode_mask,
    decode_png,
    encode_png,
    pack_shard,
    read_shard,
    unpack_shard,
)
from pipeline.errors import DatasetError, ObjectMissingError, ShardCorruptError
from pipeline.stores.local_store import LocalStore
from tests.pipeline.webdataset_reader import read_with_webdataset


def make_samples(num: int, channels: int = 3) -> list[Sample]:
    pixels = np.random.default_rng(3).integers(0, 256, (num, 8, 8, channels), dtype=np.uint8)
    return [
        Sample(key=f"{index:09d}", image=encode_png(image), cls=index % 3, meta={"source": f"class/{index} \u00e4.jpg"})
        for index, image in enumerate(pixels)
    ]


samples_strategy = st.lists(
    st.builds(
        Sample,
        key=st.from_regex(r"[a-zA-Z0-9_-]{1,20}", fullmatch=True),
        image=st.binary(max_size=1500),
        cls=st.none() | st.integers(-5, 10**12),
        meta=st.dictionaries(
            st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3
        ),
    ),
    max_size=5,
    unique_by=lambda sample: sample.key,
)


@given(samples=samples_strategy)
@settings(deadline=None)
def test_pack_and_unpack_are_inverses(samples: list[Sample]) -> None:
    data = pack_shard(samples)
    assert unpack_shard(data) == samples
    assert pack_shard(samples) == data
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:  # an independent reader
        members = archive.getmembers()
        assert sum(member.name.endswith(".png") for member in members) == len(samples)
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (
                0,
                0,
                0,
                "",
                "",
                0o444,
            )
        for sample in samples:
            file = archive.extractfile(f"{sample.key}.png")
            assert file is not None and file.read() == sample.image


def test_the_bytes_of_a_shard_are_pinned() -> None:
    # A change here means that every dataset and every generated shard gets another digest.
    samples = [
        Sample(key="000000000", image=b"png", cls=7, meta={"b": 1, "a": "\u00e4"}),
        Sample(key="000000001", image=b"", meta={}),
    ]
    assert (
        hashlib.sha256(pack_shard(samples)).hexdigest()
        == "0070f533d5ab541d744e8857d114f455012f3eace4f980744fbef430251fe88f"
    )


def test_the_webdataset_library_reads_a_shard(tmp_path: Path) -> None:
    samples = make_samples(7)
    (tmp_path / "shard.tar").write_bytes(pack_shard(samples))
    read = read_with_webdataset([tmp_path / "shard.tar"])
    assert [row["__key__"] for row in read] == [sample.key for sample in samples]
    for row, sample in zip(read, samples, strict=True):
        assert row["cls"] == sample.cls and row["json"] == sample.meta
        assert np.array_equal(np.asarray(row["png"]), decode_png(sample.image))


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "\u00e4", "x" * 91, "nul\0"])
def test_keys_that_webdataset_would_cut_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key: must be"):
        pack_shard([Sample(key=key, image=b"", meta={})])


def test_repeated_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="unique"):
        pack_shard([Sample(key="a", image=b"", meta={}), Sample(key="a", image=b"", meta={})])


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def shard_bytes() -> bytes:
    return pack_shard(make_samples(3))


def test_a_tar_cut_anywhere_is_refused(shard_bytes: bytes) -> None:
    # at every block boundary: a plain tar reader takes a cut between members for the end
    for length in {*range(0, len(shard_bytes), 512), 1, 511, 513, len(shard_bytes) - 1}:
        with pytest.raises(ShardCorruptError, match="malformed at byte"):
            unpack_shard(shard_bytes[:length])
    assert len(unpack_shard(shard_bytes)) == 3


def test_every_damaged_header_byte_is_refused(shard_bytes: bytes) -> None:
    headers = [
        offset for offset in range(0, len(shard_bytes), 512) if shard_bytes[offset + 257 : offset + 262] == b"ustar"
    ]
    assert len(headers) == 9
    for header in headers:
        for position in range(0, 500, 7):
            damaged = bytearray(shard_bytes)
            damaged[header + position] ^= 0x55
            with pytest.raises(ShardCorruptError):
                unpack_shard(bytes(damaged))


def tar_of(members: list[tuple[str, bytes, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, kind, data in members:
            header = tarfile.TarInfo(name)
            header.type, header.size = kind, len(data)
            archive.addfile(header, io.BytesIO(data))
    data = buffer.getvalue()
    while not any(data[-1536:]):
        data = data[:-512]
    return data


FILE = tarfile.REGTYPE


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", FILE, b"x")], "sample 'a' has the members"),
        ([("a.json", FILE, b"{}")], "sample 'a' has the members"),
        ([("a.png", FILE, b"x"), ("a.json", FILE, b"{}"), ("a.txt", FILE, b"x")], "sample 'a' has the members"),
        ([("a.png", FILE, b"x"), ("a.png", FILE, b"y"), ("a.json", FILE, b"{}")], "occurs twice"),
        ([("a.png", FILE, b"x"), ("a.json", FILE, b"[]")], "is no object"),
        ([("a.png", FILE, b"x"), ("a.json", FILE, b"{")], "malformed"),
        ([("a.png", FILE, b"x"), ("a.cls", FILE, b"seven"), ("a.json", FILE, b"{}")], "invalid literal"),
        ([("a.png", FILE, b"x"), ("b.json", FILE, b"{}"), ("a.json", FILE, b"{}")], "sample 'a' has the members"),
        ([("a", tarfile.DIRTYPE, b"")], "no plain file"),
        ([("a.png", tarfile.SYMTYPE, b""), ("a.json", FILE, b"{}")], "no plain file"),
    ],
)
def test_archives_that_are_not_ours_are_refused(members: list[tuple[str, bytes, bytes]], message: str) -> None:
    good = [("a.png", FILE, b"x"), ("a.json", FILE, b"{}")]
    assert len(unpack_shard(tar_of(good))) == 1
    with pytest.raises(ShardCorruptError, match="malformed at byte") as caught:
        unpack_shard(tar_of(members), "s3://bucket/shard.tar")
    assert message in str(caught.value) and str(caught.value).startswith("s3://bucket/shard.tar: ")


@pytest.fixture
def stored(tmp_path: Path, shard_bytes: bytes) -> Iterator[tuple[LocalStore, ShardRecord]]:
    store = LocalStore(tmp_path)
    store.write("train/0.tar", shard_bytes)
    sha256 = hashlib.sha256(shard_bytes).hexdigest()
    yield store, ShardRecord(key="train/0.tar", size_bytes=len(shard_bytes), sha256=sha256, num_samples=3)


def test_read_shard_returns_verified_samples(stored: tuple[LocalStore, ShardRecord]) -> None:
    assert read_shard(*stored) == make_samples(3)


def test_pixels_of_more_levels_than_can_be_read_are_refused(stored: tuple[LocalStore, ShardRecord]) -> None:
    manifest = DatasetManifest(
        name="deep", source="x", image_size=(8, 8), channels=3, class_names=(), num_quarantined=0,
        splits={"train": Split(shards=(stored[1],))},
    )  # fmt: skip
    check_levels(manifest, "s3://b/d")
    with pytest.raises(DatasetError, match=r"^s3://b/d: its pixels have 65536 levels, this program reads 256; prepare"):
        check_levels(replace(manifest, num_levels=65536), "s3://b/d")


def test_any_flipped_bit_is_found(stored: tuple[LocalStore, ShardRecord], shard_bytes: bytes) -> None:
    store, record = stored
    for position in range(0, len(shard_bytes), 397):
        damaged = bytearray(shard_bytes)
        damaged[position] ^= 1
        store.write(record.key, bytes(damaged))
        with pytest.raises(ShardCorruptError, match="sha256 is") as caught:
            read_shard(store, record)
        assert record.sha256 in str(caught.value) and f"{store.uri}/{record.key}" in str(caught.value)


def test_wrong_size_count_and_absence_are_found(stored: tuple[LocalStore, ShardRecord], shard_bytes: bytes) -> None:
    store, record = stored
    more = ShardRecord(key=record.key, size_bytes=record.size_bytes, sha256=record.sha256, num_samples=4)
    with pytest.raises(ShardCorruptError, match="number of samples is 3, the manifest says 4"):
        read_shard(store, more)
    store.write(record.key, shard_bytes[:-1024])
    with pytest.raises(ShardCorruptError, match=f"size in bytes is {record.size_bytes - 1024}"):
        read_shard(store, record)
    store.delete(record.key)
    with pytest.raises(ObjectMissingError):
        read_shard(store, record)


# ---------------------------------------------------------------- PNG


@given(image=hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))))
@settings(deadline=None)
def test_png_is_lossless(image: np.ndarray) -> None:
    decoded = decode_png(encode_png(image))
    assert decoded.dtype == np.uint8 and decoded.shape == image.shape and np.array_equal(decoded, image)
    assert decoded.flags.writeable
    with PIL.Image.open(io.BytesIO(encode_png(image))) as opened:
        assert opened.mode == ("L" if image.shape[2] == 1 else "RGB") and opened.info == {}


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (4, 4, 4), (1, 4, 4, 3)])
def test_encode_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image: must be uint8"):
        encode_png(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="image: must be uint8"):
        encode_png(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]


def test_decode_refuses_what_a_shard_never_holds() -> None:
    png = encode_png(np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8))
    for data, reason in ((b"", "is no PNG"), (b"not a png", "is no PNG"), (png[: len(png) // 2], "does not decode")):
        with pytest.raises(ValueError, match=f"^png: {reason}[^<>]*$"):
            decode_png(data)
    for mode, kind in (("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("1", "PNG")):
        buffer = io.BytesIO()
        PIL.Image.new(mode, (4, 4)).save(buffer, kind)
        with pytest.raises(ValueError, match="8-bit grey or RGB"):
            decode_png(buffer.getvalue())
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    with pytest.raises(ValueError, match="is no PNG"):
        decode_png(buffer.getvalue())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_mask_is_white_in_every_mode(mode: str) -> None:
    white = np.indices((5, 7)).sum(axis=0) % 3 == 0
    image, buffer = PIL.Image.fromarray(np.uint8(255) * white), io.BytesIO()
    image.convert(mode).save(buffer, "PNG")
    assert PIL.Image.open(io.BytesIO(buffer.getvalue())).mode == mode
    assert np.array_equal(decode_mask(buffer.getvalue()), white)


def test_what_is_coloured_or_transparent_is_not_white() -> None:
    pixels = np.array([[[255, 255, 255, 255], [255, 255, 255, 0], [255, 0, 0, 255], [127, 255, 255, 255]]], np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    assert decode_mask(buffer.getvalue()).tolist() == [[True, False, False, False]]
    buffer = io.BytesIO()
    PIL.Image.new("I;16", (4, 4)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="must be 8-bit, got mode I;16"):
        decode_mask(buffer.getvalue())
