"""A TCP proxy that damages HTTP traffic on request: answers cut short, connections reset, 503."""

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

BUSY = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class CuttingProxy:
    """Forwards every connection to one server; use it as a context manager."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._method, self._cuts_left, self._after_bytes, self._reset, self._busy_left = b"", 0, 0, False, 0
        self.num_cut = self.num_busy = 0
        self._open: set[socket.socket] = set()

    def cut(self, method: str, *, times: int, after_bytes: int, reset: bool = False) -> None:
        """End the next `times` answers to a method after some bytes, by closing or by resetting the connection."""
        self._method, self._cuts_left, self._after_bytes, self._reset = method.encode(), times, after_bytes, reset

    def busy(self, *, times: int) -> None:
        """Answer the next requests with 503."""
        self._busy_left = times

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            self._close(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._upstream)
            self._open |= {client, server}
            state = {"armed": False}
            threading.Thread(target=self._requests, args=(client, server, state), daemon=True).start()
            threading.Thread(target=self._answers, args=(client, server, state), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        try:
            while data := client.recv(1 << 16):
                with self._lock:
                    if self._busy_left and data.startswith((b"GET ", b"PUT ")):
                        self._busy_left -= 1
                        self.num_busy += 1
                        client.sendall(BUSY)
                        break
                    if self._cuts_left and data.startswith(self._method + b" "):
                        self._cuts_left -= 1
                        state["armed"] = True
                server.sendall(data)
        except OSError:
            pass
        self._close(server)
        self._close(client)

    def _answers(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        sent = 0
        try:
            while data := server.recv(1 << 16):
                if data.startswith(b"HTTP/1.1 100"):  # not the answer yet, it only asks for the body
                    client.sendall(data)
                elif state["armed"] and sent + len(data) > self._after_bytes:
                    with self._lock:
                        self.num_cut += 1
                    client.sendall(data[: max(self._after_bytes - sent, 0)])
                    if self._reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                else:
                    client.sendall(data)
                    sent += len(data) if state["armed"] else 0
        except OSError:
            pass
        self._close(client)
        self._close(server)

    def _close(self, connection: socket.socket) -> None:
        self._open.discard(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
