"""A model, made ready to be sampled from: on its device, in the precision and layout of a spec, compiled or not."""

import contextlib
import dataclasses

import torch
from torch import nn

from ddpm import DiffusionModel
from pipeline.errors import ConfigError
from pipeline.generation.spec.sampling_plan import SamplingSpec
from pipeline.models.cuda_graph import GraphedNetwork
from pipeline.models.network_pass import NetworkPass, compile_or_interpret, laid_out
from pipeline.progress import say


def set_up(model: DiffusionModel, spec: SamplingSpec, device: torch.device) -> DiffusionModel:
    """The model whose network is evaluated as the spec says; how float32 is multiplied is set for the process.

    Args:
        model: As it is loaded, on the CPU.
        spec: Precision, layout, whether it is compiled, and for which batches.
        device: Where it is evaluated.

    Raises:
        ConfigError: If the network is to be compiled and cannot be: evaluated otherwise, it would make other last bits.
    """
    assert isinstance(model.network, nn.Module), "built from the card"
    network = laid_out(model.network, device, channels_last=spec.channels_last)
    evaluated = NetworkPass(network, device, precision=spec.precision, channels_last=spec.channels_last)
    ready = dataclasses.replace(model, network=evaluated)
    if not spec.compile:
        return ready
    # If a batch does not fit, the first shard does not either: there the message names one that does.
    with contextlib.suppress(torch.OutOfMemoryError):
        reason = compile_or_interpret(evaluated, lambda: _evaluate_nothing(ready, spec.batch_size, device))
        if reason is not None:
            raise ConfigError(f"sample: compile: does not work here ({reason}); leave it out")
    return ready if device.type != "cuda" else dataclasses.replace(ready, network=GraphedNetwork(evaluated, say))


@torch.no_grad()
def _evaluate_nothing(model: DiffusionModel, batch_size: int, device: torch.device) -> None:
    """One evaluation of a batch of nothing."""
    label = None if model.null_label is None else torch.zeros(batch_size, dtype=torch.int64, device=device)
    t = torch.zeros(batch_size, dtype=torch.int64, device=device)
    model.network(torch.zeros(batch_size, *model.image_shape, device=device), t, label)
