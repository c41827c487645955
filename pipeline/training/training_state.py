"""What a training run consists of between two steps: weights, optimiser, moving averages, position.

As files: the moving averages (averages.py), of which the first is the model that is sampled and registered; beside them
stand the weights in training, the optimiser's moments and `state.json`. safetensors and JSON only.
"""

import math
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

from ddpm import Ema, ImportanceSampler
from pipeline.config_io import read_record, to_json
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.model_files import ModelCard
from pipeline.training.averages import Averages
from pipeline.training.checkpoints import TRAIN_AGAIN
from pipeline.training.train_config import OptimizerConfig

TRAIN_WEIGHTS = "train_weights.safetensors"
_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"
_IMPORTANCE = "importance.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run has come."""

    format_version: int = 2
    """Version of this record's form."""
    step: int
    """Global batches behind the run; the next one has this index."""
    skipped_steps: tuple[int, ...]
    """Global batches left out because their loss or gradient was not finite."""
    num_averaged_images: int
    """Images that the moving averages have taken in."""


class TrainingState:
    """The mutable state of one rank's training.

    Args:
        network: The network in training, on its device.
        config: Adam, warm-up and moving averages.
        keep_ema: Keep the moving averages here (one rank is enough: their inputs are equal on all).
        sigma_rels: Lengths of the power-function averages to track.
        importance: The choice of t where it has a state.
    """

    def __init__(
        self,
        network: nn.Module,
        config: OptimizerConfig,
        *,
        keep_ema: bool,
        sigma_rels: tuple[float, ...] = (),
        importance: ImportanceSampler | None = None,
    ) -> None:
        """Start at step 0 with the network's present weights."""
        self.network, self.importance = network, importance
        self.step = 0
        self.skipped_steps: list[int] = []
        self.averages = Averages(network, config, sigma_rels) if keep_ema else None
        self._config = config
        self._optimizer = torch.optim.Adam(
            network.parameters(), lr=config.learning_rate, betas=(config.beta_1, config.beta_2)
        )

    @property
    def ema(self) -> Ema | None:
        """The moving average that is sampled and registered, where it is kept."""
        return None if self.averages is None else self.averages.registered

    @property
    def learning_rate(self) -> float:
        """Adam's step size for the next step."""
        warmed = min(1.0, (self.step + 1) / self._config.warmup_steps) if self._config.warmup_steps else 1.0
        return self._config.learning_rate * warmed

    def apply_gradient(self, num_images: int) -> float:
        """Clip the gradient and step, unless it is not finite; the position moves on either way.

        The norm is the same on every rank, since the gradient was averaged over them: all step, or none does.

        Args:
            num_images: Images of the global batch, the unit of the moving averages.

        Returns:
            The gradient's norm before clipping; where it is not finite the weights are untouched.
        """
        limit = self._config.grad_clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), limit))
        if torch.isfinite(torch.tensor(norm)):
            for group in self._optimizer.param_groups:
                group["lr"] = self.learning_rate
            self._optimizer.step()
            if self.averages is not None:
                self.averages.update(self.network, num_images)
        else:
            self.skipped_steps.append(self.step)
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    def to_files(self, card: ModelCard, source: bytes | None) -> dict[str, bytes]:
        """The state as files, among them the averaged networks as models.

        Args:
            card: What the one is that is sampled and registered.
            source: Source of the caller's own network.

        Returns:
            Contents by file name.
        """
        assert self.averages is not None, "only the rank that keeps the moving averages writes checkpoints"
        position = Position(
            step=self.step,
            skipped_steps=tuple(self.skipped_steps),
            num_averaged_images=self.averages.num_images,
        )
        moments = {
            f"{index}.{name}": value
            for index, entry in self._optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        return self.averages.to_files(card, source) | {
            _STATE: to_json(position),
            TRAIN_WEIGHTS: _to_safetensors(self.network.state_dict()),
            _OPTIMIZER: _to_safetensors(moments),
            **({} if self.importance is None else {_IMPORTANCE: _to_safetensors(self.importance.state_dict())}),
        }

    def restore(self, files: dict[str, bytes]) -> None:
        """Take over the state that `to_files` wrote.

        Raises:
            CheckpointError: If a file is missing or belongs to another network.
            FormatVersionError: If a file is of another version.
        """
        try:
            position = read_record(Position, files[_STATE], _STATE, remedy=TRAIN_AGAIN)
            self.network.load_state_dict(safetensors.torch.load(files[TRAIN_WEIGHTS]))
            self._restore_optimizer(safetensors.torch.load(files[_OPTIMIZER]))
            if self.importance is not None:
                self.importance.load_state_dict(safetensors.torch.load(files[_IMPORTANCE]))
            if self.averages is not None:
                self.averages.restore(files, num_images=position.num_averaged_images)
        except (KeyError, RuntimeError, ValueError, ConfigError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"checkpoint does not fit the configured network ({reason})") from error
        self.step, self.skipped_steps = position.step, list(position.skipped_steps)

    def _restore_optimizer(self, moments: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})


def _to_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """Copies, because views of one storage cannot be written."""
    return safetensors.torch.save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()})
