"""What a comparison of samplers found: a record to store, a table to read, a chart to look at."""

from dataclasses import dataclass

from pipeline.evaluation.charts import Line, Panel, line_charts
from pipeline.progress import format_duration


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerRow:
    """The images of one sampler with one number of steps."""

    sampler: str
    """Its name in the table."""
    max_evaluations: int
    """Network evaluations per image that it was allowed."""
    num_evaluations: int
    """Those that it took: heun's come in pairs."""
    frechet_pixels: float
    """Frechet distance to the held-out images, raw pixels in [0, 1]."""
    label_agreement: float
    """Share of images that the classifier reads as the class asked for."""
    rms_to_reference: float | None
    """Root mean square difference, pixels in [0, 1], to the reference's images from the same x_T; None for a sampler
    that adds noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerComparison:
    """The content of `samplers.json`."""

    format_version: int = 2
    """Version of this record."""
    model: str
    """The model's URI, resolved."""
    model_digest: str
    """Digest of its files."""
    dataset_digest: str
    """Digest of the dataset's manifest."""
    num_images: int
    """Images of each row."""
    wall_s: float
    """Time of the whole comparison, seconds; less if some images existed already."""
    real_frechet_pixels: float
    """Frechet distance of the training images to the held-out images."""
    real_label_agreement: float
    """Share of held-out images that the classifier reads as their class."""
    rows: tuple[SamplerRow, ...]
    """In the order of the samplers, each with ascending evaluations."""

    @property
    def samplers(self) -> list[str]:
        """Names of the samplers, in order."""
        return list(dict.fromkeys(row.sampler for row in self.rows))

    def table(self) -> str:
        """The figures as tables of Markdown: a row for each sampler, a column for each limit of evaluations."""
        tables = [
            f"{self.num_images:,} images of {self.model} each, made and measured in {format_duration(self.wall_s)}"
        ]
        for title, field, digits in (
            (f"Frechet distance (real: {self.real_frechet_pixels:.3f})", "frechet_pixels", 3),
            (f"label agreement (real: {self.real_label_agreement:.3f})", "label_agreement", 3),
            ("RMS to the reference, pixels in [0, 1]", "rms_to_reference", 4),
        ):
            if any(getattr(row, field) is not None for row in self.rows):
                tables.append(self._table(title, field, digits))
        return "\n\n".join(tables)

    def _table(self, title: str, field: str, digits: int) -> str:
        rows = [row for row in self.rows if getattr(row, field) is not None]
        columns = sorted({row.max_evaluations for row in rows})
        lines = [f"| {title} | " + " | ".join(str(column) for column in columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for name in dict.fromkeys(row.sampler for row in rows):
            cells = {row.max_evaluations: row for row in rows if row.sampler == name}
            values = [f"{getattr(cells[c], field):.{digits}f}" if c in cells else "" for c in columns]
            lines.append(f"| {name} | " + " | ".join(values) + " |")
        return "\n".join(lines)


def draw_comparison(comparison: SamplerComparison) -> bytes:
    """Quality against evaluations as a PNG: one panel for each figure of merit, one line for each sampler."""
    panels = []
    for title, field, real in (
        ("Frechet distance in pixels", "frechet_pixels", comparison.real_frechet_pixels),
        ("label agreement", "label_agreement", comparison.real_label_agreement),
        ("RMS difference to the reference, pixels in [0, 1]", "rms_to_reference", None),
    ):
        lines = []
        for name in comparison.samplers:
            points = [(row.num_evaluations, getattr(row, field)) for row in comparison.rows if row.sampler == name]
            known = [(x, y) for x, y in points if y is not None]
            lines.append(Line(label=name, x=[x for x, _ in known], y=[y for _, y in known]))
        levels = {} if real is None else {"real images": real}
        panels.append(Panel(title=title, lines=lines, log_y=field != "label_agreement", levels=levels))
    return line_charts(panels, x_label="network evaluations per image", log_x=True, markers=True)
