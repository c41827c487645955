"""An object store on S3, the only importer of boto3; the contract is in pipeline/stores/object_store.py.

Credentials, endpoint and region come from the environment (AWS_*), never from a URI, a config or a pickle.
Objects are read and written whole (at most 5 GiB). Every request is retried: by botocore (8 attempts; $AWS_MAX_ATTEMPTS
changes it), and here when an answer breaks off.
"""

import functools
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import tenacity
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from pipeline.errors import ObjectMissingError, StorageAccessError, StorageError
from pipeline.stores.object_store import TEMPORARY_PREFIX, ObjectInfo, Versioned, check_key, one_line

_ACCESS_CODES = {
    *("AccessDenied", "AccountProblem", "AuthorizationHeaderMalformed", "ExpiredToken", "InvalidAccessKeyId"),
    *("InvalidBucketName", "InvalidToken", "NoSuchBucket", "PermanentRedirect", "RequestTimeTooSkewed"),
    *("SignatureDoesNotMatch", "301", "400", "401", "403"),
}
_TRANSIENT = (HTTPClientError, IncompleteReadError, HTTPError, OSError)


class _CutOffError(OSError):
    """The body of an answer ended early; botocore retries requests, not bodies."""


@functools.lru_cache(maxsize=4)
def _make_client(environment: frozenset[tuple[str, str]]) -> Any:
    """One client per process and AWS_* environment: making one costs 0.1 s; clients are thread-safe."""
    names = {name for name, _ in environment}
    retries: dict[str, Any] = {"mode": "standard"} | ({} if "AWS_MAX_ATTEMPTS" in names else {"total_max_attempts": 8})
    config = Config(
        retries=retries,
        max_pool_connections=64,
        connect_timeout=10,
        read_timeout=60,
        # servers other than AWS's refuse or ignore the newer default checksums
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)


_client_lock = threading.Lock()


def _retrying() -> tenacity.Retrying:
    """Retries of what botocore does not retry: an answer that breaks off, and 409 on a conditional write."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, _CutOffError) or _code(error) == "ConditionalRequestConflict"
        ),
        stop=tenacity.stop_after_attempt(6),
        wait=tenacity.wait_random_exponential(multiplier=0.4, max=10),
        reraise=True,
    )


def _code(error: BaseException) -> str:
    return str(error.response["Error"].get("Code")) if isinstance(error, ClientError) else ""


class S3Store:
    """A prefix of a bucket, on AWS or any server with the S3 API ($AWS_ENDPOINT_URL)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        """Name a bucket and a prefix without "/" at its ends ("" for the whole bucket)."""
        self._bucket = bucket
        self._prefix = prefix + "/" if prefix else ""

    @property
    def uri(self) -> str:
        """s3://bucket/prefix."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        """Show the URI."""
        return f"S3Store({self.uri!r})"

    def read(self, key: str) -> bytes:
        """See ObjectStore.read."""
        return self.read_versioned(key).data

    def read_versioned(self, key: str) -> Versioned:
        """See ObjectStore.read_versioned. An answer shorter than announced, or cut off, is read again."""
        place = self._place(key)

        def fetch() -> Versioned:
            answer = self._client().get_object(**place)
            try:
                data: bytes = answer["Body"].read()
            except _TRANSIENT as error:
                raise _CutOffError(one_line(error)) from error
            if len(data) != answer["ContentLength"]:
                raise _CutOffError(f"{len(data)} of {answer['ContentLength']} bytes")
            return Versioned(data=data, etag=answer["ETag"])

        with self._errors(key):
            return _retrying()(fetch)

    def write(self, key: str, data: bytes | Iterable[bytes]) -> None:
        """See ObjectStore.write. One PUT: S3 publishes it whole."""
        place = self._place(check_key(key))
        with self._errors(key):
            self._client().put_object(**place, Body=data if isinstance(data, bytes) else b"".join(data))

    def create(self, key: str, data: bytes) -> bool:
        """See ObjectStore.create. One PUT with If-None-Match: *."""
        place = self._place(check_key(key))
        with self._errors(key):
            try:
                _retrying()(lambda: self._client().put_object(**place, Body=data, IfNoneMatch="*"))
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412"):
                    raise
                return False
        return True

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        """See ObjectStore.replace. One PUT with If-Match."""
        place = self._place(check_key(key))
        with self._errors(key):
            try:
                answer = _retrying()(lambda: self._client().put_object(**place, Body=data, IfMatch=etag))
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412", "NoSuchKey", "404"):
                    raise
                return None
        return str(answer["ETag"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See ObjectStore.list. 1,000 keys per request."""
        with self._errors(prefix):
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    if not entry["Key"].endswith("/") and not key.rpartition("/")[2].startswith(TEMPORARY_PREFIX):
                        modified_s = entry["LastModified"].timestamp()
                        yield ObjectInfo(key=key, size_bytes=entry["Size"], modified_s=modified_s)

    def stat(self, key: str) -> ObjectInfo | None:
        """See ObjectStore.stat."""
        with self._errors(key):
            try:
                head = self._client().head_object(**self._place(key))
            except ClientError as error:
                if _code(error) not in ("404", "NoSuchKey"):
                    raise
                # HEAD has no body that could say which of the two is missing, the key or the bucket
                self._client().list_objects_v2(Bucket=self._bucket, MaxKeys=1)
                return None
        return ObjectInfo(key=key, size_bytes=head["ContentLength"], modified_s=head["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        with self._errors(key):
            self._client().delete_object(**self._place(key))

    def _client(self) -> Any:
        with _client_lock:
            try:
                return _make_client(frozenset((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
            except ValueError as error:
                if not str(error).startswith("Invalid endpoint"):
                    raise
        # Not what was found there, nor its error: a password in what is no URL could not be told.
        raise StorageAccessError(f"{self.uri}: AWS_ENDPOINT_URL is no URL; write it as http://host:port")

    def _place(self, key: str) -> dict[str, str]:
        # keys that others wrote may have empty parts ("a//b"): readable, but never written by us
        if not key or key.startswith("/") or any(part in (".", "..") for part in key.split("/")):
            raise ValueError(f"key: must be a relative path without '.' or '..' parts, got {key!r}")
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn what botocore and the network raise into our errors."""
        uri = f"{self.uri}/{key}".rstrip("/")
        try:
            yield
        except ClientError as error:
            code = _code(error)
            if code in ("NoSuchKey", "404"):
                raise ObjectMissingError(f"{uri}: does not exist") from None
            reason = f"{code}: {error.response['Error'].get('Message') or 'refused'}"
            if code in _ACCESS_CODES:
                raise StorageAccessError(
                    f"{uri}: {' '.join(reason.split())}; check the bucket, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                    "AWS_ENDPOINT_URL and the permissions"
                ) from error
            raise StorageError(f"{uri}: {' '.join(reason.split())}; run again later") from error
        except _TRANSIENT as error:
            raise StorageError(
                f"{uri}: no complete answer after all retries: {one_line(error)}; check AWS_ENDPOINT_URL and the "
                "network, then run again"
            ) from error
        except BotoCoreError as error:  # no or partial credentials, unknown profile, bad name
            raise StorageAccessError(
                f"{uri}: {one_line(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL "
                "for a server other than AWS)"
            ) from error
