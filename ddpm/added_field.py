"""Fields that a stored format got after its first version.

A record written before the field existed lacks it. What it means there is the *pin*: what the code did before the field
existed, which need not be the default of today. A field at its pin is left out of records and digests, so that what was
stored before keeps its bytes and its digest.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
PIN = "pin"
"""Key of the pin in the metadata of a `dataclasses.Field`."""


def added_field(
    *,
    default: T = dataclasses.MISSING,  # type: ignore[assignment]
    default_factory: Callable[[], T] = dataclasses.MISSING,  # type: ignore[assignment]
    pin: T,
) -> T:
    """A dataclass field that was added to a stored format after its first version.

    Args:
        default: Value where a person leaves the field out; may change.
        default_factory: Makes that value, for dicts and lists; instead of default.
        pin: What the code did before the field existed; never changes. A dataclass here spells every option out, since
            its own defaults may change.

    Returns:
        What `dataclasses.field` returns; typed as the value, which is what the annotation of the field says.

    Raises:
        ValueError: If both or neither of default and default_factory are given.
    """
    keywords: dict[str, Any] = {"default": default, "default_factory": default_factory}
    if sum(value is not dataclasses.MISSING for value in keywords.values()) != 1:
        raise ValueError("added_field: takes default or default_factory, got both or neither; give one of them")
    field: T = dataclasses.field(**keywords, metadata={PIN: pin})
    return field
