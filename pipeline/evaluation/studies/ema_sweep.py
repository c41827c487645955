"""How long should the weights be averaged? The quality of one run's averages against their length.

Each length is a model made of the run's snapshots and measured as `evaluate` measures any, from the same noise; beside
them stand the weights in training, which are an average of length 0, and the average that training registered.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ddpm import PowerProfile
from ddpm.added_field import added_field
from pipeline.cluster import ClusterConfig, ray_session
from pipeline.config_io import refuse_empty, to_json
from pipeline.config_sections import write_section
from pipeline.evaluation.charts import Line, Panel, line_charts
from pipeline.evaluation.evaluate import EvaluateConfig, MeasuresConfig, evaluate
from pipeline.evaluation.report import EvaluationRecord
from pipeline.generation.output.manifest import write_if_changed
from pipeline.generation.requests.requests import Generate
from pipeline.generation.sample_config import ImagesConfig
from pipeline.models.model_files import ModelFiles
from pipeline.models.registry import ResolvedModel
from pipeline.progress import say
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import check_uris, join_uri, open_store
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, check_server, new_run_key
from pipeline.training.post_hoc_ema import RunAverages

REPORT_KEY, CHART_KEY = "ema_sweep.json", "ema_sweep.png"
_FIGURES = {
    "frechet_pixels": "Frechet distance in pixels",
    "label_agreement": "label agreement",
    "eps_mse": "held-out eps error",
}
_METRIC_STEP = 1e-4  # of sigma_rel: MLflow's abscissa is a whole number


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaSweepConfig:
    """Measure a trained run's averages of several lengths, and draw quality against length."""

    run: str
    """Output of a training run that took snapshots: a folder or s3:// URI."""
    output: str
    """Folder or s3:// URI for the images, the figures and the picture."""
    dataset: str
    """Folder or s3://bucket/prefix of a prepared dataset with a held-out split."""
    sample: ImagesConfig
    """The images to measure; the model is each of the averages, and its images go to `output`."""
    evaluate: MeasuresConfig = field(default_factory=MeasuresConfig)
    """What to measure, and how exactly."""
    sigma_rels: tuple[float, ...] = (0.025, 0.05, 0.075, 0.10, 0.125, 0.15, 0.20, 0.25)
    """Lengths to measure, as shares of the training; 0 stands for the weights in training and is always measured."""
    run_name: str = "ema-sweep"
    """Name of the MLflow run."""
    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        check_uris(self, "run", "output", "dataset")
        refuse_empty(self, "run_name")
        if not isinstance(self.sample.request, Generate):
            raise ValueError(
                "sample.request.name: averages are measured on images from nothing, got "
                f"{self.sample.request.name}, which keeps parts of real ones; leave the request out"
            )
        if not self.sigma_rels or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError(f"sigma_rels: distinct and at least one, got {self.sigma_rels}; try 0.05 0.10 0.15")
        for sigma_rel in self.sigma_rels:
            try:
                PowerProfile(num_images=1, sigma_rel=sigma_rel)
            except ValueError as error:
                raise ValueError(str(error).replace("sigma_rel:", "sigma_rels:", 1)) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaSweepRow:
    """What was measured of one average."""

    sigma_rel: float | None
    """Its length; 0 for the weights in training, None for the average that training registered."""
    residual: float | None
    """Distance of its profile from the one that was wanted, as a share of that one's norm; None where none was made."""
    model_digest: str
    """Digest of its files."""
    figures: dict[str, float]
    """The model's figures by name, as `evaluate` names them."""
    standard_errors: dict[str, float] = added_field(default_factory=dict, pin={})
    """Their standard errors, where known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaSweep:
    """The content of `ema_sweep.json`."""

    format_version: int = 2
    """Version of this record."""
    train: str
    """The training run's output."""
    checkpoint: str
    """Its checkpoint."""
    num_snapshots: int
    """Snapshots that the averages were made of."""
    num_images: int
    """Images of each model that were measured."""
    rows: tuple[EmaSweepRow, ...]
    """The registered average first, then by length."""
    real: dict[str, float] = added_field(default_factory=dict, pin={})
    """The figures of real images, as many as each model's: the Frechet distance depends on their number."""
    real_standard_errors: dict[str, float] = added_field(default_factory=dict, pin={})
    """Their standard errors."""
    warnings: tuple[str, ...] = added_field(default=(), pin=())
    """What may make the figures wrong, one line each."""

    def table(self) -> str:
        """The figures as aligned text."""
        names = [name for name in _FIGURES if name in self.rows[0].figures]
        lines = [("sigma_rel", *names, "residual")]
        for row in self.rows:
            length = "registered" if row.sigma_rel is None else f"{row.sigma_rel:g}"
            residual = "-" if row.residual is None else f"{row.residual:.1e}"
            lines.append((length, *_cells(names, row.figures, row.standard_errors), residual))
        if self.real:
            lines.append(("real images", *_cells(names, self.real, self.real_standard_errors), "-"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
        return "\n".join([*table, *(f"warning: {warning}" for warning in self.warnings)])


def _cells(names: list[str], figures: dict[str, float], standard_errors: dict[str, float]) -> list[str]:
    """Figures with their standard errors; "-" for one that is not known."""
    cells = []
    for name in names:
        error = f" +- {standard_errors[name]:.4f}" if name in standard_errors else ""
        cells.append(f"{figures[name]:.4f}{error}" if name in figures else "-")
    return cells


def sweep_ema(config: EmaSweepConfig) -> EmaSweep:
    """Make and measure every average, one at a time, and record the figures.

    Returns:
        The figures; they are in the output as `ema_sweep.json` and `ema_sweep.png`, and in an MLflow run.

    Raises:
        ModelMissingError: If the run took no snapshots.
        PipelineError: As evaluate; images that were made stay, and running again goes on from there.
    """
    averages = RunAverages(config.run, trust_model_code=config.trust_model_code)
    check_server(config.tracking)
    check_conditions(open_store(config.output))
    sample = dataclasses.replace(
        config.sample, model=averages.checkpoint_uri, output=join_uri(config.output, "samples")
    )
    options = {one.name: getattr(config.evaluate, one.name) for one in dataclasses.fields(MeasuresConfig)}
    measures = EvaluateConfig(
        dataset=config.dataset,
        sample=sample,
        trust_model_code=config.trust_model_code,
        tracking=config.tracking,
        cluster=config.cluster,
        **options,
    )
    run = TrackingRun.open(
        config.tracking,
        new_run_key(),
        config.run_name,
        params={"train": averages.uri, "sigma_rels": config.sigma_rels, "num_snapshots": len(averages.snapshots)},
        tags={"ddpm.train_output": averages.uri, "ddpm.train_checkpoint": averages.checkpoint_uri},
    )
    run.log_text(write_section(config, "ema_sweep"), "config.toml")
    status: Literal["FINISHED", "FAILED"] = "FAILED"
    try:
        rows: list[EmaSweepRow] = []
        records: list[EvaluationRecord] = []
        with ray_session(config.cluster):
            for sigma_rel, residual, files in _models(config, averages):
                model = ResolvedModel(uri=f"{averages.uri}, {_name(sigma_rel)}", version=None, files=files)
                say(f"{len(rows) + 1} of {len(config.sigma_rels) + 2}: {_name(sigma_rel)}")
                record = evaluate(measures, model=model).record
                records.append(record)
                row = EmaSweepRow(
                    sigma_rel=sigma_rel,
                    residual=residual,
                    model_digest=record.model_digest,
                    figures={name: f.model for name, f in record.figures.items() if f.model is not None},
                    standard_errors={
                        name: f.standard_error for name, f in record.figures.items() if f.standard_error is not None
                    },
                )
                rows.append(row)
                _log(run, row)
        # The eps error has no figure of real images: what it calls so is the model's on the training images.
        of_images = {name: f for name, f in records[0].figures.items() if name in ("frechet_pixels", "label_agreement")}
        sweep = EmaSweep(
            train=averages.uri,
            checkpoint=averages.checkpoint_uri,
            num_snapshots=len(averages.snapshots),
            num_images=records[0].num_images,
            rows=tuple(rows),
            real={name: f.real for name, f in of_images.items() if f.real is not None},
            real_standard_errors={
                name: f.real_standard_error for name, f in of_images.items() if f.real_standard_error is not None
            },
            warnings=tuple(dict.fromkeys(warning for record in records for warning in record.warnings)),
        )
        _publish(config, sweep, run)
        status = "FINISHED"
    finally:
        run.finish(status)
    return sweep


def _models(config: EmaSweepConfig, averages: RunAverages) -> Iterator[tuple[float | None, float | None, ModelFiles]]:
    """Length, residual and files of each, made when it is its turn."""
    yield None, None, averages.registered
    yield 0.0, None, averages.last_weights()
    for sigma_rel in sorted(config.sigma_rels):
        yield sigma_rel, averages.fit(sigma_rel).residual, averages.model(sigma_rel)


def _name(sigma_rel: float | None) -> str:
    if sigma_rel is None:
        return "the registered average"
    return f"sigma_rel {sigma_rel:g}" if sigma_rel else "the weights in training"


def _log(run: TrackingRun, row: EmaSweepRow) -> None:
    if row.sigma_rel is None:
        run.log_metrics({f"{name}_registered": value for name, value in row.figures.items()}, 0)
    else:
        run.log_metrics(row.figures, round(row.sigma_rel / _METRIC_STEP))


def _publish(config: EmaSweepConfig, sweep: EmaSweep, run: TrackingRun) -> None:
    store, report, chart = open_store(config.output), to_json(sweep), draw_sweep(sweep)
    write_if_changed(store, REPORT_KEY, report)
    write_if_changed(store, CHART_KEY, chart)
    run.log_text(report.decode(), REPORT_KEY)
    run.log_file(chart, CHART_KEY)


def draw_sweep(sweep: EmaSweep) -> bytes:
    """Quality against length, a panel for each figure; as PNG."""
    registered, *rows = sweep.rows
    panels = []
    for name, title in _FIGURES.items():
        if name in registered.figures:
            line = Line(
                label="average of the weights",
                x=[row.sigma_rel for row in rows if row.sigma_rel is not None],
                y=[row.figures[name] for row in rows],
            )
            levels = {"registered average": registered.figures[name]}
            panels.append(Panel(title=title, lines=[line], levels=levels))
    return line_charts(panels, x_label="sigma_rel, length of the average (0: the weights in training)", markers=True)


def describe_plan(config: EmaSweepConfig) -> list[tuple[str, str]]:
    """What a sweep would do, as names and values; reads the newest checkpoint, starts nothing."""
    averages = RunAverages(config.run, trust_model_code=config.trust_model_code)
    return [
        ("checkpoint", averages.checkpoint_uri),
        ("snapshots", f"{len(averages.snapshots)}, the newest behind {averages.num_images:,} images"),
        ("models", f"{len(config.sigma_rels)} lengths, the weights in training and the registered average"),
        *((f"sigma_rel {s:g}", f"profile within {averages.fit(s).residual:.2%}") for s in sorted(config.sigma_rels)),
        ("images", f"{config.sample.count} of each model"),
        ("report", join_uri(config.output, REPORT_KEY)),
    ]
