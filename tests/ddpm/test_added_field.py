"""A field that was added to a stored format: an ordinary dataclass field that knows its pin."""

import dataclasses
from dataclasses import dataclass

import pytest

from ddpm.added_field import PIN, added_field


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    first: int
    factor: float = added_field(default=2.0, pin=1.0)
    names: tuple[str, ...] = added_field(default_factory=lambda: ("new",), pin=())


def test_it_is_a_field_with_a_default_and_a_pin() -> None:
    assert Record(first=1) == Record(first=1, factor=2.0, names=("new",))
    pins = {field.name: dict(field.metadata) for field in dataclasses.fields(Record)}
    assert pins == {"first": {}, "factor": {PIN: 1.0}, "names": {PIN: ()}}


def test_it_has_one_default() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        added_field(pin=1)
    with pytest.raises(ValueError, match="both or neither"):
        added_field(default=1, default_factory=int, pin=1)
