"""The main path on real workers, once: dataset, two DDP ranks, checkpoints, MLflow, registry, images, figures."""

import dataclasses
import math
from pathlib import Path

import pytest

from ddpm import DDIM, OwnNetworkConfig, UNetConfig
from pipeline.config_io import to_json
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import ConfigError, DatasetMissingError, FormatVersionError, OutputExistsError, StoppedError
from pipeline.evaluation.evaluate import EvaluateConfig, evaluate
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.models.registration import register_model
from pipeline.models.registry import CHECKPOINT_TAG
from pipeline.presets import digits, imagenet64
from pipeline.project import parse_project, read_preset
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from pipeline.training.checkpoints.checkpoint_records import Retention
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.checkpoints.ema_snapshots import PostHocEmaConfig
from pipeline.training.metrics.telemetry import STALL_METRIC
from pipeline.training.post_hoc_ema import ReconstructConfig, RunAverages, reconstruct
from pipeline.training.run_record import RUN_RECORD, RunRecord, read_run_record
from pipeline.training.train import _pin_registered, train
from pipeline.training.train_config import OptimizerConfig, RunIdentity, TrainConfig, ValidationConfig
from pipeline.training.train_plan import describe_plan, noisy_average
from tests.pipeline.registered_models import download_artifacts
from tests.pipeline.tiny_models import write_own_model
from tests.pipeline.training.small_runs import make_run, manifest

TINY = UNetConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> TrainConfig:
    folder = tmp_path_factory.mktemp("train")
    prepare(PrepareConfig(source="digits", dataset=str(folder / "dataset"), shard_size=250))
    return dataclasses.replace(
        digits().train,
        dataset=str(folder / "dataset"),
        output=str(folder / "run"),
        network=TINY,
        steps=12,
        optimizer=dataclasses.replace(
            digits().train.optimizer, more_ema_halflives_images=(500,), ema_ramp_up_ratio=0.05
        ),
        post_hoc_ema=PostHocEmaConfig(snapshot_interval_steps=4),
        checkpoint_interval_steps=5,
        keep_checkpoints=2,
        log_interval_steps=4,
        grid_interval_steps=6,
        grid_sampler=DDIM(num_steps=2),
        profile=2,
        tracking=TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}"),
    )


def test_the_main_path(config: TrainConfig) -> None:
    result = train(config)
    assert (result.steps, result.version.uri) == (12, "models:/ddpm-digits/1")

    client = connect(str(config.tracking.uri))
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["network.base_channels"] == "8"
    for key in ("loss", "grad_norm", "learning_rate", "images_per_s", "data_wait_share", "loss_t_quartile_4"):
        history = client.get_metric_history(result.run_id, key)
        assert [entry.step for entry in history] == [4, 8, 12], key
        assert all(math.isfinite(entry.value) for entry in history)
    measured = client.get_metric_history(result.run_id, "validation_loss")
    assert measured[-1].step == 12 and all(entry.step in (5, 10, 12) and 0 < entry.value < 2 for entry in measured)
    assert run.data.metrics["validation_bits_per_dim"] > 0
    # What somebody who opens the run sees: what it is, on which data, by which code, on which machines.
    described = run.data.tags["mlflow.note.content"]
    assert described.startswith("12 steps of 128 images for a `unet` of ")
    assert "on **digits**: 1,500 images of 8 x 8, 1 channel, 10 classes." in described
    (inputs,) = run.inputs.dataset_inputs
    assert (inputs.dataset.name, inputs.dataset.digest) == ("digits", run.data.params["dataset_digest"][:36])
    names = ("model_flops_utilisation", "goodput", "system/node_0/cpu_utilization_percentage")
    assert all(math.isfinite(run.data.metrics[name]) for name in names)
    assert 0 < run.data.metrics["goodput"] < 1 and run.data.metrics["peak_memory_bytes"] > 2**27
    assert {file.path for file in client.list_artifacts(result.run_id)} >= {"environment.txt", "profile"}
    stalls = client.get_metric_history(result.run_id, STALL_METRIC)
    assert [entry.step for entry in stalls] == [5, 10, 12] and all(entry.value > 0 for entry in stalls)
    assert {file.path for file in client.list_artifacts(result.run_id, "samples")} == {
        "samples/step-000000006.png",
        "samples/step-000000012.png",
    }
    linked = client.search_logged_models([run.info.experiment_id], filter_string="name LIKE 'step-%'")
    assert {model.name for model in linked} == {"step-000000005", "step-000000010", "step-000000012"}
    assert all(model.tags["ddpm.uri"] and model.tags["ddpm.digest"] for model in linked)
    stored = Path(result.checkpoint_uri, "config.toml").read_text()
    handle = TrackingRun(str(config.tracking.uri), result.run_id)
    assert download_artifacts(handle, "config.toml", Path(config.output).parent / "logged").read_text() == stored
    tables = parse_project(stored, "config.toml")
    assert read_preset(imagenet64(), tables, "config.toml", ("train",)).train == config, "a project file"
    kept = sorted(path.parent.name[:14] for path in Path(config.output, "checkpoints").glob("step-*/model.json"))
    assert kept == ["step-000000010", "step-000000012"]

    # A finished run that is resumed trains and registers nothing; one that is started again is refused.
    again = train(dataclasses.replace(config, resume=True))
    assert again == result
    assert [version.version for version in client.search_model_versions("name='ddpm-digits'")] in ([1], ["1"])
    with pytest.raises(OutputExistsError, match="--resume"):
        train(config)
    with pytest.raises(ConfigError, match=r"^seed: the run in .* has 0, got 7"):
        train(dataclasses.replace(config, resume=True, seed=7))

    # The registered version and the checkpoint are the same model: the same images, made once.
    sampling = SampleConfig(
        model="models:/ddpm-digits@candidate",
        output=str(Path(config.output).parent / "samples"),
        images_per_class=2,
        sampler=DDIM(num_steps=2),
        shard_size=10,
        batch_size=10,
        tracking=config.tracking,
    )
    made = sample(sampling)
    assert (made.manifest.num_images, made.num_made) == (20, 20)
    same = sample(dataclasses.replace(sampling, model=result.checkpoint_uri))
    assert (same.store.uri, same.num_made) == (made.store.uri, 0)
    measures = EvaluateConfig(
        dataset=config.dataset, sample=sampling.images, eps_images_per_t=2, tracking=config.tracking
    )
    report = evaluate(measures)
    terms = {"bits_per_dim_prior", "bits_per_dim_denoising", "bits_per_dim_decoder"}
    assert set(report.record.figures) == {"label_agreement", "frechet_pixels", "eps_mse", "bits_per_dim", *terms}
    assert report.figures["bits_per_dim"] == pytest.approx(sum(report.figures[term] for term in terms), rel=1e-4)
    assert client.get_model_version("ddpm-digits", "1").tags["ddpm.evaluation"] == report.uri
    logged = client.get_metric_history(result.run_id, "eval/eps_mse")
    assert [entry.value for entry in logged] == [report.figures["eps_mse"]]

    # A further average is another model, of the version and of its checkpoint.
    further = sample(dataclasses.replace(sampling, model=f"{result.version.uri}?ema=500"))
    assert further.num_made == 20 and further.store.uri != made.store.uri
    again = sample(dataclasses.replace(sampling, model=f"{result.checkpoint_uri}?ema=500"))
    assert (again.store.uri, again.num_made) == (further.store.uri, 0)

    # So is an average of any length, made of the snapshots.
    assert [record.step for record in RunAverages(config.output).snapshots] == [4, 8, 12]
    reconstruction = ReconstructConfig(run=config.output, output=str(Path(config.output).parent / "ema"))
    assert sample(dataclasses.replace(sampling, model=reconstruct(reconstruction).uri)).num_made == 20

    # More steps of the same run are another model: a second version. How they are computed may change, and what is
    # kept; the checkpoint of the first version stays.
    unmeasured = dataclasses.replace(config, profile=0, validation=ValidationConfig(num_images=0))
    changed = dataclasses.replace(unmeasured, steps=14, resume=True, gradient_checkpointing=True, keep_checkpoints=1)
    longer = train(changed)
    assert [record.step for record in CheckpointStore.of_run(config.output).records()] == [14, 12]
    assert Path(result.checkpoint_uri, "ema-500.safetensors").exists()
    assert (longer.steps, longer.version.uri) == (14, "models:/ddpm-digits/2")
    assert [record.step for record in RunAverages(config.output).snapshots] == [4, 8, 12, 14]


def test_a_driver_whose_time_is_over_before_its_workers_train_makes_no_step(config: TrainConfig) -> None:
    """A longer run from where the test before ended: its group leaves as soon as it has started."""
    with pytest.raises(StoppedError, match=r"^at step 14, checkpoint .*, because of --stop-after \(1.0 s\)") as stopped:
        train(dataclasses.replace(config, steps=100_000, resume=True, stop_after="1s"))
    assert stopped.value.exit_code == 3
    run = connect(str(config.tracking.uri)).get_run(str(read_run_record(open_store(config.output)).run_id))
    assert run.info.status == "KILLED" and run.data.tags["stopped"] == str(stopped.value)
    assert run.data.tags["ddpm.restarts"] == "2" and float(run.data.tags["ddpm.wall_time_s"]) > 0


def test_a_plan_says_what_a_run_takes(config: TrainConfig) -> None:
    plan = dict(describe_plan(config))
    assert plan["images"].startswith("1,536 (1.0 epochs of 1,500")
    assert plan["shards"].startswith("6, ")
    assert plan["EMA snapshots"].startswith("3 of 2 averages")


def test_an_average_that_remembers_the_random_weights_is_named(config: TrainConfig) -> None:
    def averaging(steps: int, **changes: object) -> TrainConfig:
        constant: dict[str, object] = {"ema_halflife_images": 1000, "ema_ramp_up_ratio": None}
        optimizer = OptimizerConfig(**constant | changes)  # type: ignore[arg-type]
        return dataclasses.replace(config, steps=steps, global_batch=64, optimizer=optimizer)

    few = averaging(31)
    note = noisy_average(few)
    assert note is not None and note.startswith("25% of the registered average") and "(it is 1,000)" in note
    assert dict(describe_plan(few))["average"] == note
    assert noisy_average(averaging(104)) is None, "6,656 images: a hundredth"
    assert (noisy_average(averaging(103)) or "").startswith("1% ")
    assert noisy_average(dataclasses.replace(few, optimizer=OptimizerConfig(ema_halflife_images=1000))) is None
    assert noisy_average(dataclasses.replace(few, fork_from="models:/other/1")) is None


def test_what_does_not_fit_is_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = dataclasses.replace(config, output=str(tmp_path / "run"))
    with pytest.raises(DatasetMissingError):
        train(dataclasses.replace(fresh, dataset=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match=r"^network\.factory: cannot import"):
        train(dataclasses.replace(fresh, network=OwnNetworkConfig(factory="no_such_package:factory")))
    with pytest.raises(
        ConfigError, match=r"^gradient_checkpointing: own_network_\w+:make does not offer it; give the "
    ):
        write_own_model(tmp_path / "own", monkeypatch, "nothing")
        own = next((tmp_path / "own").glob("*.py")).stem
        network = OwnNetworkConfig(factory=f"{own}:make", options={"what": "nothing"})
        train(dataclasses.replace(fresh, network=network, gradient_checkpointing=True))
    with pytest.raises(ConfigError, match="model name"):
        train(dataclasses.replace(fresh, register_as="a/b"))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    record = RunRecord(run_id="a", identity=RunIdentity.of(digits().train, manifest("a")))
    store.write(RUN_RECORD, to_json(record))
    assert read_run_record(store) == record
    store.write(RUN_RECORD, to_json(record).replace(b'"format_version":2', b'"format_version":1'))
    with pytest.raises(
        FormatVersionError, match=r"run\.json: has format_version 1, .* train again into another output"
    ):
        read_run_record(store)


@pytest.mark.parametrize("is_looked_up", [True, False])
def test_what_versions_of_the_time_before_pins_came_from_is_kept(tmp_path: Path, is_looked_up: bool) -> None:
    make_run(tmp_path / "run", steps=2, interval=0)
    checkpoints = CheckpointStore.of_run(str(tmp_path / "run"))
    (record,) = checkpoints.records()
    run = TrackingRun.open(TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"), new_run_key())
    register_model(run, checkpoints.read_model(record), "old", tags={CHECKPOINT_TAG: checkpoints.uri(record)})
    if is_looked_up:
        _pin_registered(checkpoints, run)
    newer = checkpoints.save(4, [lambda: {"file": b"x"}])
    checkpoints.prune(newer, Retention(last=1))
    assert [record.step for record in checkpoints.records()] == ([4, 2] if is_looked_up else [4])
    run.finish()


def test_versions_that_cannot_be_looked_up_end_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", steps=2, interval=0)
    _pin_registered(CheckpointStore.of_run(str(tmp_path / "run")), TrackingRun("http://127.0.0.1:9", "0" * 32))
    assert "may be removed, since they cannot be looked up: MLflow at http://127.0.0.1:9" in capsys.readouterr().out
