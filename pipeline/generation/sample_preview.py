"""What a generation run would do, before it does it."""

from torch import nn

from ddpm import count_parameters
from pipeline.generation.output.inventory import Inventory
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_cost import cost_plan
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.tick_preview import describe_tick
from pipeline.models.model_files import load_model
from pipeline.models.registry import ResolvedModel

_CONTAINERS = {"webdataset": "WebDataset tars", "parquet": "Parquet"}


def describe_plan(config: SampleConfig) -> list[tuple[str, str]]:
    """What a run would do, as names and values; reads the model and the output's listing, starts nothing."""
    job = resolve_job(config)
    inventory = Inventory(job.store, job.plan, job.manifest)
    inventory.stop()
    missing, num_missing_shards = job.plan.num_images - inventory.num_images_done, inventory.num_missing
    named = [(name, model) for name, model in (("model", job.model), ("guide", job.guide)) if model is not None]
    # Before the cost is counted, which builds the networks: loading is what makes a model's own code importable.
    models = [(name, _describe_model(model)) for name, model in named]
    flops = missing * job.flops_per_image
    return [
        *models,
        *([] if job.labels.text is None else [("labels", job.labels.text)]),
        *([] if job.edit is None else [("edit", f"{job.edit.spec.name} of images in {job.edit.inputs.uri}")]),
        ("output", job.store.uri),
        *describe_tick(config, job, inventory),
        ("images", f"{job.plan.num_images:,}, of which {missing:,} are missing"),
        ("stored as", f"{job.spec.image_format.words}, in {_CONTAINERS[job.spec.container]}"),
        ("output shards", f"{job.plan.num_shards:,}, of which {num_missing_shards:,} are missing"),
        ("network evaluations", f"{missing * job.evaluations_per_image:,} images, {flops:.3g} FLOP"),
        ("workers", f"{min(config.num_actors, num_missing_shards)} actors, {config.cpus_per_actor} CPUs each"),
        *cost_plan(config, job, inventory),
    ]


def _describe_model(model: ResolvedModel) -> str:
    network = load_model(model.files, model.uri)[1].network
    assert isinstance(network, nn.Module), "built from the card"
    return f"{model.uri}, {count_parameters(network):,} parameters"
