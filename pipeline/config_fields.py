"""What the annotations of config and record dataclasses say of JSON values: fields, variants, elements, pins.

A *variant field* is annotated with a union of two or more dataclasses, and perhaps None, each of which has a field
`name: Literal["x"] = "x"`. The union is the only list of them: a class that is added to it is known everywhere. A value
of such a field is chosen by its `name`. Nothing here reads, writes or checks values.
"""

import dataclasses
import functools
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ddpm.added_field import PIN

NAME = "name"
"""The field that says which variant a value is."""


def variants_of(hint: Any) -> dict[str, type]:
    """The variants that an annotation allows, by name and in its order; empty if it is not of a variant field.

    Raises:
        ValueError: If two of them have the same name.
    """
    return dict(_variants(hint))


def shared_fields(old: type, new: type) -> list[str]:
    """Names of the options that two variants share; the variant's own name is none."""
    return [name for name in fields_of(new) if name in fields_of(old) and name != NAME]


def fields_of(cls: Any) -> dict[str, Any]:
    """Names and types of a dataclass's fields; empty for other types."""
    return _fields_of(cls)


@functools.cache
def _fields_of(cls: Any) -> dict[str, Any]:
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        return {}
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def default_of(cls: Any, name: str) -> Any:
    """What a field of a dataclass is where nothing is given; dataclasses.MISSING if it must be given."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def pins_of(cls: Any) -> dict[str, Any]:
    """The pins of a dataclass's added fields, see ddpm/added_field.py; empty for other types."""
    if not fields_of(cls):
        return {}
    return {field.name: field.metadata[PIN] for field in dataclasses.fields(cls) if PIN in field.metadata}


def takes_none(hint: Any) -> bool:
    """Whether None is a value of this type."""
    return types.NoneType in _options(hint)


def takes_none_word(hint: Any) -> bool:
    """Whether the word "none" stands for None in TOML: where None may be and text may not."""
    return takes_none(hint) and str not in _options(hint)


def resolve(hint: Any, value: Any) -> Any:
    """The option of an annotation that a JSON value belongs to: the chosen variant, the dataclass, the dict or list.

    Returns:
        The annotation itself where it leaves no choice, or where the value fits none of the options.
    """
    variants = _variants(hint)
    if variants:
        name = value.get(NAME) if isinstance(value, dict) else None
        return variants.get(name, hint) if isinstance(name, str) else hint
    for option in _options(hint):
        if isinstance(value, dict) and (fields_of(option) or get_origin(option) is dict):
            return option
        if isinstance(value, list) and get_origin(option) in (list, tuple):
            return option
    return hint


def inside(hint: Any, value: Any) -> Iterator[tuple[str | int, Any, Any]]:
    """The JSON values directly in a JSON value: key or index, type (None if there is none), value."""
    option = resolve(hint, value)
    if isinstance(value, list):
        for index, element in enumerate(value):
            yield index, element_of(option, index), element
    elif isinstance(value, dict):
        fields = fields_of(option)
        for key, element in value.items():
            yield key, fields.get(key) if fields else element_of(option, key), element


def element_of(hint: Any, key: str | int) -> Any:
    """The type of an element of a list, a tuple or a dict; None for other types."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple and ... not in arguments:
        return arguments[key] if isinstance(key, int) and key < len(arguments) else None
    if get_origin(hint) in (list, tuple):
        return arguments[0]
    return arguments[-1] if get_origin(hint) is dict else None


def walk(hint: Any, value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Path, type and value of a JSON value and of all inside it, where a variant, a pin or a version can be."""
    if not is_special(hint):
        return
    yield path, hint, value
    for key, element_hint, element in inside(hint, value):
        yield from walk(element_hint, element, (*path, str(key)))


@functools.cache
def is_special(hint: Any) -> bool:
    """Whether a variant, a pin or a version can be somewhere in a value; long lists of plain records are not walked."""
    seen: set[Any] = set()
    waiting = [hint]
    while waiting:
        option = waiting.pop()
        if option in seen or get_origin(option) is Literal:
            continue
        seen.add(option)
        if _variants(option) or pins_of(option) or "format_version" in fields_of(option):
            return True
        waiting += [*get_args(option), *fields_of(option).values()]
    return False


def _options(hint: Any) -> tuple[Any, ...]:
    """The options of a union; one for other types."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(option for one in get_args(hint) for option in _options(one))
    return (hint,)


@functools.cache
def _variants(hint: Any) -> dict[str, type]:
    classes = [option for option in _options(hint) if option is not types.NoneType]
    names = [_variant_name(cls) for cls in classes]
    if len(classes) < 2 or None in names:
        return {}
    if len(set(names)) < len(names):
        raise ValueError(f"name: each variant has its own, got {', '.join(map(str, names))}; rename one")
    return {str(name): cls for name, cls in zip(names, classes, strict=True)}


def _variant_name(cls: Any) -> str | None:
    """The one name that a variant can have; None if the class is no variant."""
    hint = fields_of(cls).get(NAME)
    names = get_args(hint) if get_origin(hint) is Literal else ()
    return names[0] if len(names) == 1 and isinstance(names[0], str) and default_of(cls, NAME) == names[0] else None
