"""More than a node can bear: slow readers by the thousand, connections without end, no descriptors left.

The node holds a bounded amount of memory, tells who comes too many to come back later, and serves the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal import liveness
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import Overloaded
from shoal.filesystem import ShoalFileSystem
from shoal.transport import Transport
from shoal.wire import batch, http_connection, http_server
from shoal.wire.batch import ShardRange
from shoal.wire.http_messages import Request, Response
from shoal.wire.http_server import HttpServer
from shoal_cachenode import batches, passing, recent
from tests.support import raw_http
from tests.support.waiting import wait_for

READERS = 1000
SIZE_BYTES = 12 << 20
DATA = random.Random(11).randbytes(SIZE_BYTES)
#: What a node may hold beyond what it began with: its bounds for slow readers, and a little for each connection.
BOUND_BYTES = passing.PASSING_BYTES + recent.RECENT_BYTES + batches.BATCHES_BYTES + READERS * (64 << 10)


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Enough of them for both ends of the connections; the node's own process takes what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def slow_readers(port: int, requests: list[bytes]) -> Iterator[dict[int, int]]:
    """A connection for each request, that asks and takes a trickle of the answer.

    Gives the statuses, once there is one of each and those that are served have taken something ten times.
    """
    socks: list[socket.socket] = []
    statuses: dict[int, int] = {}
    rounds = 0
    stop = threading.Event()

    def trickle() -> None:
        nonlocal rounds
        while not stop.wait(0.2):
            for number, sock in enumerate(socks):
                with contextlib.suppress(OSError):
                    found = sock.recv(512, socket.MSG_DONTWAIT)
                    if number not in statuses:
                        statuses[number] = int(found.split()[1])
            rounds += len(statuses) == len(socks)

    thread = threading.Thread(target=trickle, daemon=True)
    try:
        for request in requests:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(60)
            sock.connect(("127.0.0.1", port))
            socks.append(sock)
            sock.sendall(request)
        thread.start()
        wait_for(lambda: rounds >= 10, 60)
        yield statuses
    finally:
        stop.set()
        for sock in socks:
            sock.close()
        if thread.is_alive():
            thread.join()


def get(target: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def metric(cluster: DevCluster, name: str) -> float:
    lines = Transport().get(cluster.node_endpoints[0][7:], "/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def peak_rss(pid: int) -> int:
    """Most bytes of memory that a process has had."""
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", (Path("/proc") / str(pid) / "status").read_text(), re.MULTILINE)
    return int(kib) << 10


LONG = pytest.mark.long  # what is read through and in batches takes a minute


@pytest.mark.parametrize("kind", ["sealed", pytest.param("through", marks=LONG), pytest.param("batches", marks=LONG)])
@pytest.mark.usefixtures("descriptors")
def test_a_thousand_slow_readers(tmp_path: Path, kind: str) -> None:
    """Each asks for megabytes and takes a trickle; from a file, from the origin of a full node, or in batches."""
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "a.bin").write_bytes(DATA)
    capacity = "1MiB" if kind == "through" else "64MiB"
    with DevCluster(nodes=1, data_dir=tmp_path / "cluster", capacity=capacity) as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", str(tmp_path / "origin"), shard_size=0, replicas=1, storage_options="{}")
            digest = control.dataset("set").snapshot
        fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
        assert fs.cat_file("set/a.bin") == DATA
        node = psutil.Process(cluster.nodes[0].pid)
        port = int(cluster.node_endpoints[0].rpartition(":")[2])
        request = get(f"/v1/snapshots/{digest}/rows/0/shards/0")
        if kind == "batches":
            body = batch.encode([ShardRange(0, 0, i * 40_000, 32_768) for i in range(256)])
            head = f"POST {batch.target(digest)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            request = head.encode() + body
        before = node.memory_info().rss
        with contextlib.suppress(OSError):  # not here: then the peak is that of its whole life, which is no less
            (Path("/proc") / str(node.pid) / "clear_refs").write_text("5")  # proc(5): counted from now on
        with slow_readers(port, [request] * READERS) as statuses:
            began = time.monotonic()
            assert set(statuses.values()) <= {200, 503}, "served, or told to come back"
            refused = sum(status == 503 for status in statuses.values())
            assert (refused > 0) == (kind == "batches"), "a batch holds more than the others, so fewer fit"
            assert fs.cat_file("set/a.bin") == DATA, "another reader is served"
            assert time.monotonic() - began < 60, "and does not wait for the slow ones"
            most = peak_rss(node.pid)
        print(f"\n{kind}: {refused} refused, {before >> 20} MiB before, {most >> 20} MiB at most")
        assert most - before < BOUND_BYTES
        wait_for(lambda: metric(cluster, "shoal_node_connections") <= 4, 60)
        assert fs.cat_file("set/a.bin") == DATA


# -- the server by itself --------------------------------------------------------------------------------------------


class Served:
    """A server in a thread whose handler answers "/fast" at once, and "/slow" when it is let go."""

    def __init__(self, **limits: Any) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.go = threading.Event()
        self.server = self.run(self._make(limits))
        self.port = self.run(self.server.listen_tcp("127.0.0.1", 0))

    async def _make(self, limits: dict[str, Any]) -> HttpServer:
        return HttpServer(self._handle, epoch=lambda: 1, **limits)

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    async def _handle(self, request: Request) -> Response:
        if request.path == "/slow":
            await asyncio.to_thread(self.go.wait, 20)
        if request.path == "/large":
            return Response(200, {}, bytes(64 << 20))
        return Response(200, {}, b"done")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def close(self) -> None:
        self.go.set()
        self.run(self.server.close())
        assert self.server.open_connections == 0
        assert self.server._bodies.held_bytes == 0
        assert not self.server._idle
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture
def serve() -> Iterator[Any]:
    made: list[Served] = []

    def make(**limits: Any) -> Served:
        made.append(Served(**limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ask(sock: socket.socket, target: str = "/fast") -> bytes:
    sock.sendall(get(target))
    return sock.recv(65536)


def test_an_idle_connection_makes_room_for_a_newcomer(serve: Any) -> None:
    served = serve(max_connections=3)
    socks = [served.connect() for _ in range(3)]
    for sock in socks:
        assert ask(sock).startswith(b"HTTP/1.1 200")
    newcomer = served.connect()
    assert ask(newcomer).startswith(b"HTTP/1.1 200")
    assert socks[0].recv(1) == b"", "the one that was idle for longest"
    assert ask(socks[1]).startswith(b"HTTP/1.1 200")
    assert served.server.overloaded == 0


def test_where_nobody_is_idle_a_newcomer_is_told_at_once(serve: Any) -> None:
    served = serve(max_connections=2)
    busy = [served.connect() for _ in range(2)]
    for sock in busy:
        sock.sendall(get("/slow"))
    wait_for(lambda: not served.server._idle and served.server.open_connections == 2)
    with pytest.raises(Overloaded, match="all of its 2 connections in use"):
        Transport().get(f"127.0.0.1:{served.port}", "/fast")
    (answer,) = raw_http.parse(raw_http.exchange(served.port, b""))
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    served.go.set()
    assert all(sock.recv(65536).endswith(b"done") for sock in busy)
    wait_for(lambda: len(served.server._idle) == 2)
    assert Transport().get(f"127.0.0.1:{served.port}", "/fast").body == b"done"


def test_overloaded_is_alive(serve: Any) -> None:
    """A node with no connection left tells probes so too: it is busy, and not one whose drive hangs."""
    served = serve(max_connections=1)
    address = f"127.0.0.1:{served.port}"
    with served.connect() as busy:
        busy.sendall(get("/slow"))
        wait_for(lambda: not served.server._idle and served.server.open_connections == 1)
        with pytest.raises(Overloaded):
            Transport().get(address, liveness.TARGET)
        assert liveness.verdict_of(Transport(), address) == ""
        served.go.set()


@pytest.mark.parametrize("others", [http_server.MAX_REFUSALS, 0], ids=["some are refused", "none more are refused"])
def test_how_a_full_server_fares_is_told(serve: Any, monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    monkeypatch.setattr(http_server, "MAX_REFUSALS", others)
    served = serve(max_connections=1)
    with served.connect() as busy:
        busy.sendall(get("/slow"))
        wait_for(lambda: not served.server._idle and served.server.open_connections == 1)
        for path in sorted(http_server.ALWAYS_ANSWERED):
            # Where no more are refused, it has to be with the connection: it may come a moment later.
            wait_for(lambda path=path: raw_http.exchange(served.port, get(path)).endswith(b"done"))
        before = served.server.overloaded
        assert b"done" not in raw_http.exchange(served.port, get("/healthzz"))
        assert served.server.overloaded == before + 1
        served.go.set()


def test_who_asks_a_full_server_how_it_fares_opens_no_way_in(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a flood that asks nothing, a probe is answered; then the flood is turned away as before."""
    monkeypatch.setattr(http_server, "MAX_REFUSALS", 1)
    monkeypatch.setattr(http_server, "MAX_ASKERS", 2)
    monkeypatch.setattr(http_server, "REFUSAL_S", 60.0)
    monkeypatch.setattr(http_connection, "LINGER_S", 60.0)
    served = serve(max_connections=1)
    with contextlib.ExitStack() as flood:
        busy = flood.enter_context(served.connect())
        busy.sendall(get("/slow"))
        wait_for(lambda: not served.server._idle and served.server.open_connections == 1)
        flood.enter_context(served.connect())  # which is waited for, as it asks nothing
        wait_for(lambda: served.server._refusals == 1)
        for _ in range(http_server.MAX_ASKERS):
            asking = flood.enter_context(served.connect())
            asking.sendall(get("/healthz"))
            assert asking.recv(65536).endswith(b"done")
            assert flood.enter_context(served.connect()).recv(1) == b"", "no more of those that ask nothing"
        asking = flood.enter_context(served.connect())
        with contextlib.suppress(ConnectionError):
            asking.sendall(get("/healthz"))
            assert asking.recv(1) == b"", "and there is an end to those that ask, too"
        assert served.server._refusals == 1 + http_server.MAX_ASKERS
        served.go.set()


def test_a_flood_of_connections_does_not_keep_others_out(serve: Any) -> None:
    served = serve(max_connections=8)
    flood = [served.connect() for _ in range(200)]
    assert Transport().get(f"127.0.0.1:{served.port}", "/fast").body == b"done"
    assert served.server.open_connections <= 12
    for sock in flood:
        sock.close()


@pytest.mark.parametrize("start", [b"GET /", get("/fast")[:-4], b"POST / HTTP/1.1\r\nContent-Length: 99\r\n\r\nab"])
def test_a_request_that_comes_too_slowly_is_refused(serve: Any, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(http_connection, "REQUEST_TIMEOUT_S", 0.3)
    served = serve(max_body=100)
    with served.connect() as sock:
        sock.sendall(start)
        sock.settimeout(0.02)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while not answer:  # a byte now and then does not help
                sock.sendall(b"X")
                with contextlib.suppress(TimeoutError):
                    answer = sock.recv(65536)
    assert answer == b"" or b" 408 " in answer.partition(b"\r\n")[0]


def test_a_reader_that_takes_nothing_is_cut_off_and_one_that_takes_little_is_not(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "SEND_STALL_TIMEOUT_S", 0.5)
    served = serve()
    with served.connect() as stalled, served.connect() as slow:
        for sock in (stalled, slow):
            sock.sendall(get("/large"))
        taken = 0
        while served.server.open_connections == 2:
            taken += len(slow.recv(256 << 10))
            time.sleep(0.05)  # no wait for anything: that is how slow it is
        assert taken < 64 << 20, "the slow one is far from its end"
        while more := slow.recv(1 << 20):
            taken += len(more)
            if taken >= 64 << 20:
                break
        assert taken >= 64 << 20


def test_bodies_on_their_way_in_are_bounded(serve: Any) -> None:
    served = serve(max_body=1000)
    served.server._bodies.limit_bytes = 2500
    head = b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"
    held = [served.connect() for _ in range(3)]
    for sock in held[:2]:
        sock.sendall(head + bytes(900))
    wait_for(lambda: served.server._bodies.held_bytes == 1800)
    held[2].sendall(head + bytes(900))
    assert b" 503 " in held[2].recv(65536).partition(b"\r\n")[0]
    held[0].sendall(bytes(100))
    assert held[0].recv(65536).endswith(b"done")
    held[1].close()
    wait_for(lambda: served.server._bodies.held_bytes == 0)


def test_where_no_descriptor_is_left_the_server_does_not_ask_again_at_once(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "NO_DESCRIPTOR_WAIT_S", 3600.0)
    served = serve()
    asked = 0

    async def none_left(listener: socket.socket) -> None:
        nonlocal asked
        asked += 1
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(served.loop, "sock_accept", none_left)
    with served.connect():  # what the server waits for already is the last one that it gets
        wait_for(lambda: asked == 1)
        for _ in range(100):
            served.run(asyncio.sleep(0))
        assert asked == 1, "it would spin"


def test_without_descriptors_the_server_waits_and_then_goes_on(tmp_path: Path) -> None:
    """A node that may have few: idle connections give theirs back, requests are told, nothing dies."""
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "a.bin").write_bytes(DATA[:100_000])
    with DevCluster(nodes=1, data_dir=tmp_path / "cluster", capacity="64MiB") as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", str(tmp_path / "origin"), shard_size=0, replicas=1, storage_options="{}")
        fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
        assert fs.cat_file("set/a.bin") == DATA[:100_000]
        node = psutil.Process(cluster.nodes[0].pid)
        open_now = node.num_fds()
        node.rlimit(psutil.RLIMIT_NOFILE, (open_now + 10, node.rlimit(psutil.RLIMIT_NOFILE)[1]))
        port = int(cluster.node_endpoints[0].rpartition(":")[2])
        flood = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        log = cluster.nodes[0].log_path
        wait_for(lambda: "no connection can be accepted" in log.read_text())
        assert fs.cat_file("set/a.bin", 10, 20) == DATA[10:20]
        for sock in flood:
            sock.close()
        wait_for(lambda: node.num_fds() <= open_now + 2)
        assert fs.cat_file("set/a.bin") == DATA[:100_000]
        assert not cluster.deaths.qsize()
