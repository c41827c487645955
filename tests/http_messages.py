"""HTTP/1.1 messages on a socket, for the faulty proxy: heads stay as they came, bodies are read by their framing."""

import selectors
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import unquote

PIECE_BYTES = 1 << 16


class BrokenOffError(OSError):
    """The other side closed in the middle of a message."""


@dataclass(frozen=True)
class Head:
    """The first line of a request or an answer, and its header lines, byte by byte as they came."""

    start: bytes
    lines: tuple[bytes, ...]

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        start, *lines = raw.removesuffix(b"\r\n\r\n").split(b"\r\n")
        return cls(start, tuple(lines))

    @property
    def raw(self) -> bytes:
        return b"\r\n".join([self.start, *self.lines, b"", b""])

    @property
    def method(self) -> str:
        return self.start.split()[0].decode()

    @property
    def target(self) -> str:
        """Path and query of a request, as they came."""
        return self.start.split()[1].decode("latin-1")

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> str:
        return unquote(self.target.partition("?")[2])

    @property
    def status(self) -> int:
        return int(self.start.split()[1])

    def get(self, name: str) -> str:
        """A header's value, or ""."""
        for line in self.lines:
            if _name(line) == name.lower():
                return line.partition(b":")[2].strip().decode("latin-1")
        return ""

    def without(self, names: Iterable[str]) -> Self:
        left_out = {name.lower() for name in names}
        return replace(self, lines=tuple(line for line in self.lines if _name(line) not in left_out))

    def adding(self, name: str, value: str) -> Self:
        return replace(self, lines=(*self.lines, f"{name}: {value}".encode("latin-1")))

    @property
    def expects_continue(self) -> bool:
        return self.get("Expect").lower() == "100-continue"

    @property
    def is_chunked(self) -> bool:
        return self.get("Transfer-Encoding").lower().endswith("chunked")

    @property
    def closes(self) -> bool:
        """Whether the sender ends the connection after this message."""
        version_1_0 = b"HTTP/1.0" in self.start
        return version_1_0 or "close" in self.get("Connection").lower()


def _name(line: bytes) -> str:
    return line.partition(b":")[0].strip().lower().decode("latin-1")


class Stream:
    """A connection, read by heads and bodies."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.buffer = b""
        """What came and was not asked for yet."""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_head(self) -> Head | None:
        """The next head; None if the other side closed before it."""
        try:
            raw = self._until(b"\r\n\r\n")
        except BrokenOffError:
            return None
        return Head.parse(raw)

    def request_body(self, head: Head) -> Iterator[bytes]:
        """The body of a request, with the framing of its chunks."""
        if head.is_chunked:
            return self._chunks()
        return self._bytes(int(head.get("Content-Length") or 0))

    def answer_body(self, head: Head, method: str) -> Iterator[bytes]:
        """The body of the answer to a method, with the framing of its chunks."""
        if method == "HEAD" or head.status in (204, 304):
            return iter(())
        if head.is_chunked:
            return self._chunks()
        if length := head.get("Content-Length"):
            return self._bytes(int(length))
        return self._rest()

    def _more(self) -> None:
        data = self.socket.recv(PIECE_BYTES)
        if not data:
            raise BrokenOffError("closed in the middle of a message")
        self.buffer += data

    def _until(self, end: bytes) -> bytes:
        while end not in self.buffer:
            self._more()
        found, _, self.buffer = self.buffer.partition(end)
        return found + end

    def _bytes(self, length: int) -> Iterator[bytes]:
        while length:
            if not self.buffer:
                self._more()
            piece, self.buffer = self.buffer[:length], self.buffer[length:]
            length -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self._until(b"\r\n")
            yield line
            size = int(line.partition(b";")[0], 16)
            if size == 0:
                break
            yield from self._bytes(size + 2)
        while (line := self._until(b"\r\n")) != b"\r\n":  # trailers
            yield line
        yield line

    def _rest(self) -> Iterator[bytes]:
        while True:
            try:
                if not self.buffer:
                    self._more()
            except BrokenOffError:
                return
            piece, self.buffer = self.buffer, b""
            yield piece


def take_body(client: Stream, head: Head) -> None:
    """Read the body of a request: closing before it is read would reset the connection."""
    if head.expects_continue:
        client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    for _ in client.request_body(head):
        pass


def ask(client: Stream, head: Head, server: Stream) -> tuple[Head, bool]:
    """Send a request; its answer's head, and whether the whole request was taken from the client."""
    server.send(head.raw)
    if head.expects_continue and not client.buffer:
        with selectors.DefaultSelector() as selector:
            for stream in (client, server):
                selector.register(stream.socket, selectors.EVENT_READ)
            readable = {key.fileobj for key, _ in selector.select()}
        if client.socket not in readable:  # else the client is tired of waiting
            interim = server.read_head()
            if interim is None:
                raise ConnectionResetError("the server closed without an answer")
            if interim.status >= 200:
                return interim, False
            client.send(interim.raw)
    all_sent = True
    for piece in client.request_body(head):
        try:
            server.send(piece)
        except OSError:  # it may have answered, and closed, before the end of the body
            all_sent = False
            break
    while answer := server.read_head():
        if answer.status >= 200:
            return answer, all_sent
        client.send(answer.raw)
    raise ConnectionResetError("the server closed without an answer")
