"""Gradient checkpointing: the memory of training for time.

Between the forward and the backward pass only the inputs of a network's blocks are kept; what is inside a block is
computed again when its gradient is due. That costs about one more forward pass. Nothing that is computed changes, not
by a bit: the state of the random generators is put back first, so that dropout drops the same activations.

A network takes part by an attribute `gradient_checkpointing: bool`, False at first, that its forward obeys. It belongs
to a training run and not to the model: it is in no config of a network and in no state dict.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ATTRIBUTE = "gradient_checkpointing"


def switch_on_checkpointing(network: nn.Module, name: str) -> None:
    """Makes a network keep its blocks' inputs only, and compute the blocks again in the backward pass.

    Args:
        network: The network, with the attribute `gradient_checkpointing`.
        name: What messages call it.

    Raises:
        ValueError: If the network has no such attribute.
    """
    if not isinstance(getattr(network, ATTRIBUTE, None), bool):
        raise ValueError(
            f"{ATTRIBUTE}: {name} does not offer it; give the module an attribute {ATTRIBUTE} = False that its forward "
            "obeys when it is set to True, or switch it off"
        )
    setattr(network, ATTRIBUTE, True)


def run_block(block: Callable[..., Tensor], *inputs: Any, recompute: bool) -> Tensor:
    """The output of a block.

    Args:
        block: Any function of tensors; called a second time in the backward pass where recompute is set.
        inputs: Its arguments.
        recompute: Keep the inputs only, and compute the block again in the backward pass; without gradients nothing is
            kept anyway.
    """
    if not recompute or not torch.is_grad_enabled():
        return block(*inputs)
    # Not the reentrant kind: DistributedDataParallel counts each parameter's gradient once.
    return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=True))
