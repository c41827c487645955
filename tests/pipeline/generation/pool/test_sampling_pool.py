"""The pool of actors: shards that fail, devices that break, storage that is away, room that there is not."""

import dataclasses
import os
import time
import uuid
from pathlib import Path
from typing import ClassVar

import pytest
import ray

from ddpm import DDIM
from pipeline.cluster import ClusterConfig
from pipeline.errors import ConfigError, PipelineError
from pipeline.generation.output.commits import Commit, CommitRecord
from pipeline.generation.pool.actors import Actors
from pipeline.generation.pool.pool_config import PoolStatistics
from pipeline.generation.pool.sampling_pool import SamplingPool
from pipeline.generation.pool.shard_actor import Answer, ShardActor, WorkOrder
from pipeline.generation.pool.shard_queue import FailureKind
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.sample_preview import describe_plan
from pipeline.generation.spec.sampling_plan import OutputShard, ShardPlan
from pipeline.ray_errors import to_values
from tests.pipeline.generation.output.test_commits import made_by
from tests.pipeline.runs_in_process import digests, make_in_process
from tests.pipeline.tiny_models import noise_mark, write_model, write_own_model


def config_of(model: str, output: Path, **changes: object) -> SampleConfig:
    """24 images in eight shards of three."""
    config = SampleConfig(
        model=model,
        output=str(output),
        images_per_class=8,
        sampler=DDIM(num_steps=4),
        shard_size=3,
        batch_size=3,
        num_actors=2,
        max_shard_retries=1,
        contact_sheet_columns=2,
        trust_model_code=True,
        cluster=ClusterConfig(num_cpus=2),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def misbehaving(folder: Path, monkeypatch: pytest.MonkeyPatch, actions: dict[int, str]) -> tuple[str, Path]:
    """A model that does something at the first image of some shards; the file that says so."""
    marks = folder / "marks"
    model = write_own_model(folder / "own", monkeypatch, "by noise", str(marks))
    marks.write_text("\n".join(f"{action}:{noise_mark(0, 3 * index)!r}" for index, action in actions.items()))
    return model, marks


def records(output: Path) -> set[int]:
    return {int(path.stem) for path in output.glob("*/_parts/*.json")}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("ray_session")
def test_shards_that_kill_hang_or_raise_are_set_aside_and_all_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, marks = misbehaving(tmp_path, monkeypatch, {1: "kill", 3: "hang", 6: "raise"})
    config = config_of(model, tmp_path / "out", shard_timeout_s=4.0, start_timeout_s=12.0)
    with pytest.raises(
        PipelineError, match=r"of 8 output shards 3 could not be made: 1, 3, 6; all others are"
    ) as caught:
        sample(config)
    assert caught.value.exit_code == 1 and "The first failed 2 times, at last: output shard 1 " in str(caught.value)
    assert "its process died (its worker process has died" in str(caught.value)
    said = capsys.readouterr().out
    assert "shard 6 is set aside: output shard 6 (ids from 18): RuntimeError: a network's own reason" in said
    assert "shard 3 is set aside: output shard 3 (ids from 9): no answer for " in said
    assert records(tmp_path / "out") == {0, 2, 4, 5, 7}, "nobody else was blamed"
    assert not list(tmp_path.glob("out/*/manifest.json"))

    marks.write_text("")
    result = sample(config)
    assert result.num_made == 9
    assert digests(result) == make_in_process(config_of(model, tmp_path / "in process"))


@pytest.mark.usefixtures("ray_session")
def test_the_first_shards_that_all_fail_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = misbehaving(tmp_path, monkeypatch, dict.fromkeys(range(8), "raise"))
    with pytest.raises(
        PipelineError,
        match=r"^output shard \d \(ids from \d+\): RuntimeError: a network's own reason; [678] output shards failed "
        r"and none was made between them \(0, .*\): 8 of 8 that were missing still are, run again",
    ):
        sample(config_of(model, tmp_path / "out"))
    assert not records(tmp_path / "out")


@pytest.mark.usefixtures("ray_session")
def test_bad_shards_at_the_front_block_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor, with more bad ones before the good ones than a shard has tries."""
    model, _ = misbehaving(tmp_path, monkeypatch, dict.fromkeys(range(5), "raise"))
    with pytest.raises(PipelineError, match=r"of 8 output shards 5 could not be made: 0, 1, 2, 3, 4; all others are"):
        sample(config_of(model, tmp_path / "out", num_actors=1, max_shard_retries=1))
    assert records(tmp_path / "out") == {5, 6, 7}


@pytest.mark.usefixtures("ray_session")
def test_a_device_that_breaks_gets_no_more_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two: the other makes the rest, but for the shard that breaks every device."""
    model, _ = misbehaving(tmp_path, monkeypatch, {0: "break_device"})
    with pytest.raises(PipelineError, match=r"of 8 output shards 1 could not be made: 0; .*uncorrectable ECC error"):
        sample(config_of(model, tmp_path / "out", max_shard_retries=5))
    assert records(tmp_path / "out") == set(range(1, 8))
    said = capsys.readouterr().out
    assert said.count(" is given up: output shard 0 ") == 1 and "shard 0 is set aside" in said


@pytest.mark.usefixtures("ray_session")
def test_devices_that_break_at_the_first_shards_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = misbehaving(tmp_path, monkeypatch, dict.fromkeys(range(8), "break_device"))
    with pytest.raises(PipelineError, match=r"CUDA error: uncorrectable ECC error"):
        sample(config_of(model, tmp_path / "out", max_shard_retries=99))


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_no_actor_can_load_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is damaged between the driver's check and the actors': they verify what they fetch. No node has it yet."""
    config = config_of(write_model(tmp_path / "model", dataset_digest=uuid.uuid4().hex), tmp_path / "out")

    def stage_damaged(output: object, files: object) -> None:
        folder = tmp_path / "out" / "_models" / files.digest  # type: ignore[attr-defined]
        folder.mkdir(parents=True)
        for name, data in files.as_dict().items():  # type: ignore[attr-defined]
            (folder / name).write_bytes(data[:-1] + b"?")

    monkeypatch.setattr("pipeline.generation.sample.stage_model", stage_damaged)
    with pytest.raises(PipelineError, match="was altered, sha256 differs"):
        sample(config)


@pytest.mark.usefixtures("ray_session")
def test_nobody_who_works_ends_the_job_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster may grow, so that more than it has is waited for; a line says so, and the end does."""
    monkeypatch.setattr("pipeline.generation.pool.idle_watch._FIRST_SAY_S", 0.0)
    monkeypatch.setattr("pipeline.generation.sample_job.check_room", lambda *_: None)
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out", cpus_per_actor=3, idle_limit_s=5.0)
    needs = r"each needs 3 CPU of one node, the cluster has 2 CPU in all"
    with pytest.raises(
        PipelineError, match=rf"^sampling: nobody was at work for 5\.0 s \(idle_limit_s\): {needs}; run"
    ):
        sample(config)
    assert "waiting for an actor: each needs 3 CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cpus_per_actor": 10_000},
            r"^cpus_per_actor: at most the \d+ CPUs of the Ray that is started here, got 10000;",
        ),
        ({"use_gpu": True}, r"^use_gpu: there is no GPU on this machine"),
    ],
)
def test_what_this_machine_will_never_have_is_said_at_once(
    tmp_path: Path, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out", cluster=ClusterConfig(), **changes)
    for job in (sample, describe_plan):
        with pytest.raises(ConfigError, match=message):
            job(config)
    assert not (tmp_path / "out").exists()


class IdleActor(ShardActor):
    """Makes nothing: what is left is the driver's work."""

    def load(self) -> Answer:
        """Load nothing."""
        return Answer()

    def make(self, shard: OutputShard) -> Answer:
        """Say that a shard is there."""
        record = CommitRecord(
            index=shard.index, first_id=shard.first_id, num_samples=shard.num_samples, key="", size_bytes=1, sha256="",
            model_digest="", spec_digest="", made=made_by("a"),
        )  # fmt: skip
        return Answer(commit=Commit(record=record, outcome="first"))


class LoadsLater(IdleActor):
    """The first process cannot load the model; the folder that the order names counts them."""

    kind: ClassVar[FailureKind] = "shard"
    num_there: ClassVar[int] = 1
    """Processes that have a place when it fails."""

    def load(self) -> Answer:
        """Fail if this is the first."""
        marks = Path(self._order.store_uri)
        is_first = not list(marks.iterdir())
        Path(marks, str(os.getpid())).touch()
        while len(list(marks.iterdir())) < self.num_there:
            time.sleep(0.05)
        values = to_values(PipelineError("Found no NVIDIA driver"))
        return Answer(kind=self.kind, values=values) if is_first else Answer()


class LoadsElsewhere(LoadsLater):
    """The first device is broken."""

    kind = "device"
    num_there = 2


class Waits(IdleActor):
    """The first shard takes its time, in which storage is waited for; shard 3 hangs."""

    def __init__(self, order: WorkOrder) -> None:
        """Wait for nothing yet."""
        super().__init__(order)
        self._num_waits = 0

    def num_waits(self) -> int:
        """As told by `make`."""
        return self._num_waits

    def make(self, shard: OutputShard) -> Answer:
        """Wait, hang, or make it."""
        if shard.index == 0:
            for self._num_waits in range(1, 70):
                time.sleep(0.1)
        if shard.index == 3:
            time.sleep(3600)
        return dataclasses.replace(super().make(shard), num_waits=self._num_waits)


def order_of(config: SampleConfig, folder: str = "") -> WorkOrder:
    job = resolve_job(config)
    return WorkOrder(
        spec=job.spec, store_uri=folder, models_uri="", trusts_code=False, make_ingredients=job.make_ingredients,
        num_threads=1, use_gpu=False,
    )  # fmt: skip


@pytest.mark.usefixtures("ray_session")
def test_who_holds_a_broken_device_is_replaced(tmp_path: Path) -> None:
    """Another device may be free; a spare one would stay unused otherwise."""
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    actors = Actors(order_of(config), config.pool, PoolStatistics())
    actors.launch(1)
    actors.launch(1)
    assert len(actors.all) == 1
    actors.all[0].is_broken = True
    actors.launch(1)
    assert len(actors.all) == 2
    for actor in [*actors.all]:
        actors.remove(actor)


def pool_of(
    actor: type[ShardActor], folder: Path, monkeypatch: pytest.MonkeyPatch, num_shards: int = 8, **changes: object
) -> SamplingPool:
    """Of actors that make nothing."""
    monkeypatch.setattr("pipeline.generation.pool.actors.ShardActor", actor)
    config, marks = config_of(write_model(folder / "model"), folder / "out", **changes), folder / "marks"
    marks.mkdir()
    shards = ShardPlan(shard_size=3, num_images=3 * num_shards).missing(bytes(num_shards))
    return SamplingPool(order_of(config, str(marks)), shards, config.pool, num_shards, is_proven=False)


def made(pool: SamplingPool) -> list[int]:
    return sorted(commit.record.index for commit in pool.commits())


@pytest.mark.usefixtures("ray_session")
def test_one_process_that_cannot_load_the_model_ends_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = pool_of(LoadsLater, tmp_path, monkeypatch, num_actors=1)
    assert made(pool) == list(range(8)) and len(list((tmp_path / "marks").iterdir())) == 2
    assert "an actor did not start: Found no NVIDIA driver" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_session")
def test_a_device_that_is_broken_when_the_model_is_loaded_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two: Ray would give it to the next process. The other has work for longer than the first takes to fail."""
    pool = pool_of(LoadsElsewhere, tmp_path, monkeypatch, 2000, num_actors=2)
    held = [[actor for actor in pool._actors.all if actor.is_broken] for _ in pool.commits()]
    assert len(held) == 2000 and len(held[-1]) == 1 and len(list((tmp_path / "marks").iterdir())) == 2


@pytest.mark.usefixtures("ray_session")
def test_nothing_starts_on_a_node_where_the_model_was_not_loaded_while_there_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node is only said to be there: nobody gets a place, until this one has had its time."""
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    actors = Actors(order_of(config), config.pool, PoolStatistics())
    actors.launch(1)
    actors.all[0].place = ray.get(actors.all[0].starting)
    node = actors.all[0].node_id
    assert actors.fitting_nodes == {node}
    monkeypatch.setattr("pipeline.generation.pool.actors.fitting_nodes", lambda needs: frozenset({node, "f" * 56}))
    actors.fail_start(actors.all[0], is_sick=True)
    actors._not_before_s = 0.0
    actors.launch(1)
    assert not ray.wait([actors.all[0].starting], timeout=3.0)[0]
    actors._sick_until_s[node] = time.monotonic()
    actors.look_for_notices()
    actors.launch(1)
    assert ray.get(actors.all[0].starting).node_id == node
    actors.remove(actors.all[0])


@pytest.mark.usefixtures("ray_session")
def test_who_waits_for_storage_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes several times as long as a shard may; another that takes as long without waiting is ended."""
    pool = pool_of(Waits, tmp_path, monkeypatch, shard_timeout_s=1.0, start_timeout_s=3.0, max_shard_retries=0)
    assert made(pool) == [0, 1, 2, 4, 5, 6, 7]
    assert [(one.shard.index, len(one.places)) for one in pool.set_aside] == [(3, 1)]
    assert "no answer for" in str(pool.set_aside[0].error)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_shards_per_second_of_actors_that_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the driver hands shards out and takes answers: a figure, of which nothing is required but an end."""
    pool = pool_of(IdleActor, tmp_path, monkeypatch, 5000)
    commits = pool.commits()
    next(commits)
    started_s = time.monotonic()
    assert sum(1 for _ in commits) == 4999
    print(f"{4999 / (time.monotonic() - started_s):.0f} shards per second with two actors")
