"""How the network in training is evaluated: in which precision and layout, and shared by how many ranks.

What is optimised, averaged and stored is always the float32 network itself.
"""

import contextlib

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.train_config import TrainConfig


def laid_out(network: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """The network on its device, in its layout: before anything is made that has to have the same."""
    return network.to(device, memory_format=_layout(config))  # type: ignore[call-overload,no-any-return]


class NetworkPass:
    """A rank's network(x_t, t, label) -> prediction, whose gradient is the mean over ranks; collective to make.

    Args:
        network: In training mode, as `laid_out` gives it.
        config: Precision and layout.
        device: The network's.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, device: torch.device) -> None:
        """Wrap the network; how float32 is multiplied is set for the process."""
        float32 = "tf32" if config.precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = float32
        torch.backends.cudnn.conv.fp32_precision = float32  # type: ignore[attr-defined]  # tf32 unless told
        self._is_bf16, self._device = config.precision == "bf16", device
        self._layout = _layout(config)
        self._module = network
        if torch.distributed.get_world_size() > 1:  # one rank has nobody to share its gradient with
            device_ids = [device.index] if device.type == "cuda" else None
            self._module = DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)

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


def _layout(config: TrainConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format
