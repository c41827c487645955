"""Flags that say in another way what a preset or a file has said: `--num-images 10` where those have images_per_class.

Which fields are alternatives to each other, a configuration says itself (pipeline/config_alternatives.py). Here what
the flags give an alternative to is taken out before they are read.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from jobs.variant_flags import replaced
from pipeline.config_alternatives import taken_back
from pipeline.config_fields import fields_of

C = TypeVar("C")


def make_room(config: C, flags: Sequence[str]) -> C:
    """The configuration without what gives way to flags; a start for their parser, not checked.

    Args:
        config: What the flags are read over.
        flags: The flags; a value of None gives nothing.
    """
    given = set(_given(flags))
    for path, part in list(_parts(config)):
        for name in taken_back(type(part), lambda name, path=path: f"{path}{name}" in given):  # type: ignore[misc]
            names = [*path.split(".")[:-1], *name.split(".")]
            if _has(config, names):
                config = replaced(config, names, None)
    return config


def _given(flags: Sequence[str]) -> Iterator[str]:
    """The paths of the fields that flags give."""
    for flag, after in zip(flags, [*flags[1:], ""]):
        name, equals, value = flag.partition("=")
        if name.startswith("--") and (value if equals else after) != "None":
            yield name.removeprefix("--").replace("-", "_")


def _parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All dataclasses in a configuration, with the paths of their fields up to the field's name."""
    yield path, config
    for name in fields_of(type(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value, f"{path}{name}.")


def _has(config: Any, names: Sequence[str]) -> bool:
    """Whether there is such a field: a variant has its own."""
    for name in names:
        if name not in fields_of(type(config)):
            return False
        config = getattr(config, name)
    return True
