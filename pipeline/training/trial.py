"""What is tried before the first step, on images of nothing: how many fit into memory.

That is a function of the machine, so it is asked of it and not foretold; all ranks come to the same answer.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed
from torch import Tensor, nn

from ddpm import ModelConfig
from pipeline.models.network_pass import NetworkPass


def micro_batches(num_rows: int, most_rows: int, size: int | None) -> list[slice]:
    """Cut a rank's rows into parts that pass through the network one after the other.

    Args:
        num_rows: Rows of this rank, at least 1.
        most_rows: Rows of the rank that has the most.
        size: Rows of a part at most; None for all at once.

    Returns:
        Parts in order, as equal as can be, and equally many on every rank unless it has fewer rows than that.
    """
    number = 1 if size is None else -(-most_rows // size)
    ends = [num_rows * part // number for part in range(number + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends) if begin < end]


def largest_fitting(num_rows: int, attempt: Callable[[int], None], agree: Callable[[bool], bool] = bool) -> int | None:
    """The largest divisor of a batch that fits into memory.

    Args:
        num_rows: Images of the batch.
        attempt: Trains on so many.
        agree: Whether what holds here holds on every rank; collective.

    Returns:
        Images of a micro-batch; None if not even one fits.
    """
    for size in range(num_rows, 0, -1):
        if num_rows % size:
            continue
        try:
            attempt(size)
            fits = True
        except torch.OutOfMemoryError:  # what it held is free once the exception is gone
            fits = False
            torch.cuda.empty_cache()
        if agree(fits):
            return size
    return None


def everywhere(device: torch.device) -> Callable[[bool], bool]:
    """For `largest_fitting` and `compile_or_interpret`: whether something holds on all ranks; collective."""

    def agree(here: bool) -> bool:
        answer = torch.tensor(int(here), device=device)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN)
        return bool(answer)

    return agree


def train_on_nothing(
    network: NetworkPass, module: nn.Module, config: ModelConfig, size: int, *, holds_moments: bool
) -> None:
    """Pass so many images forward and backward, beside what an optimiser will hold; no weight changes.

    Args:
        network: The network.
        module: Its module, whose gradients are let go.
        config: Its images and classes.
        size: How many.
        holds_moments: Whether the optimiser has its moments already.

    Raises:
        torch.OutOfMemoryError: If they do not fit.
    """
    parameters = list(module.parameters())
    device, moments = parameters[0].device, list[Tensor]()
    try:
        if not holds_moments:
            moments += [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]
        label = None if config.num_classes is None else torch.zeros(size, dtype=torch.int64, device=device)
        x_t = torch.zeros(size, config.channels, *config.image_size, device=device)
        torch.autograd.backward(network(x_t, torch.zeros(size, dtype=torch.int64, device=device), label).sum())
    finally:
        for parameter in parameters:
            parameter.grad = None
