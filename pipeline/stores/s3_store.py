"""An object store on S3; the contract is in pipeline/stores/object_store.py.

Every request is tried again while the server is away (patience.py), on its own and in each thread: a page of a listing,
a part of an object. What is written in one request may have 5 GiB: what `create` and `replace` publish. `write` takes
objects of up to 9.6 TiB (s3_multipart.py).
"""

import io
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from pipeline.errors import ObjectMissingError
from pipeline.stores.cancellation import Cancellation
from pipeline.stores.object_store import TEMPORARY_PREFIX, ObjectInfo, Versioned, check_key
from pipeline.stores.s3_multipart import PART_BYTES, write_parts
from pipeline.stores.s3_requests import KEYS_PER_DELETE, RequestFailedError, S3Requests, storage_errors

_OTHER_VERSION = ("PreconditionFailed", "412")
_MISSING = ("NoSuchKey", "404")


class S3Store:
    """A prefix of a bucket, on AWS or any server with the S3 API ($AWS_ENDPOINT_URL)."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        part_bytes: int = PART_BYTES,
        at_most_s: float | None = None,
        cancellation: Cancellation | None = None,
        is_anonymous: bool = False,
    ) -> None:
        """Name a place.

        Args:
            bucket: The bucket.
            prefix: Without "/" at its ends; "" for the whole bucket.
            part_bytes: What `write` sends in one request, at least 5 MiB.
            at_most_s: Less patience than $DDPM_PATIENCE_MINUTES.
            cancellation: Ends it; None: nobody does.
            is_anonymous: As for S3Requests; of no use for writing.
        """
        self._bucket = bucket
        self._prefix = prefix + "/" if prefix else ""
        self._part_bytes = part_bytes
        self._at_most_s, self._cancellation, self._is_anonymous = at_most_s, cancellation, is_anonymous
        self._requests = S3Requests(bucket, at_most_s=at_most_s, cancellation=cancellation, is_anonymous=is_anonymous)

    @property
    def uri(self) -> str:
        """s3://bucket/prefix."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        """Show the URI."""
        return f"S3Store({self.uri!r})"

    def with_patience(self, at_most_s: float) -> "S3Store":
        """See ObjectStore.with_patience."""
        return self._with(at_most_s, self._cancellation)

    def with_cancellation(self, cancellation: Cancellation) -> "S3Store":
        """See ObjectStore.with_cancellation. A request that is under way comes to its end or its time-out."""
        return self._with(self._at_most_s, cancellation)

    def read(self, key: str) -> bytes:
        """See ObjectStore.read."""
        return self.read_versioned(key).data

    def read_versioned(self, key: str) -> Versioned:
        """See ObjectStore.read_versioned. An answer that breaks off is gone on with from there, in the same version."""
        whole_key = self._whole(key)
        with self._errors(key):
            into, etag, is_whole = io.BytesIO(), None, False
            while not is_whole:
                etag, is_whole = self._requests.receive(whole_key, into, etag)
        assert etag is not None, "what is whole has a version"
        return Versioned(data=into.getvalue(), etag=etag)

    def write(self, key: str, data: bytes | Iterable[bytes]) -> None:
        """See ObjectStore.write. One PUT, or parts and a last request: S3 publishes it whole."""
        whole_key = self._whole(check_key(key))
        with self._errors(key):
            write_parts(self._requests, whole_key, data, self._part_bytes)

    def create(self, key: str, data: bytes) -> bool:
        """See ObjectStore.create. One PUT with If-None-Match: *."""
        whole_key = self._whole(check_key(key))
        with self._errors(key):
            try:
                self._requests.send("put_object", Key=whole_key, Body=data, IfNoneMatch="*")
            except RequestFailedError as error:
                if error.code not in _OTHER_VERSION:
                    raise
                return error.follows_a_lost_answer and self._version_with(key, data) is not None
        return True

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        """See ObjectStore.replace. One PUT with If-Match."""
        whole_key = self._whole(check_key(key))
        with self._errors(key):
            try:
                # with its quotation marks, Ceph 16 takes the right version for another; all know it without them
                bare_etag = etag.strip('"')
                answer = self._requests.send("put_object", Key=whole_key, Body=data, IfMatch=bare_etag)
            except RequestFailedError as error:
                if error.code not in (*_OTHER_VERSION, *_MISSING):
                    raise
                return self._version_with(key, data) if error.follows_a_lost_answer else None
        return str(answer["ETag"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See ObjectStore.list. 1,000 keys per request."""
        page: dict[str, Any] = {"NextContinuationToken": None}
        while "NextContinuationToken" in page:
            token = page["NextContinuationToken"]
            with self._errors(prefix):
                page = self._requests.send(
                    "list_objects_v2",
                    Prefix=self._prefix + prefix,
                    **({} if token is None else {"ContinuationToken": token}),
                )
            for entry in page.get("Contents", ()):
                key = entry["Key"].removeprefix(self._prefix)
                if not entry["Key"].endswith("/") and not key.rpartition("/")[2].startswith(TEMPORARY_PREFIX):
                    modified_s = entry["LastModified"].timestamp()
                    yield ObjectInfo(key=key, size_bytes=entry["Size"], modified_s=modified_s)

    def stat(self, key: str) -> ObjectInfo | None:
        """See ObjectStore.stat."""
        with self._errors(key):
            try:
                head = self._requests.send("head_object", Key=self._whole(key))
            except RequestFailedError as error:
                if error.failure.status is None or error.failure.status >= 500:
                    raise
                # HEAD has no body that could say what is wrong, nor which is missing, the key or the bucket
                self._requests.send("list_objects_v2", MaxKeys=1)
                if error.code not in _MISSING:
                    raise
                return None
        return ObjectInfo(key=key, size_bytes=head["ContentLength"], modified_s=head["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        with self._errors(key):
            self._requests.send("delete_object", Key=self._whole(key))

    def delete_all(self, keys: Iterable[str]) -> None:
        """See ObjectStore.delete_all. What is left of a thousand is asked for by itself, and so is refused by name."""
        keys = iter(keys)
        while chunk := list(itertools.islice(keys, KEYS_PER_DELETE)):
            names = {self._whole(key): key for key in chunk}
            with self._errors(chunk[0]):
                left = self._requests.delete_together(list(names))
            for name in left:
                self.delete(names[name])

    def remove_unfinished(self, prefix: str, *, older_than_s: float) -> int:
        """See ObjectStore.remove_unfinished. Unfinished uploads are for the bucket's lifecycle rule."""
        return 0

    def _with(self, at_most_s: float | None, cancellation: Cancellation | None) -> "S3Store":
        return S3Store(
            self._bucket,
            self._prefix.removesuffix("/"),
            part_bytes=self._part_bytes,
            at_most_s=at_most_s,
            cancellation=cancellation,
            is_anonymous=self._is_anonymous,
        )

    def _version_with(self, key: str, data: bytes) -> str | None:
        """The version of an object, if its bytes are these."""
        try:
            present = self.read_versioned(key)
        except ObjectMissingError:
            return None
        return present.etag if present.data == data else None

    def _whole(self, key: str) -> str:
        # keys that others wrote may have empty parts ("a//b"): readable, but never written by us
        if not key or key.startswith("/") or any(part in (".", "..") for part in key.split("/")):
            raise ValueError(f"key: must be a relative path without '.' or '..' parts, got {key!r}")
        return self._prefix + key

    def _errors(self, key: str) -> AbstractContextManager[None]:
        return storage_errors(f"{self.uri}/{key}".rstrip("/"))
