"""Actors, nodes and drivers are lost while images are made: the same bytes come out, once."""

import dataclasses
import random
import subprocess
import uuid
from pathlib import Path

import psutil
import pytest
import ray

from ddpm import DDIM
from pipeline.config_sections import write_section
from pipeline.generation.output.commits import read_record
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.generation.pool.actors import IN_HAND
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri
from pipeline.tracking.tracking import TrackingConfig
from tests.faulty_proxy import FaultyProxy
from tests.fixtures_s3 import S3Server
from tests.integration.jobs import run_job, start_job
from tests.integration.nodes import Log, Nodes, ending
from tests.integration.training_runs import wait_until
from tests.pipeline.runs_in_process import make_in_process
from tests.pipeline.tiny_models import write_own_model

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800), pytest.mark.xdist_group("nodes")]

NUM_SHARDS = 40


def config_of(folder: Path, output: str, slow_file: Path, monkeypatch: pytest.MonkeyPatch) -> SampleConfig:
    """120 images in forty shards, of a network that is as slow as a file says."""
    return SampleConfig(
        model=write_own_model(folder / "own", monkeypatch, "slow", str(slow_file)),
        output=output,
        images_per_class=NUM_SHARDS,
        sampler=DDIM(num_steps=4),
        lease_s=4.0,
        shard_size=3,
        batch_size=3,
        num_actors=3,
        contact_sheet_columns=2,
        trust_model_code=True,
        tracking=TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}"),
    )


class Generation:
    """A sampling job on some nodes, and what it has written."""

    def __init__(self, config: SampleConfig, nodes: Nodes, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._variables = nodes.variables
        self.store: ObjectStore = resolve_job(config).store

    @property
    def flags(self) -> list[str]:
        file = self.folder / "config.toml"
        file.write_text(write_section(self.config, "sample"))
        return ["--config", str(file), "--trust-model-code"]

    def start(self) -> "subprocess.Popen[str]":
        return start_job("sample", *self.flags, log=self.folder / "log", variables=self._variables)

    def num_committed(self) -> int:
        return len(list(self.store.list("_parts/")))

    def make_on(self, job: "subprocess.Popen[str]", number: int) -> None:
        """Wait until so many more shards are committed."""
        reached = min(self.num_committed() + number, NUM_SHARDS)
        wait_until(lambda: self.num_committed() >= reached or job.poll() is not None, pause_s=0.2)

    def digests(self) -> dict[int, str]:
        manifest = load_generation_manifest(self.store)
        assert manifest is not None
        return {index: shard.sha256 for index, shard in enumerate(read_shards(self.store, manifest.parts))}


def actors_of(nodes: Nodes) -> list[psutil.Process]:
    return [one for one in nodes.processes() if one.name().startswith("ray::ShardActor"[:15])]


@pytest.mark.parametrize(
    ("num_nodes", "num_lost"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)], ids=["one_of_two", "two_of_three"]
)
def test_lost_nodes_cost_no_shard_and_one_that_comes_back_makes_some(
    all_nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_nodes: int, num_lost: int
) -> None:
    """The job is never started anew. Ray learns of a death after up to 35 s; what is lost stays away for longer."""
    nodes, slow_file = all_nodes, tmp_path / "slow"
    nodes.keep(num_nodes)
    slow_file.write_text("0")
    config = config_of(tmp_path, str(tmp_path / "out"), slow_file, monkeypatch)
    expected = make_in_process(dataclasses.replace(config, output=str(tmp_path / "in process")))

    slow_file.write_text("0.3")  # 1.2 s a shard
    generation = Generation(config, nodes, tmp_path)
    job = generation.start()
    log = Log(job, tmp_path / "log")
    with ending(job):
        generation.make_on(job, 6)
        waited_s = []
        for _ in range(num_lost):
            nodes.kill_raylet()
            waited_s.append(log.seconds_to("is lost, its shards are made elsewhere"))
            generation.make_on(job, 4)
        if num_lost > 1:
            slow_file.write_text("1.0")
            generation.make_on(job, 10)  # 40 s
            slow_file.write_text("0.3")
        nodes.keep(1)
        waited_s.append(log.seconds_to("an actor is at work in process "))
        assert f" of node {nodes.newest_node[:8]}" in log.text, log.text
        generation.make_on(job, 6)
        print("seconds to: losses seen, at work on the returned node:", [round(s, 1) for s in waited_s])
        slow_file.unlink()
        assert job.wait(300) == 0, log.text
    assert generation.digests() == expected
    assert "set aside" not in log.text


@pytest.mark.parametrize(("seed", "num_kills"), [(0, 3), pytest.param(1, 20, marks=pytest.mark.slow)])
def test_a_run_through_kills_of_actors_nodes_and_drivers(
    all_nodes: Nodes,
    s3_server: S3Server,
    storage: dict[str, str],
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    num_kills: int,
) -> None:
    """At moments of a seed; after the last rerun every byte is that of an unbroken run, and little was made twice."""
    for name, value in storage.items():
        monkeypatch.setenv(name, value)
    choice, slow_file = random.Random(seed), tmp_path / "slow"
    all_nodes.keep(1)
    slow_file.write_text("0")
    config = config_of(tmp_path, join_uri(s3_server.uri, uuid.uuid4().hex), slow_file, monkeypatch)
    config = dataclasses.replace(config, num_actors=2)
    expected = make_in_process(dataclasses.replace(config, output=str(tmp_path / "in process")))

    slow_file.write_text("0.1")
    generation = Generation(config, all_nodes, tmp_path)
    job = generation.start()
    kinds = (["actor", "raylet", "driver"] * num_kills)[:num_kills]
    choice.shuffle(kinds)
    for kind in kinds:
        generation.make_on(job, choice.randint(1, max(1, NUM_SHARDS // num_kills - 1)))
        if job.poll() is not None:
            break
        if kind == "actor":
            if actors := actors_of(all_nodes):
                choice.choice(actors).kill()
        elif kind == "raylet":
            all_nodes.kill_raylet()
            all_nodes.keep(1)
        else:
            job.kill()
            job.wait()
            job = generation.start()
    slow_file.unlink()
    assert job.wait(600) == 0, (tmp_path / "log").read_text()
    assert generation.digests() == expected
    stored = [one for one in proxy.requests if one.method == "PUT" and one.path.endswith(".tar")]
    num_again = sum(config.output.partition("//")[2] in one.path for one in stored) - NUM_SHARDS
    print("shards stored a second time:", num_again)
    assert num_again <= num_kills * IN_HAND * config.num_actors, "what was in hand, and no more"
    for index in range(NUM_SHARDS):
        assert read_record(generation.store, index).sha256 == expected[index]
    before = {info.key: info.modified_s for info in generation.store.list()}
    run_job("sample", *generation.flags)
    assert not ray.is_initialized(), "no Ray was started"
    assert {info.key: info.modified_s for info in generation.store.list()} == before, "a run after that writes nothing"
