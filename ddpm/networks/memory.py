"""How much memory a step of training takes, counted on tensors that have shapes and no content."""

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.networks.model_config import ModelConfig, construct


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes that a forward and backward pass takes, beside weights and gradients."""

    kept: int
    """At the end of the forward pass, for the backward pass."""
    peak: int
    """At most."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that operations made and that are still held, and the most that there were.

    What was there before (weights, gradients, inputs) is not counted, whatever views of it are made.

    Args:
        there_before: Tensors whose memory is not counted.
    """

    def __init__(self, there_before: Iterable[Tensor]) -> None:
        """Count from here on."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._there_before = [tensor.untyped_storage() for tensor in there_before]
        self._seen = {storage._cdata for storage in self._there_before}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do the operation, and hold what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())

    def _let_go(self, address: int, num_bytes: int) -> None:
        self._seen.discard(address)
        self.now -= num_bytes


def step_memory(
    config: ModelConfig, batch: int, *, gradient_checkpointing: bool = False, bf16: bool = False
) -> StepMemory:
    """Memory of one step without having it: for a network of any size.

    What kernels take besides (workspaces, what an allocator cannot reuse) is not in it.

    Args:
        config: The network and its images.
        batch: Images.
        gradient_checkpointing: As build_network.
        bf16: Whether operations compute in bfloat16 (autocast), the weights staying float32.

    Raises:
        Exception: Of a network of one's own, where it looks at values.
    """
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        network = construct(config)
        if gradient_checkpointing:
            network.gradient_checkpointing = True  # type: ignore[assignment]
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x_t, t = torch.zeros(batch, config.channels, *config.image_size), torch.zeros(batch, dtype=torch.int64)
        weights = [tensor for one in network.parameters() for tensor in (one, one.grad) if tensor is not None]
        autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        with LiveBytes([*weights, *network.buffers(), x_t, t]) as live:
            with autocast:
                prediction = network(x_t, t, None)  # no label: the range of labels without content cannot be checked
            loss = prediction.float().square().mean()
            del prediction
            kept = live.now
            torch.autograd.backward(loss)
    return StepMemory(kept=kept, peak=live.peak)
