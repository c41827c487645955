"""Flags that choose a variant, such as `--sampler.name heun`: they are read first, as `--preset` is.

The chosen variant then stands in the configuration that all other flags change, so that its options are flags like any
other. Options that it shares with the variant before it stay; its own start at their defaults, and those without one
must be given.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from pipeline.config_fields import default_of, fields_of, shared_fields, variants_of
from pipeline.errors import ConfigError

C = TypeVar("C")


def take_variants(config: C, flags: Sequence[str]) -> tuple[C, list[str]]:
    """The configuration with the variants that flags choose, and the flags that are left.

    The result is a start for the parser of flags, not checked: rules between a variant and other fields hold only once
    all flags are read, and options that must be given are marked as missing.

    Raises:
        ConfigError: If a flag names no variant of its field.
    """
    chosen: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(flags)
    names = {f"--{_flag(path)}.name": path for path, _, _ in variant_fields(config)}
    while waiting:
        flag, given, value = waiting.pop(0).partition("=")
        path = names.get(_dashed(flag))
        if path is None:
            rest.append(flag + given + value)
        elif not given and not waiting:
            raise ConfigError(f"{flag}: needs a name (--help lists every flag)")
        else:
            chosen[path] = value if given else waiting.pop(0)
    for path, options, value in list(variant_fields(config)):
        if path in chosen:
            config = replaced(config, path.split("."), _start(path, options, value, chosen[path]))
    _refuse_options_of_others(config, rest)
    return config, rest


def _refuse_options_of_others(config: object, flags: Sequence[str]) -> None:
    for path, options, value in variant_fields(config):
        for flag in flags:
            prefix, _, option = _dashed(flag.partition("=")[0]).rpartition(".")
            field = option.replace("-", "_")
            owners = [name for name, kind in options.items() if field in fields_of(kind)]
            if prefix == f"--{_flag(path)}" and owners and field not in fields_of(type(value)):
                raise ConfigError(
                    f"{path}.{field}: is an option of {' and '.join(owners)}, got it with {value.name}; leave it out, "
                    f"or choose --{_flag(path)}.name {owners[0]}"
                )


def describe_variants(config: object) -> str:
    """What --help says of the fields that have variants."""
    blocks = []
    for path, options, value in variant_fields(config):
        width = max(map(len, options))
        lines = [f"    {name:<{width}}  {_first_line(option)}" for name, option in options.items()]
        blocks.append("\n".join([f"  --{_flag(path)}.name NAME   (now {value.name}, whose options are below)", *lines]))
    return "\n\nRead before all others, since each has options of its own:\n" + "\n".join(blocks) if blocks else ""


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def variant_fields(config: Any, path: str = "") -> Iterator[tuple[str, dict[str, type], Any]]:
    """Path, variants by name and present value of every field of a configuration that has variants."""
    cls: Any = type(config)
    for name, hint in fields_of(cls).items():
        value, here = getattr(config, name), f"{path}{name}"
        variants = variants_of(hint)
        if variants and value is not None:
            yield here, variants, value
        elif dataclasses.is_dataclass(value):
            yield from variant_fields(value, f"{here}.")


def _start(path: str, options: dict[str, type], old: Any, name: str) -> Any:
    if name not in options:
        near = difflib.get_close_matches(name, options, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; choose one of them"
        raise ConfigError(f"{path}.name: must be one of {', '.join(options)}, got {name!r}{hint}")
    new = options[name]
    if type(old) is new:
        return old
    kept = {field: getattr(old, field) for field in shared_fields(type(old), new)}
    values = {field: kept.get(field, default_of(new, field)) for field in fields_of(new)}
    return _unchecked(new, {f: tyro.MISSING if v is dataclasses.MISSING else v for f, v in values.items()})


def replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    """A copy with another value at a path, not checked: see take_variants."""
    cls: Any = type(config)
    values = {field: getattr(config, field) for field in fields_of(cls)}
    values[path[0]] = value if len(path) == 1 else replaced(values[path[0]], path[1:], value)
    return _unchecked(cls, values)


def _unchecked(cls: type, values: dict[str, Any]) -> Any:
    made: Any = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _flag(path: str) -> str:
    return path.replace("_", "-")


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")
