"""Models that are made in milliseconds, as a folder of model files, for tests of generation."""

from pathlib import Path

from ddpm import ModelConfig, ScheduleConfig, UNetConfig, build_model
from pipeline.model_files import ModelCard, encode_model
from pipeline.model_source import collect_source

TINY_UNET = UNetConfig(
    base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.0, num_groups=4
)


def write_model(
    folder: Path,
    *,
    model: str = "unet",
    model_options: dict[str, int | float | str | bool] | None = None,
    num_classes: int | None = 3,
    channels: int = 1,
    num_timesteps: int = 100,
    image_size: int = 8,
) -> str:
    """Write an untrained model's files; returns the folder as a URI."""
    config = ModelConfig(
        model=model,
        model_options=model_options or {},
        unet=TINY_UNET,
        schedule=ScheduleConfig(name="cosine", num_timesteps=num_timesteps),
        image_size=image_size,
        channels=channels,
        num_classes=num_classes,
    )
    card = ModelCard(config=config, class_names=tuple(f"class {k}" for k in range(num_classes or 0)))
    files = encode_model(card, build_model(config).state_dict(), collect_source(model))
    folder.mkdir(parents=True)
    for name, data in files.as_dict().items():
        (folder / name).write_bytes(data)
    return str(folder)
