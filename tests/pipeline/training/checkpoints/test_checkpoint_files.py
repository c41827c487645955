"""Files are what the library makes, a few at a time, and they are compared before they count."""

import tempfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.errors import CheckpointError, StorageError
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from pipeline.training.checkpoints.checkpoint_files import encode_tensors
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from tests.pipeline.training.checkpoint_cases import WrappedStore, pieces

TENSORS = {"b": torch.randn(3, 5), "a": torch.arange(7), "scalar": torch.tensor(2.0), "half": torch.randn(4).half()}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "checkpoints")


def test_the_bytes_are_those_of_the_library() -> None:
    assert encode_tensors(TENSORS) == safetensors.torch.save(TENSORS)
    assert encode_tensors({}) == safetensors.torch.save({})


def test_nothing_is_left_and_no_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    encode_tensors(TENSORS)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"gone: cannot make a file of a checkpoint there .*TMPDIR"):
        encode_tensors(TENSORS)


def test_what_is_written_is_compared_before_it_counts(store: LocalStore) -> None:
    class LosingStore(WrappedStore):
        def write(self, key: str, data: object) -> None:
            super().write(key, b"fIrst" if key.endswith("a.bin") else data)  # type: ignore[arg-type]

    with pytest.raises(CheckpointError, match=r"a\.bin: 5 bytes that are not the 5 recorded"):
        CheckpointStore(LosingStore(store)).save(1, pieces())
    assert CheckpointStore(store).is_empty()


def test_a_reader_that_fails_once_condemns_nothing(store: LocalStore) -> None:
    class ShortOnce(WrappedStore):
        failed = False

        def read(self, key: str) -> bytes:
            data = super().read(key)
            if key.endswith("a.bin") and not self.failed:
                self.failed = True
                return data[:-1]
            return data

    record = CheckpointStore(store).save(1, pieces())
    flaky = ShortOnce(store)
    CheckpointStore(flaky).verify(record)
    assert flaky.failed


def test_files_are_encoded_in_turn_and_forgotten(store: ObjectStore) -> None:
    """At most a few are encoded and not yet stored."""
    started: list[int] = []
    most = 0

    def piece(index: int) -> dict[str, bytes]:
        nonlocal most
        started.append(index)
        most = max(most, len(started) - len(list(store.list("step-"))))
        return {f"{index}.bin": bytes(100)}

    CheckpointStore(store).save(1, [lambda index=index: piece(index) for index in range(20)])  # type: ignore[misc]
    assert len(started) == 20 and most <= 3


def test_a_file_that_cannot_be_written_ends_the_others(store: ObjectStore) -> None:
    made: list[int] = []

    def piece(index: int) -> dict[str, bytes]:
        made.append(index)
        if index == 0:
            raise StorageError("the disk is full")
        time.sleep(0.01)
        return {f"{index}.bin": b"x"}

    with pytest.raises(StorageError, match="the disk is full"):
        CheckpointStore(store).save(1, [lambda index=index: piece(index) for index in range(200)])  # type: ignore[misc]
    assert len(made) < 200 and CheckpointStore(store).is_empty()
