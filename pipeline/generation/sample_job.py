"""From a configuration to a job: models, inputs and output are looked up and checked, before any cluster work."""

from dataclasses import dataclass

from ddpm import ModelConfig, make_schedule, num_evaluations
from ddpm.editing.interpolate import check_deterministic
from ddpm.editing.repaint import check_inpainting_sampler
from ddpm.networks.model_config import flops_per_image
from pipeline.data.manifest import ShardRecord
from pipeline.errors import ConfigError
from pipeline.generation.edit_inputs import EditRequest, resolve_request
from pipeline.generation.image_maker import Ingredients, evaluations_per_image
from pipeline.generation.inventory import load_generation_manifest
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sampling_plan import OutputShard, SamplingSpec, ShardPlan, check_same_shard, plan_shards
from pipeline.models.calibration import Calibration, read_calibration
from pipeline.models.model_files import ModelCard, read_card
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleJob:
    """A resolved run: which model, which images, where, and what is known to be there."""

    model: ResolvedModel
    """The model, by version."""
    card: ModelCard
    """What the model is."""
    guide: ResolvedModel | None
    """The weaker model of autoguidance."""
    edit: EditRequest | None
    """What is edited, and how; None: images from nothing."""
    calibration: Calibration | None
    """What the analytic variance needs."""
    spec: SamplingSpec
    """All that decides the images."""
    plan: ShardPlan
    """The output shards: of as many images as are asked for, or as are there already if that is more."""
    store: ObjectStore
    """The output prefix."""
    known: dict[int, ShardRecord]
    """The shards that the manifest of an earlier run names."""

    @property
    def ingredients(self) -> Ingredients:
        """What the actors need beside the spec."""
        return Ingredients(
            model=self.model.files,
            guide=None if self.guide is None else self.guide.files,
            inputs=None if self.edit is None else self.edit.inputs,
            known=None if self.edit is None else self.edit.known,
            x_0_error=None if self.calibration is None else self.calibration.x_0_error,
        )

    @property
    def evaluations_per_image(self) -> int:
        """Evaluations of the model, and with guidance as many of the weaker answer; with an interval an upper bound."""
        return self._model_evaluations * (1 if self.spec.sampler.guidance_scale == 1.0 else 2)

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of all evaluations, a guide's counted by its own size."""
        own = flops_per_image(self.card.config)
        if self.guide is None:
            return self.evaluations_per_image * own
        return self._model_evaluations * (own + flops_per_image(read_card(self.guide.files, self.guide.uri).config))

    @property
    def _model_evaluations(self) -> int:
        return evaluations_per_image(make_schedule(self.card.config.schedule), self.spec.sampler, self.spec.request)


def resolve_job(config: SampleConfig, model: ResolvedModel | None = None) -> SampleJob:
    """Look up the models, the inputs of an edit and the output; nothing is written.

    Raises:
        ConfigError: If sampler, guide or inputs do not fit the model, or the seed or number of images is out of range.
        DatasetMissingError, DatasetError: If there are no inputs where they were named, or their manifest is damaged.
        OutputExistsError: If the output holds a run that cannot grow to this number of images.
        ModelMissingError, CheckpointError, StorageError: If model or output cannot be read.
    """
    model = model or resolve_model(config.model, config.tracking)
    card = read_card(model.files, model.uri)
    network = card.config
    guide = _resolve_guide(config, card, model.uri)
    try:
        num_evaluations(make_schedule(network.schedule), config.sampler)
        _check_fits(config, network)
        calibration = None
        if config.calibration is not None:
            calibration = read_calibration(
                config.calibration,
                model.files.digest,
                network.schedule.num_timesteps,
                clip_x_0=config.sampler.clip_x_0,
            )
        edit = resolve_request(config.request, card, model.uri)
        spec = SamplingSpec(
            model_digest=model.files.digest,
            guide_digest=None if guide is None else guide.files.digest,
            calibration_digest=None if calibration is None else calibration.digest,
            request=None if edit is None else edit.spec,
            sampler=config.sampler,
            seed=config.seed,
            num_classes=network.num_classes,
            shard_size=config.shard_size,
            batch_size=config.batch_size,
            image_size=network.image_size,
            channels=network.channels,
        )
        num_images = config.images_per_class * (network.num_classes or 1)
        plan = plan_shards(spec, num_images if edit is None else config.request.num_images or edit.spec.num_images)
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error
    store = open_store(join_uri(config.output, spec.digest[:16]))
    manifest = load_generation_manifest(store)
    known = dict(enumerate(manifest.shards)) if manifest else {}
    if manifest and manifest.num_images >= plan.num_images:
        plan = plan_shards(spec, manifest.num_images)
    elif manifest:
        last = OutputShard(
            index=len(known) - 1,
            first_id=(len(known) - 1) * spec.shard_size,
            num_samples=manifest.shards[-1].num_samples,
        )
        check_same_shard(plan.shard(last.index), last, plan.num_images, store.uri)
    return SampleJob(
        model=model,
        card=card,
        guide=guide,
        edit=edit,
        calibration=calibration,
        spec=spec,
        plan=plan,
        store=store,
        known=known,
    )


def _resolve_guide(config: SampleConfig, card: ModelCard, model_uri: str) -> ResolvedModel | None:
    """The weaker model, if one is named; it must make the same images from the same noise."""
    if config.guide_model is None:
        return None
    guide = resolve_model(config.guide_model, config.tracking)
    theirs, ours = read_card(guide.files, guide.uri), card
    for name in ("image_size", "channels", "num_classes", "schedule"):
        if getattr(theirs.config, name) != getattr(ours.config, name):
            raise ConfigError(
                f"guide_model: {guide.uri} has the {name} {getattr(theirs.config, name)}, {model_uri} "
                f"{getattr(ours.config, name)}; choose a weaker model that was trained for the same"
            )
    if theirs.class_names != ours.class_names:
        raise ConfigError(f"guide_model: {guide.uri} has other classes than {model_uri}; choose one with the same")
    return guide


def _check_fits(config: SampleConfig, network: ModelConfig) -> None:
    sampler = config.sampler
    if config.guide_model is not None:
        if sampler.guidance_scale == 1.0:
            raise ValueError("guide_model: has no effect where sampler.guidance_scale is 1; raise it, such as to 1.5")
    elif sampler.guidance_scale != 1.0 and network.num_classes is None:
        raise ValueError(
            f"guidance_scale: the model has no classes to guide to, got {sampler.guidance_scale}; set it to 1, or "
            "name a guide_model"
        )
    if sampler.variance == "learned_range" and not network.learned_variance:
        raise ValueError(
            "variance: the model has not learned one, got learned_range; choose fixed_small or fixed_large"
        )
    if (sampler.variance == "analytic") != (config.calibration is not None):
        raise ValueError(
            f"calibration: goes with sampler.variance analytic, got {config.calibration} with {sampler.variance}; make "
            "it with jobs/calibrate.py, or leave both out"
        )
    if config.request.kind == "interpolate":
        check_deterministic(sampler)
    if config.request.kind == "inpaint":
        check_inpainting_sampler(sampler)
