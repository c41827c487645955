"""Fields that say one thing in several ways: what is read over a configuration replaces what stood there."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from pipeline.config_alternatives import taken_back
from pipeline.config_io import read_toml, to_toml
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    file: str | None = None
    size: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("each", "whole", "inner.file")
    each: int | None = None
    whole: int | None = None
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.each, self.whole, self.inner.file)) > 1:
            raise ValueError("whole: goes alone; leave one out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    count: Count = field(default_factory=Count)


BY_FILE = Count(inner=Inner(file="x", size=7))


@pytest.mark.parametrize(
    ("base", "text", "expected"),
    [
        (Count(each=3), "whole = 5", Count(whole=5)),
        (Count(each=3), "each = 4", Count(each=4)),
        (Count(each=3), "inner = {size = 4}", Count(each=3, inner=Inner(size=4))),
        (Count(each=3), "inner = {file = 'y'}", Count(inner=Inner(file="y"))),
        (BY_FILE, "whole = 5", Count(whole=5, inner=Inner(size=7))),
        (BY_FILE, "whole = 'none'", BY_FILE),
        (Count(each=3), "each = 'none'\nwhole = 2", Count(whole=2)),
        (Count(each=3), "each = 'none'", Count()),
    ],
)
def test_what_is_read_takes_the_place_of_the_others(base: Count, text: str, expected: Count) -> None:
    assert read_toml(Count, text, "x.toml", base) == expected
    inside = read_toml(Job, "[count]\n" + text, "x.toml", Job(count=base))
    assert inside == Job(count=expected)
    assert read_toml(Job, to_toml(inside), "x.toml", Job(count=Count(each=9))) in (inside, Job(count=Count(each=9)))


def test_two_in_one_file_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^x\.toml: whole: goes alone"):
        read_toml(Count, "each = 3\nwhole = 5", "x.toml", Count(each=3))


def test_other_classes_have_none() -> None:
    assert taken_back(Inner, lambda path: True) == []
    assert taken_back(Count, lambda path: False) == []
    assert taken_back(Count, lambda path: path == "whole") == ["each", "inner.file"]
