"""Fields of a configuration that say one thing in several ways, of which one is given at most.

A dataclass names them, by their paths, in a class variable `ALTERNATIVES`; they are optional, None where they are not
given, and its own rules refuse two at once. What is read over a configuration, a file or flags, gives one instead of
another that stood there: else nobody could ask for a number of images where a preset has a number for each class.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def taken_back(cls: Any, is_given: Callable[[str], bool]) -> list[str]:
    """The paths of the alternatives that give way to those that are given; none where none is given.

    Args:
        cls: A dataclass; other types have no alternatives.
        is_given: Whether a path is given by what is read.
    """
    paths: tuple[str, ...] = getattr(cls, "ALTERNATIVES", ())
    given = [path for path in paths if is_given(path)]
    return [path for path in paths if path not in given] if given else []


def make_room(base: T, data: dict[str, Any]) -> T:
    """A dataclass without those of its alternatives that give way to what is read over it.

    Args:
        base: The dataclass.
        data: What is read, TOML or JSON values; the word "none" gives nothing.
    """
    for path in taken_back(type(base), lambda path: _value_at(data, path) not in (None, "none")):
        base = _without(base, path.split("."))
    return base


def _value_at(data: Any, path: str) -> Any:
    for name in path.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _without(base: T, path: list[str]) -> T:
    value = getattr(base, path[0], None)
    if value is None:  # not given, or of a variant that does not have it
        return base
    rest = _without(value, path[1:]) if path[1:] else None
    return dataclasses.replace(base, **{path[0]: rest})  # type: ignore[type-var]
