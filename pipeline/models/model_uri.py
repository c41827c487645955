"""What models are called: names that a registry takes, and the URIs that jobs are given.

models:/name@alias          the version that an alias stands for
models:/name/3              a version
folder, s3://bucket/folder  a checkpoint
...?ema=20000               any of these, in the checkpoint's further average with a half-life of 20,000 images
"""

import re
from dataclasses import dataclass

from pipeline.errors import ConfigError, ModelMissingError
from pipeline.stores.storage import fault_of, open_store

_KINDS = "models:/name@alias, models:/name/3 or a checkpoint's folder"
_AVERAGE = re.compile(r"(?P<uri>.+)\?ema=(?P<halflife_images>[^/]*)")
_HALFLIFE = re.compile(r"[1-9][0-9]*")
_REGISTERED = re.compile(r"models:/(?P<name>[^/@:'?]+)(?:/(?P<version>[1-9][0-9]*)|@(?P<alias>[^/@:'?]+))")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_ALIAS = re.compile(r"(?!v[0-9]+$|latest$)[A-Za-z0-9_-]+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredUri:
    """A version of a registered model, by number or by alias."""

    text: str
    """The URI as it was given."""
    name: str
    """Name in the registry."""
    version: str | None
    """Version number, in digits; None where there is an alias."""
    alias: str | None
    """Alias; None where there is a version."""


def split_average(uri: str) -> tuple[str, int | None]:
    """A URI without its ?ema=, and the half-life in images that stood there; None where there was none.

    Raises:
        ModelMissingError: If what stands there is no half-life.
    """
    match = _AVERAGE.fullmatch(uri)
    if match is None:
        return uri, None
    if not _HALFLIFE.fullmatch(match["halflife_images"]):
        raise ModelMissingError(
            f"{uri}: ?ema=: a whole number of images above 0, got {match['halflife_images']!r}; give one, such as "
            "?ema=20000, or leave it out"
        )
    return match["uri"], int(match["halflife_images"])


def parse_registered(uri: str) -> RegisteredUri | None:
    """A registry's URI in parts; None for a checkpoint's.

    Raises:
        ModelMissingError: If it starts as a registry's URI and is none.
    """
    if not uri.startswith("models:"):
        return None
    match = _REGISTERED.fullmatch(uri)
    if match is None:
        raise ModelMissingError(f"{uri}: is no model URI; give {_KINDS}, with nothing but ?ema=HALFLIFE behind it")
    return RegisteredUri(text=uri, name=match["name"], version=match["version"], alias=match["alias"])


def absolute_model_uri(uri: str) -> str:
    """A model's URI for processes that run in another folder: a relative path of a checkpoint becomes absolute.

    Raises:
        ModelMissingError: If it is none.
    """
    place, halflife_images = split_average(uri)
    if parse_registered(place) is not None:
        return uri
    return open_store(place).uri + ("" if halflife_images is None else f"?ema={halflife_images}")


def check_model_uris(config: object, *fields: str) -> None:
    """Refuse, before anything is looked up, what no registry and no store could open.

    Args:
        config: The object.
        fields: Names of fields that hold a model's URI, or None.

    Raises:
        ValueError: Names the field, the value and what to write.
    """
    for name in fields:
        uri = getattr(config, name)
        if uri is None:
            continue
        if not uri:
            raise ValueError(f"{name}: must not be empty, got {uri!r}; give {_KINDS}")
        try:
            place, _ = split_average(uri)
            is_registered = parse_registered(place) is not None
        except ModelMissingError as error:
            raise ValueError(f"{name}: {error}") from None
        if not is_registered and fault_of(place) is not None:
            raise ValueError(f"{name}: is no model URI, got {uri!r}; give {_KINDS}")


def check_model_name(name: str, alias: str | None = None) -> None:
    """Refuse, before hours of training, a name or alias that could not be registered in the end.

    Raises:
        ConfigError: If name or alias is none that MLflow takes.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"model name: must be letters, digits, '_', '-' and '.', got {name!r}")
    if alias is not None and not _ALIAS.fullmatch(alias):
        raise ConfigError(f"alias: must be letters, digits, '_' and '-', not 'latest' or 'v1', got {alias!r}")
