"""What a training run consists of between two steps: weights, optimiser, moving averages, position.

Whether a step was finite is known to the device alone. Optimiser and averages leave a step out there, and the host goes
on. Which steps were skipped it learns when somebody asks (`TrainingState.skipped_steps`), of all since the last time at
once: the device has work all the time.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ddpm import Ema, ImportanceSampler
from pipeline.errors import CheckpointError
from pipeline.training.checkpoints.ema_snapshots import SnapshotRecord
from pipeline.training.checkpoints.host_copy import Tensors
from pipeline.training.checkpoints.state_files import IMPORTANCE, OPTIMIZER, TRAIN_WEIGHTS, Position, StateParts
from pipeline.training.train_config import OptimizerConfig
from pipeline.training.worker.averages import Averages


class TrainingState:
    """The mutable state of one rank's training; of its thread alone.

    Args:
        network: The network in training, on its device.
        config: Adam, warm-up and moving averages.
        sigma_rels: Lengths of the power-function averages to track.
        importance: The choice of t where it has a state.
        rank: This rank, which keeps its share of the moving averages.
        world: Number of ranks.
    """

    def __init__(
        self,
        network: nn.Module,
        config: OptimizerConfig,
        *,
        sigma_rels: tuple[float, ...] = (),
        importance: ImportanceSampler | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Start at step 0 with the network's present weights."""
        self.network, self.importance = network, importance
        self.step = 0
        self.micro_batch: int | None = None
        """Images of a rank that pass through the network at once; None: all of them."""
        self._skipped_steps: list[int] = []
        self._are_finite: dict[int, Tensor] = {}  # of steps that were not asked about yet
        self.averages = Averages(network, config, sigma_rels, rank=rank, world=world)
        self._config = config
        # Of Adam's implementations the fused one alone can leave a step out by a flag on the device.
        self._optimizer = torch.optim.Adam(
            network.parameters(), lr=config.learning_rate, betas=(config.beta_1, config.beta_2), fused=True
        )

    @property
    def skipped_steps(self) -> tuple[int, ...]:
        """Global batches that were not trained on, in order: the gradient was not finite, or they were left out.

        To read it waits for the device.
        """
        if self._are_finite:
            are_finite = torch.stack(list(self._are_finite.values())).tolist()
            self._skipped_steps += [step for step, is_finite in zip(self._are_finite, are_finite) if not is_finite]
            self._are_finite = {}
        return tuple(self._skipped_steps)

    @property
    def has_moments(self) -> bool:
        """Whether the optimiser's moments are in memory: from its first step on."""
        return bool(self._optimizer.state)

    @property
    def ema(self) -> Ema:
        """This rank's share of the moving average that is sampled and registered."""
        return self.averages.registered

    @property
    def learning_rate(self) -> float:
        """Adam's step size for the next step."""
        warmed = min(1.0, (self.step + 1) / self._config.warmup_steps) if self._config.warmup_steps else 1.0
        return self._config.learning_rate * warmed

    def apply_gradient(self, num_images: int) -> Tensor:
        """Clip the gradient and step, unless it is not finite; the position moves on either way.

        The norm is the same on every rank, since the gradient was averaged over them: all step, or none does. Nothing
        waits for the device.

        Args:
            num_images: Images of the global batch, the unit of the moving averages.

        Returns:
            The gradient's norm before clipping, 0-dim on its device; where it is not finite the weights, the moments,
            Adam's count of steps and the averages are untouched.
        """
        parameters = list(self.network.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._config.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._config.grad_clip_norm, norm)
        is_finite = norm.isfinite()
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate  # a tensor would give other last bits than a number
        self._optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.averages.update(self.network, torch.where(is_finite, num_images, 0))
        self._are_finite[self.step] = is_finite
        self.step += 1
        return norm

    def leave_out(self) -> None:
        """Move on past the next global batch without training on it; noted as skipped."""
        self._skipped_steps = [*self.skipped_steps, self.step]  # in order: this waits, as few steps do
        self.step += 1

    def parts(self) -> StateParts:
        """The whole state, on rank 0 after the averages were gathered; not copies, the next step changes them."""
        averages = self.averages
        position = Position(
            step=self.step,
            skipped_steps=self.skipped_steps,
            num_averaged_images=averages.num_images,
            micro_batch=self.micro_batch,
        )
        return StateParts(
            position=position,
            tensors=averages.tensors() | self._shared_tensors(),
            halflives_images=averages.halflives_images,
        )

    @property
    def files(self) -> tuple[str, ...]:
        """Names, as in `StateParts.tensors`, of what a state is restored from."""
        importance = () if self.importance is None else (IMPORTANCE,)
        return (TRAIN_WEIGHTS, OPTIMIZER, *importance, *self.averages.files)

    def restore(self, position: Position, tensors: Tensors, snapshots: Sequence[SnapshotRecord] = ()) -> None:
        """Take over a stored state.

        Args:
            position: How far it had come.
            tensors: Those of `files`, whole, on any device.
            snapshots: The snapshots behind it.

        Raises:
            CheckpointError: If something is missing or belongs to another network.
        """
        try:
            self.network.load_state_dict(tensors[TRAIN_WEIGHTS])
            self._restore_optimizer(tensors[OPTIMIZER])
            if self.importance is not None:
                self.importance.load_state_dict(tensors[IMPORTANCE])
            self.averages.restore(tensors, snapshots, num_images=position.num_averaged_images)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"checkpoint does not fit the configured network ({reason})") from error
        self.step, self.micro_batch = position.step, position.micro_batch
        self._skipped_steps, self._are_finite = list(position.skipped_steps), {}

    def _shared_tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = {
            f"{index}.{name}": value
            for index, entry in self._optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        tensors = {TRAIN_WEIGHTS: self.network.state_dict(), OPTIMIZER: moments}
        return tensors if self.importance is None else tensors | {IMPORTANCE: self.importance.state_dict()}

    def _restore_optimizer(self, moments: Mapping[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})
