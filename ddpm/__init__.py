"""Denoising diffusion probabilistic models (Ho et al. 2020) in plain torch: what a user of the library reaches for.

No I/O, no clock, no environment, no global random state: every function is a function of its arguments. Whatever is not
listed here is taken from its module. Read in this order: process/schedules, process/diffusion, process/denoiser, model,
samplers/sampler, samplers/generate, training/train_step, noise; then likelihood/bound, networks/unet.
"""

from ddpm.editing.interpolate import interpolate_images, invert_images, slerp
from ddpm.editing.partial import partial_diffusion
from ddpm.editing.repaint import repaint
from ddpm.likelihood.bound import BoundStatistics, ImageBound, LikelihoodConfig, bound_of_images
from ddpm.likelihood.decoder import discretised_log_likelihood
from ddpm.likelihood.probability_flow import FlowBound, probability_flow_bound
from ddpm.likelihood.terms import bound_loss, bound_term, gaussian_kl, prior_loss
from ddpm.model import DiffusionModel, build_model
from ddpm.networks.cost import count_parameters, flops_per_image
from ddpm.networks.dit import DiT, DiTConfig
from ddpm.networks.model_config import ModelConfig, build_network
from ddpm.networks.network_config import NetworkConfig
from ddpm.networks.own import OwnNetworkConfig
from ddpm.networks.registry import NETWORKS
from ddpm.networks.unet import UNet, UNetConfig
from ddpm.noise import Stream, bernoulli, philox4x32, random_integers, random_words, standard_normal
from ddpm.process.denoiser import Denoiser, Network, NetworkDenoiser, Prediction
from ddpm.process.diffusion import GaussianStep, Variance, p_mean_variance, q_posterior_mean_variance, q_sample
from ddpm.process.guidance import GuidedNetwork
from ddpm.process.pixels import images_to_x_0, x_0_to_images
from ddpm.process.prediction import PredictionType, predict_x_0_and_eps, prediction_target
from ddpm.process.schedules import NoiseSchedule, ScheduleConfig, make_schedule
from ddpm.process.spacing import Spacing, spaced_timesteps
from ddpm.samplers.analytic import x_0_error_table, x_0_errors
from ddpm.samplers.ancestral import Ancestral, p_sample
from ddpm.samplers.ddim import DDIM, ddim_invert, ddim_step
from ddpm.samplers.dpm_solver import DPMSolver2M, DPMSolver2MSDE
from ddpm.samplers.dpm_solver_3m import DPMSolver3M, DPMSolver3MCommon
from ddpm.samplers.generate import generate
from ddpm.samplers.heun import Heun
from ddpm.samplers.registry import SAMPLERS
from ddpm.samplers.sampler import Sampler, SingleStepSampler
from ddpm.statistics.frechet import FrechetComparison, Moments, frechet_distance
from ddpm.statistics.running_moments import (
    Estimate,
    RunningMoments,
    agreement_standard_error,
    stratified_standard_error,
)
from ddpm.training.ema import Ema, EmaBank
from ddpm.training.objectives import ObjectiveConfig
from ddpm.training.post_hoc_ema import PostHocFit, PowerEma, PowerProfile, combine_snapshots, fit_post_hoc_ema
from ddpm.training.timestep_sampling import ChosenTimesteps, ImportanceSampler, stratified_timesteps
from ddpm.training.train_step import TrainingBatch, make_training_batch, per_sample_loss, simple_loss

__all__ = [
    "DDIM",
    "NETWORKS",
    "SAMPLERS",
    "Ancestral",
    "BoundStatistics",
    "ChosenTimesteps",
    "DPMSolver2M",
    "DPMSolver2MSDE",
    "DPMSolver3M",
    "DPMSolver3MCommon",
    "Denoiser",
    "DiT",
    "DiTConfig",
    "DiffusionModel",
    "Ema",
    "EmaBank",
    "Estimate",
    "FlowBound",
    "FrechetComparison",
    "GaussianStep",
    "GuidedNetwork",
    "Heun",
    "ImageBound",
    "ImportanceSampler",
    "LikelihoodConfig",
    "ModelConfig",
    "Moments",
    "Network",
    "NetworkConfig",
    "NetworkDenoiser",
    "NoiseSchedule",
    "ObjectiveConfig",
    "OwnNetworkConfig",
    "PostHocFit",
    "PowerEma",
    "PowerProfile",
    "Prediction",
    "PredictionType",
    "RunningMoments",
    "Sampler",
    "ScheduleConfig",
    "SingleStepSampler",
    "Spacing",
    "Stream",
    "TrainingBatch",
    "UNet",
    "UNetConfig",
    "Variance",
    "agreement_standard_error",
    "bernoulli",
    "bound_loss",
    "bound_of_images",
    "bound_term",
    "build_model",
    "build_network",
    "combine_snapshots",
    "count_parameters",
    "ddim_invert",
    "ddim_step",
    "discretised_log_likelihood",
    "fit_post_hoc_ema",
    "flops_per_image",
    "frechet_distance",
    "gaussian_kl",
    "generate",
    "images_to_x_0",
    "interpolate_images",
    "invert_images",
    "make_schedule",
    "make_training_batch",
    "p_mean_variance",
    "p_sample",
    "partial_diffusion",
    "per_sample_loss",
    "philox4x32",
    "predict_x_0_and_eps",
    "prediction_target",
    "prior_loss",
    "probability_flow_bound",
    "q_posterior_mean_variance",
    "q_sample",
    "random_integers",
    "random_words",
    "repaint",
    "simple_loss",
    "slerp",
    "spaced_timesteps",
    "standard_normal",
    "stratified_standard_error",
    "stratified_timesteps",
    "x_0_error_table",
    "x_0_errors",
    "x_0_to_images",
]
