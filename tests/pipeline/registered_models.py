"""A model small enough to register, load and sample in a test, whose images depend on the label."""

from pathlib import Path

import torch
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from ddpm import ModelConfig, ScheduleConfig, UNetConfig, build_network
from pipeline.models.model_files import ModelCard, ModelFiles, encode_model
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingRun

_UNET = UNetConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
CONFIG = ModelConfig(
    network=_UNET,
    schedule=ScheduleConfig(name="cosine", num_timesteps=20),
    image_size=(8, 8),
    channels=1,
    num_classes=3,
)


def model_files(seed: int, config: ModelConfig = CONFIG, source: bytes | None = None) -> ModelFiles:
    network = build_network(config, seed=seed)
    with torch.no_grad():  # the last convolution of a fresh U-Net is zero: its images would not depend on the label
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    card = ModelCard(config=config, class_names=("a", "b", "c") if config.num_classes else (), train_step=10 * seed)
    return encode_model(card, network.state_dict(), source)


def download_artifacts(run: TrackingRun, path: str, folder: Path) -> Path:
    """A run's file or folder, copied; MLflow's own function opens a database in the working folder on the way."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = get_artifact_repository(connect(run.uri).get_run(run.run_id).info.artifact_uri, tracking_uri=run.uri)
    return Path(stored.download_artifacts(path, str(folder)))
