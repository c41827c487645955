"""A run grows: what is there is not touched; who makes a shard, and in which order, changes no byte."""

import dataclasses
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from ddpm import DDIM
from pipeline.cluster import ClusterConfig
from pipeline.errors import OutputExistsError
from pipeline.generation.making.shard_maker import ShardMaker
from pipeline.generation.output.inventory import Inventory
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob, resolve_job
from pipeline.generation.spec.sampling_plan import OutputShard
from pipeline.stores.storage import join_uri
from tests.fixtures_s3 import S3Server
from tests.pipeline.runs_in_process import digests, make_in_process, run
from tests.pipeline.tiny_models import write_model


def config_of(model: str, output: str, num_images: int = 1000) -> SampleConfig:
    return SampleConfig(
        model=model,
        output=output,
        num_images=num_images,
        sampler=DDIM(num_steps=2),
        shard_size=100,
        batch_size=50,
        contact_sheet_columns=2,
        gallery_images=0,
        cluster=ClusterConfig(num_cpus=2),
    )


def missing_of(job: SampleJob) -> Iterator[OutputShard]:
    return Inventory(job.store, job.plan, job.manifest).missing()


def test_growing_from_one_to_five_thousand_images_touches_none(s3_server: S3Server, tmp_path: Path) -> None:
    """Neither their versions nor their times: not a request writes them."""
    config = config_of(write_model(tmp_path / "model"), join_uri(s3_server.uri, uuid.uuid4().hex))
    make_in_process(config)
    first = sample(config)
    client, prefix = boto3.client("s3"), first.store.uri.removeprefix(f"{s3_server.uri}/")

    def objects() -> dict[str, tuple[str, object]]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3_server.bucket, Prefix=f"{prefix}/")
        found = [item for page in pages for item in page["Contents"]]
        return {item["Key"].removeprefix(f"{prefix}/"): (item["ETag"], item["LastModified"]) for item in found}

    before = objects()
    grown = dataclasses.replace(config, num_images=5000)
    job = resolve_job(grown)
    make = ShardMaker(job.ingredients, job.spec, job.store, num_threads=1, device="cpu")
    assert [make(shard).record.index for shard in missing_of(job)] == list(range(10, 50))
    result = sample(grown)
    assert (result.manifest.num_images, len(digests(result))) == (5000, 50)
    after = objects()
    of_shards = {key for key in before if key.endswith(".tar") or key.startswith("_parts/")}
    assert len(of_shards) == 20 and {key: after[key] for key in of_shards} == {key: before[key] for key in of_shards}
    assert {key: digests(result)[key] for key in digests(first)} == digests(first)
    client.close()


def test_a_run_with_a_short_end_does_not_grow_inside_its_last_shard(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model"), str(tmp_path / "out"), num_images=150)
    made = run(config)[0].store
    before = {info.key: made.read(info.key) for info in made.list() if info.key != "lease.json"}
    with pytest.raises(OutputExistsError, match=r"shard 1 is committed with 50 images, a run of 160 images needs 60"):
        sample(dataclasses.replace(config, num_images=160))
    assert {info.key: made.read(info.key) for info in made.list() if info.key != "lease.json"} == before


def test_the_order_in_which_shards_are_made_changes_no_byte(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model", answers=True), str(tmp_path / "out"))
    expected = make_in_process(dataclasses.replace(config, output=str(tmp_path / "in order")))
    job = resolve_job(config)
    make = ShardMaker(job.ingredients, job.spec, job.store, num_threads=1, device="cpu")
    order = list(range(10))
    random.Random(1).shuffle(order)
    assert order != list(range(10))
    assert {index: make(job.plan.shard(index)).record.sha256 for index in order} == expected


@pytest.mark.usefixtures("ray_session")
def test_the_number_of_actors_changes_no_byte(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model", answers=True), str(tmp_path / "one"))
    one, two = (
        sample(dataclasses.replace(config, output=str(tmp_path / name), num_actors=number))
        for name, number in (("one", 1), ("two", 2))
    )
    assert digests(one) == digests(two) and one.num_made == two.num_made == 1000
