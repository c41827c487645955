"""The shards of a split as columns: a million of them are three arrays of 48 MB together, and no million objects."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]

SHA256_BYTES = 32
_KEY = re.compile(r"(?P<prefix>(?:[^/]+/)*)\d{9}-(?P<digits>[0-9a-f]{1,64})\.(?P<suffix>\w+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard: enough to verify it before use."""

    key: str
    """Key in the dataset's store."""
    size_bytes: int
    """Size of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar, 64 hexadecimal digits."""
    num_samples: int
    """Samples in the tar; 0 in a generation run where all images of a shard were taken down, never in a dataset."""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError(f"sha256: must be 64 hexadecimal digits, got {self.sha256!r}; the manifest is damaged")
        if self.num_samples < 0 or self.size_bytes < 1:
            raise ValueError(
                f"num_samples: must be at least 0, and size_bytes 1, got {self.num_samples} and {self.size_bytes} in "
                f"{self.key!r}; the manifest is damaged"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRule:
    """How keys follow from numbers and digests: <prefix><number, 9 digits>-<first hex digits of sha256>.<suffix>."""

    prefix: str
    """What the keys begin with, such as "train/"."""
    num_digits: int
    """Digits of the sha256 in a key, 1 to 64."""
    suffix: str
    """What they end with, such as "tar"."""

    def key(self, number: int, sha256: str) -> str:
        """The key of one shard.

        Args:
            number: Its number, from 0.
            sha256: Its digest, 64 hexadecimal digits.
        """
        return f"{self.prefix}{number:09d}-{sha256[: self.num_digits]}.{self.suffix}"


class ShardTable(Sequence[ShardRecord]):
    """Shards with consecutive numbers; a record is made when it is asked for, a slice gives a tuple of them."""

    __slots__ = ("first_number", "keys", "num_samples", "sha256", "size_bytes")

    def __init__(
        self,
        *,
        sha256: UInt8Array,
        size_bytes: Int64Array,
        num_samples: Int64Array,
        keys: KeyRule | tuple[str, ...],
        first_number: int = 0,
    ) -> None:
        """Take the columns as they are; nobody may change them afterwards.

        Args:
            sha256: Digests, uint8 [N, 32].
            size_bytes: Sizes in bytes, int64 [N].
            num_samples: Samples in each, int64 [N].
            keys: How the keys follow from numbers and digests; or the keys, N of them.
            first_number: Number of the first shard.

        Raises:
            ValueError: If a number is impossible.
        """
        self.sha256, self.size_bytes, self.num_samples = sha256, size_bytes, num_samples
        self.keys, self.first_number = keys, first_number
        assert sha256.shape == (len(self), SHA256_BYTES) and num_samples.shape == size_bytes.shape
        assert isinstance(keys, KeyRule) or len(keys) == len(self)
        impossible = np.flatnonzero((num_samples < 0) | (size_bytes < 1))
        if impossible.size:
            at = int(impossible[0])
            raise ValueError(
                f"num_samples: must be at least 0, and size_bytes 1, got {num_samples[at]} and {size_bytes[at]} in "
                f"{self._key(at)!r}; the manifest is damaged"
            )

    @classmethod
    def of(cls, shards: Sequence[ShardRecord], first_number: int = 0) -> "ShardTable":
        """A table of any shards, numbered from `first_number`; one that is such a table already is given back."""
        if isinstance(shards, ShardTable) and shards.first_number == first_number:
            return shards
        digests = bytes.fromhex("".join(shard.sha256 for shard in shards))
        return cls(
            sha256=np.frombuffer(digests, np.uint8).reshape(-1, SHA256_BYTES),
            size_bytes=np.fromiter((shard.size_bytes for shard in shards), np.int64, len(shards)),
            num_samples=np.fromiter((shard.num_samples for shard in shards), np.int64, len(shards)),
            keys=_rule_of(shards, first_number) or tuple(shard.key for shard in shards),
            first_number=first_number,
        )

    @classmethod
    def joined(cls, tables: Sequence["ShardTable"]) -> "ShardTable":
        """Tables one after the other; the numbers begin with those of the first."""
        if not tables:
            return cls.of(())
        first = tables[0].keys
        one_rule = isinstance(first, KeyRule) and all(table.keys == first for table in tables)
        return cls(
            sha256=np.concatenate([table.sha256 for table in tables]),
            size_bytes=np.concatenate([table.size_bytes for table in tables]),
            num_samples=np.concatenate([table.num_samples for table in tables]),
            keys=first if one_rule else tuple(shard.key for table in tables for shard in table),
            first_number=tables[0].first_number,
        )

    def rows(self, begin: int, end: int) -> "ShardTable":
        """The shards [begin, end) as a table; no column is copied."""
        return ShardTable(
            sha256=self.sha256[begin:end],
            size_bytes=self.size_bytes[begin:end],
            num_samples=self.num_samples[begin:end],
            keys=self.keys if isinstance(self.keys, KeyRule) else self.keys[begin:end],
            first_number=self.first_number + begin,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of all sha256 (32 bytes each), then all size_bytes, then all num_samples (int64, little-endian)."""
        sha256 = hashlib.sha256(np.ascontiguousarray(self.sha256).data)
        for column in (self.size_bytes, self.num_samples):
            sha256.update(np.ascontiguousarray(column, dtype="<i8").data)
        return sha256.hexdigest()

    def __len__(self) -> int:
        return len(self.size_bytes)

    @overload
    def __getitem__(self, at: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[ShardRecord, ...]: ...
    def __getitem__(self, at: int | slice) -> ShardRecord | tuple[ShardRecord, ...]:
        if isinstance(at, slice):
            return tuple(self[number] for number in range(len(self))[at])
        at = range(len(self))[at]  # an IndexError beyond the ends; from the end where it is negative
        return ShardRecord(
            key=self._key(at),
            size_bytes=int(self.size_bytes[at]),
            sha256=self.sha256[at].tobytes().hex(),
            num_samples=int(self.num_samples[at]),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        return (
            (self.keys, self.first_number) == (other.keys, other.first_number)
            and np.array_equal(self.sha256, other.sha256)
            and np.array_equal(self.size_bytes, other.size_bytes)
            and np.array_equal(self.num_samples, other.num_samples)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ShardTable({len(self)} shards, {int(self.num_samples.sum())} samples)"

    def _key(self, at: int) -> str:
        if isinstance(self.keys, KeyRule):
            return self.keys.key(self.first_number + at, self.sha256[at].tobytes().hex())
        return self.keys[at]


def _rule_of(shards: Iterable[ShardRecord], first_number: int) -> KeyRule | None:
    """The rule that all keys follow; None if there is none."""
    rule: KeyRule | None = None
    for number, shard in enumerate(shards, first_number):
        if rule is None:
            match = _KEY.fullmatch(shard.key)
            if match is None:
                return None
            rule = KeyRule(prefix=match["prefix"], num_digits=len(match["digits"]), suffix=match["suffix"])
        if shard.key != rule.key(number, shard.sha256):
            return None
    return rule
