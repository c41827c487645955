"""Whom an error is held against."""

import pytest
import torch

from pipeline.errors import (
    CommitConflictError,
    ObjectMissingError,
    PipelineError,
    StorageAccessError,
    StorageError,
    StorageUnfitError,
)
from pipeline.generation.pool.failure_kinds import as_own_error, kind_of


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("anything", 700),
    ],
)
def test_of_a_device(error: BaseException) -> None:
    assert kind_of(error) == "device"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        PipelineError("out of memory on NVIDIA H100 at output shard 3: the words CUDA error in a message of ours"),
        ValueError("images: are not numbers"),
        KeyError("x"),
        CommitConflictError("two results"),
        StorageAccessError("denied"),
        StorageUnfitError("ignores conditions"),
        ObjectMissingError("an input is gone"),
    ],
)
def test_of_a_shard(error: BaseException) -> None:
    assert kind_of(error) == "shard"


def test_of_the_device_that_has_no_room_for_the_model() -> None:
    """Another process may have its memory; a RuntimeError of loading is the machine's, such as a missing driver."""
    assert kind_of(torch.OutOfMemoryError("CUDA out of memory"), is_loading=True) == "device"
    assert kind_of(RuntimeError("Found no NVIDIA driver on your system"), is_loading=True) == "shard"


def test_of_nobody() -> None:
    assert kind_of(StorageError("did not answer for 10 minutes")) == "outage"


def test_ours_stays_as_it_is_and_another_keeps_its_reason_in_one_line() -> None:
    own = StorageError("s3://b/k: away")
    assert as_own_error(own, "output shard 3") is own
    foreign = as_own_error(RuntimeError("first line\n  second s3://key:secret@host/b"), "output shard 3 (ids from 30)")
    assert str(foreign).startswith("output shard 3 (ids from 30): RuntimeError: first line second s3://")
    assert "secret" not in str(foreign)
