"""Variants: dataclasses of one kind that are told apart by a field `name` with one value."""

from typing import Any


def check_variant_name(variant: Any) -> None:
    """Refuse a name that is another variant's: it is part of what is stored, and of digests.

    Raises:
        ValueError: If the name is not the default of the variant's class.
    """
    own = type(variant).__dataclass_fields__["name"].default
    if variant.name != own:
        raise ValueError(f"name: must be {own!r} for {type(variant).__name__}, got {variant.name!r}; leave it out")
