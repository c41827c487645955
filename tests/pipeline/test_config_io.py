"""Reading and writing config trees and records: strictness, one-line messages, round trips, canonical bytes."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm.added_field import added_field
from pipeline.config_io import (
    digest,
    from_json,
    identity,
    plain,
    read_record,
    read_toml,
    refuse_empty,
    to_json,
    to_toml,
)
from pipeline.errors import ConfigError, FormatVersionError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    name: Literal["ancestral", "ddim"] = "ddim"
    eta: float = 1.0
    limit: int | None = 5
    steps: tuple[int, ...] = (1, 2)
    options: dict[str, int | float | str | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta: must be at least 0, got {self.eta}; use 0 for none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    output: str
    note: str | None = None
    num_images: int = 10
    sampler: Sampler = field(default_factory=Sampler)
    many: tuple[Sampler, ...] = ()
    by_name: dict[str, Sampler] = field(default_factory=dict)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
number = st.floats(0, 1e6) | st.integers(0, 1000)
samplers = st.builds(
    Sampler,
    name=st.sampled_from(["ancestral", "ddim"]),
    eta=number,
    limit=st.none() | st.integers(-(2**63), 2**63 - 1),
    steps=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    options=st.dictionaries(
        text, st.booleans() | st.integers(0, 9) | st.floats(allow_nan=False, allow_infinity=False) | text
    ),
)
jobs = st.builds(
    Job,
    output=text,
    note=st.none() | text,
    num_images=st.integers(-5, 5),
    sampler=samplers,
    many=st.lists(samplers, max_size=2).map(tuple),
    by_name=st.dictionaries(text, samplers, max_size=2),
)


@given(job=jobs)
def test_round_trips(job: Job) -> None:
    assert read_toml(Job, to_toml(job), "x.toml") == job
    assert from_json(Job, to_json(job), "x.json") == job
    assert to_json(from_json(Job, to_json(job), "x.json")) == to_json(job)


@given(base=jobs, other=jobs)
def test_a_file_with_every_field_wins_over_the_base(base: Job, other: Job) -> None:
    full = to_toml(other)
    expected = dataclasses.replace(other, note=base.note) if other.note is None else other
    read = read_toml(Job, full, "x.toml", base)
    assert read == expected


def test_a_file_changes_only_what_it_names() -> None:
    base = Job(output="a", note="n", sampler=Sampler(name="ancestral", eta=2.0, options={"x": 1}), many=(Sampler(),))
    read = read_toml(Job, "num_images = 3\n[sampler]\neta = 0\noptions = {y = 2}", "x.toml", base)
    sampler = dataclasses.replace(base.sampler, eta=0.0, options={"y": 2})
    assert read == dataclasses.replace(base, num_images=3, sampler=sampler)
    assert isinstance(read.sampler.eta, float)
    assert read_toml(Job, b"", "x.toml", base) == base


def test_none_is_written_where_it_is_not_the_default() -> None:
    job = Job(output="a", sampler=Sampler(limit=None))
    assert 'limit = "none"' in to_toml(job) and "note" not in to_toml(job)
    base = Job(output="a", note="n")
    read = read_toml(Job, 'note = "none"\n[sampler]\nlimit = "none"', "x.toml", base)
    assert read.sampler.limit is None
    assert read.note == "none", "text stays text"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextNone:
    name: str | None = "default"


def test_none_that_toml_cannot_hold_is_an_error_and_not_another_value() -> None:
    with pytest.raises(ValueError, match="name: None is not the default"):
        to_toml(TextNone(name=None))


MISTAKES = [
    ("nun_images = 1", "nun_images", "unknown key; did you mean 'num_images'?"),
    ("output = 'a'\n[sampler]\nett = 1", "sampler.ett", "unknown key; did you mean 'eta'?"),
    ("output = 'a'\n[sampler]\nzzzz = 1", "sampler.zzzz", "unknown key; known: name, eta, limit, steps, options"),
    ("output = 'a'\n[[many]]\nett = 1", "many.0.ett", "did you mean 'eta'?"),
    ("output = 'a'\n[by_name.x]\nett = 1", "by_name.x.ett", "did you mean 'eta'?"),
    ("", "output", "is required and missing"),
    ("output = 1", "output", "string, got 1"),
    ("output = 'a'\nnum_images = '1'", "num_images", 'integer, got "1"'),
    ("output = 'a'\nnum_images = true", "num_images", "integer, got true"),
    ("output = 'a'\nnum_images = 1.5", "num_images", "integer, got 1.5"),
    ("output = 'a'\nnum_images = 1979-05-27", "x.toml", "write it as text"),
    ("output = 'a'\nsampler = 3", "sampler", "got 3"),
    ("output = 'a'\n[sampler]\neta = -1", "sampler.eta", "must be at least 0, got -1.0; use 0 for none"),
    ("output = 'a'\n[sampler]\neta = 'x'", "sampler.eta", 'number, got "x"'),
    ("output = 'a'\n[sampler]\neta = nan", "sampler.eta", "finite number, got NaN"),
    ("output = 'a'\n[sampler]\nname = 'heun'", "sampler.name", "'ancestral' or 'ddim', got \"heun\""),
    ("output = 'a'\n[sampler]\nsteps = [1, 'b']", "sampler.steps.1", 'integer, got "b"'),
    ("output = 'a'\n[sampler.options]\nk = [1]", "sampler.options.k", "got [1]"),
    ("output = 'a'\nnum_images = 'x'\nnote = 3", "note", "(and 1 more)"),
    ("output = ", "x.toml", "not valid TOML"),
]


@pytest.mark.parametrize(("toml", "field_path", "rule"), MISTAKES)
def test_mistakes_are_one_line_with_file_field_rule_and_value(toml: str, field_path: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_toml(Job, toml, "x.toml")
    line = str(caught.value)
    assert "\n" not in line and line.startswith("x.toml: ")
    assert f"{field_path}:" in line and rule in line, line
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'{"output":"a","other":1}', b'{"output":"a","note":3}', b"\xff"]
)
def test_damaged_json_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^s3://b/x\.json: ") as caught:
        from_json(Job, data, "s3://b/x.json")
    assert "\n" not in str(caught.value)


def test_json_is_canonical() -> None:
    job = Job(output="\u00e4 \U0001f600", by_name={"b": Sampler(), "a": Sampler(eta=2)}, sampler=Sampler(eta=3))
    data = to_json(job)
    reference = json.dumps(
        dataclasses.asdict(from_json(Job, data, "x")), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert data == reference.encode() + b"\n"
    assert digest(job) == hashlib.sha256(data).hexdigest()
    # one way to write a number, whatever the caller passed
    assert b'"eta":3.0' in data and digest(Sampler(eta=3)) == digest(Sampler(eta=3.0))
    swapped = Job(output=job.output, by_name=dict(reversed(job.by_name.items())), sampler=job.sampler)
    assert digest(swapped) == digest(job)


def test_digest_is_pinned() -> None:
    # a change here changes the digests of everything stored so far
    assert to_json(Sampler()) == b'{"eta":1.0,"limit":5,"name":"ddim","options":{},"steps":[1,2]}\n'
    assert digest(Sampler()) == "3da907877eab1744531decf9ad822d6f3b5d2de8f34c3a8324f0495ca6d9a71b"


@given(a=jobs, b=jobs)
def test_different_objects_have_different_digests(a: Job, b: Job) -> None:
    assert a == b or digest(a) != digest(b)
    assert digest(a) == digest(read_toml(Job, to_toml(a), "x.toml"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_cannot_hold_are_refused(value: float) -> None:
    for attempt in (to_json, to_toml, digest):
        with pytest.raises(ValueError, match="eta"):
            attempt(Sampler(eta=value))
    with pytest.raises(ValueError, match="JSON"):
        to_json({"x": value})


def test_objects_that_break_their_own_rules_are_not_written() -> None:
    wrong: Any = Sampler(steps=("x",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Sampler: steps\.0: "):
        to_json(wrong)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dog:
    name: Literal["dog"] = "dog"
    weight: float = 9.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Cat:
    name: Literal["cat"] = "cat"


class LoudDog(Dog):
    """Not in the union, and of the same name: as JSON it would look like a dog."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Household:
    pet: Dog | Cat | None = None
    more: tuple[Dog | Cat, ...] = ()
    by_name: dict[str, Dog | Cat] = field(default_factory=dict)


@pytest.mark.parametrize(
    "household",
    [Household(pet=LoudDog()), Household(more=(Cat(), LoudDog())), Household(by_name={"a": LoudDog()})],
)
def test_a_variant_that_is_not_registered_has_no_digest(household: Household) -> None:
    for attempt in (to_json, to_toml, digest, plain):
        with pytest.raises(ValueError, match=r"LoudDog: is none of the kinds .* dog, cat; register it"):
            attempt(household)
    whole = Household(pet=Dog(), more=(Cat(), Dog()), by_name={"a": Cat()})
    assert from_json(Household, to_json(whole), "x.json") == whole


def test_equal_numbers_have_equal_digests() -> None:
    assert Sampler(eta=-0.0) == Sampler(eta=0.0) and digest(Sampler(eta=-0.0)) == digest(Sampler(eta=0.0))
    zeros = {"-0.0": [-0.0, {"x": -0.0}], "text": "-0.0", "number": -10.0, "list": (0.0, -0.5, 1)}
    assert to_json(zeros) == b'{"-0.0":[0.0,{"x":0.0}],"list":[0.0,-0.5,1],"number":-10.0,"text":"-0.0"}\n'


def test_empty_texts_are_refused_by_name() -> None:
    refuse_empty(Job(output="x"), "output", "note")
    refuse_empty(Job(output="x", note=""), "output")
    with pytest.raises(ValueError, match=r"^note: must not be empty"):
        refuse_empty(Job(output="x", note=""), "output", "note")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """As it was when the first records were written."""

    name: Literal["shape"] = "shape"
    width: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class GrownShape:
    name: Literal["shape"] = "shape"
    width: int = 4
    ratio: float = added_field(default=2.0, pin=1)
    limit: int | None = added_field(default=3, pin=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    name: Literal["other"] = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    format_version: int = 2
    shape: Shape | Other = field(default_factory=Shape)
    shapes: tuple[Shape, ...] = ()
    by_name: dict[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GrownRun:
    format_version: int = 2
    shape: GrownShape | Other = field(default_factory=GrownShape)
    shapes: tuple[GrownShape, ...] = ()
    by_name: dict[str, GrownShape] = field(default_factory=dict)
    extra: GrownShape | None = added_field(default_factory=GrownShape, pin=GrownShape(ratio=1.0, limit=None, width=9))


old_shapes = st.builds(Shape, width=st.integers(0, 9))
old_runs = st.builds(
    Run,
    shape=old_shapes | st.just(Other()),
    shapes=st.lists(old_shapes, max_size=2).map(tuple),
    by_name=st.dictionaries(text, old_shapes, max_size=2),
)
grown_shapes = st.builds(
    GrownShape, width=st.integers(0, 9), ratio=st.sampled_from([1.0, 2.0, 3]), limit=st.none() | st.integers(0, 3)
)
grown_runs = st.builds(
    GrownRun,
    shape=grown_shapes | st.just(Other()),
    shapes=st.lists(grown_shapes, max_size=2).map(tuple),
    by_name=st.dictionaries(text, grown_shapes, max_size=2),
    extra=st.none() | grown_shapes,
)


@given(old=old_runs)
def test_records_from_before_a_field_existed_are_at_its_pin_and_keep_their_digest(old: Run) -> None:
    read = from_json(GrownRun, to_json(old), "x.json")
    shapes = [read.shape, *read.shapes, *read.by_name.values()]
    assert all((shape.ratio, shape.limit) == (1.0, None) for shape in shapes if isinstance(shape, GrownShape))
    assert read.extra == GrownShape(ratio=1.0, limit=None, width=9)
    assert identity(read) == json.loads(to_json(old)) and digest(read) == digest(old)


@given(a=grown_runs, b=grown_runs)
def test_identities_tell_objects_apart_and_are_records(a: GrownRun, b: GrownRun) -> None:
    assert a == b or digest(a) != digest(b)
    assert from_json(GrownRun, to_json(identity(a)), "x.json") == a == from_json(GrownRun, to_json(a), "x.json")
    assert read_toml(GrownRun, to_toml(a), "x.toml", b).shape == a.shape


def test_a_field_off_its_pin_changes_the_digest_even_at_its_default() -> None:
    pinned = GrownShape(ratio=1.0, limit=None)
    assert digest(pinned) == digest(Shape()) and digest(GrownShape()) != digest(Shape())
    assert identity(GrownShape()) == {"name": "shape", "width": 4, "ratio": 2.0, "limit": 3}
    assert identity(GrownShape(limit=None)) == {"name": "shape", "width": 4, "ratio": 2.0}
    assert to_json(pinned) == to_json(Shape()), "records leave it out too"
    assert plain(pinned) == {"name": "shape", "width": 4, "ratio": 1.0, "limit": None}


def test_people_get_the_defaults_of_today() -> None:
    assert read_toml(GrownRun, "shape.width = 1", "x.toml") == GrownRun(shape=GrownShape(width=1))
    base = GrownRun(shape=GrownShape(ratio=5.0))
    assert read_toml(GrownRun, "shape.width = 1", "x.toml", base).shape == GrownShape(width=1, ratio=5.0)


def test_plain_values_are_their_own_identity() -> None:
    assert identity([["a", 1]]) == [["a", 1]] and digest(["a"]) == hashlib.sha256(b'["a"]\n').hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    format_version: int = 3
    run: GrownRun | None = None


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b'{"format_version":2}', "has format_version 2, this program reads 3; index it again"),
        (b'{"format_version":4,"unknown":1}', "has format_version 4, this program reads 3; update this program"),
        (b'{"run":null}', "has no format_version, this program reads 3; index it again"),
        (b'{"format_version":"3"}', 'has format_version "3", this program reads 3; index it again'),
        (b'{"format_version":true}', "has format_version true, this program reads 3; index it again"),
        (b'{"format_version":3,"run":{"format_version":1}}', "run: has format_version 1, this program reads 2; index"),
    ],
)
def test_another_version_is_refused_before_anything_else(data: bytes, rule: str) -> None:
    with pytest.raises(FormatVersionError) as caught:
        read_record(Index, data, "s3://b/x.json", remedy="index it again")
    assert str(caught.value).startswith(f"s3://b/x.json: {rule}") and caught.value.exit_code == 2


def test_a_record_of_this_version_is_read() -> None:
    run = GrownRun(shape=Other(), shapes=(GrownShape(),))
    assert read_record(GrownRun, to_json(run), "x", remedy="") == run
    old = Run(shapes=(Shape(),))
    assert read_record(GrownRun, to_json(old), "x", remedy="").shapes == (GrownShape(ratio=1.0, limit=None),)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff", b'{"format_version":3,"x":1}'])
def test_a_damaged_record_is_no_other_version(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^s3://b/x\.json: "):
        read_record(Index, data, "s3://b/x.json", remedy="index it again")
