"""Copies of a device's tensors on the host, in buffers that are used again."""

from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file and by name."""


class HostCopy:
    """Buffers for one kind of copy; a copy is valid until the next is taken."""

    def __init__(self) -> None:
        """Buffers are made when they are first needed."""
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """Copy tensors from any device; when this returns, the originals may change.

        Each copy is contiguous and has memory of its own, though originals may share theirs. From a GPU the memory is
        pinned, so that the copy goes at the speed of the bus.
        """
        copies = {
            file: {name: self._copy(file, name, tensor.detach()) for name, tensor in named.items()}
            for file, named in tensors.items()
        }
        for device in {tensor.device for named in tensors.values() for tensor in named.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copies

    def _copy(self, file: str, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get((file, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[file, name] = buffer
        return buffer.copy_(tensor, non_blocking=True)
