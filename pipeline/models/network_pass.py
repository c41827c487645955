"""How a network is evaluated: in which precision and layout, compiled or not, and in training by how many ranks.

What is optimised, averaged and stored is always the float32 network itself; what is computed around its answers, such
as the steps of a sampler, is in float32 and float64.
"""

import contextlib
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Precision = Literal["float32", "tf32", "bf16"]


def laid_out(network: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """The network on its device, in its layout: before anything is made that has to have the same."""
    return network.to(device, memory_format=_layout(channels_last))  # type: ignore[call-overload,no-any-return]


def multiply_float32_as(precision: Precision) -> None:
    """Have this process's GPUs multiply float32 as it is, or as tf32 where that is the precision."""
    float32 = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = float32
    torch.backends.cudnn.conv.fp32_precision = float32  # type: ignore[attr-defined]  # tf32 unless told


class NetworkPass:
    """A network(x_t, t, label) -> prediction; in training a rank's, whose gradient is the mean over ranks.

    Args:
        network: As `laid_out` gives it.
        device: The network's.
        precision: How it is evaluated: float32; tf32, where a GPU rounds to 10 bits what it multiplies; bf16, in which
            most operations compute.
        channels_last: Whether images are given with the channels innermost.
    """

    def __init__(self, network: nn.Module, device: torch.device, *, precision: Precision, channels_last: bool) -> None:
        """Evaluate the network on this rank alone; how float32 is multiplied is set for the process."""
        multiply_float32_as(precision)
        self._is_bf16, self._device = precision == "bf16", device
        self._layout = _layout(channels_last)
        self._network = self._module = network

    def compile(self) -> None:
        """Have the network compiled when it is evaluated first, in training in forward and backward pass.

        Its backward pass is one: ranks share their gradients after it, and no longer in buckets while it goes on.
        """
        self._network.compile(dynamic=False)

    def interpret(self) -> None:
        """Undo `compile`."""
        self._network._compiled_call_impl = None

    def share(self) -> None:
        """Average gradients over the ranks from here on; collective."""
        if torch.distributed.get_world_size() > 1:  # one rank has nobody to share its gradient with
            device_ids = [self._device.index] if self._device.type == "cuda" else None
            self._module = DistributedDataParallel(self._network, device_ids=device_ids, gradient_as_bucket_view=True)

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The prediction; in bfloat16 where that is the precision, and the caller goes on in float32."""
        bf16 = torch.autocast(self._device.type, torch.bfloat16) if self._is_bf16 else contextlib.nullcontext()
        with bf16:
            prediction: Tensor = self._module(x_t.contiguous(memory_format=self._layout), t, label)
        return prediction

    def shared(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward pass of a micro-batch: ranks share their gradients after the last one alone."""
        if is_last or not isinstance(self._module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._module.no_sync()


def compile_or_interpret(
    network: NetworkPass, attempt: Callable[[], None], agree: Callable[[bool], bool] = bool
) -> str | None:
    """Compile the network if that works on every rank.

    Args:
        network: Not shared by ranks yet.
        attempt: Evaluates it, in training forward and backward, on every size of batch that is to come.
        agree: Whether what holds here holds on every rank; collective.

    Returns:
        Why the network is not compiled; None if it is.

    Raises:
        torch.OutOfMemoryError: If the compiled network does not fit.
    """
    reason = ""
    try:
        network.compile()
        attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler's, which has no common class for them, or its compiler's
        lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines()]
        reason = " ".join(line for line in lines if line)[:300]
    if agree(not reason):
        return None
    network.interpret()
    return reason or "another worker could not compile it"


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
