"""Dataclasses to and from TOML and JSON, strictly, and their digests.

Reading refuses unknown keys and wrong types at every level; one line says which file, which field, which rule and what
was found. TOML is for people; TOML has no null, so that None is written as nothing where it is the default, and as the
string "none" elsewhere, and "none" is read as None by every optional field that takes no text. JSON is for records:
canonical bytes (sorted keys, no spaces, UTF-8, one newline at the end), so that equal objects have equal digests.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import tomllib
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
import tomli_w

from pipeline.errors import ConfigError

T = TypeVar("T")


def read_toml(cls: type[T], text: str | bytes, where: str, base: T | None = None) -> T:
    """Read a config tree from TOML.

    Args:
        cls: A dataclass whose fields may be dataclasses.
        text: The file's content.
        where: The file's name, for messages.
        base: Values of the keys that the file leaves out; without it the dataclass's own defaults.

    Raises:
        ConfigError: If the text is not TOML, a key is unknown, or a value breaks a rule.
    """
    try:
        data = tomllib.loads(text.decode() if isinstance(text, bytes) else text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from None
    data = _read_none(cls, data)
    return _validate(cls, data if base is None else _merge(base, data), where)


def to_toml(obj: Any) -> str:
    """Write a dataclass as TOML that `read_toml` reads back as an equal object."""
    return tomli_w.dumps(_write_none(type(obj), _plain(obj)))


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
    """Read a record from JSON.

    Args:
        cls: A dataclass whose fields may be dataclasses.
        data: UTF-8 bytes.
        where: The object's URI, for messages.

    Raises:
        ConfigError: If the bytes are not JSON, a key is unknown, or a value breaks a rule.
    """
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    return _validate(cls, parsed, where)


def to_json(obj: Any) -> bytes:
    """Canonical JSON of a dataclass (or of plain lists, dicts and scalars).

    Raises:
        ValueError: If a number is not finite, or the object breaks its own rules.
    """
    data = _plain(obj) if dataclasses.is_dataclass(obj) else obj
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def digest(obj: Any) -> str:
    """SHA-256 of `to_json`, in hexadecimal."""
    return hashlib.sha256(to_json(obj)).hexdigest()


@functools.cache
def _holder(cls: Any) -> tuple[Any, pydantic.TypeAdapter[Any]]:
    """A dataclass with one field of the class, and its adapter."""
    # A dataclass cannot be given a pydantic config from outside, but inherits that of the dataclass that holds it.
    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants")
    holder = pydantic.with_config(config)(dataclasses.make_dataclass("holder", [("value", cls)]))
    return holder, pydantic.TypeAdapter(holder)


def _validate(cls: type[T], data: Any, where: str) -> T:
    kind: Any = cls  # mypy does not take a type variable's class for hashable
    try:
        # strict rules for JSON input: a list may become a tuple, 1 may become 1.0; "1" stays text, true is no number
        value: T = _holder(kind)[1].validate_json(json.dumps({"value": data})).value
    except TypeError as error:  # a TOML date or time
        raise ConfigError(f"{where}: {error}; write it as text") from None
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(cls, data, where, error)) from None
    return value


def _plain(obj: Any) -> dict[str, Any]:
    """The object as JSON values, normalised: 1 in a float field becomes 1.0, so that equal objects look equal."""
    kind: Any = type(obj)
    holder, adapter = _holder(kind)
    once = adapter.dump_json(holder(obj), warnings=False)
    try:
        again = adapter.validate_json(once)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(type(obj), json.loads(once)["value"], type(obj).__name__, error)) from None
    plain: dict[str, Any] = adapter.dump_python(again, mode="json")["value"]
    return plain


def _merge(base: Any, data: Any) -> Any:
    """`data` over `base`, field by field through nested dataclasses; other values are replaced whole."""
    if not dataclasses.is_dataclass(base) or not isinstance(data, dict):
        return data
    merged = _plain(base)
    for key, value in data.items():
        merged[key] = _merge(getattr(base, key, None), value)
    return merged


def _fields(cls: Any) -> dict[str, Any]:
    """Names and types of a dataclass's fields; nothing for other types."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _inner(hint: Any) -> Any:
    """The dataclass in `X | None`, or the hint itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return next((option for option in get_args(hint) if dataclasses.is_dataclass(option)), hint)
    return hint


def _takes_none_word(hint: Any) -> bool:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    return types.NoneType in options and str not in options


def _element(hint: Any) -> Any:
    """The type of the values of a dict or of the elements of a list or tuple."""
    arguments = [argument for argument in get_args(hint) if argument is not ...]
    return _inner(arguments[-1]) if arguments else None


def _read_none(hint: Any, value: Any) -> Any:
    """Replace the word "none" by None where `hint` allows it, at every level."""
    if isinstance(value, list):
        return [_read_none(_element(hint), element) for element in value]
    if isinstance(value, dict):
        fields, other = _fields(_inner(hint)), _element(hint)
        return {name: _read_none(fields.get(name, other), element) for name, element in value.items()}
    return None if value == "none" and _takes_none_word(hint) else value


def _write_none(hint: Any, value: Any) -> Any:
    """Leave out None where it is the default and write the word "none" elsewhere, at every level."""
    if isinstance(value, list):
        return [_write_none(_element(hint), element) for element in value]
    if not isinstance(value, dict):
        return value
    cls = _inner(hint)
    fields, other = _fields(cls), _element(hint)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)} if fields else {}
    result = {}
    for name, element in value.items():
        if element is not None:
            result[name] = _write_none(fields.get(name, other), element)
        elif defaults.get(name) is not None:
            if not _takes_none_word(fields[name]):
                raise ValueError(f"{name}: None is not the default and TOML cannot hold it; give the field another one")
            result[name] = "none"
    return result


def _explain(cls: type[Any], data: Any, where: str, error: pydantic.ValidationError) -> str:
    """One line about the first error: file: field path: rule, value."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] in unknown), errors[0])  # a typo may be why another is missing
    absent = first["type"] in unknown or "missing" in first["type"]
    path: list[str] = []
    level, hint = data, cls
    location = first["loc"][1:]  # without the holder's "value"
    for index, part in enumerate(location):
        inside = part in level if isinstance(level, dict) else isinstance(level, list) and isinstance(part, int)
        if inside:
            level = level[part]
        elif not (absent and index == len(location) - 1):
            continue  # the name of a union's branch, not a key of the file
        path.append(str(part))
        if index < len(location) - 1:
            hint = _inner(_fields(hint)[str(part)] if part in _fields(hint) else _element(hint))
    message, value = first["msg"], _short(first["input"])
    if first["type"] in unknown:
        near = difflib.get_close_matches(path[-1], _fields(hint), n=1)
        known = f"; known: {', '.join(_fields(hint))}" if _fields(hint) else ""
        message = "unknown key" + (f"; did you mean {near[0]!r}?" if near else known)
    elif "missing" in first["type"]:
        message = "is required and missing"
    elif first["type"] == "value_error":  # our own rules: "field: rule, got value; what to do"
        name, _, rule = message.removeprefix("Value error, ").partition(": ")
        path.append(name)
        message = rule
    else:
        message = f"{message}, got {value}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(f"{where}: {'.'.join(path) or 'top level'}: {message}{more}".split())


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
