"""The plan of a generation run: a partition of the ids, independent of how many images are asked for."""

import dataclasses
import json
import time
import tracemalloc
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import SamplerConfig
from pipeline.config_io import digest, from_json, to_json
from pipeline.errors import OutputExistsError
from pipeline.generation.requests import EditSpec
from pipeline.generation.sampling_plan import OutputShard, SamplingSpec, check_same_shard, fixed_batches, plan_shards


def make_spec(**changes: object) -> SamplingSpec:
    values: dict[str, object] = {
        "model_digest": "ab" * 32,
        "sampler": SamplerConfig(),
        "seed": 0,
        "num_classes": 10,
        "shard_size": 100,
        "batch_size": 32,
        "image_size": 8,
        "channels": 1,
    }
    return SamplingSpec(**(values | changes))  # type: ignore[arg-type]


sizes = st.integers(1, 60)


@given(shard_size=sizes, num_images=st.integers(1, 500))
def test_shards_partition_the_ids_in_order(shard_size: int, num_images: int) -> None:
    plan = plan_shards(make_spec(shard_size=shard_size), num_images)
    shards = [plan.shard(index) for index in range(plan.num_shards)]
    assert [i for shard in shards for i in shard.sample_ids] == list(range(num_images))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(shard.num_samples == shard_size for shard in shards[:-1])


@given(done=st.lists(st.booleans(), min_size=1, max_size=40), shard_size=sizes)
def test_missing_is_what_is_not_done(done: list[bool], shard_size: int) -> None:
    plan = plan_shards(make_spec(shard_size=shard_size), shard_size * len(done))
    assert list(plan.missing(bytearray(done))) == [plan.shard(i) for i, there in enumerate(done) if not there]


@given(shard_size=sizes, num_images=st.integers(1, 300), batch_size=st.integers(1, 40))
def test_batches_have_one_size_and_cover_the_shard(shard_size: int, num_images: int, batch_size: int) -> None:
    plan = plan_shards(make_spec(shard_size=shard_size), num_images)
    for shard in plan.missing(bytes(plan.num_shards)):
        batches = list(fixed_batches(shard, batch_size))
        assert all(len(ids) == batch_size for ids, _ in batches)
        assert [i for ids, wanted in batches for i in ids[:wanted]] == list(shard.sample_ids)


def test_batches_of_a_short_shard_are_those_of_the_full_one() -> None:
    """Otherwise images would change in the last bits when a run grows."""
    full = [ids for ids, _ in fixed_batches(OutputShard(index=2, first_id=200, num_samples=100), 32)]
    short = [ids for ids, _ in fixed_batches(OutputShard(index=2, first_id=200, num_samples=50), 32)]
    assert short == full[: len(short)]


def test_spec_digest_is_pinned_and_knows_no_image_count() -> None:
    """The digest names output prefixes for ever: a change of it orphans every stored run."""
    assert make_spec().digest == "d8fb3581b0ed01c1b19d7d1b49a31e72d38219dec989274602f015fba94c5b70"
    assert not {"num_images", "images_per_class", "count"} & {f.name for f in dataclasses.fields(SamplingSpec)}


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "cd" * 32},
        {"sampler": SamplerConfig(num_steps=49)},
        {"seed": 1},
        {"num_classes": None},
        {"shard_size": 101},
        {"batch_size": 33},
        {"image_size": 16},
        {"channels": 3},
        {"guide_digest": "cd" * 32},
        {"calibration_digest": "cd" * 32},
        {"request": EditSpec(kind="partial", inputs_digest="ef" * 32, num_inputs=3, label=None, strength=0.5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_decides_bytes_changes_the_digest(change: dict[str, object]) -> None:
    assert make_spec(**change).digest != make_spec().digest


def test_everything_that_decides_an_edit_changes_the_digest() -> None:
    edit = EditSpec(kind="partial", inputs_digest="ef" * 32, num_inputs=3, label=None, strength=0.5)
    changes = [
        {"kind": "inpaint"},
        {"inputs_digest": "cd" * 32},
        {"num_inputs": 4},
        {"label": 1},
        {"mask_digest": "cd" * 32},
        {"jump_length": 5},
        {"num_resamples": 5},
        {"strength": 0.6},
        {"weights": (0.5,)},
    ]
    assert {next(iter(change)) for change in changes} == {field.name for field in dataclasses.fields(EditSpec)}
    specs = [make_spec(request=dataclasses.replace(edit, **change)) for change in [{}, *changes]]  # type: ignore[arg-type]
    assert len({spec.digest for spec in specs}) == len(specs)


def test_a_stored_spec_without_the_later_fields_is_read_and_has_its_digest() -> None:
    record = {k: v for k, v in json.loads(to_json(make_spec())).items() if k not in ("guide_digest", "request")}
    del record["calibration_digest"]
    stored = from_json(SamplingSpec, json.dumps(record).encode(), "manifest.json")
    assert stored == make_spec() and stored.digest == make_spec().digest == digest(record)


def test_labels_depend_on_the_id_alone() -> None:
    spec = make_spec(num_classes=3)
    assert [spec.label(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert make_spec(num_classes=None).label(5) is None


def test_growing_from_a_ragged_end_is_refused_and_says_why() -> None:
    old, new = plan_shards(make_spec(), 250), plan_shards(make_spec(), 300)
    check_same_shard(new.shard(1), old.shard(1), 300, "/out")
    with pytest.raises(OutputExistsError, match=r"/out: shard 2 .*multiple of shard_size; ask for 250 images"):
        check_same_shard(new.shard(2), old.shard(2), 300, "/out")


@pytest.mark.parametrize("field", ["seed", "shard_size", "batch_size"])
def test_impossible_specs_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*got -1"):
        make_spec(**{field: -1})
    with pytest.raises(ValueError, match=r"^num_images: .*got 0"):
        plan_shards(make_spec(), 0)


def test_ten_million_shards_are_planned_lazily() -> None:
    """A billion images: a few missing shards are found in milliseconds and one byte per shard."""
    num_shards = 10_000_000
    spec = make_spec(shard_size=100)
    tracemalloc.start()
    started_s = time.perf_counter()
    plan = plan_shards(spec, 100 * num_shards)
    done = bytearray(b"\1" * num_shards)
    for index in (0, 4_711, num_shards - 1):
        done[index] = 0
    found = [shard.index for shard in plan.missing(done)]
    first = list(islice(plan.missing(bytes(num_shards)), 1000))
    wall_s = time.perf_counter() - started_s
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [0, 4_711, num_shards - 1]
    assert [shard.first_id for shard in first] == list(range(0, 100_000, 100))
    assert peak_bytes < 4 * num_shards and wall_s < 5


def test_more_shards_than_keys_can_number_are_refused() -> None:
    assert plan_shards(make_spec(shard_size=2), 2 * 10**9).num_shards == 10**9
    with pytest.raises(ValueError, match=r"^shard_size: .* at most 10\^9 shards, got 2 for 2000000001 images"):
        plan_shards(make_spec(shard_size=2), 2 * 10**9 + 1)
