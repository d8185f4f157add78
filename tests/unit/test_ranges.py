"""Many ranges at once against plain slices, whatever is cached where; and batches that are none, on the wire."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal import memory, ranges, reader, shards
from shoal.errors import InvalidRequest, NotFound, OriginUnavailable
from shoal.filesystem import ShoalFileSystem
from shoal.maps import Maps
from shoal.wire import batch
from shoal.wire.batch import ShardRange
from shoal_cachenode import batches
from tests.support.minicluster import MiniCluster

PART, SHARD = 16, 64
SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 130, 200)


def content(size_bytes: int, seed: int = 0) -> bytes:
    return bytes((i * 37 + seed * 101) % 251 for i in range(size_bytes))


OBJECTS = {f"{size}": content(size, size) for size in SIZES}
SHARDS = [(row, index) for row, size in enumerate(SIZES) for index in range(shards.shard_count(size, SHARD))]


class Requests:
    """What a client asks for from now on: (method, path) in no certain order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fs: ShoalFileSystem) -> None:
        self.made: list[tuple[str, str]] = []
        get = fs.cluster.transport.get

        def counted(address: str, target: str, *args: Any, **kwargs: Any) -> Any:
            self.made.append((kwargs.get("method", "GET"), target))
            return get(address, target, *args, **kwargs)

        monkeypatch.setattr(fs.cluster.transport, "get", counted)

    def count(self, method: str) -> int:
        return sum(each == method for each, _ in self.made)


def settle(cluster: MiniCluster) -> None:
    """Wait until everything that was begun is sealed."""
    for node in cluster.nodes:
        cluster.run(node.fills.settle())


def cool(cluster: MiniCluster, *, but: frozenset[bytes] = frozenset()) -> None:
    """Let the nodes hold nothing but the sealed shards `but`."""
    settle(cluster)
    for node in cluster.nodes:
        for key in {*node.store.sealed_sizes()} - but | {*node.store.idle_partials()}:
            node.store.evict(key)
        assert node.store.sealed_sizes().keys() <= but and not node.store.reserved_sizes()


def put(cluster: MiniCluster, fs: ShoalFileSystem, row: int, index: int, parts: set[int] | None) -> None:
    """Let a shard's first owner hold some parts of it, as a killed fill leaves them; None: all of it, sealed."""
    snapshot = cluster.snapshot
    plain = cluster.origin.objects[snapshot.path(row)]
    owner = reader.ObjectReader(fs.cluster, snapshot, cluster.replicas, row, verify=True).first_owner(index)
    store = next(node.store for node in cluster.nodes if node.id == owner.id)
    key = shards.shard_key(snapshot.key(row), index)
    if store.is_sealed(key):
        return
    partial = store.begin(key, shards.shard_length(len(plain), snapshot.shard_size, index))
    for part in range(len(partial.header.checksums)):
        if parts is None or part in parts:
            first, last = partial.header.part_range(part)
            offset = index * snapshot.shard_size
            partial.write_part(part, plain[offset + first : offset + last])
    if partial.header.is_complete:
        partial.seal()
    else:
        store.suspend(partial)


# Against plain slices


@pytest.fixture(scope="module", params=[1, 3], ids=["one-node", "three-nodes"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    directory = tmp_path_factory.mktemp("c")
    with MiniCluster(directory, OBJECTS, nodes=request.param, part_size=PART, shard_size=SHARD) as cluster:
        assert [cluster.snapshot.path(row) for row in range(len(SIZES))] == sorted(OBJECTS)
        yield cluster


ROWS = {path: row for row, path in enumerate(sorted(OBJECTS))}
KEYS = [(ROWS[str(SIZES[i])], index) for i, index in SHARDS]
POSITION = st.none() | st.integers(-210, 210)
WANTED = st.lists(st.tuples(st.sampled_from(sorted(OBJECTS)), POSITION, POSITION), max_size=14)
STATES = st.lists(
    st.none() | st.just(set[int]()) | st.sets(st.integers(0, 3)), min_size=len(SHARDS), max_size=len(SHARDS)
)


@contextmanager
def bounds(tight: bool) -> Iterator[None]:
    """The real bounds, with which all of these objects are small; or such as are met all the time."""
    with pytest.MonkeyPatch.context() as patch:
        if tight:
            patch.setattr(batch, "MAX_RANGES", 3)
            patch.setattr(batch, "MAX_BYTES", 90)
            patch.setattr(batch, "MAX_RANGE_BYTES", 40)
            patch.setattr(ranges, "MAP_FROM", 60)
            patch.setattr(batches, "RUN_BYTES", 24)
            patch.setattr(batches, "RUN_RANGES", 2)
        yield


@pytest.mark.parametrize("tight", [False, True])
@given(wanted=WANTED, states=STATES, mapped=st.sets(st.sampled_from(sorted(OBJECTS)), max_size=2))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ranges_over_any_cached_parts(
    cluster: MiniCluster,
    tight: bool,
    wanted: list[tuple[str, int | None, int | None]],
    states: list[Any],
    mapped: set[str],
) -> None:
    paths = [f"set/{path}" for path, _, _ in wanted]
    starts, ends = [start for _, start, _ in wanted], [end for _, _, end in wanted]
    expected = [OBJECTS[path][start:end] for path, start, end in wanted]
    sealed = {
        shards.shard_key(cluster.snapshot.key(row), index)
        for (row, index), parts in zip(KEYS, states, strict=True)
        if parts is None
    }
    for local in (False, True):
        fs = cluster.filesystem(local=local)
        cool(cluster, but=frozenset(sealed))
        for (row, index), parts in zip(KEYS, states, strict=True):
            if parts is None or parts:
                put(cluster, fs, row, index, parts)
        if fs.cluster.local is not None:
            fs.cluster.local.maps = Maps()
            for path in mapped:
                fs.open_buffers(f"set/{path}")
        with bounds(tight):
            assert fs.cat_ranges(paths, starts, ends, on_error="raise") == expected


@pytest.mark.parametrize("local", [False, True])
def test_ranges_of_one_start_or_end(cluster: MiniCluster, local: bool) -> None:
    fs = cluster.filesystem(local=local)
    assert fs.cat_ranges(["set/200", "set/17"], 2, None) == [OBJECTS["200"][2:], OBJECTS["17"][2:]]
    assert fs.cat_ranges(["set/200", "set/17"], [3, -4], -1) == [OBJECTS["200"][3:-1], OBJECTS["17"][-4:-1]]
    with pytest.raises(ValueError, match="of one length"):
        fs.cat_ranges(["set/200"], [1, 2], [3])
    with pytest.raises(NotImplementedError):
        fs.cat_ranges(["set/200"], [1], [3], max_gap=5)


@pytest.mark.parametrize("local", [False, True])
def test_errors_are_each_ranges_own(cluster: MiniCluster, local: bool) -> None:
    fs = cluster.filesystem(local=local)
    fs.cat_file("set/200")
    cool(cluster, but=frozenset(k for node in cluster.nodes for k in node.store.sealed_sizes()))
    paths, starts, ends = ["set/nope", "set/200", "none/x", "set/17", "set/200"], [0, 5, 0, 3, 190], [5, 9, 1, 7, 300]
    first, second, third, fourth, fifth = fs.cat_ranges(paths, starts, ends)
    assert isinstance(first, NotFound) and isinstance(third, FileNotFoundError)
    assert [second, fourth, fifth] == [OBJECTS["200"][5:9], OBJECTS["17"][3:7], OBJECTS["200"][190:]]
    with pytest.raises(NotFound, match="set/nope"):
        fs.cat_ranges(paths, starts, ends, on_error="raise")


@pytest.mark.parametrize("local", [False, True])
def test_origin_that_fails_harms_only_what_is_cold(tmp_path: Path, local: bool) -> None:
    objects = {"warm": content(500), "cold": content(500, 1)}
    with MiniCluster(tmp_path, objects, part_size=PART, shard_size=SHARD) as cluster:
        fs = cluster.filesystem(local=local)
        fs.cat_file("set/warm")
        settle(cluster)
        cluster.origin.is_down = True
        paths, starts = ["set/warm", "set/cold"] * 8, [30 * n for n in range(16)]
        found = fs.cat_ranges(paths, starts, [s + 20 for s in starts])
        for path, start, each in zip(paths, starts, found, strict=True):
            if path == "set/warm":
                assert each == objects["warm"][start : start + 20]
            else:
                assert isinstance(each, OriginUnavailable)
        with pytest.raises(OriginUnavailable, match="the origin is down"):
            fs.cat_ranges(paths, starts, [s + 20 for s in starts], on_error="raise")
        cluster.origin.is_down = False
        assert fs.cat_ranges(["set/cold"], [100], [120]) == [objects["cold"][100:120]]


# Requests


def test_thousands_of_ranges_are_a_request_an_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {f"{n}": content(3000, n) for n in range(6)}
    with MiniCluster(tmp_path, plain, nodes=3, part_size=256, shard_size=512) as cluster:
        fs = cluster.filesystem()
        for path in plain:
            fs.cat_file(f"set/{path}")
        settle(cluster)
        requests = Requests(monkeypatch, fs)
        wanted = [(f"{n % 6}", (n * 64) % 2944) for n in range(5000)]
        found = fs.cat_ranges([f"set/{p}" for p, _ in wanted], [s for _, s in wanted], [s + 60 for _, s in wanted])
        assert found == [plain[path][start : start + 60] for path, start in wanted]
        crossing = sum(start // 512 != (start + 59) // 512 for _, start in wanted)
        assert crossing == 0
        assert requests.made == [("POST", batch.target(cluster.snapshot.digest))] * 3
        requests.made.clear()
        again = list(product(plain, range(0, 2990, 2)))[:8970]
        fs.cat_ranges([f"set/{p}" for p, _ in again], [s for _, s in again], [s + 1 for _, s in again])
        assert requests.count("POST") == 3 and len(requests.made) == 3


def test_bounds_cut_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = content(3000)
    with MiniCluster(tmp_path, {"o": plain}, part_size=256, shard_size=4096) as cluster:
        fs = cluster.filesystem()
        fs.cat_file("set/o")
        settle(cluster)
        requests = Requests(monkeypatch, fs)

        def read(starts: Sequence[int], length: int) -> tuple[int, int]:
            requests.made.clear()
            found = fs.cat_ranges(["set/o"] * len(starts), list(starts), [s + length for s in starts])
            assert found == [plain[s : s + length] for s in starts]
            return requests.count("POST"), requests.count("GET")

        monkeypatch.setattr(batch, "MAX_RANGES", 100)
        assert read(range(100), 10) == (1, 0)
        assert read(range(101), 10) == (2, 0)
        monkeypatch.setattr(batch, "MAX_BYTES", 500)
        assert read(range(50), 10) == (1, 0)
        assert read(range(51), 10) == (2, 0)
        monkeypatch.setattr(batch, "MAX_RANGE_BYTES", 50)
        assert read([1, 2], 50) == (1, 0)
        assert read([1, 2], 51) == (0, 2)


def test_long_ranges_and_short_ones_by_the_real_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = content(600_001)
    with MiniCluster(tmp_path, {"o": plain}, nodes=3, part_size=4096, shard_size=400_000) as cluster:
        fs = cluster.filesystem()
        wanted = [(0, 262_144), (1, 262_146), (100, 200), (399_990, 400_010), (0, 600_001), (500_000, 700_000), (7, 7)]
        for _ in "cold", "warm":
            found = fs.cat_ranges(["set/o"] * len(wanted), [s for s, _ in wanted], [e for _, e in wanted])
            assert found == [plain[s:e] for s, e in wanted]
            settle(cluster)
        requests = Requests(monkeypatch, fs)
        fs.cat_ranges(["set/o"] * len(wanted), [s for s, _ in wanted], [e for _, e in wanted])
        # 1 and 6 may share an owner; the second is too long, the fourth and fifth are over two shards each.
        assert requests.count("POST") <= 2 and requests.count("GET") == 1 + 2 + 2


def test_local_ranges_of_small_shards_are_batched_and_those_of_large_ones_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"small": content(1000), "large": content(2000, 1)}
    with MiniCluster(tmp_path, plain, part_size=256, shard_size=4096) as cluster:
        fs = cluster.filesystem(local=True)
        for path in plain:
            cluster.filesystem().cat_file(f"set/{path}")
            fs.info(f"set/{path}")
        settle(cluster)
        requests = Requests(monkeypatch, fs)
        monkeypatch.setattr(ranges, "MAP_FROM", 2000)

        def read(path: str) -> None:
            requests.made.clear()
            found = fs.cat_ranges([f"set/{path}"] * 900, list(range(900)), [n + 20 for n in range(900)])
            assert found == [plain[path][n : n + 20] for n in range(900)]

        read("small")
        assert requests.made == [("POST", batch.target(cluster.snapshot.digest))]
        read("large")
        assert (
            requests.count("POST") == 0
            and 1 <= requests.count("GET") <= reader.run_parallel.__globals__["MAX_PARALLEL"] + 1
        )
        read("large")
        assert requests.made == []


def test_node_that_dies_within_a_batch_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that are sealed have been sent, and a cold one is awaited, when the node goes."""
    plain = {f"{n}": content(100, n) for n in range(30)}
    with MiniCluster(tmp_path, plain, nodes=3, part_size=PART, shard_size=SHARD) as cluster:
        fs = cluster.filesystem(node=0)
        paths = sorted(plain)
        victim = cluster.nodes[1]
        owned = [path for path in paths if fs._reader(f"set/{path}").first_owner(0).id == victim.id]
        assert len(owned) > 2
        for path in paths:
            if path != owned[-1]:
                fs.cat_file(f"set/{path}")
        settle(cluster)
        read, died = cluster.origin.read, threading.Event()

        def deadly(path: str, version: str, start: int, end: int) -> bytes:
            if not died.is_set():
                died.set()
                cluster.stop_node(1)
            return read(path, version, start, end)

        monkeypatch.setattr(cluster.origin, "read", deadly)
        requests = Requests(monkeypatch, fs)
        found = fs.cat_ranges([f"set/{path}" for path in paths], [3] * 30, [50] * 30, on_error="raise")
        assert found == [plain[path][3:50] for path in paths]
        # Three owners, and what the dead one owned from one or both of the others.
        assert died.is_set() and 4 <= requests.count("POST") <= 5


# One range over several connections


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 2 KiB and more from other nodes come over up to four connections, as on a machine of 16 processors."""
    monkeypatch.setattr(reader, "MAX_STREAMS", 4)
    monkeypatch.setattr(reader, "STREAM_BYTES", 1024)
    monkeypatch.setattr(reader, "PART_SIZE", 256)


@pytest.mark.usefixtures("streams")
def test_long_piece_over_several_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = content(9_000)
    with MiniCluster(tmp_path, {"o": plain}, nodes=2, part_size=256, shard_size=8192) as cluster:
        fs = cluster.filesystem()
        requests = Requests(monkeypatch, fs)
        for start, end in ((0, 9_000), (1, 8_999), (255, 7_000), (256, 2_304), (256, 2_305), (5_000, 9_000)):
            requests.made.clear()
            assert fs.cat_file("set/o", start, end) == plain[start:end]
            assert fs._reader("set/o").read_buffer(start, end).to_pybytes() == plain[start:end]
            into = bytearray(end - start)
            with fs.open("set/o") as file:
                file.seek(start)
                assert file.readinto(into) == end - start
            assert into == plain[start:end]
            assert requests.count("GET") >= 2 * 3


@pytest.mark.usefixtures("streams")
def test_connections_of_one_piece_fill_one_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them is first; the first one to allocate is held up until another does, or nobody does."""
    plain = content(4_096)
    allocate, another, calls = memory.allocate, threading.Event(), []

    def slow(length: int) -> pa.Buffer:
        calls.append(length)
        if len(calls) > 1:
            another.set()
        another.wait(0.1)
        return allocate(length)

    with MiniCluster(tmp_path, {"o": plain}, part_size=256, shard_size=8192) as cluster:
        fs = cluster.filesystem()
        fs.cat_file("set/o")
        settle(cluster)
        monkeypatch.setattr(memory, "allocate", slow)
        assert fs.open_buffer("set/o").to_pybytes() == plain
        assert calls == [4_096]


# Batches on the wire


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    with MiniCluster(tmp_path_factory.mktemp("w"), OBJECTS, part_size=PART, shard_size=SHARD) as cluster:
        yield cluster


Ask = Callable[..., tuple[int, Mapping[str, str], bytes]]


@pytest.fixture
def ask(node: MiniCluster) -> Iterator[Ask]:
    """Ask the node; whatever it answers, it answers the next request and another connection as ever."""
    host, port = node.nodes[0].address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)

    def ask(method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Mapping[str, str], bytes]:
        connection.request(method, path, body, **options)
        response = connection.getresponse()
        answer = response.status, dict(response.getheaders()), response.read()
        connection.request("GET", "/healthz")
        health = connection.getresponse()
        assert (health.status, health.read()) == (200, b"ok\n")
        return answer

    yield ask
    connection.close()
    assert node.filesystem().cat_ranges(["set/200"], [3], [9]) == [OBJECTS["200"][3:9]]


@pytest.fixture
def target(node: MiniCluster) -> str:
    return batch.target(node.snapshot.digest)


ROW = ROWS["200"]
GOOD = [ShardRange(ROW, 0, 16, 16), ShardRange(ROW, 3, 1, 7), ShardRange(ROWS["17"], 0, 16, 1)]
GOOD_BYTES = OBJECTS["200"][16:32] + OBJECTS["200"][193:200] + OBJECTS["17"][16:]


def body_of(answer: bytes) -> bytes:
    return answer[: -batch.SUM_BYTES * len(GOOD)]


def test_batch_of_any_framing(ask: Ask, target: str) -> None:
    body = batch.encode(GOOD)
    for _ in "cold", "warm":
        assert body_of(ask("POST", target, body)[2]) == GOOD_BYTES
    pieces = iter([body[:1], body[1:17], body[17:]])
    status, headers, answer = ask("POST", target, pieces, encode_chunked=True)
    assert (status, body_of(answer)) == (200, GOOD_BYTES) and int(headers["Content-Length"]) == len(answer)


def test_batch_that_trickles_in_with_the_next_request_behind_it(node: MiniCluster, target: str) -> None:
    body = batch.encode(GOOD)
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    request = head + body + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    host, port = node.nodes[0].address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in range(0, len(request), 3):
            sock.sendall(request[byte : byte + 3])
        answer = b""
        while data := sock.recv(1 << 16):
            answer += data
    assert answer.count(b"HTTP/1.1 200 ") == 2 and GOOD_BYTES in answer and answer.endswith(b"ok\n")


def test_empty_half_and_oversize_batches(ask: Ask, target: str) -> None:
    good = batch.encode(GOOD)
    long = batch.MAX_RANGE_BYTES
    for body, sentence in (
        (b"", b"not 0 bytes"),
        (good[:-1], b"not 47 bytes"),
        (good + b"x", b"not 49 bytes"),
        (batch.encode([ShardRange(ROW, 0, 0, 0)]), b"1 to 262144 bytes"),
        (batch.encode([*GOOD, ShardRange(ROW, 0, 0, long + 1)]), b"1 to 262144 bytes"),
        (batch.encode([ShardRange(ROW, 0, 0, long)] * (batch.MAX_BYTES // long + 1)), b"ask in several"),
        (batch.encode([ShardRange(ROW, 0, 0, 2**32 - 1)] * 8), b"ask in several"),
        (batch.encode([*GOOD, ShardRange(ROW, 0, 60, 5)]), b"has 64 bytes: a range ends past them"),
        (batch.encode([*GOOD, ShardRange(ROW, 3, 2**32 - 1, 1)]), b"has 8 bytes: a range ends past them"),
    ):
        status, headers, answer = ask("POST", target, body)
        assert (status, headers["Shoal-Error"]) == (400, "InvalidRequest")
        assert sentence in answer and answer.count(b"\n") == 1


def test_most_ranges_and_one_more() -> None:
    most = [ShardRange(0, 0, 0, 1)] * batch.MAX_RANGES
    assert batch.decode(batch.encode(most)) == most
    assert len(batch.encode(most)) == batch.MAX_REQUEST_BYTES
    with pytest.raises(InvalidRequest, match="at most 8192 ranges"):
        batch.decode(batch.encode([*most, most[0]]))


def test_largest_body_is_taken_and_a_larger_one_is_413(node: MiniCluster, ask: Ask, target: str) -> None:
    most = batch.encode([ShardRange(ROW, 0, 0, 1)] * batch.MAX_RANGES)
    status, _, answer = ask("POST", target, most)
    assert (status, len(answer)) == (200, 9 * batch.MAX_RANGES)
    host, port = node.nodes[0].address.split(":")
    for chunked in (False, True):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        body = iter([most, most[:16]]) if chunked else most + most[:16]
        connection.request("POST", target, body, encode_chunked=chunked)
        response = connection.getresponse()
        assert (response.status, response.getheader("Shoal-Error")) == (413, "InvalidRequest")
        assert response.getheader("Connection") == "close" and b"at most 131072 bytes" in response.read()
        connection.close()


def test_batch_of_what_is_not_there(ask: Ask, target: str, node: MiniCluster) -> None:
    for missing in (ShardRange(len(SIZES), 0, 0, 1), ShardRange(2**32 - 1, 0, 0, 1), ShardRange(ROW, 4, 0, 1),
                    ShardRange(ROWS["0"], 0, 0, 1)):  # fmt: skip
        status, headers, _ = ask("POST", target, batch.encode([*GOOD, missing]))
        assert (status, headers["Shoal-Error"]) == (404, "NotFound")
    status, headers, _ = ask("POST", batch.target("0" * 32), batch.encode(GOOD))
    assert (status, headers["Shoal-Error"]) == (404, "SnapshotNotFound")
    assert ask("POST", batch.target("nonsense"), batch.encode(GOOD))[0] == 400


def test_only_post_is_for_batches_and_batches_only_for_post(ask: Ask, target: str, node: MiniCluster) -> None:
    for method in ("GET", "HEAD"):
        status, headers, _ = ask(method, target)
        assert (status, headers["Allow"]) == (405, "POST")
    for method in ("PUT", "DELETE", "PATCH"):
        assert ask(method, target)[0] == 405
    snapshot = f"/v1/snapshots/{node.snapshot.digest}"
    for path in (snapshot, f"{snapshot}/rows/{ROW}/shards/0", "/v1/cluster", "/v1/datasets", "/v1/datasets/set",
                 "/v1/datasets/ranges", "/v1/resolve", "/healthz", "/metrics"):  # fmt: skip
        status, headers, _ = ask("POST", path, batch.encode(GOOD))
        assert (path, status, headers.get("Allow")) == (path, 405, "GET, HEAD")
