"""Denoising diffusion probabilistic models (Ho et al. 2020) in plain torch.

No I/O, no clock, no environment, no global random state: every function is a function of its arguments. Read in this
order: schedules, diffusion, denoiser, samplers/ancestral, train_step, noise; then unet.
"""

from ddpm.denoiser import (
    Denoiser,
    EpsDenoiser,
    Network,
    Prediction,
    predict_eps_from_x_0,
    predict_x_0_from_eps,
)
from ddpm.diffusion import GaussianStep, Variance, p_mean_variance, q_posterior_mean_variance, q_sample
from ddpm.ema import Ema
from ddpm.losses import simple_loss
from ddpm.metrics import Moments, frechet_distance
from ddpm.model import ModelConfig, build_model
from ddpm.noise import Stream, bernoulli, philox4x32, random_integers, random_words, standard_normal
from ddpm.samplers import SamplerConfig, generate
from ddpm.samplers.ancestral import ancestral_sample, p_sample, p_sample_loop
from ddpm.samplers.ddim import ddim_sample, ddim_step
from ddpm.samplers.spacing import Spacing, spaced_timesteps
from ddpm.schedules import NoiseSchedule, ScheduleConfig, gather, make_schedule
from ddpm.train_step import TrainingBatch, images_to_x_0, make_training_batch, per_sample_loss, x_0_to_images
from ddpm.unet import UNet, UNetConfig

__all__ = [
    "Denoiser",
    "Ema",
    "EpsDenoiser",
    "GaussianStep",
    "ModelConfig",
    "Moments",
    "Network",
    "NoiseSchedule",
    "Prediction",
    "SamplerConfig",
    "ScheduleConfig",
    "Spacing",
    "Stream",
    "TrainingBatch",
    "UNet",
    "UNetConfig",
    "Variance",
    "ancestral_sample",
    "bernoulli",
    "build_model",
    "ddim_sample",
    "ddim_step",
    "frechet_distance",
    "gather",
    "generate",
    "images_to_x_0",
    "make_schedule",
    "make_training_batch",
    "p_mean_variance",
    "p_sample",
    "p_sample_loop",
    "per_sample_loss",
    "philox4x32",
    "predict_eps_from_x_0",
    "predict_x_0_from_eps",
    "q_posterior_mean_variance",
    "q_sample",
    "random_integers",
    "random_words",
    "simple_loss",
    "spaced_timesteps",
    "standard_normal",
    "x_0_to_images",
]
