"""A new run that begins with the weights of another model, and shares nothing else with the run that made it.

The network in training and its moving averages both begin with the model that would be sampled, the average; Adam and
the warm-up begin anew. So does the authors' code of Karras et al. 2022 (arXiv:2206.00364) with `--transfer`.
"""

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from ddpm import ModelConfig, build_network
from pipeline.errors import ConfigError
from pipeline.models.model_files import ModelFiles
from pipeline.models.registry import resolve_model
from pipeline.training.train_config import TrainConfig


def check_fork(config: TrainConfig, model_config: ModelConfig) -> str | None:
    """Make sure that the model which a new run begins with is there, and fits.

    Args:
        config: The new run.
        model_config: Its network, in the shape of its dataset.

    Returns:
        The model's digest; None where a run begins with random weights.

    Raises:
        ConfigError: If its weights are those of another network.
        ModelMissingError, CheckpointError, StorageError: If it cannot be read.
    """
    if config.fork_from is None:
        return None
    files = _read(config)
    _load(config, files, build_network(model_config))
    return files.digest


def begin_with_fork(config: TrainConfig, network: nn.Module, digest: str | None) -> None:
    """Put the weights into the network of a run at its step 0, where it has a model to begin with.

    Args:
        config: The run.
        network: Its network, on the CPU.
        digest: What `check_fork` returned when the run was made; None changes nothing.

    Raises:
        ConfigError: If `fork_from` is another model by now.
        ModelMissingError, CheckpointError, StorageError: If it cannot be read.
    """
    if digest is None:
        return
    files = _read(config)
    if files.digest != digest:
        raise ConfigError(
            f"fork_from: {config.fork_from} has digest {files.digest[:16]}, this run was made from {digest[:16]}; name "
            "the version or the checkpoint that it was then"
        )
    _load(config, files, network)


def _read(config: TrainConfig) -> ModelFiles:
    # Trusted, because nothing of it is run: its weights are put into the network that this run has anyway.
    return resolve_model(str(config.fork_from), config.tracking, trust_model_code=True).files


def _load(config: TrainConfig, files: ModelFiles, network: nn.Module) -> None:
    try:
        network.load_state_dict(safetensors.torch.load(files.weights))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).partition(": ")[2][:150]
        raise ConfigError(
            f"fork_from: the weights of {config.fork_from} do not fit this run's network ({reason}); give the network "
            "the options, and the dataset the shape and classes, that it had there"
        ) from error
