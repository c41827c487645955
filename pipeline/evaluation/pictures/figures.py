"""Pictures of the method and of a model, as PNGs in a folder and in the MLflow run: what is better seen than told.

schedules.png            signal left and log-SNR, by t
posterior_variance.png   the variances that a step may have
loss_weights.png         how strongly each objective weighs an error, by t
bits_by_t.png            where the bits of the variational bound are spent
trajectory.png           x_t, and below it x_0_hat, on the way from noise to an image
samplers.png             quality against network evaluations, of each sampler
"""

from dataclasses import dataclass

import torch

from ddpm import Ancestral, BoundStatistics, DiffusionModel, LikelihoodConfig, generate, x_0_to_images
from ddpm.shapes import Images
from pipeline.data.pictures import image_grid
from pipeline.errors import TrackingUnavailableError
from pipeline.evaluation.charts import Line, Panel, line_charts
from pipeline.evaluation.pictures.method_charts import draw_loss_weights, draw_posterior_variance, draw_schedules
from pipeline.evaluation.studies import sampler_comparison
from pipeline.evaluation.studies.sampler_comparison import SamplerComparisonConfig, compare_samplers
from pipeline.evaluation.studies.sampler_table import draw_comparison
from pipeline.generation.output.manifest import write_if_changed
from pipeline.measuring.bound import BoundMeter
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.models.model_files import load_model
from pipeline.models.registry import resolve_model
from pipeline.models.version_records import log_version_files
from pipeline.progress import say
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import check_uris, join_uri, open_store

_MLFLOW_FOLDER = "figures"
_TRAJECTORY_STEPS, _TRAJECTORY_COLUMNS, _TRAJECTORY_IMAGES = 100, 10, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class FiguresConfig(SamplerComparisonConfig):
    """Draw the method's and a model's pictures, and compare samplers."""

    output: str
    """Folder or s3://bucket/prefix for the pictures."""
    max_bound_images: int = 64
    """Held-out images, spread over the split, on which every term of the bound is measured."""
    batch_size: int = 250
    """Images per evaluation of the network in the bound."""
    seed: int = 0
    """Seed of the bound's and of the trajectory's noise, in [0, 2^64)."""

    def __post_init__(self) -> None:
        SamplerComparisonConfig.__post_init__(self)
        check_uris(self, "output")
        for name in ("max_bound_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; choose a positive number")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: must be in [0, 2^64), got {self.seed}; choose another seed")


def draw_figures(config: FiguresConfig) -> list[str]:
    """Draw everything, write it to the output, and log it to the run that trained the model.

    Args:
        config: What to draw.

    Returns:
        URIs of the pictures.

    Raises:
        PipelineError: As compare_samplers.
    """
    dataset = EvaluationDataset(config.dataset)
    dataset.check_pixel_statistics()
    model = resolve_model(config.sample.model, config.tracking, trust_model_code=config.trust_model_code)
    check_conditions(open_store(config.output))
    card, loaded = load_model(model.files, model.uri)
    dataset.check_fits(card, model.uri)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = loaded.to(device)
    meter = BoundMeter(model=loaded, seed=config.seed, batch_size=config.batch_size, device=device)
    pictures = {
        "schedules.png": draw_schedules(card.config.schedule),
        "posterior_variance.png": draw_posterior_variance(card.config.schedule),
        "loss_weights.png": draw_loss_weights(card.config.schedule, loaded.prediction_type),
        "trajectory.png": draw_trajectory(loaded, seed=config.seed, device=device),
    }
    say("measuring every term of the bound")
    bound = meter.bound(dataset.stream("held_out", config.max_bound_images), LikelihoodConfig())
    pictures["bits_by_t.png"] = draw_bits_by_t(bound)
    pictures["samplers.png"] = draw_comparison(compare_samplers(config, model=model))
    store = open_store(config.output)
    for name, png in pictures.items():
        write_if_changed(store, name, png)
    if model.version is not None:
        try:
            log_version_files(model.version, pictures, _MLFLOW_FOLDER)
        except TrackingUnavailableError as error:
            say(f"the pictures are in {store.uri} but not in MLflow ({error}); draw again to log them")
    return [join_uri(store.uri, name) for name in pictures]


def draw_bits_by_t(bound: BoundStatistics) -> bytes:
    """The terms of the bound by t, and their sum from t = 0 on, as a PNG; the abscissa is t + 1, the paper's t."""
    mean = bound.by_t.mean
    place = list(range(1, len(mean) + 1))
    total = mean.cumsum(0)
    return line_charts(
        [
            Panel(
                title="bits per dimension of each term",
                lines=[Line(label="L_0 (t = 1), L_{t-1}", x=place, y=mean.tolist())],
                log_y=True,
            ),
            Panel(
                title="share of the bits in the terms up to t",
                lines=[Line(label="L_0 (t = 1), L_{t-1}", x=place, y=(total / total[-1]).tolist())],
                limits_y=(0.0, 1.02),
            ),
        ],
        x_label="t, as the papers count it",
        log_x=True,
    )


def draw_trajectory(model: DiffusionModel, *, seed: int, device: torch.device) -> bytes:
    """Some images on their way from noise to data, x_t over x_0_hat, as a PNG; time runs from left to right."""
    seen: list[tuple[Images, Images]] = []
    ids = torch.arange(_TRAJECTORY_IMAGES, device=device)
    num_steps = min(_TRAJECTORY_STEPS, model.schedule.num_timesteps)
    generate(
        model,
        Ancestral(num_steps=num_steps, variance=model.variance),
        seed=seed,
        sample_ids=ids,
        label=None if model.null_label is None else ids % model.null_label,
        callback=lambda step, t, x_t, x_0_hat: seen.append((x_t, x_0_hat)),
    )
    num_columns = min(_TRAJECTORY_COLUMNS, num_steps)
    shown = [seen[round(i * (num_steps - 1) / max(num_columns - 1, 1))] for i in range(num_columns)]
    cells = [row[half][image] for image in range(_TRAJECTORY_IMAGES) for half in (0, 1) for row in shown]
    pixels = x_0_to_images(torch.stack(cells).clamp(-1, 1)).cpu().numpy()
    return image_grid(pixels, columns=num_columns)


def describe_plan(config: FiguresConfig) -> list[tuple[str, str]]:
    """What drawing would do, as names and values; reads manifest and model, starts nothing."""
    bound = f"every term of about {config.max_bound_images} held-out images"
    return [*sampler_comparison.describe_plan(config), ("bound", bound), ("pictures", config.output)]
