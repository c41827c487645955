"""The proxy does what its faults say, to the requests they name, and nothing to others."""

import http.client
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import requests

from tests.faulty_proxy import (
    Answer,
    Cut,
    Delay,
    Fault,
    FaultyProxy,
    LoseAnswer,
    LoseRequest,
    RandomFaults,
    Stall,
    s3_error,
)

BIG = os.urandom(1 << 20)


class Upstream(ThreadingHTTPServer):
    """Keeps what it gets: (method, target, headers, body)."""

    request_queue_size = 128  # 5, the default, resets connections when many clients come at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[tuple[str, str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: the proxy leaves in the middle of an answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_any(self) -> None:
        assert isinstance(self.server, Upstream)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.got.append((self.command, self.path, dict(self.headers), body))
        answer = BIG if "big" in self.path else b"fine"
        self.send_response(200)
        if "chunked" in self.path:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (answer[:10], answer[10:]):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if piece else b"")
            self.wfile.write(b"0\r\n\r\n")
            return
        if "endless" in self.path:
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def handle_expect_100(self) -> bool:
        if "refused" not in self.path:
            return super().handle_expect_100()
        self.send_error(412)
        return False

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultyProxy]:
    with FaultyProxy(upstream.url) as proxy:
        yield proxy


@pytest.fixture
def session(proxy: FaultyProxy) -> Iterator[requests.Session]:
    """A client that keeps its connections and does not try again."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


def test_messages_pass_as_they_are(upstream: Upstream, proxy: FaultyProxy, session: requests.Session) -> None:
    target = "/bucket/a%2Fb%20c//d?uploads&list-type=2&prefix=%C3%A4"
    body = os.urandom(200_000)
    assert session.put(proxy.endpoint + target, data=body, headers={"X-Own": "a  b"}).content == b"fine"
    method, got_target, headers, got_body = upstream.got[0]
    assert (method, got_target, got_body) == ("PUT", target, body)
    assert headers["Host"] == urlsplit(proxy.endpoint).netloc, "signatures cover the host that the client sees"
    assert headers["X-Own"] == "a  b"
    session.post(proxy.endpoint + "/streamed", data=iter([b"one", b"two" * 50_000]))
    assert upstream.got[1][3] == b"one" + b"two" * 50_000
    for path in ("/big", "/big-chunked", "/big-endless"):
        assert session.get(proxy.endpoint + path).content == BIG
    head = session.head(proxy.endpoint + "/big")
    assert head.headers["Content-Length"] == str(len(BIG)) and head.content == b""
    assert session.delete(proxy.endpoint + "/x").content == b"fine"
    assert [(request.ordinal, request.method, request.status) for request in proxy.requests] == [
        (i, method, 200) for i, method in enumerate(["PUT", "POST", "GET", "GET", "GET", "HEAD", "DELETE"])
    ]
    assert proxy.requests[0].path == "/bucket/a/b c//d" and "prefix=ä" in proxy.requests[0].query
    assert proxy.count(Fault) == 0 and not any(request.broken for request in proxy.requests)


def test_one_connection_serves_many_requests(upstream: Upstream, proxy: FaultyProxy) -> None:
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc)
    proxy.add(Answer(503), path="/b")
    ports = set()
    for path in ("/a", "/b", "/c-chunked", "/d"):
        connection.request("GET", path)
        ports.add(connection.sock.getsockname()[1])
        connection.getresponse().read()
    connection.close()
    assert len(ports) == 1 and len(upstream.got) == 3


def test_a_body_is_asked_for_before_it_is_sent(upstream: Upstream, proxy: FaultyProxy) -> None:
    proxy.add(Answer(503), path="/busy")
    for path, status in (("/a", b"200"), ("/busy", b"503")):
        with socket.create_connection(("127.0.0.1", int(urlsplit(proxy.endpoint).port or 0)), timeout=300) as client:
            client.sendall(
                f"PUT {path} HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n".encode()
            )
            assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"body")
            assert client.recv(1000).split()[1] == status
    assert [got[3] for got in upstream.got] == [b"body"]


def test_a_body_that_the_server_refuses_is_not_asked_for(upstream: Upstream, proxy: FaultyProxy) -> None:
    with socket.create_connection(("127.0.0.1", int(urlsplit(proxy.endpoint).port or 0)), timeout=300) as client:
        client.sendall(b"PUT /refused HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        with client.makefile("rb") as answer:
            assert answer.read().startswith(b"HTTP/1.1 412 "), "and then the connection is closed"
    assert upstream.got == [] and proxy.requests[0].status == 412


def test_a_lost_answer_reached_the_server(upstream: Upstream, proxy: FaultyProxy, session: requests.Session) -> None:
    proxy.add(LoseAnswer(), method="PUT", times=1)
    with pytest.raises(requests.ConnectionError):
        session.put(proxy.endpoint + "/a", data=b"x")
    assert [got[:2] for got in upstream.got] == [("PUT", "/a")]
    assert proxy.requests[0].fault == LoseAnswer() and proxy.requests[0].status == 200
    assert session.put(proxy.endpoint + "/a", data=b"x").ok


def test_a_lost_request_did_not(upstream: Upstream, proxy: FaultyProxy, session: requests.Session) -> None:
    proxy.add(LoseRequest(), times=1)
    with pytest.raises(requests.ConnectionError):
        session.put(proxy.endpoint + "/a", data=BIG)
    assert upstream.got == [] and proxy.count(LoseRequest) == 1 and proxy.requests[0].status is None


@pytest.mark.parametrize("reaches_server", [False, True])
def test_a_stall_is_silent_and_ends(
    upstream: Upstream, proxy: FaultyProxy, session: requests.Session, reaches_server: bool
) -> None:
    proxy.add(Stall(0.5, reaches_server=reaches_server), path="/short")
    proxy.add(Stall(reaches_server=reaches_server), path="/long")
    begun = time.monotonic()
    with pytest.raises(requests.ConnectionError):
        session.get(proxy.endpoint + "/short")
    assert time.monotonic() - begun >= 0.5
    with pytest.raises(requests.ReadTimeout):
        session.get(proxy.endpoint + "/long", timeout=(60, 0.3))
    while reaches_server and len(upstream.got) < 2:  # pytest's own limit ends a wait for nothing
        time.sleep(0.01)
    assert len(upstream.got) == 2 * reaches_server
    begun = time.monotonic()
    proxy.down()
    assert time.monotonic() - begun < 60, "it waits for no stall"


def test_a_delay_passes_later(upstream: Upstream, proxy: FaultyProxy, session: requests.Session) -> None:
    proxy.add(Delay(0.4))
    begun = time.monotonic()
    assert session.get(proxy.endpoint + "/a").ok and time.monotonic() - begun >= 0.4
    assert len(upstream.got) == 1


def test_an_answer_of_its_own(upstream: Upstream, proxy: FaultyProxy, session: requests.Session) -> None:
    proxy.add(Answer(403, b"Invalid Host header", (("X-Why", "host"),)), path="/mlflow")
    proxy.add(s3_error("Slow&Down", 503, "<busy>"), path="/s3")
    answer = session.post(proxy.endpoint + "/mlflow", data=BIG)
    assert (answer.status_code, answer.content, answer.headers["X-Why"]) == (403, b"Invalid Host header", "host")
    answer = session.get(proxy.endpoint + "/s3")
    assert answer.status_code == 503 and "<Code>Slow&amp;Down</Code><Message>&lt;busy&gt;</Message>" in answer.text
    assert session.head(proxy.endpoint + "/s3").status_code == 503
    assert session.get(proxy.endpoint + "/s3").status_code == 503, "HEAD left nothing on the connection"
    assert upstream.got == [] and proxy.count(Answer) == 4


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("path", ["/big", "/big-chunked"])
def test_an_answer_cut_short(proxy: FaultyProxy, path: str, reset: bool) -> None:
    proxy.add(Cut(5000, reset=reset))
    port = int(urlsplit(proxy.endpoint).port or 0)
    with socket.create_connection(("127.0.0.1", port), timeout=300) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        data, end = b"", "closed"
        try:
            while piece := client.recv(1 << 16):
                data += piece
        except ConnectionResetError:
            end = "reset"
    assert end == ("reset" if reset else "closed")
    assert reset or len(data.partition(b"\r\n\r\n")[2]) == 5000
    assert proxy.count(Cut) == 1


def test_what_is_too_short_to_be_cut_is_not_counted(proxy: FaultyProxy, session: requests.Session) -> None:
    proxy.add(Cut(4))
    assert session.get(proxy.endpoint + "/a").content == b"fine"
    assert proxy.count(Cut) == 0


def test_faults_meet_the_requests_they_name(proxy: FaultyProxy, session: requests.Session) -> None:
    proxy.add(
        Answer(501), method=("PUT", "POST"), path=re.compile(r"_parts/\d+\.json$"), query="uploads", times=2, after=1
    )
    for method, target in (
        ("GET", "/_parts/1.json?uploads"),
        ("PUT", "/_parts/x.json?uploads"),
        ("PUT", "/_parts/1.json"),
        ("PUT", "/_parts/1.json?uploads"),  # the one after which it begins
        ("PUT", "/_parts/1.json?uploads"),
        ("PUT", "/a%20_parts%2F1.json?a=b&uploads="),
        ("PUT", "/_parts/1.json?uploads"),
    ):
        session.request(method, proxy.endpoint + target)
    assert [request.status for request in proxy.requests] == [200, 200, 200, 200, 501, 501, 200]
    proxy.add(Answer(500))
    assert session.get(proxy.endpoint).status_code == 500
    proxy.clear()
    assert session.get(proxy.endpoint).status_code == 200


def test_random_faults_follow_from_seed_and_ordinal(upstream: Upstream, session: requests.Session) -> None:
    kinds = (s3_error("InternalError", 500), Answer(503), LoseAnswer())

    def campaign(seed: int, share: float, path: str) -> list[Fault | None]:
        with FaultyProxy(upstream.url) as proxy:
            proxy.add(RandomFaults(seed, share, kinds))
            for i in range(120):
                try:
                    session.get(f"{proxy.endpoint}{path}{i}")
                except requests.ConnectionError:
                    assert proxy.requests[-1].fault == LoseAnswer()
            assert [request.ordinal for request in proxy.requests] == list(range(120))
            return [request.fault for request in proxy.requests]

    first = campaign(7, 0.25, "/a")
    assert first == campaign(7, 0.25, "/others"), "it does not depend on what is asked for"
    assert first != campaign(8, 0.25, "/a")
    assert set(first) == {None, *kinds}
    assert 15 <= sum(fault is not None for fault in first) <= 45, "30 on average, deviation 4.7; always the same"
    assert campaign(7, 0.0, "/a") == [None] * 120 and None not in campaign(7, 1.0, "/a")


def test_a_server_that_is_away_for_a_while(upstream: Upstream, proxy: FaultyProxy, session: requests.Session) -> None:
    assert session.get(proxy.endpoint).ok
    endpoint = proxy.endpoint
    with proxy.down():
        port = int(urlsplit(endpoint).port or 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with pytest.raises(requests.ConnectionError):
            session.get(endpoint)
    assert session.get(endpoint).ok and proxy.endpoint == endpoint
    proxy.down()
    proxy.down()
    proxy.up()
    proxy.up()
    assert session.get(endpoint).ok and len(upstream.got) == 3


def test_going_down_breaks_what_is_under_way(proxy: FaultyProxy) -> None:
    proxy.add(Delay(3600))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(requests.get, proxy.endpoint, timeout=3600)
        while not proxy.requests:
            time.sleep(0.01)
        proxy.down()
        assert isinstance(answer.exception(timeout=300), requests.ConnectionError)


def test_what_breaks_unasked_is_told(session: requests.Session) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with FaultyProxy(f"http://127.0.0.1:{nobody.getsockname()[1]}") as proxy:
            with pytest.raises(requests.ConnectionError):
                session.get(proxy.endpoint)
            assert "ConnectionRefusedError" in proxy.requests[0].broken and proxy.requests[0].fault is None


def test_many_clients_at_once(upstream: Upstream, proxy: FaultyProxy) -> None:
    def put(i: int) -> int:
        return requests.put(f"{proxy.endpoint}/{i}", data=f"{i}".encode() * 1000, timeout=60).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(put, range(64))) == {200}
    assert sorted(got[3] for got in upstream.got) == sorted(f"{i}".encode() * 1000 for i in range(64))
    assert [request.ordinal for request in proxy.requests] == list(range(64))
