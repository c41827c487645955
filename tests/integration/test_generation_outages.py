"""A generation run through a store that fails all the time makes the images of one that nothing happened to."""

import dataclasses
import hashlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm import DDIM
from pipeline.cluster import ClusterConfig
from pipeline.config_sections import write_section
from pipeline.data.image_stream import read_images
from pipeline.generation.output.commits import read_record
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri
from pipeline.tracking.tracking import TrackingConfig
from tests.faulty_proxy import Cut, FaultyProxy, LoseAnswer, LoseRequest, RandomFaults, Stall, s3_error
from tests.fixtures_s3 import S3Server
from tests.integration.jobs import start_job
from tests.integration.nodes import ending
from tests.pipeline.runs_in_process import make_in_process
from tests.pipeline.tiny_models import write_own_model

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]

NUM_SHARDS = 40
KINDS = (
    LoseRequest(),
    LoseAnswer(),
    Stall(3.0),
    s3_error("InternalError", 500),
    s3_error("SlowDown", 503),
    Cut(2000),
    Cut(2000, reset=True),
)
SHARE = 0.2


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_run_through_faults_of_its_store(
    ceph_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A fifth of all requests fails, in every way: nothing partial is seen under a final name, and the run ends."""
    for name, value in ceph_server.environment.items():
        monkeypatch.setenv(name, value)
    model = write_own_model(tmp_path / "own", monkeypatch, "fine")
    config = SampleConfig(
        model=model,
        output=join_uri(ceph_server.uri, uuid.uuid4().hex),
        images_per_class=NUM_SHARDS,
        sampler=DDIM(num_steps=4),
        shard_size=3,
        batch_size=3,
        contact_sheet_columns=2,
        trust_model_code=True,
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
        cluster=ClusterConfig(num_cpus=2),
        num_actors=2,
    )
    expected = make_in_process(dataclasses.replace(config, output=str(tmp_path / "in process")))
    store = resolve_job(config).store
    file = tmp_path / "config.toml"
    file.write_text(write_section(config, "sample"))
    with FaultyProxy(ceph_server.endpoint) as proxy:
        proxy.add(RandomFaults(seed, SHARE, KINDS))
        flags = ["--config", str(file), "--trust-model-code"]
        variables = {"AWS_ENDPOINT_URL": proxy.endpoint}
        job = start_job("sample", *flags, log=tmp_path / "log", variables=variables)
        with ending(job):
            while job.poll() is None:
                assert set(_tars(store)) <= set(expected.values()), "what is seen is whole"
                time.sleep(0.5)
        assert job.returncode == 0, (tmp_path / "log").read_text()
        counts = {kind: proxy.count(kind) for kind in (LoseRequest, LoseAnswer, Stall, Cut)}
        print(len(proxy.requests), "requests", counts)
    assert all(counts.values()), "every kind has struck"
    manifest = load_generation_manifest(store)
    assert manifest is not None
    shards = list(read_shards(store, manifest.parts))
    assert {index: shard.sha256 for index, shard in enumerate(shards)} == expected
    assert [read_record(store, index).tar for index in range(NUM_SHARDS)] == shards
    assert len(list(read_images(store, shards))) == 3 * NUM_SHARDS, "each verified"
    assert sum(info.key.endswith(".tar") for info in store.list()) == NUM_SHARDS, "no orphan is left"


def _tars(store: ObjectStore) -> Iterator[str]:
    """The digest of what can be seen under each tar's name at this moment."""
    for info in list(store.list("0")):
        yield hashlib.sha256(store.read(info.key)).hexdigest()
