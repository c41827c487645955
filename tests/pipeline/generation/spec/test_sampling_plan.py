"""The plan of a generation run: a partition of the ids, independent of how many images are asked for."""

import dataclasses
import json
import tracemalloc
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import DDIM, SAMPLERS, DPMSolver2M, Heun, Sampler
from ddpm.added_field import added_field
from pipeline.config_io import digest, from_json, to_json
from pipeline.data.image_formats import Jpeg, WebP
from pipeline.errors import OutputExistsError
from pipeline.generation.spec.edits import PartialSpec
from pipeline.generation.spec.labels import IdModuloChosenClasses, PlannedLabels
from pipeline.generation.spec.sampling_plan import (
    OutputShard,
    SamplingSpec,
    check_same_shard,
    fixed_batches,
    plan_shards,
)

GOLDEN = {
    "ancestral": "8b894e040df5df9027c9285a12ea534ca8e0c965e6fec980bd10df91122e0f3c",
    "ddim": "f1c9678307c0c149dd6770f933e69b8c553046c322d9f0e93f2957176a3f9ee3",
    "dpm_solver_2m": "59f30a1c3e49f81d177269e1aa4f47b5fa11741771c1d03e173efc758459ed7a",
    "dpm_solver_2m_sde": "6313d3e1b778c843450467403ef2e4a01e8827ccc59424b992d5243ea4af1f34",
    "dpm_solver_3m": "30868f91c869dadebd45a1ddce42a91b6eeff15c9c8eae499d635062bd5949b7",
    "dpm_solver_3m_common": "e8facaefcd43f4fb15523f5b743f296f08bfaeaf981621dc66b69dad700bb092",
    "heun": "84455ccba4ec0761d668daf6a7c3d91a58070bd527b1d55674854b61ccd7cf09",
}
"""Digests of specs with each sampler's defaults: they name output prefixes, and a change of one orphans every run."""


def make_spec(sampler: Sampler | None = None, **changes: object) -> SamplingSpec:
    sampler = sampler or DDIM()
    values: dict[str, object] = {
        "model_digest": "ab" * 32,
        "guide_digest": None,
        "calibration_digest": None,
        "request": None,
        "sampler": sampler,
        "sampler_revision": sampler.revision,
        "seed": 0,
        "num_classes": 10,
        "shard_size": 100,
        "batch_size": 32,
        "image_size": (8, 8),
        "channels": 1,
        "num_levels": 256,
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


@pytest.mark.parametrize("name", SAMPLERS)
def test_spec_digests_are_golden(name: str) -> None:
    assert make_spec(SAMPLERS[name]()).digest == GOLDEN[name]


def test_a_spec_knows_no_image_count() -> None:
    assert not {"num_images", "images_per_class", "count"} & {f.name for f in dataclasses.fields(SamplingSpec)}


PARTIAL = PartialSpec(revision=1, inputs_digest="ef" * 32, num_inputs=3, label=None, strength=0.5)
CHANGES: list[dict[str, object]] = [
    {"model_digest": "cd" * 32},
    {"sampler": DDIM(num_steps=49)},
    {"sampler": DPMSolver2M()},
    {"sampler_revision": 2},
    {"seed": 1},
    {"num_classes": None},
    {"shard_size": 101},
    {"batch_size": 33},
    {"precision": "bf16"},
    {"channels_last": True},
    {"compile": True},
    {"image_size": (16, 8)},
    {"image_size": (8, 16)},
    {"channels": 3},
    {"num_levels": 65_536},
    {"guide_digest": "cd" * 32},
    {"calibration_digest": "cd" * 32},
    {"request": PARTIAL},
    {"label_rule": IdModuloChosenClasses(classes=(3, 7))},
    {"image_format": WebP()},
    {"image_format": Jpeg()},
    {"container": "parquet"},
    {"tick": "2026-11-22T03:00Z"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_everything_that_decides_bytes_changes_the_digest(change: dict[str, object]) -> None:
    assert make_spec(**change).digest != make_spec().digest  # type: ignore[arg-type]


def test_the_quality_of_a_jpeg_changes_the_digest() -> None:
    qualities = [make_spec(image_format=Jpeg(quality=quality)).digest for quality in (90, 95)]
    assert qualities[0] != qualities[1]


def test_no_field_is_left_out_of_that() -> None:
    fixed = {"format_version"}  # one value, so far
    assert {next(iter(change)) for change in CHANGES} == {f.name for f in dataclasses.fields(SamplingSpec)} - fixed


def test_a_stored_spec_is_read_back_with_its_digest() -> None:
    """The digest is of the record as it is stored: every field counts, none is left out."""
    planned = PlannedLabels(file_sha256="cd" * 32, num_rows=7)
    edited = make_spec(Heun(churn=3.0), guide_digest="cd" * 32, request=PARTIAL)
    for spec in (make_spec(), edited, make_spec(label_rule=planned)):
        stored = to_json(spec)
        assert from_json(SamplingSpec, stored, "manifest.json") == spec
        assert spec.digest == digest(json.loads(stored))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DDIMOfLater(DDIM):
    """A sampler that has got an option since; so far there was always half of it."""

    warmth: float = added_field(default=0.0, pin=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SpecOfLater(SamplingSpec):
    """What the spec's own file will say then."""

    sampler: DDIMOfLater | Heun


def test_an_option_added_to_a_sampler_leaves_old_runs_where_they_are() -> None:
    def later(sampler: DDIMOfLater | Heun) -> str:
        values = {field.name: getattr(make_spec(), field.name) for field in dataclasses.fields(SamplingSpec)}
        return SpecOfLater(**(values | {"sampler": sampler})).digest

    old = make_spec(DDIM(eta=0.5)).digest
    assert later(DDIMOfLater(eta=0.5, warmth=0.5)) == old == digest(make_spec(DDIM(eta=0.5)))
    assert later(DDIMOfLater(eta=0.5)) != old, "today's default is not what it was then"
    assert len({later(DDIMOfLater(warmth=warmth)) for warmth in (0.0, 0.5, 1.0)}) == 3
    assert later(Heun()) == make_spec(Heun()).digest, "other samplers are not concerned"
    assert digest(DDIMOfLater(warmth=0.5)) == digest(DDIM())


def test_a_run_stored_before_the_option_existed_is_read_as_what_it_was() -> None:
    stored = to_json(make_spec(DDIM(eta=0.5)))
    read = from_json(SpecOfLater, stored, "manifest.json")
    assert read.sampler == DDIMOfLater(eta=0.5, warmth=0.5) and read.digest == make_spec(DDIM(eta=0.5)).digest


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
    """A billion images: one byte per shard, and no shard is made that is not missing or not asked for."""
    num_shards = 10_000_000
    spec = make_spec(shard_size=100)
    tracemalloc.start()
    plan = plan_shards(spec, 100 * num_shards)
    done = bytearray(b"\1" * num_shards)
    for index in (0, 4_711, num_shards - 1):
        done[index] = 0
    found = [shard.index for shard in plan.missing(done)]
    first = list(islice(plan.missing(bytes(num_shards)), 1000))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [0, 4_711, num_shards - 1]
    assert [shard.first_id for shard in first] == list(range(0, 100_000, 100))
    assert peak_bytes < 4 * num_shards


def test_more_shards_than_keys_can_number_are_refused() -> None:
    assert plan_shards(make_spec(shard_size=2), 2 * 10**9).num_shards == 10**9
    with pytest.raises(ValueError, match=r"^shard_size: .* at most 10\^9 shards, got 2 for 2000000001 images"):
        plan_shards(make_spec(shard_size=2), 2 * 10**9 + 1)
