"""The dry run's figures beside numbers reckoned by hand."""

import dataclasses
from pathlib import Path

import pytest

from ddpm import DDIM
from pipeline.generation.output.commits import read_record
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.sample_preview import describe_plan
from pipeline.models.model_files import read_model_files
from pipeline.models.registration import register_model
from pipeline.models.sampling_rate import SamplingRate
from pipeline.models.version_records import put_sampling_rate
from pipeline.progress import format_bytes
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.pipeline.runs_in_process import count_lists, make_in_process, snapshot
from tests.pipeline.tiny_models import write_model

RATE = SamplingRate(
    device="cpu",
    cpus_per_actor=2,
    batch_size=4,
    precision="float32",
    channels_last=False,
    compile=False,
    evaluations_per_s=10.0,
    busy_s=90.0,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("cost") / "model")


def config_of(model: str, output: Path, **changes: object) -> SampleConfig:
    """60 images in four shards of 15, each of 4 evaluations: 240 img·NFE."""
    config = SampleConfig(
        model=model,
        output=str(output),
        images_per_class=20,
        sampler=DDIM(num_steps=4),
        shard_size=15,
        batch_size=4,
        num_actors=3,
        cpus_per_actor=2,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def test_a_run_that_has_not_begun(model: str, tmp_path: Path) -> None:
    """240 img·NFE at 0.05 a second: 4,800 s of actors, 1,600 s on three, 2.67 CPU-hours on two CPUs each."""
    config = config_of(model, tmp_path / "out", throughput=0.05, price_per_device_hour=3.0, price_per_gb=0.02)
    plan = dict(describe_plan(config))
    assert plan["time"] == "about 2.67 CPU-hours, 26 min 40 s on 3 actors, at 0.05 img·NFE/s of each, as given"
    assert plan["bytes"].startswith("not known: there is no shard yet")
    assert plan["cost"] == ("about 8.00 for computing, at 3 a device-hour; not known a month for storing, at 0.02 a GB")
    # PUT 2 x 4 + 1 range + 5; LIST parts, records, image files, removals 3 times; GET a part, manifest, the five keys
    assert plan["requests"].startswith("14 PUT ") and " 6 LIST " in plan["requests"] and " 7 GET;" in plan["requests"]
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_half_done(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", throughput=0.05, price_per_gb=1e6)
    make_in_process(config)
    store = resolve_job(config).store
    sizes = [read_record(store, index).size_bytes for index in range(4)]
    for index in (1, 3):
        store.delete(f"_parts/00000000{index}.json")
    before = snapshot(tmp_path / "out")
    plan = dict(describe_plan(config))
    assert snapshot(tmp_path / "out") == before
    each = (sizes[0] + sizes[2]) / 30
    assert plan["output shards"] == "4, of which 2 are missing"
    assert plan["time"].startswith("about 1.33 CPU-hours, 20 min 00 s on 2 actors")
    assert plan["bytes"].startswith(f"about {format_bytes(60 * each)} in all, {format_bytes(30 * each)} new")
    assert plan["cost"] == f"about {60 * each / 1000:,.2f} a month for storing, at 1e+06 a GB"
    # PUT 2 x 2 + 1 + 5; GET 2 records, 2 ends of runs, one part, manifest and the five keys
    assert plan["requests"].startswith("10 PUT ") and " 6 LIST " in plan["requests"] and " 11 GET;" in plan["requests"]


def test_the_listings_are_those_that_were_foretold(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model, tmp_path / "out")
    make_in_process(config)
    foretold = dict(describe_plan(config))["requests"]
    looked: list[str] = []
    count_lists(monkeypatch, Path(resolve_job(config).store.uri), looked)
    sample(config)
    assert looked.count("gallery/") == 1, "of a picture"
    assert f" {len(looked) - 1} LIST " in foretold


def test_nothing_is_missing(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", price_per_device_hour=3.0)
    make_in_process(config)
    sample(config)
    plan = dict(describe_plan(config))
    assert plan["time"] == "none: nothing is missing" and plan["cost"].startswith("about 0.00 for computing")
    assert plan["requests"].startswith("those of a look") and plan["bytes"].startswith("about ")


def test_a_speed_that_nobody_has_measured_comes_with_the_command_that_measures_it(model: str, tmp_path: Path) -> None:
    plan = dict(describe_plan(config_of(model, tmp_path / "out", compile=True, price_per_device_hour=3.0)))
    assert plan["time"].startswith("not known before it is measured: jobs/benchmark.py sample --batch-size 4 ")
    assert "--num-threads 2 --compile does; --throughput IMG_NFE_PER_S" in plan["time"]
    assert plan["cost"].startswith("not known for computing")


def test_the_speed_that_was_measured_for_a_version_and_its_setting(model: str, tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = TrackingRun.open(tracking, new_run_key())
    version = register_model(run, read_model_files(open_store(model)), "tiny")
    config = config_of("models:/tiny/1", tmp_path / "out", tracking=tracking)
    assert "not known" in dict(describe_plan(config))["time"]
    put_sampling_rate(run, version, RATE)
    put_sampling_rate(run, version, dataclasses.replace(RATE, evaluations_per_s=999.0, busy_s=1.0))  # too short
    put_sampling_rate(run, version, dataclasses.replace(RATE, evaluations_per_s=999.0, batch_size=8))
    put_sampling_rate(run, version, dataclasses.replace(RATE, evaluations_per_s=999.0, device="NVIDIA H100"))
    assert run.flush() == 0
    run.finish()
    told = dict(describe_plan(config))["time"]
    assert told == (
        "about 0.0133 CPU-hours, 8.0 s on 3 actors, at 10 img·NFE/s of each, as measured on cpu over 1 min 30 s"
    )
    assert "not known" in dict(describe_plan(dataclasses.replace(config, precision="bf16")))["time"]
    assert "at 7 img" in dict(describe_plan(dataclasses.replace(config, throughput=7.0)))["time"]


@pytest.mark.parametrize("name", ["throughput", "price_per_device_hour", "price_per_gb"])
def test_impossible_figures_are_refused(name: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: above 0, got 0; leave it out"):
        config_of(model, tmp_path, **{name: 0})
