"""Choice of t in training: uniform, stratified over the global batch, or by the importance of its loss.

    uniform      t = f(seed, sample id, epoch): a sample's own, in any batch.
    stratified   t = f(seed, global step, slot): the B slots of a global batch get one t from each of B equal parts of
                 [0, T), dealt out anew in every step. The loss of a batch varies less.
    importance   as stratified in what it depends on, and on the losses so far: p(t) follows the root of their second
                 moment. The one choice with a state, which belongs in the checkpoint.

A *slot* is a place in the global batch, 0 to B - 1, whichever rank holds it: none of the three depends on the number of
workers, as long as the state of the third is fed the whole global batch in the order of the slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ddpm.noise import Stream, random_integers, random_words
from ddpm.process.random_steps import importance_probabilities, timestep_in_stratum, timestep_of_word

TimestepChoice = Literal["uniform", "stratified", "importance"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenTimesteps:
    """Steps at which the samples of a batch are noised."""

    t: Int[Tensor, " b"]
    """Step index [B] in [0, T-1]."""
    weight: Float[Tensor, " b"]
    """Factor of each loss, float32 [B], with which their mean is unbiased for the mean over all t: 1 / (T p(t))."""


def uniform_timesteps(
    num_timesteps: int, *, seed: int, sample_ids: Int[Tensor, " b"], epochs: Int[Tensor, " b"]
) -> ChosenTimesteps:
    """Every t with probability 1/T, for each sample by itself.

    Args:
        num_timesteps: T.
        seed: Key of the run, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48).
        epochs: How often each sample was seen before [B].

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Algorithm 1, line 3.
    """
    t = random_integers(seed, Stream.TRAIN_T, sample_ids, epochs, num_timesteps)
    return ChosenTimesteps(t=t, weight=torch.ones(len(t), device=t.device))


def stratified_timesteps(
    num_timesteps: int, *, seed: int, step: int, slots: Int[Tensor, " b"], global_batch: int
) -> ChosenTimesteps:
    """One t from each of global_batch equal parts of [0, T), dealt to the slots by a permutation of the step.

    Each slot's t is uniform by itself, and T may be any number, smaller or larger than the batch.

    Args:
        num_timesteps: T, with T times global_batch below 2^31.
        seed: Key of the run, in [0, 2^64).
        step: Global step, in [0, 2^32).
        slots: Places in the global batch [B] in [0, global_batch), those of this rank.
        global_batch: Slots in the global batch.

    Raises:
        ValueError: If T or global_batch are out of range, or as random_words.

    Source:
        Kingma et al. 2021 (arXiv:2107.00630), the low-discrepancy sampler; here each stratum draws its own place.
    """
    everyone = torch.arange(global_batch, device=slots.device)
    words = random_words(seed, Stream.TRAIN_T_SLOT, everyone, step, 2)
    stratum = words[:, 0].argsort(stable=True)  # slot i gets the stratum whose key is the i-th smallest
    t = timestep_in_stratum(num_timesteps, stratum, global_batch, words[:, 1])[slots]
    return ChosenTimesteps(t=t, weight=torch.ones(len(t), device=t.device))


class ImportanceSampler:
    """Draws t by the second moment of its latest losses; uniformly until every t has its history.

    The state is float64, and equal on every rank if every rank calls update with the same numbers. It never has the
    host wait for its device.

    Args:
        num_timesteps: T.
        history: Losses remembered for each t.
        uniform_share: As in importance_probabilities.
        device: Where the state is kept, and t drawn.

    Raises:
        ValueError: If num_timesteps or history is below 1, or uniform_share outside [0, 1].

    Source:
        Nichol and Dhariwal 2021 (arXiv:2102.09672), section 3.3.
    """

    def __init__(
        self,
        num_timesteps: int,
        *,
        history: int = 10,
        uniform_share: float = 0.001,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start with no history."""
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps: must be at least 1, got {num_timesteps}; give the chain's length")
        if history < 1:
            raise ValueError(f"history: must be at least 1, got {history}; 10 is the paper's")
        if not 0.0 <= uniform_share <= 1.0:
            raise ValueError(f"uniform_share: must be in [0, 1], got {uniform_share}; 0.001 is a good start")
        self.uniform_share = uniform_share
        # The last row is scratch: what is not to be remembered is written there.
        self._rows = torch.zeros(num_timesteps + 1, history, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    @property
    def probabilities(self) -> Float64[Tensor, " T"]:
        """p(t) of the next draw, float64 [T]."""
        losses = self._rows[:-1]
        num_timesteps, history = losses.shape
        return torch.where(
            (self._counts >= history).all(),
            importance_probabilities(losses.square().mean(dim=1), self.uniform_share),
            1 / num_timesteps,
        )

    def draw(self, *, seed: int, step: int, slots: Int[Tensor, " b"]) -> ChosenTimesteps:
        """Draw the t of some slots of a global step.

        Args:
            seed: Key of the run, in [0, 2^64).
            step: Global step, in [0, 2^32).
            slots: Places in the global batch [B], those of this rank, on the sampler's device.
        """
        probabilities = self.probabilities
        t = timestep_of_word(probabilities, random_words(seed, Stream.TRAIN_T_SLOT, slots, step, 2)[:, 1])
        weight = 1 / (len(probabilities) * probabilities[t])
        return ChosenTimesteps(t=t, weight=weight.to(torch.float32))

    def update(
        self, t: Int[Tensor, " n"], losses: Float[Tensor, " n"], *, is_trained: Bool[Tensor, ""] | None = None
    ) -> None:
        """Take in the losses of a whole global batch; one with a loss that is not finite changes nothing.

        Args:
            t: Step indices [N], in the order of the slots, on the sampler's device.
            losses: Their losses [N], without the factor `weight`.
            is_trained: 0-dim, on that device: False leaves this batch out, as the step that is skipped. None: True.
        """
        num_timesteps, history = len(self._counts), self._rows.shape[1]
        losses = losses.detach().to(torch.float64)
        is_kept = losses.isfinite().all()
        if is_trained is not None:
            is_kept = is_kept & is_trained
        t, order = t.sort(stable=True)
        new = torch.zeros_like(self._counts).index_add_(0, t, torch.ones_like(t))
        so_far = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)  # the same t before, in this batch
        # Only the last are remembered: two writes to one place have no defined order.
        row = torch.where(is_kept & (so_far >= new[t] - history), t, num_timesteps)
        self._rows[row, (self._counts[t] + so_far) % history] = losses[order]
        self._counts += new * is_kept

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the state: `losses` float64 [T, history] and `counts` int64 [T]."""
        return {"losses": self._rows[:-1].clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a stored state.

        Raises:
            ValueError: If the names or shapes are not this sampler's.
        """
        own = self.state_dict()
        if {name: tensor.shape for name, tensor in state.items()} != {name: own[name].shape for name in own}:
            found = {name: list(tensor.shape) for name, tensor in state.items()}
            raise ValueError(
                f"state: must hold losses {list(own['losses'].shape)} and counts {list(self._counts.shape)}, "
                f"got {found}; load the state of a sampler with the same number of steps and history"
            )
        self._rows[:-1].copy_(state["losses"])
        self._counts.copy_(state["counts"])
