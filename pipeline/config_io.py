"""Dataclasses to and from TOML and JSON, strictly, and their digests.

Reading refuses unknown keys and wrong types at every level; one line says which file, which field, which rule and what
was found. TOML is for people; TOML has no null, so that None is written as the string "none", which every optional
field that takes no text reads as None; fields that take text leave None out, and it must be their default. JSON is for
records: canonical bytes (sorted keys, no spaces, UTF-8, one newline at the end), so that equal objects have equal
digests.

Variants (see config_fields.py) always carry their name in JSON. In TOML a table without a name changes the variant that
is there; one with another name swaps it: what both share is kept, the rest starts at the defaults of the new one.

Fields that were added to a format later (ddpm/added_field.py) are not written while they are at their pins, and records
that lack them are read as if they had the pins: what is stored, and every digest, stays what it was.
"""

import codecs
import copy
import dataclasses
import functools
import hashlib
import json
import tomllib
from typing import Any, TypeVar

import pydantic
import tomli_w

from pipeline.config_alternatives import make_room
from pipeline.config_errors import check_names, explain, short
from pipeline.config_fields import (
    NAME,
    default_of,
    element_of,
    fields_of,
    inside,
    is_special,
    pins_of,
    resolve,
    shared_fields,
    takes_none_word,
    variants_of,
    walk,
)
from pipeline.errors import ConfigError, FormatVersionError

__all__ = [
    "digest",
    "from_json",
    "from_tables",
    "identity",
    "parse_toml",
    "plain",
    "read_record",
    "read_toml",
    "refuse_empty",
    "to_json",
    "to_toml",
    "variants_of",
]

T = TypeVar("T")


def read_toml(cls: type[T], text: str | bytes, where: str, base: T | None = None) -> T:
    """Read a config tree from TOML.

    Args:
        cls: A dataclass whose fields may be dataclasses, variants, and tuples and dicts of them.
        text: The file's content.
        where: The file's name, for messages.
        base: Values of the keys that the file leaves out; without it the dataclass's own defaults.

    Raises:
        ConfigError: If the text is not TOML, a key is unknown, or a value breaks a rule.
    """
    return _validate(cls, _over(cls, base, parse_toml(text, where)), where)


def parse_toml(text: str | bytes, where: str) -> dict[str, Any]:
    """The tables of a TOML file; for one that several dataclasses are read from, see `from_tables`.

    Raises:
        ConfigError: If the text is not TOML.
    """
    if isinstance(text, bytes):
        text = _decode(text, where)
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))  # some editors write a byte-order mark
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from None


def _decode(data: bytes, where: str) -> str:
    """The text of a file that a person wrote, in whichever encoding their editor chose."""
    if b"\0" in data or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{where}: not valid TOML: is UTF-16 text, or none at all; save it as UTF-8")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{where}: not valid TOML: byte 0x{data[error.start]:02x} in line {line} is not UTF-8; save it as UTF-8"
        ) from None


def from_tables(cls: type[T], name: str, value: Any, where: str, base: T) -> T:
    """Read a config tree, or a single value, from a part of a TOML file that is parsed already.

    Args:
        cls: Its type.
        name: What the part is called in the file.
        value: The part.
        where: The file's name, for messages.
        base: Values of the keys that the part leaves out.

    Raises:
        ConfigError: If a key is unknown, or a value breaks a rule.
    """
    holder = dataclasses.make_dataclass("Part", [(name, cls)], frozen=True)
    read: T = getattr(_validate(holder, _over(holder, holder(base), {name: value}), where), name)
    return read


def to_toml(obj: Any) -> str:
    """Write a dataclass as TOML that `read_toml` reads back as an equal object."""
    return tomli_w.dumps(_write_none(type(obj), _plain(type(obj), obj)))


def refuse_empty(config: object, *fields: str) -> None:
    """Refuse empty texts in a dataclass, such as a flag with an unset shell variable behind it.

    Args:
        config: The object.
        fields: Names of fields that hold a text or None.

    Raises:
        ValueError: If a text is empty.
    """
    for name in fields:
        if getattr(config, name) == "":
            raise ValueError(f"{name}: must not be empty, got ''; give a value or leave it out")


def from_json(cls: type[T], data: bytes, where: str) -> T:
    """Read a record from JSON; added fields that it lacks are at their pins.

    Args:
        cls: A dataclass whose fields may be dataclasses, variants, and tuples and dicts of them.
        data: UTF-8 bytes.
        where: The object's URI, for messages.

    Raises:
        ConfigError: If the bytes are not JSON, a key is unknown, or a value breaks a rule.
    """
    return _validate(cls, _fill_pins(cls, _parse(data, where)), where)


def read_record(cls: type[T], data: bytes, where: str, *, remedy: str) -> T:
    """Read a stored record that has a field `format_version`, whose default is the version that this program reads.

    Versions are compared before anything else, in records inside the record too.

    Args:
        cls: As for `from_json`.
        data: As for `from_json`.
        where: As for `from_json`.
        remedy: What to do about a record of an older version, such as "prepare the dataset again".

    Raises:
        FormatVersionError: If the record is of another version, or of none.
        ConfigError: If it is damaged, as for `from_json`.
    """
    parsed = _parse(data, where)
    for path, hint, value in walk(cls, parsed):
        record = resolve(hint, value)
        if isinstance(value, dict) and "format_version" in fields_of(record):
            place = f"{where}: {'.'.join(path)}" if path else where
            _check_version(value, default_of(record, "format_version"), place, remedy)
    return _validate(cls, _fill_pins(cls, parsed), where)


def to_json(obj: Any) -> bytes:
    """Canonical JSON of the `identity` of a dataclass, or of plain lists, dicts and scalars.

    Raises:
        ValueError: If a number is not finite, or the object breaks its own rules.
    """
    return _canonical(identity(obj))


def plain(obj: Any) -> Any:
    """The JSON value of a dataclass with every field, for people and comparisons; errors as `to_json`."""
    return _plain(type(obj), obj)


def flat(obj: Any) -> dict[str, Any]:
    """What `plain` gives, by the dotted paths of the fields, which MLflow can show and a message can name."""
    return _flat(plain(obj), "")


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    by_path: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        by_path |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return by_path


def identity(obj: Any) -> Any:
    """The JSON value of a dataclass without the added fields that are at their pins, at every level.

    Plain lists, dicts and scalars are returned as they are. `from_json` reads the JSON of it as an equal object.

    Raises:
        ValueError: As `to_json`.
    """
    return _without_pins(type(obj), _plain(type(obj), obj)) if dataclasses.is_dataclass(obj) else obj


def digest(obj: Any) -> str:
    """SHA-256 of `to_json`, in hexadecimal."""
    return hashlib.sha256(to_json(obj)).hexdigest()


def _canonical(data: Any) -> bytes:
    text = _dumps(data)
    if "-0.0" in text:  # equals 0.0, and so must its digest
        text = _dumps(_without_negative_zeros(data))
    return text.encode() + b"\n"


def _dumps(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _without_negative_zeros(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_negative_zeros(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_negative_zeros(value) for value in data]
    return data + 0.0 if isinstance(data, float) else data


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        start = " ".join(data[:200].decode(errors="replace").split())
        found = f"it starts with {short(start)}" if start else "it is empty"
        raise ConfigError(f"{where}: not valid JSON: {error}; {found}") from None


def _check_version(record: dict[str, Any], expected: int, where: str, remedy: str) -> None:
    found = record.get("format_version")
    if type(found) is int and found == expected:
        return
    is_newer = type(found) is int and found > expected
    version = f"format_version {short(found)}" if "format_version" in record else "no format_version"
    raise FormatVersionError(
        f"{where}: has {version}, this program reads {expected}; {'update this program' if is_newer else remedy}"
    )


@functools.cache
def _holder(cls: Any) -> tuple[Any, pydantic.TypeAdapter[Any]]:
    """A dataclass with one field of the class, and its adapter."""
    # A dataclass cannot be given a pydantic config from outside, but inherits that of the dataclass that holds it.
    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants")
    holder = pydantic.with_config(config)(dataclasses.make_dataclass("holder", [("value", cls)]))
    return holder, pydantic.TypeAdapter(holder)


def _validate(cls: type[T], data: Any, where: str) -> T:
    check_names(cls, data, where)
    kind: Any = cls  # mypy does not take a type variable's class for hashable
    try:
        # strict rules for JSON input: a list may become a tuple, 1 may become 1.0; "1" stays text, true is no number
        value: T = _holder(kind)[1].validate_json(json.dumps({"value": data})).value
    except TypeError as error:  # a TOML date or time
        raise ConfigError(f"{where}: {error}; write it as text") from None
    except pydantic.ValidationError as error:
        raise ConfigError(explain(cls, data, where, error)) from None
    return value


def _plain(hint: Any, value: Any) -> Any:
    """A value as JSON values, normalised: 1 in a float field becomes 1.0, so that equal objects look equal."""
    _check_variants(hint, value)
    holder, adapter = _holder(hint)
    once = adapter.dump_json(holder(value), warnings=False)
    try:
        again = adapter.validate_json(once)
    except pydantic.ValidationError as error:
        raise ValueError(explain(hint, json.loads(once)["value"], type(value).__name__, error)) from None
    return adapter.dump_python(again, mode="json")["value"]


def _check_variants(hint: Any, value: Any) -> None:
    """Refuse a variant that is not in its union: it would be written, and digested, as what it is derived from."""
    if not is_special(hint):
        return
    variants = variants_of(hint)
    if variants and dataclasses.is_dataclass(value) and type(value) not in variants.values():
        raise ValueError(
            f"{type(value).__name__}: is none of the kinds that are stored here, {', '.join(variants)}; register it"
        )
    if isinstance(value, list | tuple):
        for index, element in enumerate(value):
            _check_variants(element_of(resolve(hint, list(value)), index), element)
    elif isinstance(value, dict):
        for key, element in value.items():
            _check_variants(element_of(resolve(hint, value), key), element)
    else:
        for name, field_hint in fields_of(type(value)).items():
            _check_variants(field_hint, getattr(value, name))


def _over(hint: Any, base: Any, data: Any) -> Any:
    """TOML values over a base, as JSON values: field by field through dataclasses; other values are replaced whole."""
    if isinstance(data, list):
        elements = resolve(hint, data)
        return [_over(element_of(elements, index), None, element) for index, element in enumerate(data)]
    if not isinstance(data, dict):
        return None if data == "none" and takes_none_word(hint) else data
    has_base = dataclasses.is_dataclass(base)
    option: Any = type(base) if has_base and variants_of(hint) and NAME not in data else resolve(hint, data)
    fields = fields_of(option)
    if not fields:
        return {key: _over(element_of(option, key), None, value) for key, value in data.items()}
    merged: dict[str, Any] = {}
    if has_base:
        base = make_room(base, data)
        kept = fields if type(base) is option else shared_fields(type(base), option)
        merged = {key: value for key, value in _plain(type(base), base).items() if key in kept}
    for key, value in data.items():
        inner = getattr(base, key, None) if key in merged else None
        merged[key] = _over(fields.get(key), inner, _named(option, key, inner, value))
    return merged


def _named(cls: Any, key: str, base: Any, value: Any) -> Any:
    """A table of a variant field without name and base: it means the variant that the field is by default."""
    variants = variants_of(fields_of(cls).get(key))
    if not variants or not isinstance(value, dict) or NAME in value or base is not None:
        return value
    default = default_of(cls, key)
    return {NAME: getattr(default, NAME), **value} if type(default) in variants.values() else value


def _write_none(hint: Any, value: Any) -> Any:
    """Write the word "none" for None at every level, and leave it out where text may be and it is the default."""
    if isinstance(value, list):
        return [_write_none(element_hint, element) for _, element_hint, element in inside(hint, value)]
    if not isinstance(value, dict):
        return value
    cls = resolve(hint, value)
    is_record = bool(fields_of(cls))
    result = {}
    for key, element_hint, element in inside(hint, value):
        if element is not None:
            result[key] = _write_none(element_hint, element)
        elif is_record and takes_none_word(element_hint):
            result[key] = "none"  # also where it is the default: the file may be read over another base
        elif is_record and default_of(cls, str(key)) is not None:
            raise ValueError(f"{key}: None is not the default and TOML cannot hold it; give the field another one")
    return result


def _fill_pins(hint: Any, value: Any) -> Any:
    """JSON values with the added fields that they lack at their pins, at every level."""
    if not is_special(hint) or not isinstance(value, list | dict):
        return value
    if isinstance(value, list):
        return [_fill_pins(element_hint, element) for _, element_hint, element in inside(hint, value)]
    filled = {key: _fill_pins(element_hint, element) for key, element_hint, element in inside(hint, value)}
    return copy.deepcopy(_plain_pins(resolve(hint, value))) | filled


def _without_pins(hint: Any, value: Any) -> Any:
    """JSON values without the added fields that are at their pins, at every level."""
    if not is_special(hint) or not isinstance(value, list | dict):
        return value
    if isinstance(value, list):
        return [_without_pins(element_hint, element) for _, element_hint, element in inside(hint, value)]
    pins = _plain_pins(resolve(hint, value))
    return {
        key: _without_pins(element_hint, element)
        for key, element_hint, element in inside(hint, value)
        if key not in pins or _canonical(element) != _canonical(pins[str(key)])
    }


@functools.cache
def _plain_pins(cls: Any) -> dict[str, Any]:
    """The pins of a dataclass as JSON values."""
    return {name: _plain(fields_of(cls)[name], pin) for name, pin in pins_of(cls).items()}
