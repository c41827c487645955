"""Variants: which classes a union offers, and reading, changing, swapping and writing them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config_fields import is_special
from pipeline.config_io import digest, from_json, identity, read_toml, to_json, to_toml, variants_of
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    name: Literal["constant"] = "constant"
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ramp:
    name: Literal["ramp"] = "ramp"
    scale: float = 1.0
    knots: tuple[int, ...] = (1, 2)


Guidance = Constant | Ramp


@dataclass(frozen=True, kw_only=True, slots=True)
class Common(ABC):
    num_steps: int = 50
    limit: int | None = None
    guidance: Guidance | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, got {self.num_steps}; give a positive number")

    @property
    @abstractmethod
    def order(self) -> int:
        """Makes the class abstract."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ancestral(Common):
    name: Literal["ancestral"] = "ancestral"
    variance: Literal["small", "large"] = "small"
    order = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Ddim(Common):
    name: Literal["ddim"] = "ddim"
    eta: float = 0.0
    order = 1

    def __post_init__(self) -> None:
        Common.__post_init__(self)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: must be in [0, 1], got {self.eta}; use 0 for none")


@dataclass(frozen=True, kw_only=True, slots=True)
class DdimOfOld(Ddim):
    """A variant that is a subclass of another."""

    name: Literal["ddim_of_old"] = "ddim_of_old"  # type: ignore[assignment]
    eta: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Heun(Common):
    name: Literal["heun"] = "heun"
    churn: float = 0.0
    order = 2


Sampler = Ancestral | Ddim | DdimOfOld | Heun


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    sampler: Sampler
    times: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    output: str = "out"
    sampler: Sampler = field(default_factory=lambda: Ddim(eta=0.5))
    second: Sampler | None = None
    many: tuple[Entry, ...] = ()
    by_name: dict[str, Sampler] = field(default_factory=dict)
    pair: tuple[Sampler, Guidance] | None = None


guidances = st.builds(Constant, scale=st.floats(0, 9)) | st.builds(
    Ramp, scale=st.integers(0, 9), knots=st.lists(st.integers(0, 9), max_size=2).map(tuple)
)
common: dict[str, Any] = {
    "num_steps": st.integers(1, 99),
    "limit": st.none() | st.integers(0, 9),
    "guidance": st.none() | guidances,
}
samplers = (
    st.builds(Ancestral, variance=st.sampled_from(["small", "large"]), **common)
    | st.builds(Ddim, eta=st.floats(0, 1), **common)
    | st.builds(DdimOfOld, eta=st.floats(0, 1), **common)
    | st.builds(Heun, churn=st.integers(0, 9), **common)
)
text = st.text("abc", max_size=3)
jobs = st.builds(
    Job,
    output=text,
    sampler=samplers,
    second=st.none() | samplers,
    many=st.lists(st.builds(Entry, sampler=samplers, times=st.integers(0, 9)), max_size=2).map(tuple),
    by_name=st.dictionaries(text, samplers, max_size=2),
    pair=st.none() | st.tuples(samplers, guidances),
)


@given(job=jobs)
def test_round_trips(job: Job) -> None:
    assert read_toml(Job, to_toml(job), "x.toml") == job
    assert from_json(Job, to_json(job), "x.json") == job
    assert to_json(from_json(Job, to_json(job), "x.json")) == to_json(job)
    assert identity(job)["sampler"]["name"] == job.sampler.name


@given(base=jobs)
def test_a_file_that_says_nothing_changes_nothing(base: Job) -> None:
    assert read_toml(Job, "", "x.toml", base) == base
    assert read_toml(Job, "[sampler]", "x.toml", base) == base


@given(a=jobs, b=jobs)
def test_different_objects_have_different_digests(a: Job, b: Job) -> None:
    assert a == b or digest(a) != digest(b)
    assert type(from_json(Job, to_json(a), "x").sampler) is type(a.sampler), "equal fields are no equal variants"


def test_a_table_without_a_name_changes_the_variant_that_is_there() -> None:
    base = Job(sampler=Heun(num_steps=9, churn=2.0), second=Ancestral(num_steps=3))
    read = read_toml(Job, "[sampler]\nchurn = 4\n[second]\nlimit = 2", "x.toml", base)
    assert read == replace(base, sampler=Heun(num_steps=9, churn=4.0), second=Ancestral(num_steps=3, limit=2))
    assert read_toml(Job, "[sampler]\nnum_steps = 3", "x.toml").sampler == Ddim(num_steps=3), "the field's default kind"


def test_another_name_swaps_the_variant_and_keeps_what_both_share() -> None:
    base = Job(sampler=Ddim(num_steps=9, limit=4, eta=1.0, guidance=Constant(scale=3.0)))
    read = read_toml(Job, '[sampler]\nname = "heun"\nlimit = 5', "x.toml", base).sampler
    assert read == Heun(num_steps=9, limit=5, guidance=Constant(scale=3.0))
    assert read_toml(Job, '[sampler]\nname = "ddim"', "x.toml", base) == base, "the same name changes nothing"
    back = read_toml(Job, '[sampler]\nname = "ddim"', "x.toml", replace(base, sampler=read)).sampler
    assert back == Ddim(num_steps=9, limit=5, guidance=Constant(scale=3.0)), "eta starts at its default"


def test_variants_inside_variants() -> None:
    base = Job(sampler=Ddim(guidance=Ramp(scale=2.0, knots=(7,))))
    read = read_toml(Job, "[sampler]\nname = 'heun'\nguidance = {scale = 5}", "x.toml", base)
    assert read.sampler == Heun(guidance=Ramp(scale=5.0, knots=(7,)))
    read = read_toml(Job, "[sampler.guidance]\nname = 'constant'", "x.toml", base)
    assert read.sampler == Ddim(guidance=Constant(scale=2.0), eta=0.0)
    assert read_toml(Job, "[sampler]\nguidance = 'none'", "x.toml", base).sampler == Ddim()


def test_a_variant_that_may_be_none() -> None:
    base = Job(second=Heun(churn=1.0))
    assert read_toml(Job, "second = 'none'", "x.toml", base).second is None
    assert read_toml(Job, "second = {name = 'heun', churn = 2}", "x.toml").second == Heun(churn=2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Strict:
    name: Literal["strict"] = "strict"
    num_steps: int = 3

    def __post_init__(self) -> None:
        if self.num_steps > 5:
            raise ValueError(f"num_steps: at most 5, got {self.num_steps}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StrictJob:
    sampler: Heun | Strict = field(default_factory=Heun)


def test_what_is_kept_must_obey_the_rules_of_the_new_variant_only_together_with_the_file() -> None:
    with pytest.raises(ConfigError, match=r"x\.toml: sampler\.num_steps: at most 5, got 50"):
        read_toml(StrictJob, "sampler.name = 'strict'", "x.toml", StrictJob())
    assert read_toml(StrictJob, "[sampler]\nname = 'strict'\nnum_steps = 4", "x.toml", StrictJob()).sampler == Strict(
        num_steps=4
    )


NUMBER = "Input should be a valid number, got"
NAMES = "ancestral, ddim, ddim_of_old, heun"
INTEGER = "Input should be a valid integer, got"
MISTAKES = [
    ("sampler.name = 'hein'", f"sampler.name: must be one of {NAMES}, got 'hein'; did you mean 'heun'?"),
    ("sampler.name = 'zzz'", f"sampler.name: must be one of {NAMES}, got 'zzz'"),
    ("sampler.name = 3", f"sampler.name: must be one of {NAMES}, got 3"),
    ("sampler = 'heun'", f'sampler: must have a name, one of {NAMES}, got "heun"; did you mean sampler.name = '),
    ("sampler = 3", f"sampler: must have a name, one of {NAMES}, got 3"),
    ("sampler = {eta = 1, name = 'heun'}", "sampler.eta: unknown key of 'heun'; known: num_steps, limit, guidance, na"),
    ("sampler.ettta = 1", "sampler.ettta: unknown key of 'ddim'; did you mean 'eta'?"),
    ("sampler = {name = 'heun', churm = 1}", "sampler.churm: unknown key of 'heun'; did you mean 'churn'?"),
    ("sampler.eta = 2", "sampler.eta: must be in [0, 1], got 2.0; use 0 for none"),
    ("sampler = {name = 'heun', num_steps = 0}", "sampler.num_steps: must be at least 1, got 0; give a positive num"),
    ("sampler = {churn = 'x', name = 'heun'}", f'sampler.churn: {NUMBER} "x"'),
    ("sampler = {num_steps = 1.5, limit = 'x'}", f"sampler.num_steps: {INTEGER} 1.5 (and 1 more)"),
    ("second.limit = 3", f"second.name: is required and missing; one of {NAMES}"),
    ("[[many]]\ntimes = 3", "many.0.sampler: is required and missing"),
    ("[[many]]\nsampler.eta = 1", f"many.0.sampler.name: is required and missing; one of {NAMES}"),
    ("[[many]]\nsampler = {name = 'heun', eta = 1}", "many.0.sampler.eta: unknown key of 'heun'; known: "),
    ("by_name.x = {name = 'ddim', eta = -1}", "by_name.x.eta: must be in [0, 1], got -1.0; use 0 for none"),
    ("pair = [{name = 'heun'}, {name = 'ramp', s = 1}]", "pair.1.s: unknown key of 'ramp'; known: name, scale, knots"),
    ("sampler.guidance = {name = 'ramp', knots = ['x']}", f'sampler.guidance.knots.0: {INTEGER} "x"'),
    ("sampler.guidance.scale = 1", "sampler.guidance.name: is required and missing; one of constant, ramp"),
    ("sampler.guidance.name = 'rampe'", "sampler.guidance.name: must be one of constant, ramp, got 'rampe'; did"),
    ("outputt = 'x'\nsampler.num_steps = 'x'", "outputt: unknown key; did you mean 'output'? (and 1 more)"),
]


@pytest.mark.parametrize(("toml", "rule"), MISTAKES)
def test_mistakes_are_told_of_the_chosen_variant_alone(toml: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_toml(Job, toml, "mine.toml", Job())
    line = str(caught.value)
    assert line.startswith(f"mine.toml: {rule}") and "\n" not in line, line


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b'{"sampler":{"eta":1}}', f"sampler.name: is required and missing; one of {NAMES}"),
        (b'{"sampler":null}', f"sampler: must have a name, one of {NAMES}, got null"),
        (b'{"second":{}}', f"second.name: is required and missing; one of {NAMES}"),
        (b'{"sampler":{"name":["heun"]}}', f'sampler.name: must be one of {NAMES}, got ["heun"]'),
        (b'{"sampler":{"name":"heun","eta":1}}', "sampler.eta: unknown key of 'heun'"),
    ],
)
def test_a_record_names_its_variants(data: bytes, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(Job, data, "s3://b/x.json")
    assert str(caught.value).startswith(f"s3://b/x.json: {rule}")


def test_objects_that_break_their_own_rules_are_not_written() -> None:
    wrong: Any = Job(sampler=Heun(churn="x"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^Job: sampler\.churn: Input should be a valid number"):
        to_json(wrong)
    with pytest.raises(ValueError, match="sampler"):
        to_json(Job(sampler=3))  # type: ignore[arg-type]


def test_which_annotations_are_variant_fields() -> None:
    expected = {"constant": Constant, "ramp": Ramp}
    annotations: list[Any] = [Guidance, Guidance | None, Optional[Guidance], Annotated[Guidance | None, "doc"]]  # noqa: UP045
    assert all(variants_of(annotation) == expected for annotation in annotations)
    others: list[Any] = [
        Constant,
        Constant | None,
        Constant | Entry,
        Constant | str,
        int | str,
        dict[str, Guidance],
        None,
    ]
    assert all(variants_of(other) == {} for other in others)
    assert list(variants_of(Sampler)) == NAMES.split(", ")


@dataclass(frozen=True, kw_only=True, slots=True)
class AlsoRamp:
    name: Literal["ramp"] = "ramp"


def test_two_variants_cannot_have_one_name() -> None:
    with pytest.raises(ValueError, match="name: each variant has its own, got constant, ramp, ramp"):
        variants_of(Constant | Ramp | AlsoRamp)


def test_lists_of_plain_records_are_not_walked() -> None:
    assert not is_special(tuple[Constant, ...]) and not is_special(dict[str, int])
    assert is_special(dict[str, tuple[Entry, ...]])
