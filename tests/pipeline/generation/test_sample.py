"""Generation end to end: exactly once through killed actors and killed drivers, and nothing written twice."""

import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest
import webdataset

from ddpm import DDIM, Ancestral
from pipeline.cluster import ClusterConfig
from pipeline.config_io import to_toml
from pipeline.config_sections import write_section
from pipeline.data.image_stream import join_images, read_images
from pipeline.errors import OutputExistsError, PipelineError
from pipeline.generation import sample as sample_module
from pipeline.generation.making.shard_maker import ShardMaker
from pipeline.generation.output.commits import read_record
from pipeline.generation.output.inventory import Inventory
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob, resolve_job
from pipeline.generation.sample_preview import describe_plan
from pipeline.presets import digits
from pipeline.project import parse_project, read_preset
from pipeline.stores.object_store import TEMPORARY_PREFIX
from pipeline.stores.storage import open_store
from tests.pipeline.runs_in_process import digests, make_in_process, run, snapshot
from tests.pipeline.tiny_models import write_model, write_own_model
from tests.processes import environment, kill_with_its_machine
from tests.seeds import SEEDS

ROOT = Path(__file__).parents[3]


def config_of(model: str, output: Path, images_per_class: int = 20, **changes: object) -> SampleConfig:
    """Three classes: 60 images in four shards of 15."""
    config = SampleConfig(
        model=model,
        output=str(output),
        images_per_class=images_per_class,
        sampler=DDIM(num_steps=4),
        shard_size=15,
        batch_size=4,
        num_actors=2,
        contact_sheet_columns=6,
        cluster=ClusterConfig(num_cpus=2),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- without Ray


def test_a_finished_run_is_published_and_then_left_alone(tmp_path: Path) -> None:
    """Everything is committed already, as after a driver that was killed late: no Ray is needed to finish."""
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    made = make_in_process(config)
    result = sample(config)
    assert (result.manifest.num_images, result.num_made, result.evaluations_per_s) == (60, 0, 0)
    assert load_generation_manifest(open_store(result.store.uri)) == result.manifest and result.edit is None
    assert digests(result) == made
    before = snapshot(tmp_path / "out")
    again = sample(config)
    assert (again.manifest, again.num_made, again.store.uri) == (result.manifest, 0, result.store.uri)
    assert sample(dataclasses.replace(config, num_actors=7)).num_made == 0, "who makes the images is no part of them"
    assert snapshot(tmp_path / "out") == before
    stored = Path(result.store.uri, "config.toml").read_text()
    assert stored == write_section(config, "sample")
    assert read_preset(digits(), parse_project(stored, "config.toml"), "config.toml", ("sample",)).sample == config


def test_the_images_are_those_that_were_asked_for_in_the_order_of_their_ids(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model", answers=True), tmp_path / "out")
    result, images = run(config)
    assert result.num_asked == 60 and images.labels is not None
    assert images.labels.tolist() == [i % 3 for i in range(60)]
    assert (images.images == read_images(result.store, read_shards(result.store, result.manifest.parts)).images).all()
    fewer = sample(dataclasses.replace(config, images_per_class=7))
    few = join_images(list(fewer.images()))
    assert (fewer.num_asked, fewer.manifest.num_images) == (21, 60), "21 images end inside the second shard"
    assert (few.images == images.images[:21]).all() and len(few) == 21


def test_a_model_without_classes_makes_as_many_images_as_asked_for(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model", num_classes=None), tmp_path / "out", images_per_class=20)
    result, images = run(config)
    assert result.manifest.num_images == 20 and images.labels is None
    shorter = sample(dataclasses.replace(config, images_per_class=5))
    assert (shorter.manifest.num_images, shorter.num_asked) == (20, 5), "a run never shrinks"


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


def test_orphans_go_when_they_are_old_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are found when their range is closed."""
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    make_in_process(config)
    prefix = Path(resolve_job(config).store.uri)
    young, old = (prefix / f"00000000{index}-{'0' * 64}.tar" for index in (1, 2))
    for orphan in (young, old):
        orphan.write_bytes(b"bytes of other hardware")
    os.utime(old, (0, time.time() - config.orphan_age_s - 1))
    sample(config)
    assert young.exists() and not old.exists()
    said = capsys.readouterr().out
    assert "removed 1 shards of killed attempts" in said and "1 of them are too young" in said


def test_files_that_killed_attempts_did_not_finish_go_when_they_are_old_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    make_in_process(config)
    prefix, models = Path(resolve_job(config).store.uri), tmp_path / "out" / "_models" / "0123"
    models.mkdir(parents=True)
    young, old, staged = prefix / "young", prefix / "_parts" / "old", models / "staged"
    young, old, staged = (path.with_name(f"{TEMPORARY_PREFIX}{path.name}") for path in (young, old, staged))
    for path in (young, old, staged):
        path.write_bytes(b"cut short")
    for path in (old, staged):
        os.utime(path, (0, time.time() - config.orphan_age_s - 1))
    sample(config)
    assert young.exists() and not old.exists() and not staged.exists()
    assert "removed 2 unfinished files of killed attempts" in capsys.readouterr().out


def test_an_orphan_that_was_seen_in_two_rounds_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard has lost its tar, which is found when its range is closed: it is closed once more."""
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    make_in_process(config)
    job = resolve_job(config)
    (Path(job.store.uri) / f"000000001-{'0' * 64}.tar").write_bytes(b"bytes of other hardware")
    job.store.delete(read_record(job.store, 2).key)

    def make(config: SampleConfig, job: SampleJob, inventory: Inventory, _: object) -> None:
        maker = ShardMaker(job.ingredients, job.spec, job.store, num_threads=1, device="cpu")
        for shard in list(inventory.missing()):
            inventory.add(maker(shard).record)

    monkeypatch.setattr(sample_module, "_make_missing", make)
    sample(config)
    said = capsys.readouterr().out
    assert "1 committed shards have lost their tar" in said and ": 1 of them are too young" in said


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
    expected = make_in_process(config_of(model, tmp_path / "in process", trust_model_code=True))
    marker.unlink()

    config = config_of(model, tmp_path / "out", trust_model_code=True)
    result = sample(config)
    assert marker.exists()
    assert (result.manifest.num_images, result.num_made) == (60, 60) and result.evaluations_per_s > 0
    assert digests(result) == expected
    assert "60 of 60 images" in capsys.readouterr().out
    tars = [str(path) for path in sorted(Path(result.store.uri).glob("*.tar"))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False, handler=webdataset.reraise_exception))
    assert [json.loads(row["json"])["sample_id"] for row in read] == list(range(60))
    assert [int(row["cls"]) for row in read] == [i % 3 for i in range(60)]
    assert PIL.Image.open(io.BytesIO(read[0]["png"])).size == (8, 8)
    before = snapshot(tmp_path / "out")
    assert sample(config).num_made == 0
    assert snapshot(tmp_path / "out") == before

    # Something is lost, and more is asked for: what is missing is made, what is there is not touched.
    prefix = Path(result.store.uri)
    record = read_record(result.store, 1)
    (prefix / "_parts" / "000000001.json").unlink()
    (prefix / record.key).unlink()
    (prefix / read_record(result.store, 3).key).write_bytes(b"cut short")
    before = snapshot(prefix)
    grown = sample(dataclasses.replace(config, images_per_class=25))
    assert (grown.manifest.num_images, grown.num_made) == (75, 45)
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
        sample(config_of(model, tmp_path / "out", trust_model_code=True, batch_size=16))
    assert not list(tmp_path.glob("out/*/manifest.json"))


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_kills_every_actor_ends_the_run_after_its_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "killed"
    model = write_own_model(tmp_path / "own", monkeypatch, "kills", str(marker))
    with pytest.raises(PipelineError, match=r"^output shard 0 \(ids from 0\): its process died .*batch_size=2"):
        sample(
            config_of(
                model, tmp_path / "out", trust_model_code=True, images_per_class=1, num_actors=1, max_shard_retries=2
            )
        )
    assert marker.read_text().count("killed") == 3


# ---------------------------------------------------------------- a killed driver

DRIVER = """
import sys
from pathlib import Path
from pipeline.config_io import read_toml
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
sample(read_toml(SampleConfig, Path(sys.argv[1]).read_text(), sys.argv[1]))
"""


def start_driver(config: SampleConfig, file: Path, address: str | None) -> subprocess.Popen[bytes]:
    """On the Ray at `address`, or on one of its own."""
    file.write_text(to_toml(config))
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(file)], cwd=ROOT, env=environment(address))


def names(output: Path, pattern: str) -> set[str]:
    return {path.name[:9] for path in output.glob(f"*/{pattern}")}


def first_tar(output: Path) -> bool:
    return bool(names(output, "*.tar"))


def first_record(output: Path) -> bool:
    return bool(names(output, "_parts/*.json"))


def every_record(output: Path) -> bool:
    return len(names(output, "_parts/*.json")) == 4


def tars(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*/*.tar")}


@dataclass(frozen=True)
class Kill:
    """When a driver is killed, and whether its machine is lost with it."""

    moment: Callable[[Path], bool]
    machine: bool = False
    before: str = ""
    """What is written next: where the job was quicker than the kill, it is removed, and the disk as a moment before."""

    @classmethod
    def at_random(cls, seed: int) -> "Kill":
        choice = random.Random(seed)
        num_tars = choice.randint(1, 3)
        return cls(lambda output: len(names(output, "*.tar")) >= num_tars, machine=choice.random() < 0.5)


KILLS = [
    pytest.param(Kill(first_tar, machine=True, before="_parts/*.json"), id="tar_without_record"),
    pytest.param(Kill(first_record), id="first_record"),
    pytest.param(Kill(every_record, before="manifest.json"), id="every_record_but_no_manifest"),
    *(pytest.param(Kill.at_random(*seed.values), id=seed.id, marks=seed.marks) for seed in SEEDS[1:]),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> SampleConfig:
    """A run that nothing happens to, made in this process; slow enough for another to be killed at work."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = config_of(write_model(folder / "model"), folder / "out", sampler=Ancestral(num_steps=50), lease_s=2.0)
    make_in_process(config)
    assert len(tars(folder / "out")) == 4
    return config


@pytest.mark.services
@pytest.mark.parametrize("kill", KILLS)
def test_a_driver_killed_at_any_moment_changes_no_byte_of_the_result(
    unbroken: SampleConfig, kill: Kill, tmp_path: Path, ray_address: str
) -> None:
    output = tmp_path / "out"
    config = dataclasses.replace(unbroken, output=str(output))
    driver = start_driver(config, tmp_path / "config.toml", None if kill.machine else ray_address)
    while not kill.moment(output):
        assert driver.poll() is None, "the moment never came"
        time.sleep(0.002)
    if kill.machine:
        kill_with_its_machine(driver)
    else:
        driver.kill()
    assert driver.wait() == -signal.SIGKILL
    for written in list(output.glob(f"*/{kill.before}"))[:1] if kill.before else []:
        written.unlink()
    assert not names(output, "manifest.json"), "killed before the end"

    sample(config)
    assert tars(output) == tars(Path(unbroken.output))
    before = snapshot(output)
    sample(config)
    assert snapshot(output) == before, "a run after that writes nothing"


@pytest.mark.services
@pytest.mark.parametrize(
    ("lease_s", "codes", "sizes"),
    [(0.0, [0, 0], (20, 20)), (0.0, [0, 0], (20, 40)), (20.0, [0, 1], (20, 20))],
    ids=["without lease", "of two sizes", "with lease"],
)
def test_two_drivers_at_once_by_mistake_make_one_result(
    unbroken: SampleConfig, tmp_path: Path, ray_address: str, lease_s: float, codes: list[int], sizes: tuple[int, int]
) -> None:
    """With the lease the second leaves, unless the first is done before it has been seen to renew.

    Of two sizes the longer manifest stays, whoever writes last: each record is there once.
    """
    config = dataclasses.replace(unbroken, output=str(tmp_path / "out"), num_actors=1, lease_s=lease_s)
    drivers = [
        start_driver(dataclasses.replace(config, images_per_class=size), tmp_path / f"{number}.toml", ray_address)
        for number, size in enumerate(sizes)
    ]
    assert sorted(driver.wait() for driver in drivers) in ([0, 0], codes)
    made = tars(tmp_path / "out")
    assert tars(Path(unbroken.output)).items() <= made.items()
    num_images = 3 * max(sizes)
    assert len(made) == num_images // 15 == len(names(tmp_path / "out", "_parts/*.json"))
    manifest = load_generation_manifest(resolve_job(config).store)
    assert manifest is not None and (manifest.num_images, manifest.num_shards) == (num_images, num_images // 15)
