"""A model's calibration: the error of its x_0_hat, which the analytic variance of ancestral sampling needs.

One JSON file for each model, measured once (pipeline/evaluation/studies/calibration.py) and named by `sample`'s config.
"""

import math
from dataclasses import dataclass

from ddpm.added_field import added_field
from pipeline import config_io
from pipeline.errors import ConfigError, ObjectMissingError
from pipeline.stores.storage import read_file

_REMEDY = "calibrate the model again with jobs/calibrate.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The content of a calibration file."""

    format_version: int = 2
    """Version of this record."""
    model_digest: str
    """Digest of the model's files."""
    dataset_digest: str
    """Digest of the manifest of the dataset that it was measured on."""
    num_images: int
    """Training images that were measured."""
    clip_x_0: bool
    """Whether predicted images were limited to [-1, 1], as by the sampler that this is for."""
    x_0_error: tuple[float, ...]
    """What x_0_error_table gave: mean squared error of x_0_hat, not negative, one number per trained step."""
    warnings: tuple[str, ...] = added_field(default=(), pin=())
    """What may make the numbers wrong, one line each; sampling with them says so."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        if not self.x_0_error or not all(0 <= error < math.inf for error in self.x_0_error):
            raise ValueError(
                "x_0_error: must be one number from 0 up per trained step, got none, NaN or a negative one; calibrate "
                "again"
            )

    @property
    def digest(self) -> str:
        """Of the numbers, which are all that decides images."""
        return config_io.digest(list(self.x_0_error))


def read_calibration(uri: str, model_digest: str, num_timesteps: int, *, clip_x_0: bool) -> Calibration:
    """Read the calibration of a model.

    Args:
        uri: The file, local or s3://...
        model_digest: Digest of the model that is to be sampled.
        num_timesteps: Its trained steps.
        clip_x_0: Whether the sampler limits predicted images.

    Raises:
        ConfigError: If the file is missing or damaged, or of another model or kind of sampler.
        FormatVersionError: If it is of another version.
        StorageError: If it cannot be read.
    """
    try:
        data = read_file(uri)
    except ObjectMissingError:
        raise ConfigError(f"calibration: no file {uri}; make it with jobs/calibrate.py") from None
    found = config_io.read_record(Calibration, data, f"calibration: {uri}", remedy=_REMEDY)
    if found.model_digest != model_digest:
        raise ConfigError(
            f"calibration: {uri} is of the model {found.model_digest[:16]}, this one is {model_digest[:16]}; calibrate "
            "this model with jobs/calibrate.py"
        )
    if len(found.x_0_error) != num_timesteps:
        raise ConfigError(
            f"calibration: {uri} has {len(found.x_0_error)} steps, the model {num_timesteps}; calibrate it again"
        )
    if found.clip_x_0 != clip_x_0:
        raise ConfigError(
            f"calibration: {uri} was measured with clip_x_0 {found.clip_x_0}, sampler.clip_x_0 is {clip_x_0}; "
            "calibrate with the same"
        )
    return found
