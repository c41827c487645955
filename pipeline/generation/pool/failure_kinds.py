"""What an error of a process that makes shards says about the shard, the device and the storage."""

import re

import torch

from pipeline.errors import ObjectMissingError, PipelineError, StorageAccessError, StorageError, StorageUnfitError
from pipeline.generation.pool.shard_queue import FailureKind
from pipeline.redact import redact

# The CUDA runtime's and its libraries' own words; a context that has raised one of them answers nothing any more.
_OF_A_DEVICE = re.compile(
    r"CUDA error|CUDA driver error|HIP error|XPU error|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|cublas.*failed|"
    r"uncorrectable|device-side assert|illegal memory access"
)
_MAX_TEXT = 300


def kind_of(error: BaseException) -> FailureKind:
    """Whom an error is held against."""
    if isinstance(error, StorageError):
        # What is refused or missing will be so again; what did not answer for minutes may answer in an hour.
        lasting = isinstance(error, ObjectMissingError | StorageAccessError | StorageUnfitError)
        return "shard" if lasting else "outage"
    if isinstance(error, torch.OutOfMemoryError):
        return "shard"
    if isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and not isinstance(error, PipelineError) and _OF_A_DEVICE.search(str(error))
    ):
        return "device"
    return "shard"


def as_own_error(error: BaseException, where: str) -> PipelineError:
    """One of ours as it is; another library's as one line that names the shard and keeps its reason."""
    if isinstance(error, PipelineError):
        return error
    text = redact(" ".join(str(error).split()))[:_MAX_TEXT]
    return PipelineError(f"{where}: {type(error).__name__}: {text}")
