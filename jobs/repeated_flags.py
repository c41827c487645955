"""Flags of several values that are given several times, such as `--exclude a --exclude b`: all values count.

The parser of flags would keep those of the last, and lose the others without a word.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, get_origin

from pipeline.config_fields import fields_of


def gather(config: object, flags: Sequence[str]) -> list[str]:
    """The flags, with all values of one that is repeated behind its last.

    Args:
        config: What the flags are read over; its fields that are tuples take several values.
        flags: The flags.
    """
    names = set(_tuple_flags(config))
    groups: list[tuple[str, list[str]]] = []  # a flag as it is written, and its values
    for word in flags:
        name, equals, value = word.partition("=")
        if word.startswith("--") or not groups:
            groups.append((name, [value]) if equals and _dashed(name) in names else (word, []))
        else:
            groups[-1][1].append(word)
    gathered: list[str] = []
    for place, (name, values) in enumerate(groups):
        dashed = _dashed(name)
        if dashed in names and any(_dashed(later) == dashed for later, _ in groups[place + 1 :]):
            continue
        if dashed in names:
            values = [value for other, given in groups if _dashed(other) == dashed for value in given]
        gathered += [name, *values]
    return gathered


def _tuple_flags(config: Any, path: str = "") -> Iterator[str]:
    for name, hint in fields_of(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is tuple:
            yield _dashed(f"--{path}{name}")
        elif dataclasses.is_dataclass(value):
            yield from _tuple_flags(value, f"{path}{name}.")


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")
