"""What a comparison of samplers found: a record to store, a table to read, a chart to look at."""

from dataclasses import dataclass

from ddpm.added_field import added_field
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
    frechet_standard_error: float | None = added_field(default=None, pin=None)
    """Standard error of the distance over images, the held-out ones being the same."""
    agreement_standard_error: float | None = added_field(default=None, pin=None)
    """Standard error of the agreement."""
    frechet_better_than: tuple[str, ...] = added_field(default=(), pin=())
    """Samplers with as many evaluations whose distance is surely larger (sampler_judge.py)."""
    agreement_better_than: tuple[str, ...] = added_field(default=(), pin=())
    """Those whose agreement is surely smaller."""


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
    """Images of each row and seed."""
    wall_s: float
    """Time of the whole comparison, seconds; less if some images existed already."""
    real_frechet_pixels: float
    """Frechet distance of as many training images to the held-out images, mean over sets of them; in records without
    num_compared_images, of all training images."""
    real_label_agreement: float
    """Share of held-out images that the classifier reads as their class."""
    rows: tuple[SamplerRow, ...]
    """In the order of the samplers, each with ascending evaluations."""
    num_seeds: int = added_field(default=1, pin=1)
    """Seeds of which each row is the mean."""
    num_compared_images: int | None = added_field(default=None, pin=None)
    """Images in each Frechet distance, real or generated."""
    num_real_sets: int | None = added_field(default=None, pin=None)
    """Disjoint sets of so many training images."""
    real_frechet_standard_error: float | None = added_field(default=None, pin=None)
    """Standard error of the distance of one of these sets."""
    real_agreement_standard_error: float | None = added_field(default=None, pin=None)
    """That of the held-out images' agreement."""
    warnings: tuple[str, ...] = added_field(default=(), pin=())
    """What may make the figures wrong, one line each."""

    @property
    def samplers(self) -> list[str]:
        """Names of the samplers, in order."""
        return list(dict.fromkeys(row.sampler for row in self.rows))

    def table(self) -> str:
        """The figures as tables of Markdown, a row for each sampler and a column for each limit of evaluations.

        Below them stands which differences are more than chance.
        """
        seeds = f"{self.num_seeds} seeds of " if self.num_seeds > 1 else ""
        parts = [
            f"{seeds}{self.num_images:,} images of {self.model} each, made and measured in "
            f"{format_duration(self.wall_s)}; +- is one standard error over images"
        ]
        real_frechet = _number(self.real_frechet_pixels, self.real_frechet_standard_error, 3)
        real_agreement = _number(self.real_label_agreement, self.real_agreement_standard_error, 3)
        of_as_many = f", {self.num_compared_images:,} images each" if self.num_compared_images else ""
        for title, field, error, digits in (
            (f"Frechet distance{of_as_many} (real: {real_frechet})", "frechet_pixels", "frechet_standard_error", 3),
            (f"label agreement (real: {real_agreement})", "label_agreement", "agreement_standard_error", 3),
            ("RMS to the reference, pixels in [0, 1]", "rms_to_reference", None, 4),
        ):
            if any(getattr(row, field) is not None for row in self.rows):
                parts.append(self._table(title, field, error, digits))
        parts.append(self._differences())
        return "\n\n".join([*parts, *(f"warning: {warning}" for warning in self.warnings)])

    def _table(self, title: str, field: str, error: str | None, digits: int) -> str:
        rows = [row for row in self.rows if getattr(row, field) is not None]
        columns = sorted({row.max_evaluations for row in rows})
        lines = [f"| {title} | " + " | ".join(str(column) for column in columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for name in dict.fromkeys(row.sampler for row in rows):
            cells = {row.max_evaluations: row for row in rows if row.sampler == name}
            values = [
                _number(getattr(cells[c], field), getattr(cells[c], error) if error else None, digits)
                if c in cells
                else ""
                for c in columns
            ]
            lines.append(f"| {name} | " + " | ".join(values) + " |")
        return "\n".join(lines)

    def _differences(self) -> str:
        """Which samplers no other is surely better than, for each number of evaluations."""
        lines = [
            "Samplers than which no other is surely better (paired over images; a false alarm in 5 % of the lines). No "
            "difference among those of a line is supported:"
        ]
        for evaluations in sorted({row.max_evaluations for row in self.rows}):
            column = [row for row in self.rows if row.max_evaluations == evaluations]
            for what, field in (("Frechet distance", "frechet_better_than"), ("agreement", "agreement_better_than")):
                beaten = {name for row in column for name in getattr(row, field)}
                unbeaten = [row.sampler for row in column if row.sampler not in beaten]
                which = "all" if not beaten else "; ".join(unbeaten)
                lines.append(f"- {evaluations} evaluations, {what}: {which}")
        return "\n".join(lines)


def _number(value: float, standard_error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" +- {standard_error:.{digits}f}" if standard_error else "")


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
