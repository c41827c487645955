"""The registered model: an MLflow pyfunc that makes images from ids. MLflow runs this file; nothing imports it.

Rows go in with `sample_id` (and `label`, if the model has classes) and come out with a PNG each. A row is the image
that `ddpm.generate` makes for that seed, id and label, so the same ids always give the same images.

A network of one's own runs only where it is loaded with `model_config={"trust_model_code": True}`.
"""

import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import PIL.Image
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from ddpm import Sampler, generate, x_0_to_images
from pipeline.models.model_files import MODEL_JSON, SOURCE_JSON, WEIGHTS, ModelFiles, load_model
from pipeline.models.sampler_params import TRUST, sampler_of_params

_MAX_SAMPLE_ID = 2**48 - 1


class SamplerModel(PythonModel):
    """A diffusion model behind `predict(DataFrame, params)`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read and verify the three files, and build the network on the GPU if there is one."""
        paths = {name: Path(path) for name, path in context.artifacts.items()}
        files = ModelFiles(
            card_json=paths[MODEL_JSON].read_bytes(),
            weights=paths[WEIGHTS].read_bytes(),
            source=paths[SOURCE_JSON].read_bytes() if SOURCE_JSON in paths else None,
            trusted=(context.model_config or {}).get(TRUST) is True,
        )
        card, model = load_model(files, where="registered model")
        if card.config.num_levels != 256:
            raise MlflowException.invalid_parameter_value(
                f"registered model: images are served with 256 levels, got a model of {card.config.num_levels}"
            )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._num_classes, self._model = card.config.num_classes, model.to(self._device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Make one image per row.

        Args:
            context: Unused; the files were read when the model was loaded.
            model_input: DataFrame with sample_id (integers in [0, 2^48)) and, for a model with classes, label.
            params: seed, batch_size, `sampler` for a sampler's name, and its options.

        Returns:
            DataFrame with sample_id, label (if the model has classes) and png (bytes), in the order of the rows.

        Raises:
            MlflowException: If a column is missing or a value is out of range (INVALID_PARAMETER_VALUE).
        """
        try:
            sampler, seed, batch_size = _read_params(params or {})
            ids, labels = self._read_rows(model_input)
            pngs: list[bytes] = []
            for start in range(0, len(ids), batch_size):
                rows = slice(start, start + batch_size)
                pngs += self._make(sampler, seed, ids[rows], None if labels is None else labels[rows])
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        columns: dict[str, Any] = {"sample_id": ids.numpy()}
        if labels is not None:
            columns["label"] = labels.numpy()
        return pd.DataFrame(columns | {"png": pd.Series(pngs, dtype=object)})

    def _make(self, sampler: Sampler, seed: int, ids: torch.Tensor, label: torch.Tensor | None) -> list[bytes]:
        x_0 = generate(
            self._model,
            sampler,
            seed=seed,
            sample_ids=ids.to(self._device),
            label=None if label is None else label.to(self._device),
        )
        return [_png(image) for image in x_0_to_images(x_0).cpu().numpy()]

    def _read_rows(self, frame: pd.DataFrame) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_classes = self._num_classes
        ids = _column(frame, "sample_id", _MAX_SAMPLE_ID)
        if num_classes is not None:
            return ids, _column(frame, "label", num_classes - 1)
        if "label" in frame:
            raise ValueError("label: this model has no classes; leave the column out")
        return ids, None


def _png(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Encodes uint8 [H, W, C]; not `shards.encode_png`, whose module needs packages that serving does not."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


def _column(frame: pd.DataFrame, name: str, largest: int) -> torch.Tensor:
    """An integer column as int64 [B], each value in [0, largest]."""
    if name not in frame:
        raise ValueError(f"{name}: the column is missing, got {sorted(map(str, frame.columns))}")
    values = frame[name]
    if len(values) and (not pd.api.types.is_integer_dtype(values.dtype) or values.isna().any()):
        raise ValueError(f"{name}: must hold integers without gaps, got {values.dtype}")
    array = values.to_numpy(dtype=np.int64)
    wrong = array[(array < 0) | (array > largest)]
    if wrong.size:
        raise ValueError(f"{name}: must be in [0, {largest}], got {wrong[0]}")
    return torch.from_numpy(array.copy())


def _read_params(params: dict[str, Any]) -> tuple[Sampler, int, int]:
    """Sampler, seed and batch size; refuses unknown names and impossible values."""
    values = dict(params)
    seed, batch_size = int(values.pop("seed", 0)), int(values.pop("batch_size", 64))
    if seed < 0:
        raise ValueError(f"seed: must not be negative, got {seed}")
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    return sampler_of_params(values), seed, batch_size


mlflow.models.set_model(SamplerModel())
