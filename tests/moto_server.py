"""moto's S3 server with writes that come one after the other, as `tests/s3server.sh` starts it.

moto looks whether a key exists and then stores it: on a busy machine two creates of one key both succeed. A real store
does both in one step, and here a lock does.
"""

import io
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto import server

_one_write = threading.Lock()
_answer = server.DomainDispatcherApplication.__call__


def answer(self: Any, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer a request; of writes, read the body first, so that a slow sender holds up nobody."""
    if environ["REQUEST_METHOD"] not in ("PUT", "POST"):  # POST: the end of a multipart upload
        return _answer(self, environ, start_response)
    if environ.get("CONTENT_LENGTH"):
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    with _one_write:
        return _answer(self, environ, start_response)


if __name__ == "__main__":
    server.DomainDispatcherApplication.__call__ = answer
    server.main()
