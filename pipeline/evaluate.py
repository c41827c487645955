"""Measure a model on a labelled dataset: every figure beside real images and beside a naive model.

    label agreement     share of images that a classifier fitted to real training images reads as the class asked for
    Frechet distance    between Gaussians fitted to raw pixels in [0, 1], against the held-out images
    eps error           mean squared error of the predicted noise on held-out images, over all t

The naive model is a Gaussian per class (pipeline/baselines.py). A figure that makes no sense for a dataset or a model is
left out: labels need classes, and pixel statistics need small images.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ddpm import Moments, NoiseSchedule, frechet_distance, make_schedule, x_0_to_images
from pipeline import sample as sampling
from pipeline.baselines import ClassGaussians
from pipeline.config_io import to_json
from pipeline.errors import ConfigError, DatasetMissingError, TrackingUnavailableError
from pipeline.image_stream import LabelledImages, read_images, spread_shards, stream_images
from pipeline.inventory import load_generation_manifest, write_if_changed
from pipeline.manifest import DatasetManifest, ShardRecord, load_manifest
from pipeline.measures import Estimate, PixelClassifier, eps_mse, pixel_moments
from pipeline.model_files import ModelCard, load_network, read_card
from pipeline.object_store import ObjectStore
from pipeline.progress import say
from pipeline.registry import ResolvedModel, log_version_metrics, resolve_model
from pipeline.sample import SampleConfig
from pipeline.storage import join_uri, open_store

REPORT_KEY = "evaluation.json"
# Covariances of pixels: 4096 values per image take 128 MiB, and all classes together at most 2 GiB.
_MAX_PIXELS = 4096
_MAX_COVARIANCE_ENTRIES = 2**28
_SIGNIFICANT_DIGITS = 6  # what lies beyond depends on the order of summation
