"""Arrays of a batch on their way to the device, beside what it computes."""

from typing import Any

import torch
from torch import Tensor


class DeviceCopy:
    """Copies arrays to a device.

    To a GPU from pinned memory, on a stream of its own: the host goes on, and the batch of a step crosses the bus while
    the steps before it are still being computed.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is copied yet."""
        make_stream: Any = torch.cuda.Stream  # it is not typed
        self._device = device
        self._stream = make_stream(device) if device.type == "cuda" else None

    def __call__(self, array: Any) -> Tensor:
        """A numpy array as a tensor on the device, as far as what is computed there from now on sees."""
        tensor = torch.from_numpy(array)
        if self._stream is None:
            return tensor.to(self._device, non_blocking=True)
        present = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copy = tensor.pin_memory().to(self._device, non_blocking=True)
        present.wait_stream(self._stream)  # the device waits, not the host
        copy.record_stream(present)  # its memory is not given away before it was used there
        return copy
