"""What is minimised in training: L_simple with its weightings, the variational bound, or both.

Every objective is a loss per sample at the one t that was drawn, such that its mean over uniform t is the objective.
x_0_hat is never clipped here: a clipped prediction has no gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from ddpm.process.diffusion import Variance
from ddpm.process.interpolation import Table
from ddpm.process.prediction import PredictionType
from ddpm.process.schedules import NoiseSchedule
from ddpm.training.timestep_sampling import TimestepChoice

_MIN_SNR_GAMMA, _P2_GAMMA, _VLB_WEIGHT = 5.0, 1.0, 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What training minimises. What the network predicts is not part of it: that belongs to the model."""

    name: Literal["simple", "vlb", "hybrid"] = "simple"
    """simple: L_simple, the squared error of the prediction, for the best images. vlb: the variational bound in bits
    per dimension, for the best likelihood. hybrid: L_simple, and vlb_weight times the bound for the variance alone. The
    bound hardly weighs steps that have next to no signal: those of a schedule with zero terminal SNR are best trained
    by L_simple of v."""
    vlb_weight: float = _VLB_WEIGHT
    """hybrid only: weight of the bound (lambda)."""
    weighting: Literal["constant", "min_snr", "p2"] = "constant"
    """Weight of L_simple by t, with SNR = alpha_bar / (1 - alpha_bar). constant: 1, for whatever is predicted. min_snr:
    the error of x_0 times SNR, or min_snr_gamma if that is less. p2: the error of eps over (1 + SNR)^p2_gamma. The last
    two mean the same for every prediction, and are refused with zero terminal SNR, whose last step they never train."""
    min_snr_gamma: float = _MIN_SNR_GAMMA
    """min_snr only: cap of the signal-to-noise ratio."""
    p2_gamma: float = _P2_GAMMA
    """p2 only: how strongly steps with little noise are played down; 0 not at all."""
    t_choice: TimestepChoice = "uniform"
    """uniform: each sample by itself. stratified: one t from each of as many parts of the chain as the batch has
    samples. importance: by the second moment of the loss, for vlb."""

    def __post_init__(self) -> None:
        """Refuse impossible values, and options that the chosen objective would ignore."""
        _check_choice("name", self.name, ("simple", "vlb", "hybrid"))
        _check_choice("weighting", self.weighting, ("constant", "min_snr", "p2"))
        _check_choice("t_choice", self.t_choice, ("uniform", "stratified", "importance"))
        if not self.vlb_weight > 0:
            raise ValueError(f"vlb_weight: must be above 0, got {self.vlb_weight}; 0.001 is the paper's")
        if not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma: must be above 0, got {self.min_snr_gamma}; 5 is the paper's")
        if not self.p2_gamma >= 0:
            raise ValueError(f"p2_gamma: must be at least 0, got {self.p2_gamma}; 1 is the paper's")
        if self.name == "vlb" and self.weighting != "constant":
            raise ValueError(
                f"weighting: is for L_simple, got {self.weighting} with vlb; leave it out or choose simple"
            )
        for field, value, default, owner in (
            ("vlb_weight", self.vlb_weight, _VLB_WEIGHT, self.name == "hybrid"),
            ("min_snr_gamma", self.min_snr_gamma, _MIN_SNR_GAMMA, self.weighting == "min_snr"),
            ("p2_gamma", self.p2_gamma, _P2_GAMMA, self.weighting == "p2"),
        ):
            if value != default and not owner:
                raise ValueError(f"{field}: got {value}, which this objective ignores; leave it out")


def check_objective(
    objective: ObjectiveConfig, variance: Variance, schedule: NoiseSchedule, prediction_type: PredictionType
) -> None:
    """Refuse an objective that does not fit the model that it is to train.

    Args:
        objective: What is to be minimised.
        variance: Which variance the model's steps have.
        schedule: The training chain.
        prediction_type: What the network predicts.

    Raises:
        ValueError: If hybrid is given a fixed variance, which leaves its bound without a gradient, or simple a learned
            one, which it would never train; as loss_weights.
    """
    learned = variance == "learned_range"
    if objective.name == "hybrid" and not learned:
        raise ValueError(f"name: hybrid trains a learned variance, got {variance}; choose learned_range, or simple")
    if objective.name == "simple" and learned:
        raise ValueError("name: simple does not train the learned variance; choose hybrid or vlb")
    if objective.weighting != "constant":
        loss_weights(schedule, objective, prediction_type)


def loss_weights(schedule: NoiseSchedule, objective: ObjectiveConfig, prediction_type: PredictionType) -> Table:
    """Factor of L_simple at every t, for the squared error of what is predicted.

    The squared errors of one x_0_hat are proportional: that of eps is SNR times that of x_0, that of v is SNR + 1 times
    it. Except for "constant", the weight is the same in terms of x_0 whatever is predicted.

    Both weightings fall with SNR, down to 0 where no signal is left, so that they would never train the step that
    sampling starts from. A floor that trains it would be another weighting: with T = 1000 the step before has an SNR of
    4e-9. With v the constant weight is such a one: SNR + 1 in terms of x_0, Salimans and Ho's remedy for this.

    Args:
        schedule: The training chain.
        objective: Which weighting.
        prediction_type: What the network predicts.

    Returns:
        float64 [T], finite and above 0 everywhere, in float32 too.

    Raises:
        ValueError: If the weighting would leave a step untrained.

    Source:
        Hang et al. 2023 (arXiv:2303.09556) for min-SNR; Choi et al. 2022 (arXiv:2204.00227) for P2, with k = 1.
        Salimans and Ho 2022 (arXiv:2202.00512), section 4, for weights where no signal is left.
    """
    alpha_bar = schedule.alpha_bar
    snr = alpha_bar / (1 - alpha_bar)
    if objective.weighting == "constant":
        return torch.ones_like(snr)
    if objective.weighting == "min_snr":
        eps_weight = (objective.min_snr_gamma / snr).clamp(max=1)
    else:
        eps_weight = (1 + snr) ** -objective.p2_gamma
    weight = eps_weight * {"eps": torch.ones_like(snr), "x_0": snr, "v": alpha_bar}[prediction_type]
    untrained = (weight.to(torch.float32) == 0).nonzero()[:, 0].tolist()
    if untrained:
        gamma = "raise min_snr_gamma" if objective.weighting == "min_snr" else "lower p2_gamma"
        remedy = "choose constant for zero terminal SNR" if float(alpha_bar[untrained[-1]]) == 0 else gamma
        raise ValueError(
            f"weighting: must train every step, got {objective.weighting}, of weight 0 at t = {untrained[-1]} for the "
            f"error of {prediction_type}; {remedy}"
        )
    return weight


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}: must be {' or '.join(choices)}, got {value!r}; choose one of them")
