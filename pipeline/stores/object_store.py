"""The contract of an object store. Implementations: pipeline/stores/local_store.py, pipeline/stores/s3_store.py.

Conventions:
    A key is a relative "/"-separated path; "..", ".", empty parts, a leading "/" and NUL are refused with ValueError.
    Readers see an object whole or not at all; `create` publishes a key at most once, `replace` only over the version
    that the caller has read. What is created or replaced on conditions is written in no other way.
    Listings are sorted by key (UTF-8 byte order), skip directory markers (keys ending in "/") and temporary files.
    Every failure is a class of pipeline/errors.py with a one-line message that names the URI.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.stores.cancellation import Cancellation

TEMPORARY_PREFIX = ".tmp-ddpm-"
"""File names that LocalStore.write and LocalStore.create use before the object is published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """What a listing knows about an object."""

    key: str
    """Key relative to the store."""
    size_bytes: int
    """Size in bytes."""
    modified_s: float
    """Time of the last change, seconds since 1970, on the storage's clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Versioned:
    """An object's bytes, and which version of it they are."""

    data: bytes
    """The whole object."""
    etag: str
    """The store's name for this version; equal only while the bytes are."""


class ObjectStore(Protocol):
    """A flat map from keys to bytes under one URI. Implementations are picklable and thread-safe."""

    @property
    def uri(self) -> str:
        """Where the store is: an absolute path or s3://bucket/prefix; `open_store` opens it again."""

    def with_patience(self, at_most_s: float) -> "ObjectStore":
        """The same place, for somebody who waits: a request is given up after so many seconds."""

    def with_cancellation(self, cancellation: Cancellation) -> "ObjectStore":
        """The same place, for work that may be told to stop: a server that is away is waited for no longer then.

        Every method may raise CancelledWriteError; what was asked for last may have been done all the same.
        """

    def read(self, key: str) -> bytes:
        """Return the whole object.

        Raises:
            ObjectMissingError: If the key does not exist.
            StorageAccessError: If access is refused.
            StorageError: If no complete answer came for as long as is waited for one.
        """

    def read_versioned(self, key: str) -> Versioned:
        """Return the whole object and its version, for `replace`; errors as `read`."""

    def write(self, key: str, data: bytes | Iterable[bytes]) -> None:
        """Create or replace an object; a reader sees the old bytes or the new ones, never a part.

        Args:
            key: The object.
            data: Its bytes, or chunks of any size that are sent as they come; an object may be larger than memory.

        Raises:
            StorageAccessError: If access is refused.
            StorageError: If no answer came for as long as is waited for one: the old object is seen then or, where only
                the last answer was lost, the new one.
            Exception: What `data` raises; nothing is visible then.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Publish an object once: of any number of concurrent callers exactly one creates it.

        A lost answer is no conflict: where an attempt may have been done without our hearing of it, and the key then
        exists with our very bytes, they count as ours. Two callers with equal bytes may so both be told True.

        Returns:
            True if this call created the object. False if another did; nothing was changed then.

        Raises:
            StorageAccessError: If access is refused.
            StorageError: If no answer came for as long as is waited for one.
        """

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        """Put new bytes in the place of one version of an object: of any number of concurrent callers one succeeds.

        Args:
            key: The object.
            data: Its new bytes; something in them should be this caller's own, as for `create`.
            etag: The version that they replace, from `read_versioned` or `replace`.

        Returns:
            The new version; None if the object is another version by now, or gone: nothing was changed then.

        Raises:
            StorageAccessError: If access is refused.
            StorageError: If no answer came for as long as is waited for one.
        """

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with `prefix` (any string, not only a folder), sorted by key."""

    def stat(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, None if the key does not exist."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing key is fine."""

    def delete_all(self, keys: Iterable[str]) -> None:
        """Remove objects in the order given, of S3 a thousand with each request; missing keys are fine.

        Args:
            keys: The objects; taken as they are needed, so that they may come from a listing of any length.

        Raises:
            StorageAccessError: If access to one is refused; those before it are gone, some of those behind it may be.
            StorageError: If no answer came for as long as is waited for one.
        """

    def remove_unfinished(self, prefix: str, *, older_than_s: float) -> int:
        """Remove what writers that died left in a folder and no listing shows; of S3 a lifecycle rule does that.

        Args:
            prefix: Starts of the folders, as for `list`.
            older_than_s: Least age of what is removed: a younger one may have a writer that lives.

        Returns:
            How many files were removed.
        """


def check_key(key: str) -> str:
    """Refuse keys that leave the store or that a file system cannot hold as they are."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in key or parts[-1].startswith(TEMPORARY_PREFIX):
        raise ValueError(f"key: must be a relative path without '', '.' or '..' parts, got {key!r}")
    return key


def one_line(error: BaseException) -> str:
    """The message of an error of another library, without its line breaks."""
    return " ".join(str(error).split())
