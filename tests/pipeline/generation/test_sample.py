"""Generation end to end: exactly once through killed actors and killed drivers, and nothing written twice."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest
import webdataset

from ddpm import SamplerConfig
from pipeline.cluster import ClusterConfig
from pipeline.config_io import read_toml, to_toml
from pipeline.data.image_stream import read_images
from pipeline.errors import ConfigError, ModelMissingError, OutputExistsError, PipelineError
from pipeline.generation.commits import read_record
from pipeline.generation.inventory import load_generation_manifest
from pipeline.generation.sample import SampleConfig, SampleResult, describe_plan, resolve_job, sample
from pipeline.generation.shard_maker import ShardMaker
from pipeline.stores.storage import open_store
from tests.pipeline.tiny_models import write_model, write_own_model

ROOT = Path(__file__).parents[3]


def config_of(model: str, output: Path, images_per_class: int = 20, **changes: object) -> SampleConfig:
    """Three classes: 60 images in four shards of 15."""
    config = SampleConfig(
        model=model,
        output=str(output),
        images_per_class=images_per_class,
        sampler=SamplerConfig(num_steps=4),
        shard_size=15,
        batch_size=4,
        num_actors=2,
        contact_sheet_columns=6,
        cluster=ClusterConfig(num_cpus=2),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def make_in_process(config: SampleConfig) -> dict[int, str]:
    """Make and commit every shard without Ray; the digest of each, by index."""
    job = resolve_job(config)
    make = ShardMaker(job.ingredients, job.spec, job.store, num_threads=1, device="cpu")
    return {s.index: make(s).record.sha256 for s in job.plan.missing(bytes(job.plan.num_shards))}


def digests(result: SampleResult) -> dict[int, str]:
    manifest = load_generation_manifest(open_store(result.uri))
    assert manifest is not None
    return {index: shard.sha256 for index, shard in enumerate(manifest.shards)}


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file and folder: time of change, inode, content. A temporary file would change its folder's time."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes() if path.is_file() else b""
        )
        for path in [folder, *folder.rglob("*")]
    }  # fmt: skip


# ---------------------------------------------------------------- without Ray


def test_a_finished_run_is_published_and_then_left_alone(tmp_path: Path) -> None:
    """Everything is committed already, as after a driver that was killed late: no Ray is needed to finish."""
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    made = make_in_process(config)
    result = sample(config)
    assert (result.num_images, result.num_made, result.evaluations_per_s) == (60, 0, 0)
    assert digests(result) == made
    before = snapshot(tmp_path / "out")
    assert sample(config) == dataclasses.replace(result, wall_s=pytest.approx(0, abs=60))
    assert sample(dataclasses.replace(config, num_actors=7)).num_made == 0, "who makes the images is no part of them"
    assert snapshot(tmp_path / "out") == before
    stored = Path(result.uri, "config.toml").read_text()
    assert read_toml(SampleConfig, stored, "config.toml") == config and stored == to_toml(config)


def test_the_contact_sheet_shows_the_first_images_of_each_class_in_a_row(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model", channels=3), tmp_path / "out")
    make_in_process(config)
    result = sample(config)
    manifest = load_generation_manifest(open_store(result.uri))
    assert manifest is not None and manifest.class_names == ("class 0", "class 1", "class 2")
    images = read_images(open_store(result.uri), manifest.shards)
    sheet = np.asarray(PIL.Image.open(result.contact_sheet_uri))
    scale, pitch = 4, 9
    assert sheet.shape == ((3 * pitch - 1) * scale, (6 * pitch - 1) * scale, 3)
    assert images.labels is not None
    for k in range(3):
        for column, image in enumerate(images.images[images.labels == k][:6]):
            place = sheet[::scale, ::scale][k * pitch : k * pitch + 8, column * pitch : column * pitch + 8]
            assert (place == image).all()


def test_a_model_without_classes_makes_as_many_images_as_asked_for(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model", num_classes=None), tmp_path / "out", images_per_class=20)
    make_in_process(config)
    result = sample(config)
    assert result.num_images == 20
    assert np.asarray(PIL.Image.open(result.contact_sheet_uri)).shape == ((4 * 9 - 1) * 4, (6 * 9 - 1) * 4)
    assert sample(dataclasses.replace(config, images_per_class=5)).num_images == 20, "a run never shrinks"


def test_a_run_with_a_ragged_end_does_not_grow_and_nothing_is_changed(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out", images_per_class=7)
    make_in_process(config)
    longer = dataclasses.replace(config, images_per_class=20)
    for publish in (False, True):  # by its records alone, and by its manifest
        if publish:
            sample(config)
        before = snapshot(tmp_path / "out")
        with pytest.raises(
            OutputExistsError, match=r"shard 1 .* 6 images, .* multiple of shard_size; ask for 21 images"
        ):
            sample(longer)
        assert snapshot(tmp_path / "out") == before


def test_orphans_go_when_they_are_old_enough(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    make_in_process(config)
    result = sample(config)
    orphan = Path(result.uri, f"000000002-{'0' * 64}.tar")
    orphan.write_bytes(b"bytes of other hardware")
    sample(config)
    assert orphan.exists()
    os.utime(orphan, (0, time.time() - config.orphan_age_s - 1))
    before = snapshot(Path(result.uri))
    sample(config)
    assert not orphan.exists()
    after = snapshot(Path(result.uri))
    assert {key for key in before if key != "."} - set(after) == {orphan.name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": SamplerConfig(num_steps=101)}, r"num_steps"),
        ({"model": "/nowhere"}, r"/nowhere"),
        ({"output": "ftp://host/x"}, r"ftp://host/x"),
    ],
    ids=["steps", "model", "output"],
)
def test_mistakes_are_found_before_anything_is_started(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(config_of(write_model(tmp_path / "model"), tmp_path / "out"), **change)
    with pytest.raises((ConfigError, ModelMissingError), match=message):
        sample(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "field", ["images_per_class", "shard_size", "batch_size", "num_actors", "contact_sheet_columns"]
)
def test_impossible_configurations_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*got 0"):
        SampleConfig(model="m", output="o", **{field: 0})
    with pytest.raises(ValueError, match=r"^seed: "):
        SampleConfig(model="m", output="o", seed=-1)


def test_the_plan_is_described_without_a_trace(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    rows = dict(describe_plan(config))
    assert rows["images"] == "60, of which 60 are missing"
    assert rows["output shards"] == "4, of which 4 are missing"
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- on Ray


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files to the collector
@pytest.mark.usefixtures("ray_session")
def test_an_actor_killed_at_work_is_replaced_and_every_image_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network kills its own process with SIGKILL the first time that it is called; its source travels with it."""
    marker = tmp_path / "killed"
    model = write_own_model(tmp_path / "own", monkeypatch, "kills once", str(marker))
    marker.touch()
    expected = make_in_process(config_of(model, tmp_path / "in process"))
    marker.unlink()

    config = config_of(model, tmp_path / "out")
    result = sample(config)
    assert marker.exists()
    assert (result.num_images, result.num_made) == (60, 60) and result.evaluations_per_s > 0
    assert digests(result) == expected
    assert "60 of 60 images" in capsys.readouterr().out
    tars = [str(path) for path in sorted(Path(result.uri).glob("*.tar"))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False, handler=webdataset.reraise_exception))
    assert [json.loads(row["json"])["sample_id"] for row in read] == list(range(60))
    assert [int(row["cls"]) for row in read] == [i % 3 for i in range(60)]
    assert PIL.Image.open(io.BytesIO(read[0]["png"])).size == (8, 8)
    before = snapshot(tmp_path / "out")
    assert sample(config).num_made == 0
    assert snapshot(tmp_path / "out") == before

    # Something is lost, and more is asked for: what is missing is made, what is there is not touched.
    prefix = Path(result.uri)
    record = read_record(open_store(result.uri), 1)
    (prefix / "_parts" / "000000001.json").unlink()
    (prefix / record.key).unlink()
    (prefix / read_record(open_store(result.uri), 3).key).write_bytes(b"cut short")
    before = snapshot(prefix)
    grown = sample(dataclasses.replace(config, images_per_class=25))
    assert (grown.num_images, grown.num_made) == (75, 45)
    assert {index: digest for index, digest in digests(grown).items() if index < 4} == expected
    after = snapshot(prefix)
    untouched = {key for key in before if key[:9] in ("000000000", "000000002") or key.startswith("_parts/")}
    assert len(untouched) == 5 and all(after[key] == before[key] for key in untouched)


@pytest.mark.usefixtures("ray_session")
def test_what_an_actor_raises_reaches_the_operator_as_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_own_model(tmp_path / "own", monkeypatch, "hungry")
    with pytest.raises(
        PipelineError, match=r"^out of memory on cpu at output shard \d with batch_size=16: choose batch_size=4,"
    ):
        sample(config_of(model, tmp_path / "out", batch_size=16))
    assert not list(tmp_path.glob("out/*/manifest.json"))


@pytest.mark.services
@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_kills_every_actor_ends_the_run_after_its_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "killed"
    model = write_own_model(tmp_path / "own", monkeypatch, "kills", str(marker))
    with pytest.raises(PipelineError, match=r"actors died 3 times over one output shard .*batch_size=2"):
        sample(config_of(model, tmp_path / "out", images_per_class=1, num_actors=1, max_shard_retries=2))
    assert marker.read_text().count("killed") == 3


# ---------------------------------------------------------------- a killed driver

DRIVER = """
import sys
from pathlib import Path
from pipeline.config_io import read_toml
from pipeline.generation.sample import SampleConfig, sample
sample(read_toml(SampleConfig, Path(sys.argv[1]).read_text(), sys.argv[1]))
"""


def start_driver(config: SampleConfig, file: Path) -> subprocess.Popen[bytes]:
    file.write_text(to_toml(config))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(file)], cwd=ROOT, env=environment)


def finish(config: SampleConfig, file: Path) -> None:
    assert start_driver(config, file).wait(timeout=300) == 0


def names(output: Path, pattern: str) -> set[str]:
    return {path.name[:6] for path in output.glob(f"*/{pattern}")}


def tar_without_record(output: Path) -> bool:
    return bool(names(output, "*.tar") - names(output, "_parts/*.json"))


def first_record(output: Path) -> bool:
    return bool(names(output, "_parts/*.json"))


def every_record_but_no_manifest(output: Path) -> bool:
    return len(names(output, "_parts/*.json")) == 4 and not names(output, "manifest.json")


@pytest.mark.services
def test_a_driver_killed_at_any_moment_changes_no_byte_of_the_result(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    sampler = SamplerConfig(name="ancestral", num_steps=100)  # slow enough to be killed at work
    unbroken = config_of(model, tmp_path / "unbroken", sampler=sampler)
    finish(unbroken, tmp_path / "unbroken.toml")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "unbroken").glob("*/*.tar")}
    assert len(expected) == 4

    moments: list[Callable[[Path], bool]] = [tar_without_record, first_record, every_record_but_no_manifest]
    for moment in moments:
        output, file = tmp_path / moment.__name__, tmp_path / f"{moment.__name__}.toml"
        config = dataclasses.replace(unbroken, output=str(output))
        driver = start_driver(config, file)
        deadline_s = time.monotonic() + 120
        while not moment(output):
            assert driver.poll() is None and time.monotonic() < deadline_s, f"{moment.__name__} never came"
        victims = psutil.Process(driver.pid).children(recursive=True) if moment is tar_without_record else []
        for process in [*victims, psutil.Process(driver.pid)]:  # a machine that is lost, or its driver alone
            process.send_signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        assert not names(output, "manifest.json"), "killed before the end"
        if moment is tar_without_record and not tar_without_record(output):
            # The worker was quicker than the kill. Without the record the disk is as a moment earlier.
            next(output.glob("*/_parts/*.json")).unlink()
        left = names(output, "_parts/*.json")

        finish(config, file)
        assert {path.name: path.read_bytes() for path in output.glob("*/*.tar")} == expected
        assert (len(left) == 4) == (moment is every_record_but_no_manifest)
        before = snapshot(output)
        finish(config, file)
        assert snapshot(output) == before, "a run after that writes nothing"

    # Two drivers by mistake, at once: one result, and neither fails.
    config = dataclasses.replace(unbroken, output=str(tmp_path / "twice"))
    drivers = [start_driver(config, tmp_path / f"twice {number}.toml") for number in range(2)]
    assert [driver.wait(timeout=300) for driver in drivers] == [0, 0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "twice").glob("*/*.tar")} == expected
    assert names(tmp_path / "twice", "manifest.json")
