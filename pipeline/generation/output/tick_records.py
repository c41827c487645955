"""What a tick was begun with: `<output>/_ticks/<tick>.json`, created once, before the first shard.

Whoever goes on with the tick takes the model from here, by version: an alias is looked up once per tick, and may move
between two attempts. The record also keeps the settings, so that a tick cannot end as two halves of two configurations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config_io import flat, read_record, to_json
from pipeline.errors import ConfigError, ObjectMissingError, OutputExistsError
from pipeline.generation.spec.sampling_plan import SamplingSpec
from pipeline.stores.object_store import ObjectInfo, ObjectStore

TICK_FOLDER = "_ticks/"
PREFIX_DIGITS = 16
"""Digits of a spec's digest that name its prefix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TickRecord:
    """The content of `_ticks/<tick>.json`."""

    format_version: int = 2
    """Version of this record."""
    tick: str
    """Which tick, in its normal form."""
    asked_model: str
    """The model as it was asked for, such as models:/name@champion."""
    model_uri: str
    """What that was when the tick began: models:/name/3; spec.model_digest says which bytes."""
    asked_guide_model: str | None
    """The weaker model as it was asked for; None: there is none."""
    guide_uri: str | None
    """What that was when the tick began."""
    seed: int
    """Seed of the series; spec.seed is the tick's own."""
    spec: SamplingSpec
    """All that decides the images."""
    spec_digest: str
    """Digest of the spec."""
    prefix: str
    """Folder of the images, below the output."""
    removal_begun: bool = False
    """Whether what the tick made is being removed: by then its manifest may be gone, and nothing is made any more."""

    def __post_init__(self) -> None:
        """Refuse a record that was altered: its prefix is what would be deleted."""
        digest = self.spec.digest
        if (self.spec_digest, self.prefix, self.spec.tick) != (digest, digest[:PREFIX_DIGITS], self.tick):
            raise ValueError(f"prefix: does not follow from the record's spec, got {self.prefix!r}; do not edit it")

    def refuse_others(self, *, model: str, guide_model: str | None, seed: int, where: str) -> None:
        """Refuse an attempt that asks for another model or series, or for a tick that is on its way out.

        Raises:
            OutputExistsError: If what it made is being removed.
            ConfigError: If the attempt asks for something else; names the field.
        """
        if self.removal_begun:
            raise OutputExistsError(
                f"tick: {where} is being removed (keep_last); a later tick with keep_last removes the rest, then this "
                "one can be made again"
            )
        asked = {"model": model, "guide_model": guide_model, "seed": seed}
        allowed: dict[str, set[Any]] = {
            "model": {self.asked_model, self.model_uri},
            "guide_model": {self.asked_guide_model, self.guide_uri} if self.guide_uri else {None},
            "seed": {self.seed},
        }
        begun = {"model": self.asked_model, "guide_model": self.asked_guide_model, "seed": self.seed}
        for name, value in asked.items():
            if value not in allowed[name]:
                raise _other_setting(name, where, begun[name], value)

    def refuse_other_spec(self, spec: SamplingSpec, where: str) -> None:
        """Refuse an attempt whose images would be others.

        Raises:
            ConfigError: If a field differs; names the first one.
        """
        begun, asked = (flat(one) for one in (self.spec, spec))
        # The name of a variant first: it is why its options differ.
        for name in sorted(begun.keys() | asked.keys(), key=lambda name: (not name.endswith(".name"), name)):
            if begun.get(name) != asked.get(name):
                raise _other_setting(name, where, begun.get(name), asked.get(name))


def tick_key(tick: str) -> str:
    """Key of a tick's record in the output."""
    return f"{TICK_FOLDER}{tick}.json"


def read_tick(output: ObjectStore, tick: str) -> TickRecord | None:
    """The record of a tick; None: nobody has begun it.

    Raises:
        ConfigError: If it is damaged, or that of another tick.
        FormatVersionError: If it is of another version.
        StorageError: If the store fails.
    """
    try:
        data = output.read(tick_key(tick))
    except ObjectMissingError:
        return None
    return parse_tick(output, tick, data)


def parse_tick(output: ObjectStore, tick: str, data: bytes) -> TickRecord:
    """The bytes of a tick's record; errors as `read_tick`."""
    where = f"{output.uri}/{tick_key(tick)}"
    record = read_record(TickRecord, data, where, remedy="finish the tick with the program that began it")
    if record.tick != tick:
        raise ConfigError(f"{where}: is the record of tick {record.tick}; bring back the right one from a copy")
    return record


def create_tick(output: ObjectStore, record: TickRecord) -> bool:
    """Begin a tick; False: another driver was first, and its record stands.

    Raises:
        StorageError: If the store fails.
    """
    return output.create(tick_key(record.tick), to_json(record))


def list_ticks(output: ObjectStore) -> Iterator[tuple[str, ObjectInfo]]:
    """The ticks that have a record, the earliest first, each with what the listing says of its record."""
    for info in output.list(TICK_FOLDER):
        tick = info.key.removeprefix(TICK_FOLDER).removesuffix(".json")
        if info.key == tick_key(tick):
            yield tick, info


def _other_setting(name: str, where: str, begun: Any, asked: Any) -> ConfigError:
    return ConfigError(
        f"{name}: {where} was begun with {begun!r}, got {asked!r}; a tick keeps its settings: give the same, or name "
        "another tick or output"
    )
