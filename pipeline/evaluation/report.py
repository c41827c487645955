"""What an evaluation found: a record to store, and a table to read."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of merit, of the model and of what it is compared with; None where it was not measured."""

    model: float | None
    """The model's images, or its predictions; of a fill, the images with that fill in their place."""
    real: float | None
    """The same figure of real images: of held-out ones, or of the training images, which the model has seen."""
    gaussian: float | None
    """The naive model: a Gaussian per class."""
    standard_error: float | None = None
    """Standard error of the model's figure, where it is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """The content of `evaluation.json`."""

    format_version: int = 2
    """Version of this record."""
    model: str
    """The model's URI, resolved."""
    model_digest: str
    """Digest of its files."""
    spec_digest: str
    """Digest of the sampling spec."""
    dataset_digest: str
    """Digest of the dataset's manifest."""
    num_images: int
    """Generated images that were measured."""
    figures: dict[str, Figure]
    """Figures by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A finished evaluation."""

    uri: str
    """The report."""
    record: EvaluationRecord
    """What it says."""

    @property
    def figures(self) -> dict[str, float]:
        """Every number by name: `frechet_pixels`, `frechet_pixels_real`, `frechet_pixels_gaussian` and so on."""
        named = {}
        for name, figure in self.record.figures.items():
            for suffix, value in (
                ("", figure.model),
                ("_real", figure.real),
                ("_gaussian", figure.gaussian),
                ("_standard_error", figure.standard_error),
            ):
                if value is not None:
                    named[name + suffix] = value
        return named

    def table(self) -> str:
        """The figures as aligned text."""
        rows = [("", "model", "real images", "Gaussian per class")]
        for name, title in _TITLES.items():
            if name in self.record.figures:
                figure = self.record.figures[name]
                error = f" +- {figure.standard_error:.4f}" if figure.standard_error else ""
                rows.append((title, _number(figure.model) + error, _number(figure.real), _number(figure.gaussian)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


_TITLES = {
    "label_agreement": "label agreement (real: held-out)",
    "label_agreement_grey_fill": "  with grey for the new pixels",
    "label_agreement_mean_fill": "  with the mean training image",
    "label_agreement_class_mean_fill": "  with that of the class",
    "frechet_pixels": "Frechet distance in pixels (real: train)",
    "frechet_pixels_grey_fill": "  with grey for the new pixels",
    "frechet_pixels_mean_fill": "  with the mean training image",
    "frechet_pixels_class_mean_fill": "  with that of the class",
    "eps_mse": "held-out eps error (real: the model on train)",
    "bits_per_dim": "held-out bits per dimension (variational bound)",
    "bits_per_dim_prior": "  of which prior, L_T",
    "bits_per_dim_denoising": "  of which denoising, the sum of L_{t-1}",
    "bits_per_dim_decoder": "  of which decoder, L_0",
    "bits_per_dim_flow": "held-out bits per dimension (bound of the flow and decoder)",
    "bits_per_dim_flow_discretisation": "  of which gained by twice the nodes",
}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
