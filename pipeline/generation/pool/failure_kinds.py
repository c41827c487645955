"""What an error of a process that makes shards says about the shard, the device and the storage."""

import re

import torch

from pipeline.errors import PipelineError, is_outage
from pipeline.generation.pool.shard_queue import FailureKind
from pipeline.redact import redact

# The CUDA runtime's and its libraries' own words; a context that has raised one of them answers nothing any more.
_OF_A_DEVICE = re.compile(
    r"CUDA error|CUDA driver error|HIP error|XPU error|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|cublas.*failed|"
    r"uncorrectable|device-side assert|illegal memory access"
)
_MAX_TEXT = 300


def kind_of(error: BaseException, *, is_loading: bool = False) -> FailureKind:
    """Whom an error is held against.

    Args:
        error: What was raised.
        is_loading: Whether no shard was made, but a model loaded: what is no device's is then the machine's, and a
            device without room for the model is of no use.
    """
    if is_outage(error):
        return "outage"
    if isinstance(error, torch.OutOfMemoryError):
        return "device" if is_loading else "shard"
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
