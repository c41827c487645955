"""A model small enough to register, load and sample in a test, whose images depend on the label."""

from pathlib import Path

import mlflow
import torch

from ddpm import ModelConfig, ScheduleConfig, UNetConfig, build_model
from pipeline.models.model_files import ModelCard, ModelFiles, encode_model
from pipeline.tracking.tracking import TrackingRun

_UNET = UNetConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
CONFIG = ModelConfig(
    unet=_UNET, schedule=ScheduleConfig(name="cosine", num_timesteps=20), image_size=8, channels=1, num_classes=3
)


def model_files(seed: int, config: ModelConfig = CONFIG, source: bytes | None = None) -> ModelFiles:
    network = build_model(config, seed=seed)
    with torch.no_grad():  # the last convolution of a fresh U-Net is zero: its images would not depend on the label
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    card = ModelCard(config=config, class_names=("a", "b", "c") if config.num_classes else (), train_step=10 * seed)
    return encode_model(card, network.state_dict(), source)


def download_artifacts(run: TrackingRun, path: str, folder: Path) -> Path:
    """A run's file or folder, copied; MLflow's client would open a database of its own in the working folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(
        mlflow.artifacts.download_artifacts(
            run_id=run.run_id, artifact_path=path, dst_path=str(folder), tracking_uri=run.uri
        )
    )
