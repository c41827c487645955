"""What the host sees of a device: copies of tensors, in buffers that are used again, and a flag that arrives later."""

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


class HostFlag:
    """A boolean on its way from a device to the host, which goes on meanwhile; it holds one at a time."""

    def __init__(self) -> None:
        """Nothing is on its way."""
        self._flag: Tensor | None = None
        self._pinned: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None

    def send(self, flag: Tensor) -> None:
        """Queue the copy of a flag (0-dim) behind what its device has to do; the one before must have been read."""
        self._flag = flag
        if not flag.is_cuda:
            return
        if self._pinned is None:
            self._pinned = torch.empty((), dtype=torch.bool, pin_memory=True)
            # blocking: other threads of the worker need the CPU meanwhile.
            self._arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        assert self._arrival is not None
        self._flag = self._pinned.copy_(flag, non_blocking=True)
        self._arrival.record(torch.cuda.current_stream(flag.device))

    def wait(self) -> bool:
        """The flag that was sent last, as soon as its device has it."""
        assert self._flag is not None, "nothing was sent"
        if self._arrival is not None:
            self._arrival.synchronize()
        return bool(self._flag)
