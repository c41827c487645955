"""Algorithm 1 of Ho et al.: noise a batch at random steps and compare the network's prediction with the answer.

Every random number is a function of (seed, sample id, epoch), so a sample is noised alike on whichever rank reads it.
Only t may be chosen otherwise (timestep_sampling), by the place in the global batch.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddpm.likelihood.terms import bound_loss
from ddpm.model import DiffusionModel
from ddpm.noise import Stream, bernoulli, standard_normal
from ddpm.process.diffusion import p_mean_variance, q_sample
from ddpm.process.prediction import check_prediction_type, prediction_target
from ddpm.process.schedules import gather
from ddpm.shapes import Images, Labels, Steps, check_precision
from ddpm.training.objectives import ObjectiveConfig, check_objective, loss_weights
from ddpm.training.timestep_sampling import ChosenTimesteps, uniform_timesteps

L_SIMPLE = ObjectiveConfig()
"""The objective of Ho et al."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """What the network sees in a training step, and the answer."""

    x_t: Images
    """Noised images [B, C, H, W]."""
    t: Steps
    """Step index [B] in [0, T-1]."""
    eps: Images
    """The noise that was added, same shape as x_t."""
    x_0: Images
    """The clean images, flipped where a flip was drawn, same shape."""
    weight: Float[Tensor, " b"]
    """Factor of each loss for the choice of t; 1 unless t was chosen by importance."""
    label: Labels | None
    """Class [B], where some may be the null label; None for an unconditional network."""


def make_training_batch(
    model: DiffusionModel,
    x_0: Images,
    label: Labels | None,
    *,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    epochs: Int[Tensor, " b"],
    flip: bool,
    label_drop: float,
    timesteps: ChosenTimesteps | None = None,
) -> TrainingBatch:
    """Draw t, eps, the flip and the label drop of each sample, and noise it.

    Args:
        model: The model in training; its network is not asked.
        x_0: Clean images [B, C, H, W] in [-1, 1].
        label: Class [B], or None.
        seed: Key of the run, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48), on x_0's device.
        epochs: How often each sample was seen before [B], on x_0's device.
        flip: Mirror each image left to right with probability 1/2.
        label_drop: Probability with which a label becomes the null label (classifier-free guidance).
        timesteps: t of each sample, where it is stratified or chosen by importance; None draws it uniformly.

    Raises:
        ValueError: If label_drop is outside [0, 1], or above 0 for a model without classes; as q_sample.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Algorithm 1, lines 2-4. Label drop: Ho and Salimans 2022 (arXiv:2207.12598).
    """
    schedule, null_label = model.schedule, model.null_label
    if timesteps is None:
        timesteps = uniform_timesteps(schedule.num_timesteps, seed=seed, sample_ids=sample_ids, epochs=epochs)
    t = timesteps.t
    eps = standard_normal(seed, Stream.TRAIN_EPS, sample_ids, epochs, x_0.shape[1:], x_0.dtype)
    if flip:
        flipped = bernoulli(seed, Stream.TRAIN_FLIP, sample_ids, epochs, 0.5)
        x_0 = torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0)
    if label_drop != 0:
        if label is None or null_label is None:
            raise ValueError(f"label_drop: needs labels and a null label, got {label_drop} without; set it to 0")
        dropped = bernoulli(seed, Stream.TRAIN_LABEL_DROP, sample_ids, epochs, label_drop)
        label = torch.where(dropped, null_label, label)
    x_t = q_sample(schedule, x_0, t, eps)
    return TrainingBatch(x_t=x_t, t=t, eps=eps, x_0=x_0, weight=timesteps.weight, label=label)


def per_sample_loss(
    model: DiffusionModel, batch: TrainingBatch, *, objective: ObjectiveConfig = L_SIMPLE
) -> Float[Tensor, " b"]:
    """The objective at each sample's t, with gradient, for one evaluation of the network.

    The caller multiplies by batch.weight and averages over the global batch.

    Args:
        model: The model in training, its network perhaps wrapped for many workers.
        batch: From make_training_batch.
        objective: What is minimised.

    Returns:
        [B]: L_simple as a mean over C, H and W; T times the term of the bound at t in bits per dimension, whose mean
        over t is the bound without L_T, which no network can change; or their sum.

    Raises:
        ValueError: If the objective does not fit the variance or the schedule, eps is predicted where no signal is
            left, or the network answers with another shape.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Algorithm 1, line 5; Nichol and Dhariwal 2021 (arXiv:2102.09672), Eq. 16.
    """
    check_prediction_type(model.prediction_type, model.schedule)
    check_objective(objective, model.variance, model.schedule, model.prediction_type)
    output = model.network(batch.x_t, batch.t, batch.label).to(batch.eps.dtype)
    if objective.name == "vlb":
        return _bound(model, output, batch)
    prediction = output[:, : output.shape[1] // 2] if model.learned_variance else output
    target = prediction_target(model.schedule, batch.x_0, batch.t, batch.eps, model.prediction_type)
    weight = gather(loss_weights(model.schedule, objective, model.prediction_type), batch.t, target)[:, 0, 0, 0]
    simple = weight * simple_loss(target, prediction)
    if objective.name == "simple":
        return simple
    # Here the bound trains the variance alone: L_simple gives better images than its noisy gradient for the mean.
    detached = torch.cat((prediction.detach(), output[:, prediction.shape[1] :]), dim=1)
    return simple + objective.vlb_weight * _bound(model, detached, batch)


def simple_loss(eps: Float[Tensor, "b c h w"], eps_hat: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """L_simple: the squared error of the predicted noise, or of x_0 or v where these are what is predicted.

    Args:
        eps: The noise that was added [B, C, H, W].
        eps_hat: The network's prediction, same shape.

    Returns:
        Mean over C, H and W for each sample [B]; 1 for a network that always answers 0, in expectation.

    Raises:
        ValueError: If the shapes differ, or one is neither float32 nor float64.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Eq. 14.
    """
    check_precision("eps", eps)
    check_precision("eps_hat", eps_hat)
    if eps.shape != eps_hat.shape:
        raise ValueError(
            f"eps_hat: must have eps's shape {list(eps.shape)}, got {list(eps_hat.shape)}; check the network"
        )
    return (eps - eps_hat).square().mean(dim=(1, 2, 3))


def _bound(model: DiffusionModel, output: Tensor, batch: TrainingBatch) -> Float[Tensor, " b"]:
    """T times the bound's term at t, for what the network has answered."""
    answered = dataclasses.replace(model, network=lambda x_t, t, label: output).denoiser(clip_x_0=False)
    schedule = model.schedule
    step = p_mean_variance(schedule, answered, batch.x_t, batch.t, batch.label, variance=model.variance)
    terms = bound_loss(schedule, batch.x_0, batch.t, step, model.num_levels)
    return (schedule.num_timesteps * terms).to(output.dtype)
