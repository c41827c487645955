"""Requests to S3, each tried again for as long as its server is away; the only importer of boto3.

Credentials, endpoint and region come from the environment (AWS_*), never from a URI, a config or a pickle.
botocore makes one attempt: its retries share one quota in all threads of a client, so that in a storm none is left.
"""

import dataclasses
import functools
import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from pipeline.errors import ObjectMissingError, StorageAccessError, StorageError
from pipeline.progress import format_duration
from pipeline.redact import redact
from pipeline.stores.cancellation import Cancellation, CancelledWriteError
from pipeline.stores.causes import Failure, cause_of
from pipeline.stores.patience import patiently
from pipeline.stores.s3_causes import NO_ENDPOINT, NOT_S3, S3_CAUSES, may_have_been_done

KEYS_PER_DELETE = 1000
"""What S3 deletes in one request."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
_METADATA_PATIENCE_S = 30.0
_BLOCK_BYTES = 1 << 20
_LONGEST_REASON = 240
_MAKER = Path("/sys/devices/virtual/dmi/id/sys_vendor")
_T = TypeVar("_T")
# What each operation is for, and what every S3 server says in its answer: a web page of another server lacks it.
_OPERATIONS = {
    "get_object": ("read", ("ETag", "ContentLength")),
    "head_object": ("read", ("ETag",)),
    "list_objects_v2": ("list", ("IsTruncated",)),
    "put_object": ("write", ("ETag",)),
    "create_multipart_upload": ("write", ("UploadId",)),
    "upload_part": ("write", ("ETag",)),
    "complete_multipart_upload": ("write", ("ETag",)),
    "abort_multipart_upload": ("write", ()),
    "delete_object": ("delete", ()),
    "delete_objects": ("delete", ()),
}
_TROUBLE = (BotoCoreError, ClientError, HTTPError, OSError, ResponseParserError)


class RequestFailedError(Exception):
    """A request that failed, once or until patience ended."""

    def __init__(self, failure: Failure) -> None:
        """Keep why."""
        super().__init__(failure.reason)
        self.failure = failure
        self.tried_s = 0.0
        """For how long it was tried."""
        self.num_attempts = 1
        """How often it was tried."""
        self.follows_a_lost_answer = False
        """Whether an attempt before the last may have been done without our hearing of it."""

    @property
    def code(self) -> str:
        """The server's name for what is wrong."""
        return self.failure.code


class S3Requests:
    """Requests to one bucket, from any thread."""

    def __init__(
        self,
        bucket: str,
        *,
        at_most_s: float | None = None,
        cancellation: Cancellation | None = None,
        is_anonymous: bool = False,
    ) -> None:
        """Name the bucket.

        Args:
            bucket: The bucket.
            at_most_s: As for `patiently`.
            cancellation: Once it is cancelled no request is made, and none is made again: each raises
                CancelledWriteError. One that is under way comes to its end.
            is_anonymous: No credentials are looked for, and none are sent: for reading a public bucket.
        """
        self.bucket = bucket
        self._at_most_s = at_most_s
        self._is_anonymous = is_anonymous
        self.cancellation = cancellation
        """What ends these requests; None: nothing does."""

    def within(self, *, at_most_s: float | None = None, cancellation: Cancellation | None = None) -> "S3Requests":
        """The same requests with less patience, and with another end or none."""
        at_most_s = self._at_most_s if at_most_s is None else at_most_s
        return S3Requests(self.bucket, at_most_s=at_most_s, cancellation=cancellation, is_anonymous=self._is_anonymous)

    def send(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Make a request of the bucket, again and again while the server is away, and return its answer.

        Args:
            operation: A method of boto3's client, one of _OPERATIONS.
            parameters: Its parameters, without the bucket.

        Raises:
            RequestFailedError: If it is refused, or patience ended.
        """
        return self._insist(lambda: self._ask(operation, parameters))

    def delete_together(self, keys: Sequence[str]) -> list[str]:
        """Delete up to 1,000 objects in one request, as far as the server does it.

        Some servers do not know this request, or want it signed otherwise, and each key may be refused by itself.

        Args:
            keys: The whole keys.

        Returns:
            Those that may still be there, in the same order: why, the answer to a request for one of them says.

        Raises:
            RequestFailedError: If the server was away until patience ended.
        """
        try:
            answer = self.send("delete_objects", Delete={"Objects": [{"Key": key} for key in keys]})
        except RequestFailedError as error:
            if _passes(error):
                raise
            return list(keys)
        gone = {entry.get("Key") for entry in answer.get("Deleted", ())}
        return [key for key in keys if key not in gone]

    def receive(self, key: str, into: BinaryIO, known_etag: str | None) -> tuple[str, bool]:
        """Read an object on, from where `into` ends; what came before an answer broke off stays there.

        Args:
            key: The whole key.
            into: Begins anew, and so does the object, if its version is not `known_etag`, or the server can only
                send whole objects.
            known_etag: The version of which `into` holds the beginning; None when it holds nothing.

        Returns:
            The version, and whether it is whole. Whatever came is progress: patience begins anew with the next call.

        Raises:
            RequestFailedError: If it is refused, or nothing more came until patience ended.
        """
        farthest, etag = into.tell(), known_etag

        def read_on() -> tuple[str, bool]:
            nonlocal etag
            etag, body, left_bytes = self._open_body(key, into, etag)
            trouble: BaseException | None = None
            try:
                while left_bytes > 0 and (block := body.read(min(left_bytes, _BLOCK_BYTES))):
                    into.write(block)
                    left_bytes -= len(block)
            except _TROUBLE as error:
                trouble = error
            finally:
                body.close()
            if left_bytes == 0 or into.tell() > farthest:
                return etag, left_bytes == 0
            reason = _short(f"the answer broke off, {left_bytes} bytes are missing: {trouble or 'it ended'}")
            failure = Failure(
                code=type(trouble).__name__,
                reason=reason,
                error=trouble or ConnectionAbortedError(reason),
                is_network=True,
                action="read",
            )
            raise RequestFailedError(failure) from trouble

        return self._insist(read_on)

    def _open_body(self, key: str, into: BinaryIO, etag: str | None) -> tuple[str, Any, int]:
        """The version, body and length of an answer that goes on where `into` ends, or begins anew with it."""
        start = into.tell()
        if etag is not None and start:
            try:
                answer = self._ask("get_object", {"Key": key, "Range": f"bytes={start}-", "IfMatch": etag})
            except RequestFailedError as error:
                if error.code not in ("PreconditionFailed", "412", "InvalidRange", "416"):
                    raise
            else:
                if answer["ETag"] == etag and str(answer.get("ContentRange")).startswith(f"bytes {start}-"):
                    return etag, answer["Body"], answer["ContentLength"]
                answer["Body"].close()
        into.seek(0)
        into.truncate()
        answer = self._ask("get_object", {"Key": key})
        return answer["ETag"], answer["Body"], answer["ContentLength"]

    def _ask(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """One attempt."""
        action, marks = _OPERATIONS[operation]
        try:
            answer: dict[str, Any] = getattr(self._client(action), operation)(Bucket=self.bucket, **parameters)
        except _TROUBLE as error:
            failure = dataclasses.replace(_failure_of(error, action), is_anonymous=self._is_anonymous)
            raise RequestFailedError(failure) from error
        if missing := [mark for mark in marks if mark not in answer]:
            if "Body" in answer:
                answer["Body"].close()
            told = answer["ResponseMetadata"]
            kind = told["HTTPHeaders"].get("content-type", "of no kind")
            reason = f"the answer is not S3's: HTTP {told['HTTPStatusCode']}, {kind}, without {missing[0]}"
            status = told["HTTPStatusCode"]
            raise RequestFailedError(
                Failure(status=status, code=NOT_S3, reason=reason, error=ValueError(reason), action=action)
            )
        return answer

    def _insist(self, request: Callable[[], _T]) -> _T:
        """Make a request until it is done, is refused, patience ends, or nobody needs it any more."""
        cancellation = self.cancellation or Cancellation()
        cancellation.check()
        started_s, may_be_done, num_attempts = time.monotonic(), False, 0

        def attempt() -> _T:
            nonlocal may_be_done, num_attempts
            num_attempts += 1
            try:
                return request()
            except RequestFailedError as error:
                error.follows_a_lost_answer, error.tried_s = may_be_done, time.monotonic() - started_s
                error.num_attempts = num_attempts
                may_be_done = may_be_done or may_have_been_done(error.failure)
                raise

        try:
            return patiently(_passes, f"s3://{self.bucket}", at_most_s=self._at_most_s, ended=cancellation.event)(
                attempt
            )
        except RequestFailedError as error:
            if cancellation.is_cancelled and _passes(error):  # else it would have been waited for
                raise CancelledWriteError from error
            raise

    def _client(self, action: str) -> Any:
        def make() -> Any:
            with _client_lock:
                environment = frozenset((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))
                return _make_client(environment, _read_timeout_s(self._at_most_s), self._is_anonymous)

        whole_s = _METADATA_PATIENCE_S if self._at_most_s is None else min(_METADATA_PATIENCE_S, self._at_most_s)
        try:
            return patiently(
                lambda error: isinstance(error, NoCredentialsError) and _has_metadata_service(),
                "the metadata service, which hands out credentials,",
                at_most_s=whole_s,
                ended=None if self.cancellation is None else self.cancellation.event,
            )(make)
        except ValueError as error:
            if not str(error).startswith("Invalid endpoint"):
                raise
        # Not what was found there, nor its error: a password in what is no URL could not be told.
        no_url = ValueError("AWS_ENDPOINT_URL is no URL")
        raise RequestFailedError(Failure(code=NO_ENDPOINT, reason=str(no_url), error=no_url, action=action))


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn requests that failed into errors that an operator acts on.

    Raises:
        ObjectMissingError, StorageAccessError, StorageError: In place of RequestFailedError.
    """
    try:
        yield
    except RequestFailedError as error:
        failure = error.failure
        if failure.code == "NoSuchKey":
            raise ObjectMissingError(f"{uri}: does not exist") from None
        cause = cause_of(failure, S3_CAUSES)
        tried = (
            f" (tried again for {format_duration(error.tried_s)})" if cause.passes and error.num_attempts > 1 else ""
        )
        kind = StorageError if cause.passes else StorageAccessError
        raise kind(f"{uri}: cannot {failure.action}: {failure.reason}{tried}; {cause.advice}") from error


@functools.lru_cache(maxsize=16)
def _make_client(environment: frozenset[tuple[str, str]], read_timeout_s: float, is_anonymous: bool) -> Any:
    """One client per process, AWS_* environment and the rest: making one costs 0.1 s; clients are thread-safe.

    Raises:
        NoCredentialsError: If there are none now; a client keeps what its session had when it was made.
    """
    session = boto3.session.Session()
    if not is_anonymous and session.get_credentials() is None:
        raise NoCredentialsError
    config = Config(
        signature_version=UNSIGNED if is_anonymous else None,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=64,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=read_timeout_s,
        # servers other than AWS's refuse or ignore the newer default checksums
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = session.client("s3", config=config)
    client.meta.events.register("before-call.s3.HeadBucket", _follow_no_redirection)
    return client


def _read_timeout_s(at_most_s: float | None) -> float:
    """Who has less patience than a silent server could take of it, such as a lease, waits less for each answer."""
    return READ_TIMEOUT_S if at_most_s is None else max(1.0, min(READ_TIMEOUT_S, at_most_s))


def _passes(error: BaseException) -> bool:
    return isinstance(error, RequestFailedError) and cause_of(error.failure, S3_CAUSES).passes


def _has_metadata_service() -> bool:
    """Whether this machine has a service that hands out credentials: elsewhere nobody without keys waits for one."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    if os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return True
    with suppress(OSError):
        return _MAKER.read_text().strip() == "Amazon EC2"
    return False


def _follow_no_redirection(context: dict[str, Any], **_: Any) -> None:
    """For botocore's question for a bucket's region: it asks when sent elsewhere; sent on again, it asks for ever."""
    context["s3_redirect"] = {"redirected": True, "bucket": None, "params": {}}


_client_lock = threading.Lock()


def _failure_of(error: BaseException, action: str) -> Failure:
    """What botocore or the network raised, in the words of causes.py."""
    if isinstance(error, ClientError):
        told, status = error.response.get("Error", {}), error.response["ResponseMetadata"]["HTTPStatusCode"]
        code = str(told.get("Code") or "")
        reason = f"{code or status}: {told.get('Message') or 'refused'}"
        return Failure(status=status, code=code, reason=_short(reason), error=error, action=action)
    if isinstance(error, ResponseParserError):
        return Failure(code=NOT_S3, reason=_short(str(error)), error=error, action=action)
    is_network = isinstance(error, (BotoConnectionError, IncompleteReadError, HTTPError)) or (
        # the class itself stands for whatever was raised on the way, a missing certificate file among them
        isinstance(error, HTTPClientError) and type(error) is not HTTPClientError
    )
    code = type(error).__name__
    return Failure(code=code, reason=_short(str(error)), error=error, is_network=is_network, action=action)


def _short(text: str) -> str:
    """In one line, without passwords, and without the whole of a web page."""
    return textwrap.shorten(redact(text), _LONGEST_REASON, placeholder=" ...")
