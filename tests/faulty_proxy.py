"""An HTTP proxy in front of one server that makes the faults of networks and stores, where and as often as asked.

    with FaultyProxy("http://127.0.0.1:5000") as proxy:
        proxy.add(LoseAnswer(), method="PUT", path="_parts/", times=1)
        ...  # a client of proxy.endpoint
        assert proxy.count(LoseAnswer) == 1

Without faults everything passes byte by byte, Host included, which S3's signatures cover. Each request goes to the
server in a connection of its own, so that no fault of one request touches another.
"""

import contextlib
import os
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

from tests.http_messages import Head, Stream, ask, take_body
from tests.s3_signature import CONDITIONS, without_conditions

JOIN_S = 30.0


class Fault:
    """What befalls a request."""

    def suits(self, request: Head) -> bool:
        """Whether it could do anything to this request."""
        return True

    def pick(self, ordinal: int) -> "Fault | None":
        """The fault of the request with this ordinal."""
        return self


@dataclass(frozen=True)
class LoseRequest(Fault):
    """The connection is closed before the server gets the request."""


@dataclass(frozen=True)
class LoseAnswer(Fault):
    """The server does the request; its answer is dropped and the connection closed."""


@dataclass(frozen=True)
class Stall(Fault):
    """Nothing comes back for so many seconds (None: while the proxy is up), then the connection is closed."""

    seconds: float | None = None
    reaches_server: bool = False
    """Whether the server gets the request, and does it, before the silence."""


@dataclass(frozen=True)
class Delay(Fault):
    """The request reaches the server so many seconds later."""

    seconds: float


@dataclass(frozen=True)
class Answer(Fault):
    """The proxy answers, the server gets nothing."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


def s3_error(code: str, status: int, message: str = "made by the faulty proxy") -> Answer:
    """An error as S3 tells it, such as ("SlowDown", 503)."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message><RequestId>0</RequestId></Error>"
    )
    return Answer(status, body.encode(), (("Content-Type", "application/xml"),))


@dataclass(frozen=True)
class Cut(Fault):
    """The answer ends after its head and so many bytes of its body, framing of chunks included.

    An answer with no more bytes than that passes whole, and is not recorded as cut.
    """

    after_bytes: int
    reset: bool = False
    """The connection is reset instead of closed."""


@dataclass(frozen=True)
class IgnoreConditions(Fault):
    """A server that does not know If-None-Match and If-Match: a create replaces what is there.

    S3's signatures cover both headers; the request is signed again without them.
    """

    environment: Mapping[str, str] | None = None
    """Where AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are; None: the environment of the process."""

    def suits(self, request: Head) -> bool:
        return any(request.get(name) for name in CONDITIONS)


@dataclass(frozen=True)
class RandomFaults(Fault):
    """A share of all requests suffers one of the kinds. Which ones follows from the seed and the request's ordinal."""

    seed: int
    share: float
    kinds: Sequence[Fault]

    def pick(self, ordinal: int) -> Fault | None:
        source = random.Random(f"{self.seed}:{ordinal}")
        return source.choice(self.kinds) if source.random() < self.share else None


@dataclass(kw_only=True)
class Request:
    """A request that arrived at the proxy."""

    ordinal: int
    """From 0, in the order of arrival since the proxy was made."""
    method: str
    path: str
    """Decoded, without the query."""
    query: str
    is_signed: bool
    """Whether it says whose request it is."""
    fault: Fault | None = None
    """What befell it; of RandomFaults the kind that was drawn."""
    status: int | None = None
    """Of the answer, also of a lost one; None: none was made."""
    broken: str = ""
    """What broke without being asked for: the server is away, the client left, the proxy went down."""


@dataclass(kw_only=True)
class _Rule:
    fault: Fault
    methods: Collection[str]
    path: re.Pattern[str]
    query: str
    times: int | None
    after: int
    num_matched: int = 0

    def pick(self, request: Head, ordinal: int) -> Fault | None:
        if self.methods and request.method not in self.methods:
            return None
        if not self.path.search(request.path) or self.query not in request.query or not self.fault.suits(request):
            return None
        self.num_matched += 1
        ordinal_here = self.num_matched - 1 - self.after
        if ordinal_here < 0 or (self.times is not None and ordinal_here >= self.times):
            return None
        picked = self.fault.pick(ordinal)
        return picked if picked and picked.suits(request) else None


class FaultyProxy:
    """Forwards to one server at http://host:port; use it as a context manager."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = upstream
        """The server itself, for whoever goes round the proxy."""
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        # bound and never listening: nobody else gets the port while the proxy is down
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self._address = self._reserved.getsockname()
        self.endpoint = f"http://127.0.0.1:{self._address[1]}"
        self.requests: list[Request] = []
        """Every request that arrived."""
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()

    def add(
        self,
        fault: Fault,
        *,
        method: str | Collection[str] = (),
        path: str | re.Pattern[str] = "",
        query: str = "",
        times: int | None = None,
        after: int = 0,
    ) -> None:
        """Make a fault of requests. Of several that match, the one added first is made.

        Args:
            fault: What befalls them.
            method: One or several; none given: all.
            path: A part of the decoded path, or a pattern found in it. It starts with "/" and, at S3, the bucket.
            query: A part of the decoded query, such as "uploads".
            times: How many matching requests; None: all.
            after: How many matching requests pass before.
        """
        methods = (method,) if isinstance(method, str) else tuple(method)
        pattern = re.compile(re.escape(path)) if isinstance(path, str) else path
        rule = _Rule(fault=fault, methods=methods, path=pattern, query=query, times=times, after=after)
        with self._lock:
            self._rules.append(rule)

    def clear(self) -> None:
        """Take all faults away; the log stays."""
        with self._lock:
            self._rules.clear()

    def count(self, kind: type[Fault]) -> int:
        """How many requests suffered a kind of fault."""
        with self._lock:
            return sum(isinstance(request.fault, kind) for request in self.requests)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()
        self._reserved.close()

    def up(self) -> None:
        """Listen, if it does not already."""
        if self._listener is None:
            self._listener = socket.create_server(self._address, backlog=128)
            self._ended = threading.Event()
            self._start(self._accept, self._listener, self._ended)

    def down(self) -> contextlib.ExitStack:
        """End all connections and refuse new ones, until `up` or the end of a `with` block."""
        if self._listener is not None:
            self._ended.set()
            self._listener.shutdown(socket.SHUT_RDWR)
            with self._lock:
                threads = list(self._threads)
                for connection in self._open:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(JOIN_S)
                assert not thread.is_alive(), "a connection of the faulty proxy does not end"
            self._listener.close()
            self._listener = None
        block = contextlib.ExitStack()
        block.callback(self.up)
        return block

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                target(*arguments)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _accept(self, listener: socket.socket, ended: threading.Event) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._start(self._serve, connection, ended)

    @contextlib.contextmanager
    def _tracked(self, connection: socket.socket, ended: threading.Event) -> Iterator[Stream]:
        """A connection that `down` ends."""
        with connection:
            with self._lock:
                if ended.is_set():
                    raise ConnectionAbortedError("the proxy is down")
                self._open.add(connection)
            try:
                yield Stream(connection)
            finally:
                with self._lock:
                    self._open.discard(connection)

    def _serve(self, connection: socket.socket, ended: threading.Event) -> None:
        with contextlib.suppress(OSError), self._tracked(connection, ended) as client:
            while (head := client.read_head()) and self._answer(client, head, ended):
                pass

    def _arrive(self, head: Head) -> tuple[Request, Fault | None]:
        with self._lock:
            request = Request(
                ordinal=len(self.requests),
                method=head.method,
                path=head.path,
                query=head.query,
                is_signed=bool(head.get("Authorization")) or "X-Amz-Signature" in head.query,
            )
            self.requests.append(request)
            for rule in self._rules:
                if fault := rule.pick(head, request.ordinal):
                    if not isinstance(fault, Cut):  # whether there is something to cut is seen later
                        request.fault = fault
                    return request, fault
            return request, None

    def _answer(self, client: Stream, head: Head, ended: threading.Event) -> bool:
        """Answer a request, and say whether the connection goes on."""
        request, fault = self._arrive(head)
        try:
            return self._suffer(client, head, ended, request, fault)
        except OSError as error:
            request.broken = repr(error)
            raise

    def _suffer(
        self, client: Stream, head: Head, ended: threading.Event, request: Request, fault: Fault | None
    ) -> bool:
        match fault:
            case LoseRequest():
                take_body(client, head)
                return False
            case Stall(seconds=seconds, reaches_server=False):
                take_body(client, head)
                ended.wait(seconds)
                return False
            case Answer():
                take_body(client, head)
                request.status = fault.status
                client.send(_own_answer(fault, head.method))
                return not head.closes
            case Delay(seconds=seconds):
                if ended.wait(seconds):
                    return False
            case IgnoreConditions():
                head = without_conditions(head, os.environ if fault.environment is None else fault.environment)
        with self._tracked(socket.create_connection(self._upstream), ended) as server:
            answer, all_sent = ask(client, head, server)
            request.status = answer.status
            body = server.answer_body(answer, head.method)
            if isinstance(fault, LoseAnswer | Stall):
                for _ in body:
                    pass
                if isinstance(fault, Stall):
                    ended.wait(fault.seconds)
                return False
            return self._pass_on(client, answer, body, request, fault) and all_sent and not head.closes

    def _pass_on(
        self, client: Stream, answer: Head, body: Iterator[bytes], request: Request, fault: Fault | None
    ) -> bool:
        """Send an answer, and say whether its end could be told without closing the connection."""
        client.send(answer.raw)
        num_sent = 0
        for piece in body:
            if isinstance(fault, Cut) and num_sent + len(piece) > fault.after_bytes:
                request.fault = fault
                client.send(piece[: fault.after_bytes - num_sent])
                if fault.reset:
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            client.send(piece)
            num_sent += len(piece)
        is_framed = answer.is_chunked or bool(answer.get("Content-Length")) or answer.status in (204, 304)
        return is_framed and not answer.closes


def _own_answer(answer: Answer, method: str) -> bytes:
    names = {status.value: status.phrase for status in HTTPStatus}
    lines = [f"HTTP/1.1 {answer.status} {names.get(answer.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in answer.headers]
    body = answer.body
    if ("Transfer-Encoding", "chunked") in answer.headers:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        lines += [f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if method == "HEAD" else body)
