"""Finds what would make the host wait for a device, on any device."""

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_READS = (_ATEN._local_scalar_dense.default, _ATEN.item.default, _ATEN.nonzero.default, _ATEN.masked_select.default)
_CONVERSIONS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


class WaitsOfTheHost(TorchDispatchMode):
    """Names, in `found`, reads of a device's numbers, results whose size is one, and blocking copies from and to it.

    Operations are seen by torch's dispatcher; conversions to Python's or numpy's numbers, some of which pass it by, are
    patched.

    Args:
        device: Whose numbers; what lies elsewhere, such as a schedule's table on the host, may be read.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.found: list[str] = []
        self._device = device
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        for name in _CONVERSIONS:
            self._patches.setattr(Tensor, name, self._noting(name, getattr(Tensor, name)))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._patches.undo()

    def _noting(self, name: str, conversion: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(conversion)
        def convert(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.device == self._device:
                self.found.append(f"Tensor.{name} of {list(tensor.shape)}")
            return conversion(tensor, *args, **kwargs)

        return convert

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in _READS and args[0].device == self._device:
            self.found.append(f"{function} of {list(args[0].shape)}")
        elif function is _ATEN._to_copy.default:
            if args[0].device != result.device and not kwargs.get("non_blocking"):
                self.found.append(f"{function} of {list(args[0].shape)}")
        elif function is _ATEN.copy_.default and args[0].device != args[1].device:
            self.found.append(f"{function} of {list(args[1].shape)}")
        return result
