"""What is wrong with a config file or a record, in one line: file, path of the field, rule, value.

pydantic reports an error for each option of a union; of variants only those of the chosen one are told.
"""

import difflib
import json
from collections.abc import Sequence
from typing import Any, cast

import pydantic

from pipeline.config_fields import NAME, element_of, fields_of, resolve, takes_none, variants_of, walk
from pipeline.errors import ConfigError
from pipeline.redact import redact

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def check_names(hint: Any, value: Any, where: str) -> None:
    """Refuse variants without a name, or with one that no class has.

    Args:
        hint: The type of the value.
        value: JSON values.
        where: The file's name or the object's URI, for messages.

    Raises:
        ConfigError: At the first of them.
    """
    for path, kind, found in walk(hint, value):
        variants = variants_of(kind)
        if not variants or (found is None and takes_none(kind)):
            continue
        known = ", ".join(variants)
        place = f"{where}: {'.'.join(path)}"
        if not isinstance(found, dict):
            guess = f"; did you mean {path[-1]}.{NAME} = {found!r}?" if found in list(variants) else ""
            raise ConfigError(f"{place}: must have a name, one of {known}, got {short(found)}{guess}")
        if NAME not in found:
            raise ConfigError(f"{place}.{NAME}: is required and missing; one of {known}")
        name = found[NAME]
        if not isinstance(name, str) or name not in variants:
            got = repr(name) if isinstance(name, str) else short(name)
            near = difflib.get_close_matches(str(name), variants, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{place}.{NAME}: must be one of {known}, got {got}{guess}")


def explain(cls: type[Any], data: Any, where: str, error: pydantic.ValidationError) -> str:
    """One line about the first error.

    Args:
        cls: The dataclass that was to be read.
        data: The JSON values that it was to be read from, as the only field `value` of a holder.
        where: The file's name or the object's URI.
        error: What pydantic found.
    """
    located = [(one, _locate(cls, data, one)) for one in error.errors(include_url=False)]
    errors = [(one, place) for one, place in located if place.is_chosen] or located
    # a typo may be why another field is missing
    first, place = next((pair for pair in errors if pair[0]["type"] in _UNKNOWN), errors[0])
    path = list(place.path)
    if first["type"] in _UNKNOWN:
        near = difflib.get_close_matches(path[-1], place.known, n=1)
        known = f"; known: {', '.join(place.known)}" if place.known else ""
        message = f"unknown key{place.of_variant}" + (f"; did you mean {near[0]!r}?" if near else known)
    elif "missing" in first["type"]:
        message = "is required and missing"
    elif first["type"] == "value_error":  # our own rules: "field: rule, got value; what to do"
        name, _, rule = first["msg"].removeprefix("Value error, ").partition(": ")
        path.append(name)
        message = rule
    else:
        message = f"{first['msg']}, got {short(first['input'])}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(f"{where}: {'.'.join(path) or 'top level'}: {message}{more}".split())


def short(value: Any) -> str:
    """A JSON value for a message, cut where it is long."""
    text = redact(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "..."


class _Place:
    """Where an error is: its path in the file, the fields known there, and whether it is the chosen variant's."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.known: Sequence[str] = ()
        self.of_variant = ""
        self.is_chosen = True


def _locate(cls: type[Any], data: Any, error: Any) -> _Place:
    place = _Place()
    absent = error["type"] in _UNKNOWN or "missing" in error["type"]
    level, hint = data, cast(Any, cls)
    location = error["loc"][1:]  # without the holder's "value"
    for index, part in enumerate(location):
        option = resolve(hint, level)
        if variants_of(hint):  # the name of a variant's class comes next, not a key of the file
            place.is_chosen = place.is_chosen and part == getattr(option, "__name__", None)
            hint, place.of_variant = option, f" of {level[NAME]!r}" if option is not hint else ""
            continue
        is_last = index == len(location) - 1
        is_inside = part in level if isinstance(level, dict) else isinstance(level, list) and isinstance(part, int)
        if not is_inside and not (absent and is_last):
            continue  # the name of another union's option
        place.path.append(str(part))
        place.known = tuple(fields_of(option))
        if not is_last:
            hint = fields_of(option).get(part) if fields_of(option) else element_of(option, part)
            level, place.of_variant = level[part] if is_inside else None, ""
    return place
