"""A scheduled run: a tick has one set of images, whatever tries it how often, with the model that it began with."""

import dataclasses
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import jobs.sample
from ddpm import DDIM
from jobs.cli import run_job
from pipeline.cluster import ClusterConfig
from pipeline.config_io import to_json
from pipeline.config_sections import write_section
from pipeline.errors import ConfigError, OutputExistsError
from pipeline.generation import claim as claim_module
from pipeline.generation.claim import claim
from pipeline.generation.output.tick_records import read_tick, tick_key
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.sample_preview import describe_plan
from pipeline.generation.spec.ticks import tick_seed
from pipeline.models.registration import register_model
from pipeline.models.registry import resolve_model
from pipeline.stores.lease import LEASE_KEY, hold_lease
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.pipeline.registered_models import model_files
from tests.pipeline.runs_in_process import count_lists, make_in_process, snapshot
from tests.pipeline.storage_checks import WATCHED_S, looking_often
from tests.pipeline.tiny_models import write_model, write_own_model
from tests.processes import environment

ROOT = Path(__file__).parents[3]
TICK, NEXT = "2026-11-22T03:00Z", "2026-11-23T03:00Z"
LEASE_S = 1.5


def config_of(model: str, output: Path, **changes: object) -> SampleConfig:
    """Three classes: 30 images in two shards of 15."""
    config = SampleConfig(
        model=model,
        output=str(output),
        images_per_class=10,
        sampler=DDIM(num_steps=4),
        shard_size=15,
        batch_size=4,
        contact_sheet_columns=6,
        cluster=ClusterConfig(num_cpus=2),
        tick=TICK,
        lease_s=LEASE_S,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def begin(config: SampleConfig) -> None:
    """As a driver that is killed before its first shard."""
    with claim(config, resolve_job(config)):
        pass


def finish(config: SampleConfig) -> Path:
    """The whole run, without Ray; its prefix."""
    begin(config)
    make_in_process(config)
    return Path(sample(config).store.uri)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "model", answers=True)


def test_ticks_differ_and_one_tick_is_made_once(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out")
    first = finish(config)
    before = snapshot(tmp_path / "out")
    again = sample(dataclasses.replace(config, tick="2026-11-22T04:00+01:00"))
    assert (again.num_made, Path(again.store.uri)) == (0, first), "the same moment in another zone"
    assert snapshot(tmp_path / "out") == before, "a tick that is done writes nothing"
    second = finish(dataclasses.replace(config, tick=NEXT))
    assert second != first and not {path.name for path in first.glob("*.tar")} & names(second)
    spec = resolve_job(config).spec
    assert (spec.tick, spec.seed) == (TICK, tick_seed(0, TICK))
    assert names(tmp_path / "out" / "_ticks") == {f"{TICK}.json", f"{NEXT}.json"}
    assert resolve_job(dataclasses.replace(config, tick=None)).spec.seed == 0, "without a tick nothing changes"


def test_a_lost_record_of_a_finished_tick_is_written_again(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out")
    finish(config)
    record = tmp_path / "out" / tick_key(TICK)
    before = record.read_bytes()
    record.unlink()
    assert sample(config).num_made == 0 and record.read_bytes() == before


def test_an_alias_that_moves_between_two_attempts_changes_nothing(tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    config = config_of("models:/digits@candidate", tmp_path / "out", tracking=tracking)
    run = TrackingRun.open(tracking, new_run_key())
    register_model(run, model_files(1), "digits")
    begin(config)
    assert register_model(run, model_files(2), "digits").version == 2
    assert resolve_model(config.model, tracking).uri == "models:/digits/2", "the alias has moved"
    make_in_process(config)
    result = sample(config)
    assert result.manifest.model_uri == "models:/digits/1"
    record = read_tick(open_store(config.output), TICK)
    assert record is not None and (record.asked_model, record.model_uri) == (config.model, "models:/digits/1")
    assert resolve_job(dataclasses.replace(config, model="models:/digits/1")).store.uri == result.store.uri
    assert resolve_job(dataclasses.replace(config, tick=NEXT)).model.uri == "models:/digits/2"
    with pytest.raises(ConfigError, match=r"^model: tick .* was begun with 'models:/digits@candidate'"):
        sample(dataclasses.replace(config, model="models:/digits/2"))
    connect(run.uri).delete_registered_model_alias("digits", "candidate")
    assert sample(config).num_made == 0, "the alias is not asked for again"


def test_the_first_of_two_drivers_decides_the_version(model: str, tmp_path: Path) -> None:
    """Both found no record; what the name stands for changed between them."""
    config = config_of(model, tmp_path / "out")
    late = resolve_job(config)
    other = resolve_model(write_model(tmp_path / "other", num_timesteps=50), config.tracking)
    with claim(config, resolve_job(config, dataclasses.replace(late.model, files=other.files))) as claimed:
        assert claimed.job.tick is not None and claimed.job.tick.spec != late.spec
    with pytest.raises(ConfigError, match=r"^model_digest: tick .* was begun with"), claim(config, late):
        raise AssertionError("the folder holds other bytes than the tick began with")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sampler": DDIM(num_steps=5)}, r"sampler\.num_steps"),
        ({"batch_size": 5}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"container": "parquet"}, "container"),
        ({"model": "elsewhere"}, "model"),
    ],
)
def test_a_tick_keeps_its_settings(model: str, tmp_path: Path, changes: dict[str, object], field: str) -> None:
    config = config_of(model, tmp_path / "out")
    begin(config)
    before = snapshot(tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"^{field}: tick {TICK} in .* was begun with .*; a tick keeps its settings"):
        sample(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    assert snapshot(tmp_path / "out") == before


def test_who_makes_a_tick_may_change_and_it_may_grow(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out")
    first = finish(config)
    grown = dataclasses.replace(config, images_per_class=20, num_actors=2, gallery_images=0)
    assert finish(grown) == first


def test_a_tick_on_its_way_out_is_not_gone_on_with(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out")
    begin(config)
    record = read_tick(open_store(config.output), TICK)
    assert record is not None
    (tmp_path / "out" / tick_key(TICK)).write_bytes(to_json(dataclasses.replace(record, removal_begun=True)))
    with pytest.raises(OutputExistsError, match=r"^tick: .* is being removed"):
        sample(config)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"tick": "now"}, "tick"), ({"keep_last": 0}, "keep_last"), ({"lease_s": -1.0}, "lease_s")],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        config_of("m", Path("o"), **changes)


def test_keep_last_needs_a_tick() -> None:
    with pytest.raises(ValueError, match=r"^keep_last: counts ticks and goes with tick"):
        SampleConfig(model="m", output="o", keep_last=3)


# ---------------------------------------------------------------- the lease


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipeline.generation.sample.ray_session", refuse)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("flags", "exit_code"),
    [
        ((), 1),
        (("--if-held", "leave"), 0),
        (("--tick", TICK), 0),
        (("--tick", TICK, "--if-held", "fail"), 1),
    ],
)
def test_a_second_driver_leaves_before_any_ray_starts(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], exit_code: int
) -> None:
    config = config_of(model, tmp_path / "out", tick=TICK if "--tick" in flags else None)
    file = tmp_path / "project.toml"
    file.write_text(write_section(dataclasses.replace(config, tick=None, lease_s=WATCHED_S), "sample"))
    if config.tick is not None:
        begin(config)
    store = resolve_job(config).store
    with hold_lease(store, duration_s=1.0), looking_often():
        held = dict(describe_plan(config))
        assert re.match(r"process \d+ on ", held["held by"])
        assert run_job(jobs.sample.JOB, ["--config", str(file), *flags]) == exit_code
    said = capsys.readouterr()
    last = (said.err if exit_code else said.out).strip().splitlines()[-1]
    named = "" if config.tick is None else f"tick {TICK}: "
    assert last.startswith("error: " if exit_code else f"left: {named}")
    assert "works here at this moment" in last
    assert not list(Path(store.uri).glob("*.tar"))


def test_a_run_that_fails_gives_its_lease_back(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", lease_s=60.0)
    job = resolve_job(config)
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), claim(config, job):
            assert b'"released":false' in job.store.read(LEASE_KEY)
            raise error
        assert b'"released":true' in job.store.read(LEASE_KEY)


def test_what_the_holder_made_while_it_was_watched_is_not_made_again(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", lease_s=3.0)
    begin(config)
    job, holding = resolve_job(config), threading.Event()

    def hold() -> None:
        with hold_lease(job.store, duration_s=60.0):  # renewed too seldom to be seen
            holding.set()
            time.sleep(0.5)
            make_in_process(config)

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    with claim(config, job) as claimed:
        assert claimed.inventory.num_missing == 0
    holder.join()


@pytest.mark.parametrize("is_another_quicker", [False, True])
def test_the_output_is_looked_through_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_another_quicker: bool
) -> None:
    """Of millions of shards that takes minutes. Again only if another driver has held the lease since."""
    config = config_of(model, tmp_path / "out", tick=None)
    job, looked = resolve_job(config), list[str]()
    with hold_lease(job.store, duration_s=LEASE_S):
        make_in_process(dataclasses.replace(config, images_per_class=5))
    count_lists(monkeypatch, Path(job.store.uri), looked)

    def between(_: object) -> None:
        if is_another_quicker:
            with hold_lease(job.store, duration_s=LEASE_S):
                make_in_process(config)

    monkeypatch.setattr(claim_module, "check_conditions", between)
    with claim(config, job) as claimed:
        assert claimed.may_write and claimed.inventory.num_missing == (0 if is_another_quicker else 1)
    assert [looked.count(prefix) for prefix in ("_parts/", "_manifest/")] == [1 + is_another_quicker] * 2


def test_with_the_lease_off_two_may_work_at_once(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", lease_s=0.0)
    job = resolve_job(config)
    with claim(config, job), claim(config, job):
        assert job.store.stat(LEASE_KEY) is None
    with claim(dataclasses.replace(config, lease_s=LEASE_S), job), claim(config, job):
        assert b'"released":false' in job.store.read(LEASE_KEY), "who goes without one asks nobody"


def test_the_dry_run_says_how_far_a_tick_is(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", keep_last=1)
    rows = dict(describe_plan(config))
    assert rows["tick"].startswith(f"{TICK}, not begun") and rows["held by"] == "nobody"
    assert rows["removed after it"] == "nothing yet" and not (tmp_path / "out").exists()
    begin(config)
    assert "not done" in dict(describe_plan(config))["tick"]
    make_in_process(config)
    sample(config)
    rows = dict(describe_plan(config))
    assert rows["tick"].startswith(f"{TICK}, done") and rows["output"] == resolve_job(config).store.uri


# ---------------------------------------------------------------- as processes

JOB = "import sys, jobs.sample as s; from jobs.cli import run_job; sys.exit(run_job(s.JOB, sys.argv[1:]))"


@pytest.mark.services
def test_a_tick_tried_three_times_at_once_killed_and_again_has_one_set_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str
) -> None:
    """The network waits for longer than anybody, so that the first is at work when the second comes."""
    slow = tmp_path / "slow"
    slow.write_text("600")
    own = write_own_model(tmp_path / "own", monkeypatch, "slow", str(slow))
    config = config_of(own, tmp_path / "out", trust_model_code=True, lease_s=6.0)
    file = tmp_path / "project.toml"
    file.write_text(write_section(config, "sample"))

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", JOB, "--config", str(file), "--trust-model-code"],
            cwd=ROOT,
            env=environment(ray_address),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ended(driver: subprocess.Popen[str]) -> tuple[int, str]:
        said = driver.communicate(timeout=300)[0]
        return driver.returncode, said.strip().splitlines()[-1]

    first = start()
    while not list((tmp_path / "out").glob(f"*/{LEASE_KEY}")):
        assert first.poll() is None
        time.sleep(0.05)
    code, last = ended(start())
    assert code == 0 and last.startswith(f"left: tick {TICK}: ") and "works here" in last
    first.send_signal(signal.SIGTERM)
    assert ended(first)[0] == 143
    (lease,) = (tmp_path / "out").glob(f"*/{LEASE_KEY}")
    assert b'"released":true' in lease.read_bytes(), "a terminated driver gives its lease back"
    killed = start()
    while b'"released":true' in lease.read_bytes():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    slow.unlink()
    code, last = ended(start())  # takes the lease over
    assert code == 0 and last.startswith(f"done: tick {TICK}: 30 images")
    before = snapshot(tmp_path / "out")
    code, last = ended(start())
    assert code == 0 and "nothing written" in last
    assert snapshot(tmp_path / "out") == before
    assert len(list((tmp_path / "out").glob("*/*.tar"))) == 2
    expected = make_in_process(dataclasses.replace(config, output=str(tmp_path / "alone")))
    assert {path.name[10:74] for path in (tmp_path / "out").glob("*/*.tar")} == set(expected.values())
