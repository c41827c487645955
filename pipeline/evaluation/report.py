"""What an evaluation found: a record to store, and a table to read."""

from dataclasses import dataclass

from ddpm.added_field import added_field


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
    real_standard_error: float | None = added_field(default=None, pin=None)
    """That of the real images' figure."""
    gaussian_standard_error: float | None = added_field(default=None, pin=None)
    """That of the naive model's figure."""
    num_images: int | None = added_field(default=None, pin=None)
    """Images of the model, of the naive model and in a set of real ones, for a figure that depends on their number; old
    records have None there, and took all training images for the real ones."""
    num_real_sets: int | None = added_field(default=None, pin=None)
    """Disjoint sets of so many training images, whose mean `real` is."""


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
    warnings: tuple[str, ...] = added_field(default=(), pin=())
    """What may make the figures wrong, one line each."""


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
                ("_real_standard_error", figure.real_standard_error),
                ("_gaussian_standard_error", figure.gaussian_standard_error),
            ):
                if value is not None:
                    named[name + suffix] = value
        return named

    def table(self) -> str:
        """The figures as aligned text."""
        rows = [["", "model", "real images", "Gaussian per class"]]
        for name, title in _TITLES.items():
            if name in self.record.figures:
                figure = self.record.figures[name]
                if figure.num_images is not None:
                    title += f", {figure.num_images:,} images each"
                cells = (
                    (figure.model, figure.standard_error),
                    (figure.real, figure.real_standard_error),
                    (figure.gaussian, figure.gaussian_standard_error),
                )
                rows.append([title, *(_number(*cell) for cell in cells)])
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.record.warnings)])


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


def _number(value: float | None, standard_error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" +- {standard_error:.4f}" if standard_error else "")
