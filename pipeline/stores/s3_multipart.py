"""Objects of any size in S3: parts sent in parallel, published by one last request.

S3 takes at most 10,000 parts, each of 5 MiB to 5 GiB, the last may be smaller. How large an object will be is not known
beforehand, so parts grow: the first 1,500 have the size asked for, each next 1,500 twice that of those before. With
64 MiB an object may have 9.6 TiB, and what is sent at once exceeds 256 MiB only beyond 94 GiB.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from pipeline.stores.cancellation import Cancellation
from pipeline.stores.s3_requests import RequestFailedError, S3Requests

PART_BYTES = 64 << 20
SMALLEST_PART_BYTES = 5 << 20
LARGEST_PART_BYTES = 5 << 30
_PARTS_AT_ONCE = 4
"""In memory: one being filled, the others being sent."""
_PARTS_OF_ONE_SIZE = 1500
_ABORT_PATIENCE_S = 5.0
# A browser shows a page from a bucket only if its files say what they are; all others are S3's "binary/octet-stream".
_MEDIA_TYPES = {
    "css": "text/css",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript",
    "png": "image/png",
    "svg": "image/svg+xml",
    "webp": "image/webp",
}


def write_parts(requests: S3Requests, key: str, data: bytes | Iterable[bytes], part_bytes: int) -> None:
    """Write an object; what fits into one part is one PUT.

    Args:
        requests: Where to.
        key: The whole key.
        data: Its bytes, or chunks of any size.
        part_bytes: Size of the first parts.

    Raises:
        RequestFailedError: If a part, or the object, is refused or not answered. What was sent is removed then, and
            when `data` raise, if the store allows that.
        CancelledWriteError: If the requests are cancelled; what was sent is removed then too.
    """
    upload: _Upload | None = None
    try:
        for part, is_last in _parts_of([data] if isinstance(data, bytes) else data, part_bytes):
            if upload is None and is_last:
                media_type = _MEDIA_TYPES.get(key.rpartition(".")[2])
                requests.send("put_object", Key=key, Body=part, **({"ContentType": media_type} if media_type else {}))
                return
            upload = upload or _Upload(requests, key)
            upload.add(part)
        assert upload is not None, "there is always a last part"
        upload.complete()
    except BaseException:
        if upload is not None:
            upload.abort()
        raise


def _parts_of(chunks: Iterable[bytes], part_bytes: int) -> Iterator[tuple[bytearray, bool]]:
    """Parts, and whether each is the last; at least one, which may be empty."""
    part, num_parts = bytearray(), 0
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            room = min(part_bytes << num_parts // _PARTS_OF_ONE_SIZE, LARGEST_PART_BYTES) - len(part)
            if room == 0:
                yield part, False
                part, num_parts = bytearray(), num_parts + 1
            else:
                part += rest[:room]
                rest = rest[room:]
    yield part, True


class _Upload:
    """One multipart upload, from the first part to its end."""

    def __init__(self, requests: S3Requests, key: str) -> None:
        """Start it."""
        self._requests, self._ended = requests, Cancellation(requests.cancellation)
        self._while_wanted = requests.within(cancellation=self._ended)
        self._place = {"Key": key, "UploadId": requests.send("create_multipart_upload", Key=key)["UploadId"]}
        self._pool = ThreadPoolExecutor(_PARTS_AT_ONCE - 1)
        self._sending: set[Future[str]] = set()
        self._parts: list[Future[str]] = []
        self._num_bytes = 0

    def add(self, part: bytearray) -> None:
        """Send a part, beside those that are being sent."""
        self._num_bytes += len(part)
        self._parts.append(self._pool.submit(self._send, len(self._parts) + 1, part))
        self._sending.add(self._parts[-1])
        if len(self._sending) == _PARTS_AT_ONCE - 1:
            done, self._sending = wait(self._sending, return_when=FIRST_COMPLETED)
            for sent in done:
                sent.result()

    def complete(self) -> None:
        """Publish the object when all parts are there."""
        etags = [part.result() for part in self._parts]
        self._pool.shutdown()
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        try:
            self._requests.send("complete_multipart_upload", **self._place, MultipartUpload={"Parts": parts})
        except RequestFailedError as error:
            if not (error.code == "NoSuchUpload" and error.follows_a_lost_answer and self._is_there(etags)):
                raise

    def abort(self) -> None:
        """Remove what was sent; where that fails, a rule of the bucket may, some day."""
        self._ended.cancel()
        self._pool.shutdown(cancel_futures=True)
        with contextlib.suppress(RequestFailedError):
            self._requests.within(at_most_s=_ABORT_PATIENCE_S).send("abort_multipart_upload", **self._place)

    def _send(self, number: int, part: bytearray) -> str:
        return str(self._while_wanted.send("upload_part", **self._place, PartNumber=number, Body=part)["ETag"])

    def _is_there(self, etags: list[str]) -> bool:
        """Whether the object is what was uploaded: its size, and its ETag where that follows from the parts'."""
        try:
            head = self._requests.send("head_object", Key=self._place["Key"])
        except RequestFailedError as error:
            if error.code in ("404", "NoSuchKey"):
                return False
            raise
        digests = [etag.strip('"') for etag in etags]
        is_known = all(re.fullmatch("[0-9a-f]{32}", digest) for digest in digests)
        expected = hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False).hexdigest() if is_known else None
        found, _, num_parts = head["ETag"].strip('"').partition("-")
        return head["ContentLength"] == self._num_bytes and num_parts == str(len(etags)) and expected in (None, found)
