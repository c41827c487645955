"""A model's calibration: the second moments of its eps_hat, which the analytic variance of ancestral sampling needs.

One JSON file for each model, measured once (pipeline/evaluation/calibration.py) and named by `sample`'s config.
"""

import math
from dataclasses import dataclass

from pipeline import config_io
from pipeline.errors import ConfigError, ObjectMissingError
from pipeline.stores.storage import read_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The content of a calibration file."""

    format_version: int = 1
    """Version of this record."""
    model_digest: str
    """Digest of the model's files."""
    dataset_digest: str
    """Digest of the manifest of the dataset that it was measured on."""
    num_images: int
    """Training images that were measured."""
    clip_x_0: bool
    """Whether predicted images were limited to [-1, 1], as by the sampler that this is for."""
    second_moment: tuple[float, ...]
    """What eps_second_moment_table gave, one number per trained step; of a poor network some may be below 0."""

    def __post_init__(self) -> None:
        """Refuse other versions and impossible numbers."""
        if self.format_version != 1:
            raise ValueError(f"format_version: this program reads version 1, got {self.format_version}; update it")
        if not self.second_moment or not all(math.isfinite(moment) for moment in self.second_moment):
            raise ValueError("second_moment: must be one number per trained step, got none or NaN; calibrate again")

    @property
    def digest(self) -> str:
        """Of the numbers, which are all that decides images."""
        return config_io.digest(list(self.second_moment))


def read_calibration(uri: str, model_digest: str, num_timesteps: int, *, clip_x_0: bool) -> Calibration:
    """Read the calibration of a model.

    Args:
        uri: The file, local or s3://...
        model_digest: Digest of the model that is to be sampled.
        num_timesteps: Its trained steps.
        clip_x_0: Whether the sampler limits predicted images.

    Raises:
        ConfigError: If the file is missing or damaged, or of another model or kind of sampler.
        StorageError: If it cannot be read.
    """
    try:
        found = config_io.from_json(Calibration, read_file(uri), f"calibration: {uri}")
    except ObjectMissingError:
        raise ConfigError(f"calibration: no file {uri}; make it with jobs/calibrate.py") from None
    if found.model_digest != model_digest:
        raise ConfigError(
            f"calibration: {uri} is of the model {found.model_digest[:16]}, this one is {model_digest[:16]}; calibrate "
            "this model with jobs/calibrate.py"
        )
    if len(found.second_moment) != num_timesteps:
        raise ConfigError(
            f"calibration: {uri} has {len(found.second_moment)} steps, the model {num_timesteps}; calibrate it again"
        )
    if found.clip_x_0 != clip_x_0:
        raise ConfigError(
            f"calibration: {uri} was measured with clip_x_0 {found.clip_x_0}, sampler.clip_x_0 is {clip_x_0}; "
            "calibrate with the same"
        )
    return found
