"""The server and the transport against each other over real sockets, and the server against what is no request."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shoal.errors import InvalidRequest, NodeUnavailable, NotCached, NotFound, OriginChanged, ShoalError
from shoal.transport import Interrupted, Transport
from shoal.wire import http_connection
from shoal.wire.byte_range import ByteRange, RangeNotSatisfiable
from shoal.wire.http_messages import FileSlice, Request, Response
from shoal.wire.http_server import HttpServer
from tests.support.waiting import wait_for

PAYLOAD = bytes(range(256)) * 2000


class Served:
    """A server in a thread, over handlers by path."""

    def __init__(self, directory: Path, senders: int = 0) -> None:
        self.file = directory / "file"
        self.file.write_bytes(PAYLOAD)
        self.released = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = HttpServer(self.handle, epoch=lambda: 7, congestion="cubic", senders=senders)
        self.port = self.run(self.server.listen_tcp("127.0.0.1", 0))
        self.unix = directory / "s.sock"
        self.run(self.server.listen_unix(self.unix))
        self.address = f"127.0.0.1:{self.port}"

    def run(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def slice(self, start: int, length: int) -> FileSlice:
        fd = os.open(self.file, os.O_RDONLY)

        def release() -> None:
            os.close(fd)
            self.released += 1

        return FileSlice(fd, start, length, release)

    async def handle(self, request: Request) -> Response:
        match request.path:
            case "/file":
                if "shoal-descriptor" in request.headers:
                    return Response(200, {}, self.slice(0, len(PAYLOAD)), pass_descriptor=True)
                wanted = ByteRange.parse(request.headers.get("range"), len(PAYLOAD))
                body = self.slice(wanted.start, wanted.end - wanted.start)
                return Response(wanted.status, wanted.headers(len(PAYLOAD)), body)
            case "/stream" | "/short":
                length = len(PAYLOAD) + (request.path == "/short")
                return Response(200, {}, self.stream(), length=length)
            case "/changed":
                raise OriginChanged("a.txt changed")
            case "/absent":
                raise NotCached("not here")
            case "/bug":
                raise RuntimeError("a bug")
            case path:
                return Response(200, {}, path.encode())

    async def stream(self) -> AsyncIterator[bytes | FileSlice]:
        yield PAYLOAD[:1000]
        yield self.slice(1000, len(PAYLOAD) - 1000)

    def close(self) -> None:
        self.run(self.server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(params=[0, 2], ids=["loop", "threads"])
def served(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(http_connection, "BULK_BYTES", 1000)
    served = Served(tmp_path, senders=request.param)
    yield served
    served.close()


def read(served: Served, start: int, end: int, *, address: str | None = None) -> bytes:
    buffer = bytearray(end - start)
    Transport().read_into(address or served.address, "/file", start, end, memoryview(buffer))
    return bytes(buffer)


def test_ranges_streams_and_whole_bodies(served: Served) -> None:
    transport = Transport()
    for start, end in ((0, 1), (5, 70_000), (0, len(PAYLOAD)), (len(PAYLOAD) - 1, len(PAYLOAD))):
        assert read(served, start, end) == PAYLOAD[start:end]
        assert read(served, start, end, address=f"unix:{served.unix}") == PAYLOAD[start:end]
    assert transport.get(served.address, "/file").body == PAYLOAD
    assert transport.get(served.address, "/stream").body == PAYLOAD
    assert transport.get(served.address, "/stream").epoch == 7


def test_connection_is_kept_and_every_slice_released(served: Served) -> None:
    transport = Transport()
    for _ in range(20):
        transport.get(served.address, "/file")
    assert served.server.open_connections == 1
    wait_for(lambda: served.released == 20)  # the last byte is here before the server is done with the file


def test_head_gives_the_length_alone(served: Served) -> None:
    answer = Transport().get(served.address, "/file", method="HEAD")
    assert answer.headers["content-length"] == str(len(PAYLOAD))
    assert answer.body == b""


def test_descriptor_arrives_and_is_read_only(served: Served) -> None:
    answer = Transport().get(f"unix:{served.unix}", "/file", {"Shoal-Descriptor": "1"})
    (descriptor,) = answer.descriptors
    assert int(answer.headers["shoal-length"]) == len(PAYLOAD)
    assert os.pread(descriptor, 10, 250) == PAYLOAD[250:260]
    os.close(descriptor)


@pytest.mark.parametrize(("path", "error"), [("/changed", OriginChanged), ("/absent", NotCached), ("/bug", ShoalError)])
def test_error_comes_back_as_its_class(served: Served, path: str, error: type[ShoalError]) -> None:
    with pytest.raises(error) as caught:
        Transport().get(served.address, path)
    assert type(caught.value) is error


def test_stream_that_is_too_short_cuts_the_connection(served: Served) -> None:
    buffer = memoryview(bytearray(len(PAYLOAD) + 1))
    with pytest.raises(Interrupted) as caught:
        Transport().read_into(served.address, "/short", 0, len(buffer), buffer)
    assert caught.value.received == len(PAYLOAD)
    assert bytes(buffer[: len(PAYLOAD)]) == PAYLOAD


def test_nobody_there_names_the_address(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(NodeUnavailable, match=f"cannot connect to {address}"):
        Transport().get(address, "/")
    with pytest.raises(NodeUnavailable, match="cannot connect to unix:"):
        Transport().get(f"unix:{tmp_path}/none", "/")


def test_kept_connection_that_the_server_closed_is_replaced(served: Served) -> None:
    transport = Transport()
    assert transport.get(served.address, "/a").body == b"/a"
    port = served.port
    served.run(served.server.close())
    served.server = HttpServer(served.handle, epoch=lambda: 8)
    served.run(served.server.listen_tcp("127.0.0.1", port))
    assert transport.get(served.address, "/b").body == b"/b"


def test_fork_shares_no_connection(served: Served) -> None:
    transport = Transport()
    transport.get(served.address, "/a")
    pid = os.fork()
    if pid == 0:
        ok = all(transport.get(served.address, f"/{i}").body == f"/{i}".encode() for i in range(50))
        os._exit(0 if ok else 1)
    for i in range(50):
        assert transport.get(served.address, f"/{i}").body == f"/{i}".encode()
    assert os.waitpid(pid, 0)[1] == 0


HOSTILE = {
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "bad version": b"GET / HTTP/9.9\r\n\r\n",
    "bad length": b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "body": b"GET / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
    "chunked body": b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "both lengths": b"GET / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "upgrade": b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "bad percent": b"GET /%ff%fe HTTP/1.1\r\n\r\n",
    "many fields": b"GET /?" + b"&".join(b"a%d=1" % i for i in range(50)) + b" HTTP/1.1\r\n\r\n",
    "long url": b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n",
    "long header": b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    "method": b"POST / HTTP/1.1\r\n\r\n",
    "connect": b"CONNECT a:1 HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_request_is_refused_and_harms_nobody(served: Served, name: str) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        try:
            sock.sendall(HOSTILE[name])
            answer = sock.recv(1000)
        except ConnectionError:
            answer = b""  # refused before all of it was read
    assert answer == b"" or answer.split()[1] in (b"400", b"405", b"431"), answer
    assert read(served, 0, 10) == PAYLOAD[:10]


CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
#: What begins a request, and what is then sent of it without end.
ENDLESS = {
    "chunk extension": (CHUNKED + b"5;", b"x" * 1000),
    "chunk extensions": (CHUNKED, b"1;" + b"x" * 1000 + b"\r\nx\r\n"),
    "trailer's value": (CHUNKED + b"0\r\nX: ", b"x" * 1000),
    "trailer's name": (CHUNKED + b"0\r\n", b"x" * 1000),
}


@pytest.mark.parametrize("name", sorted(ENDLESS))
def test_what_frames_a_body_is_bounded_as_a_head_is(served: Served, name: str) -> None:
    served.server._max_body = 1 << 20
    head, more = ENDLESS[name]
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        sock.sendall(head)
        # Twice what a head may have, and one more: a server that reads on would wait for the end.
        for _ in range(2 * http_connection.MAX_HEAD // len(more) + 1):
            sock.sendall(more)
        answer = b""
        while data := sock.recv(4096):
            answer += data
    assert answer.split()[1] == b"431", answer
    assert b"longer than 16384 bytes" in answer and b"Connection: close" in answer


def test_chunk_sizes_and_extensions_within_bounds_are_served(served: Served) -> None:
    served.server._max_body = 1 << 20
    body = b"1000;name=value\r\n" + b"x" * 4096 + b"\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        for _ in range(3):  # each counts for itself
            sock.sendall(CHUNKED.replace(b"/", b"/a", 1) + body * 200 + b"0\r\n\r\n")
            assert sock.recv(1000).endswith(b"\r\n\r\n/a")


def test_half_a_request_and_a_vanished_reader_leave_nothing(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"GET /fi")
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"GET /file HTTP/1.1\r\n\r\n" * 3)
        sock.recv(10)
    assert read(served, 0, 10) == PAYLOAD[:10]
    served.run(served.server.close())
    assert served.server.open_connections == 0


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        sock.sendall(b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\nGET /3 HTTP/1.1\r\nConnection: close\r\n\r\n")
        data = b""
        while more := sock.recv(4096):
            data += more
    assert [data.index(b"/1"), data.index(b"/2"), data.index(b"/3")] == sorted(
        [data.index(b"/1"), data.index(b"/2"), data.index(b"/3")]
    )


def test_idle_connection_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "IDLE_TIMEOUT_S", 0.01)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    ("header", "start", "end", "partial"),
    [
        (None, 0, 100, False),
        ("bytes=0-0", 0, 1, True),
        ("bytes=10-", 10, 100, True),
        ("bytes=-10", 90, 100, True),
        ("bytes=-1000", 0, 100, True),
        ("bytes=50-1000", 50, 100, True),
        ("bytes=5-4", 0, 100, False),
        ("bytes=a-b", 0, 100, False),
        ("bytes=1-2,5-6", 0, 100, False),
        ("bytes=", 0, 100, False),
        ("bytes=٣-٤", 0, 100, False),
        ("lines=1-2", 0, 100, False),
    ],
)
def test_range_header(header: str | None, start: int, end: int, partial: bool) -> None:
    assert ByteRange.parse(header, 100) == ByteRange(start, end, partial)


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_range_past_the_end(served: Served, header: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        ByteRange.parse(header, 100)
    with pytest.raises(InvalidRequest, match="begins past the end"):
        Transport().get(served.address, "/file", {"Range": f"bytes={len(PAYLOAD)}-"})


def test_unknown_class_falls_back_to_its_status() -> None:
    from shoal.wire import http_errors

    assert type(http_errors.from_response(404, "FromTheFuture", "x")) is NotFound
    assert type(http_errors.from_response(418, "os", "x")) is ShoalError


def test_a_hole_within_a_range_is_seen(tmp_path: Path) -> None:
    length, end = http_connection.SENDFILE_STRIDE, 65536
    path = tmp_path / "file"
    path.write_bytes(bytes(length))
    with path.open("rb") as file:
        fd = file.fileno()
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if http_connection.is_resident(fd, 0, 1):
            pytest.skip("this file system does not let go of pages")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        for start in (0, length - end):
            os.pread(fd, end, start)
            assert http_connection.is_resident(fd, start, end)
        assert not http_connection.is_resident(fd, 0, length)
        os.pread(fd, length, 0)
        assert http_connection.is_resident(fd, 0, length)
