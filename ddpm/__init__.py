"""Denoising diffusion probabilistic models (Ho et al. 2020) in plain torch.

No I/O, no clock, no environment, no global random state: every function is a function of its arguments. Read in this
order: schedules, prediction, denoiser, diffusion, samplers/ancestral, train_step, noise; then losses, likelihood, unet.
"""

from ddpm.editing.interpolate import interpolate_images, invert_images, num_interpolation_evaluations, slerp
from ddpm.editing.partial import num_partial_steps, partial_diffusion
from ddpm.editing.repaint import num_repaint_evaluations, repaint, repaint_sample
from ddpm.likelihood.bound import BoundStatistics, ImageBound, LikelihoodConfig, bound_of_images
from ddpm.likelihood.decoder import discretised_log_likelihood
from ddpm.likelihood.probability_flow import (
    probability_flow_bits_per_dim,
    probability_flow_log_density,
    rademacher_probes,
)
from ddpm.likelihood.terms import bound_loss, bound_term, gaussian_kl, prior_loss, simple_loss
from ddpm.networks.dit import DiT, DiTConfig
from ddpm.networks.model_config import ModelConfig, build_model
from ddpm.networks.unet import UNet, UNetConfig
from ddpm.noise import Stream, bernoulli, philox4x32, random_integers, random_words, standard_normal
from ddpm.process.denoiser import Denoiser, Network, NetworkDenoiser, Prediction
from ddpm.process.diffusion import (
    GaussianStep,
    Variance,
    analytic_variance,
    p_mean_variance,
    q_posterior_mean_variance,
    q_sample,
)
from ddpm.process.guidance import Guide, GuidedNetwork
from ddpm.process.prediction import (
    PredictionType,
    predict_eps_from_v,
    predict_eps_from_x_0,
    predict_v,
    predict_x_0_and_eps,
    predict_x_0_from_eps,
    predict_x_0_from_v,
    prediction_target,
)
from ddpm.process.schedules import NoiseSchedule, ScheduleConfig, gather, make_schedule
from ddpm.process.spacing import Spacing, continuous_timesteps, spaced_timesteps
from ddpm.samplers.analytic import x_0_error_table, x_0_errors
from ddpm.samplers.ancestral import ancestral_sample, p_sample, p_sample_loop
from ddpm.samplers.config import SamplerConfig
from ddpm.samplers.ddim import ddim_invert, ddim_sample, ddim_step
from ddpm.samplers.dpm_solver import dpm_solver_2m_sample, dpm_solver_2m_sde_sample
from ddpm.samplers.dpm_solver_3m import dpm_solver_3m_common_sample, dpm_solver_3m_sample
from ddpm.samplers.generate import generate, num_evaluations, run_sampler, sampling_denoiser
from ddpm.samplers.heun import heun_sample
from ddpm.statistics.frechet import Moments, frechet_distance
from ddpm.statistics.running_moments import Estimate, RunningMoments
from ddpm.training.ema import Ema, EmaBank
from ddpm.training.objectives import ObjectiveConfig, check_objective, loss_weights
from ddpm.training.post_hoc_ema import (
    PostHocFit,
    PowerEma,
    PowerProfile,
    combine_snapshots,
    fit_post_hoc_ema,
    gamma_from_sigma_rel,
    sigma_rel_from_gamma,
)
from ddpm.training.timestep_sampling import (
    ChosenTimesteps,
    ImportanceSampler,
    importance_probabilities,
    stratified_timesteps,
    uniform_timesteps,
)
from ddpm.training.train_step import TrainingBatch, images_to_x_0, make_training_batch, per_sample_loss, x_0_to_images

__all__ = [
    "BoundStatistics",
    "ChosenTimesteps",
    "Denoiser",
    "DiT",
    "DiTConfig",
    "Ema",
    "EmaBank",
    "Estimate",
    "GaussianStep",
    "Guide",
    "GuidedNetwork",
    "ImageBound",
    "ImportanceSampler",
    "LikelihoodConfig",
    "ModelConfig",
    "Moments",
    "Network",
    "NetworkDenoiser",
    "NoiseSchedule",
    "ObjectiveConfig",
    "PostHocFit",
    "PowerEma",
    "PowerProfile",
    "Prediction",
    "PredictionType",
    "RunningMoments",
    "SamplerConfig",
    "ScheduleConfig",
    "Spacing",
    "Stream",
    "TrainingBatch",
    "UNet",
    "UNetConfig",
    "Variance",
    "analytic_variance",
    "ancestral_sample",
    "bernoulli",
    "bound_loss",
    "bound_of_images",
    "bound_term",
    "build_model",
    "check_objective",
    "combine_snapshots",
    "continuous_timesteps",
    "ddim_invert",
    "ddim_sample",
    "ddim_step",
    "discretised_log_likelihood",
    "dpm_solver_2m_sample",
    "dpm_solver_2m_sde_sample",
    "dpm_solver_3m_common_sample",
    "dpm_solver_3m_sample",
    "fit_post_hoc_ema",
    "frechet_distance",
    "gamma_from_sigma_rel",
    "gather",
    "gaussian_kl",
    "generate",
    "heun_sample",
    "images_to_x_0",
    "importance_probabilities",
    "interpolate_images",
    "invert_images",
    "loss_weights",
    "make_schedule",
    "make_training_batch",
    "num_evaluations",
    "num_interpolation_evaluations",
    "num_partial_steps",
    "num_repaint_evaluations",
    "p_mean_variance",
    "p_sample",
    "p_sample_loop",
    "partial_diffusion",
    "per_sample_loss",
    "philox4x32",
    "predict_eps_from_v",
    "predict_eps_from_x_0",
    "predict_v",
    "predict_x_0_and_eps",
    "predict_x_0_from_eps",
    "predict_x_0_from_v",
    "prediction_target",
    "prior_loss",
    "probability_flow_bits_per_dim",
    "probability_flow_log_density",
    "q_posterior_mean_variance",
    "q_sample",
    "rademacher_probes",
    "random_integers",
    "random_words",
    "repaint",
    "repaint_sample",
    "run_sampler",
    "sampling_denoiser",
    "sigma_rel_from_gamma",
    "simple_loss",
    "slerp",
    "spaced_timesteps",
    "standard_normal",
    "stratified_timesteps",
    "uniform_timesteps",
    "x_0_error_table",
    "x_0_errors",
    "x_0_to_images",
]
