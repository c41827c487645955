"""What a generation run comes to: all that is looked up and checked before any cluster work."""

import functools
from dataclasses import dataclass, replace

from ddpm import ModelConfig, flops_per_image, make_schedule
from pipeline.errors import ConfigError
from pipeline.generation.making.shard_maker import Ingredients
from pipeline.generation.output.manifest import GenerationManifest, load_generation_manifest
from pipeline.generation.output.tick_records import PREFIX_DIGITS, TickRecord, read_tick
from pipeline.generation.pool.pool_config import check_room
from pipeline.generation.requests.edit_inputs import EditRequest, resolve_request
from pipeline.generation.requests.label_requests import LabelRequest, resolve_labels
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.spec.sampling_plan import SamplingSpec, ShardPlan, plan_shards
from pipeline.models.calibration import Calibration, read_calibration
from pipeline.models.model_files import ModelCard, ModelFiles, check_trust, read_card
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri, open_store

_IMAGES_PER_CLASS = 100  # where nothing is said


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
    labels: LabelRequest
    """Which labels are asked for."""
    num_asked: int
    """Images that are asked for; there may be more already."""
    calibration: Calibration | None
    """What the analytic variance needs."""
    spec: SamplingSpec
    """All that decides the images."""
    plan: ShardPlan
    """The output shards: of as many images as are asked for, or as are there already if that is more."""
    store: ObjectStore
    """The output prefix."""
    manifest: GenerationManifest | None
    """That of an earlier run; None: none has finished there."""
    tick: TickRecord | None = None
    """What the tick was begun with; None: it was not begun, or none was asked for."""

    @property
    def models(self) -> list[ModelFiles]:
        """The model, and the guide if there is one."""
        return [self.model.files, *([] if self.guide is None else [self.guide.files])]

    @property
    def make_ingredients(self) -> "functools.partial[Ingredients]":
        """What the actors need beside the spec, with all but the models filled in: each fetches those itself."""
        return functools.partial(
            Ingredients,
            inputs=None if self.edit is None else self.edit.inputs,
            known=None if self.edit is None else self.edit.known,
            x_0_error=None if self.calibration is None else self.calibration.x_0_error,
            label_plan=self.labels.plan,
        )

    @property
    def ingredients(self) -> Ingredients:
        """All that is needed beside the spec."""
        return self.make_ingredients(model=self.model.files, guide=None if self.guide is None else self.guide.files)

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
        schedule, sampler = make_schedule(self.card.config.schedule), self.spec.sampler
        if self.spec.request is not None:
            return self.spec.request.num_evaluations(schedule, sampler)
        return sampler.num_evaluations(schedule)


def resolve_job(config: SampleConfig, model: ResolvedModel | None = None) -> SampleJob:
    """Look up the models, the inputs of an edit and the output; nothing is written.

    Raises:
        ConfigError: If sampler, guide, labels or inputs do not fit the model, the seed or number of images is out of
            range, or the tick was begun with other settings.
        DatasetMissingError, DatasetError: If there are no inputs where they were named, or their manifest is damaged.
        OutputExistsError: If the output holds a run that cannot grow to this number of images.
        UntrustedCodeError: If a model brings code and is not trusted.
        ModelMissingError, CheckpointError, StorageError: If model or output cannot be read.
    """
    check_room(config.pool, config.cluster)
    tick, where = None, f"tick {config.tick_utc} in {config.output}"
    if config.tick_utc is not None:
        tick = read_tick(open_store(config.output), config.tick_utc)
    if tick is not None:
        tick.refuse_others(model=config.model, guide_model=config.guide_model, seed=config.seed, where=where)
    if model is None:
        uri = config.model if tick is None else tick.model_uri
        model = resolve_model(uri, config.tracking, trust_model_code=config.trust_model_code)
    check_trust(model.files, model.uri)
    card = read_card(model.files, model.uri)
    network = card.config
    guide = _resolve_guide(config, config.guide_model if tick is None else tick.guide_uri, card, model.uri)
    try:
        schedule = make_schedule(network.schedule)
        config.sampler.timesteps(schedule)
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
        labels = resolve_labels(config.request, card, model.uri)
        spec = SamplingSpec(
            model_digest=model.files.digest,
            guide_digest=None if guide is None else guide.files.digest,
            calibration_digest=None if calibration is None else calibration.digest,
            request=None if edit is None else edit.spec,
            sampler=config.sampler,
            sampler_revision=config.sampler.revision_on(schedule),
            seed=config.noise_seed,
            tick=config.tick_utc,
            label_rule=labels.rule,
            num_classes=network.num_classes,
            shard_size=config.shard_size,
            batch_size=config.batch_size,
            image_format=config.format,
            container=config.container,
            precision=config.precision,
            channels_last=config.channels_last,
            compile=config.compile,
            image_size=network.image_size,
            channels=network.channels,
            num_levels=network.num_levels,
        )
        num_asked = _num_asked(config, spec, edit, labels)
        plan = plan_shards(spec, num_asked)
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from error
    if tick is not None:
        tick.refuse_other_spec(spec, where)
    return look_again(
        SampleJob(
            model=model,
            card=card,
            guide=guide,
            edit=edit,
            labels=labels,
            num_asked=num_asked,
            calibration=calibration,
            spec=spec,
            plan=plan,
            store=open_store(join_uri(config.output, spec.digest[:PREFIX_DIGITS])),
            manifest=None,
            tick=tick,
        )
    )


def look_again(job: SampleJob) -> SampleJob:
    """The same job with the manifest that is there now, and the plan of at least as many images as it names.

    Raises:
        ConfigError, FormatVersionError, StorageError: If the manifest cannot be read.
    """
    manifest, plan = load_generation_manifest(job.store), job.plan
    if manifest and manifest.num_images > plan.num_images:
        plan = plan_shards(job.spec, manifest.num_images)
    return replace(job, manifest=manifest, plan=plan)


def _num_asked(config: SampleConfig, spec: SamplingSpec, edit: EditRequest | None, labels: LabelRequest) -> int:
    """Images that are asked for."""
    if edit is not None:
        return edit.num_asked
    fixed = labels.num_images or config.num_images
    return fixed or (config.images_per_class or _IMAGES_PER_CLASS) * (spec.label_rule.turn(spec.num_classes) or 1)


def _resolve_guide(config: SampleConfig, uri: str | None, card: ModelCard, model_uri: str) -> ResolvedModel | None:
    """The weaker model, if one is named; it must make the same images from the same noise."""
    if uri is None:
        return None
    guide = resolve_model(uri, config.tracking, trust_model_code=config.trust_model_code)
    theirs, ours = read_card(guide.files, guide.uri), card
    for name in ("image_size", "channels", "num_levels", "num_classes", "schedule"):
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
    if network.num_levels != 256:
        raise ValueError(
            f"model: images are stored with 256 levels, got a model of {network.num_levels}; choose another"
        )
    if config.guide_model is not None:
        if sampler.guidance_scale == 1.0:
            raise ValueError("guide_model: has no effect where sampler.guidance_scale is 1; raise it, such as to 1.5")
    elif sampler.guidance_scale != 1.0 and network.num_classes is None:
        raise ValueError(
            f"guidance_scale: the model has no classes to guide to, got {sampler.guidance_scale}; set it to 1, or "
            "name a guide_model"
        )
    if sampler.needs_learned_variance and not network.network.learned_variance:
        raise ValueError(
            "sampler.variance: the model has not learned one, got learned_range; choose fixed_small or fixed_large"
        )
    if sampler.needs_x_0_error != (config.calibration is not None):
        raise ValueError(
            f"calibration: goes with ancestral sampling and sampler.variance analytic, got {config.calibration} with "
            f"{sampler.name}; make it with jobs/calibrate.py, or leave both out"
        )
