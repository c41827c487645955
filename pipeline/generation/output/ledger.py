"""What a generation run has cost so far, summed over its attempts: `ledger.json`, no part of the manifest.

An attempt is a driver that had something made. It adds its share when it ends, also when it fails or is interrupted
(SIGTERM, Ctrl-C: then for some seconds only, since whoever interrupts does not wait). Drivers that end at once all
count: the record is replaced by If-Match.

What an attempt cost whose driver was killed (SIGKILL, power) is not in it: nobody was left to say so. The commit
records give a lower bound: the sum of their `made.wall_s`.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline import config_io
from pipeline.errors import ObjectMissingError
from pipeline.stores.object_store import ObjectStore

LEDGER_KEY = "ledger.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCost:
    """What was spent on one kind of device, and what came of it."""

    device_s: float
    """Time that GPUs were held, or where none were used CPUs, all together, seconds."""
    busy_s: float
    """Time of all actors from their first shard given to their last one made, seconds."""
    num_images: int
    """Images made, also those of shards that another driver had committed first."""
    num_evaluations: int
    """Those times the network evaluations of each (img·NFE)."""
    num_bytes: int
    """Of their output shards, bytes."""

    @property
    def evaluations_per_actor_s(self) -> float:
        """The rate of one actor, img·NFE/s; 0 where nothing was made."""
        return self.num_evaluations / self.busy_s if self.busy_s else 0.0

    def plus(self, other: "DeviceCost") -> "DeviceCost":
        """Both together."""
        return DeviceCost(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """The content of `ledger.json`: the attempts of a run, added up."""

    format_version: int = 2
    """Version of this record."""
    num_attempts: int = 1
    """Drivers that had something made and lived to say so."""
    num_broken: int = 0
    """Those of them that failed or were interrupted."""
    making_s: float
    """Of each attempt the time from the first shard given to an actor to the last one made, summed, seconds."""
    images_per_s: float
    """Images made in a second of that, by all actors together; 0 where nothing was made."""
    evaluations_per_s: float
    """The same in img·NFE/s."""
    num_retries: int
    """Failures that were held against a shard."""
    num_lost: int
    """Actors that were lost with their nodes, or did not answer."""
    devices: Mapping[str, DeviceCost]
    """By kind of device; "unknown": of actors that made nothing."""
    last_attempt: str = field(default_factory=lambda: secrets.token_hex(16))
    """A random name of the attempt that was added last: no two writers write the same bytes, so that a store whose
    answer was lost can tell whose they are."""

    @property
    def device_s(self) -> float:
        """Time that devices were held, of all kinds, seconds."""
        return sum(one.device_s for one in self.devices.values())

    @property
    def num_images(self) -> int:
        """Images made."""
        return sum(one.num_images for one in self.devices.values())

    @property
    def num_bytes(self) -> int:
        """Of their output shards, bytes."""
        return sum(one.num_bytes for one in self.devices.values())

    @classmethod
    def of(cls, devices: Mapping[str, DeviceCost], making_s: float, **others: Any) -> "Ledger":
        """With the rates that follow from devices and time; `others` are the other fields."""
        images, evaluations = (
            sum(getattr(one, name) for one in devices.values()) for name in ("num_images", "num_evaluations")
        )
        return cls(
            devices=devices,
            making_s=making_s,
            images_per_s=images / making_s if making_s else 0.0,
            evaluations_per_s=evaluations / making_s if making_s else 0.0,
            **others,
        )

    def plus(self, attempt: "Ledger") -> "Ledger":
        """This and an attempt that came after it."""
        devices = dict(self.devices)
        for kind, cost in attempt.devices.items():
            devices[kind] = devices[kind].plus(cost) if kind in devices else cost
        counts = ("num_attempts", "num_broken", "num_retries", "num_lost")
        return Ledger.of(
            devices,
            self.making_s + attempt.making_s,
            last_attempt=attempt.last_attempt,
            **{name: getattr(self, name) + getattr(attempt, name) for name in counts},
        )


def add_attempt(store: ObjectStore, attempt: Ledger) -> Ledger:
    """Add what an attempt has cost; several drivers may do so at once.

    Args:
        store: The output prefix.
        attempt: Its share.

    Returns:
        The whole, as it stands now.

    Raises:
        ConfigError, FormatVersionError: If the ledger there is damaged, or of another version; it is left as it is.
        StorageError: If the store fails.
    """
    while True:
        try:
            found = store.read_versioned(LEDGER_KEY)
        except ObjectMissingError:
            if store.create(LEDGER_KEY, config_io.to_json(attempt)):
                return attempt
            continue
        total = _parse(store, found.data).plus(attempt)
        if store.replace(LEDGER_KEY, config_io.to_json(total), found.etag) is not None:
            return total


def read_ledger(store: ObjectStore) -> Ledger | None:
    """The ledger of an output prefix; None: no attempt has ended there.

    Raises:
        ConfigError, FormatVersionError, StorageError: As `add_attempt`.
    """
    try:
        return _parse(store, store.read(LEDGER_KEY))
    except ObjectMissingError:
        return None


def _parse(store: ObjectStore, data: bytes) -> Ledger:
    where = f"{store.uri}/{LEDGER_KEY}"
    return config_io.read_record(Ledger, data, where, remedy="move it away, and a new one is begun")
