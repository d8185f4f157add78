"""Requests that no honest client sends, to every port: a clean refusal each, and nothing read, leaked or broken.

Clean is a well-formed answer, or a closed connection. What a server must never do is fail inside (500), hang, die, send
a byte of a file that is no shard or snapshot, or keep a connection, a descriptor or memory.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import httptools
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import ShoalError
from shoal.filesystem import ShoalFileSystem
from shoal.wire import batch
from shoal.wire.stream_post import Cause
from tests.support import raw_http
from tests.support.processes import Footprint

CANARY = b"canary-7f3a that no request may bring to light"
DATA = random.Random(7).randbytes(300_000)
#: What a server may keep more of after all this: allocators keep some of what they had.
RSS_SLACK_BYTES = 64 << 20


@dataclass
class Target:
    """A cluster under attack: a controller and one node, with one dataset of two objects."""

    cluster: DevCluster
    digest: str
    temporary: Path

    @property
    def shard(self) -> str:
        return f"/v1/snapshots/{self.digest}/rows/0/shards/0"

    @property
    def batch(self) -> str:
        return f"/v1/snapshots/{self.digest}/ranges"

    @property
    def stream(self) -> str:
        return f"/v1/snapshots/{self.digest}/streams/{'0' * 32}"

    @property
    def ports(self) -> dict[str, int]:
        """HTTP ports by the server's name."""
        return {
            "controller": int(self.cluster.endpoint.rpartition(":")[2]),
            "node": int(self.cluster.node_endpoints[0].rpartition(":")[2]),
        }

    @property
    def grpc_port(self) -> int:
        return int(self.cluster.controller_grpc.rpartition(":")[2])

    def check_alive(self) -> None:
        """Both serve, and the bytes are right."""
        assert not self.cluster.deaths.qsize(), "a process died"
        for endpoint in (self.cluster.endpoint, self.cluster.node_endpoints[0]):
            fs = ShoalFileSystem(endpoint=endpoint, local=False, skip_instance_cache=True)
            assert fs.cat_file("set/a.bin") == DATA
        with Control(self.cluster.controller_grpc) as control:
            assert [each.name for each in control.datasets()] == ["set"]

    def refuses(self, server: str, data: bytes, *, may_serve: bool = False) -> None:
        """Send `data` to `server` and check that the answer is clean; with `may_serve` it may be what was asked for."""
        found = raw_http.exchange(self.ports[server], data)
        assert CANARY not in found
        answers = raw_http.parse(found)
        for answer in answers:
            assert answer.status != 500, answer.body
            if answer.status >= 400:
                assert "shoal-error" in answer.headers and answer.body.endswith(b"\n"), answer
            else:
                assert may_serve, answer
                assert answer.status in (200, 206), answer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Shared: whatever a test does to it, the next one must find it well."""
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "origin").mkdir()
    (directory / "origin" / "a.bin").write_bytes(DATA)
    (directory / "origin" / "b.bin").write_bytes(DATA[::-1])
    (directory / "canary").write_bytes(CANARY)
    temporary = directory / "tmp"
    temporary.mkdir()
    with DevCluster(nodes=1, data_dir=directory / "cluster", capacity="100MiB") as cluster:
        for each in ("controller", "node-0", "node-0/snapshots", "node-0/shards", "node-0/indexes"):
            (cluster.data_dir / each / "canary").write_bytes(CANARY)
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", str(directory / "origin"), shard_size=0, replicas=1, storage_options="{}")
            digest = control.dataset("set").snapshot
        found = Target(cluster, digest, temporary)
        found.check_alive()
        before = Footprint.of(cluster, temporary)
        rss = {name: _rss(process.pid) for name, process in cluster.processes.items()}
        yield found
        found.check_alive()
        Footprint.wait_for_return(cluster, temporary, before)
        for name, process in cluster.processes.items():
            grown = _rss(process.pid) - rss[name]
            assert grown < RSS_SLACK_BYTES, f"{name} has {grown >> 20} MiB more"
            log = process.log_path.read_text()
            assert "Traceback" not in log, log[-3000:]


def _rss(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def get(path: str, *headers: str, method: str = "GET", body: bytes = b"", version: str = "HTTP/1.1") -> bytes:
    lines = [f"{method} {path} {version}", "Host: x", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape") + body


# -- what is no request ----------------------------------------------------------------------------------------------

_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

BROKEN: Mapping[str, bytes] = {
    "nothing": b"",
    "TLS hello": _HELLO,
    "HTTP/2 preface": _PREFACE,
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "redis": b"*1\r\n$4\r\nPING\r\n",
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
    "random": random.Random(1).randbytes(20_000),
    "only line ends": b"\r\n" * 20_000,
    "one line that never ends": b"G" * 100_000,
    "version 0.9": b"GET /healthz\r\n\r\n",
    "version 9.9": get("/healthz", version="HTTP/9.9"),
    "version 2.0": get("/healthz", version="HTTP/2.0"),
    "version garbage": get("/healthz", version="HTTP/x"),
    "no version": b"GET /healthz \r\n\r\n",
    "lower case method": get("/healthz", method="get"),
    "method garbage": get("/healthz", method="G\x00T"),
    "unknown method": get("/healthz", method="BREW"),
    "space before the target": b"GET  /healthz HTTP/1.1\r\n\r\n",
    "tab before the target": b"GET\t/healthz\tHTTP/1.1\r\n\r\n",
    "bare carriage returns": b"GET /healthz HTTP/1.1\rHost: x\r\r",
    "NUL in the target": b"GET /health\x00z HTTP/1.1\r\n\r\n",
    "NUL in a header's name": b"GET /healthz HTTP/1.1\r\nX\x00Y: z\r\n\r\n",
    "NUL in a header's value": b"GET /healthz HTTP/1.1\r\nX: y\x00z\r\n\r\n",
    "space in a header's name": b"GET /healthz HTTP/1.1\r\nX Y: z\r\n\r\n",
    "space before the colon": b"GET /healthz HTTP/1.1\r\nContent-Length : 5\r\n\r\nhello",
    "header without a colon": b"GET /healthz HTTP/1.1\r\nnothing\r\n\r\n",
    "header without a name": b"GET /healthz HTTP/1.1\r\n: x\r\n\r\n",
    "folded header": b"GET /healthz HTTP/1.1\r\nX: y\r\n z: w\r\n\r\n",
    "folded first header": b"GET /healthz HTTP/1.1\r\n X: y\r\n\r\n",
    "long target": get("/" + "x" * 40_000),
    "long header": get("/healthz", "X: " + "x" * 40_000),
    "long header name": get("/healthz", "x" * 40_000 + ": y"),
    "many headers": get("/healthz", *(f"X{i}: y" for i in range(20_000))),
    "many equal headers": get("/healthz", *["X: y"] * 20_000),
    "half a request line": b"GET /v1/clu",
    "half a head": b"GET /v1/cluster HTTP/1.1\r\nHost: x\r\nRan",
    "half a body": get("/v1/cluster", "Content-Length: 1000", method="POST", body=b"x"),
    "upgrade": get("/healthz", "Connection: Upgrade", "Upgrade: websocket"),
    "upgrade to h2c": get(
        "/healthz", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQ"
    ),
    "connect": get("example.org:443", method="CONNECT"),
}

# -- where one request ends and the next begins ----------------------------------------------------------------------

_SMUGGLED = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


def _lengths(*headers: str, body: str = _SMUGGLED) -> bytes:
    return get("/v1/cluster", *headers, method="POST", body=body.encode())


SMUGGLING: Mapping[str, bytes] = {
    "two lengths": _lengths("Content-Length: 5", "Content-Length: 6"),
    "two equal lengths": _lengths("Content-Length: 5", "Content-Length: 5"),
    "list of lengths": _lengths("Content-Length: 5, 6"),
    "negative length": _lengths("Content-Length: -1"),
    "signed length": _lengths("Content-Length: +5"),
    "hexadecimal length": _lengths("Content-Length: 0x5"),
    "fraction": _lengths("Content-Length: 5.0"),
    "empty length": _lengths("Content-Length: "),
    "length of letters": _lengths("Content-Length: five"),
    "length with a space": _lengths("Content-Length: 5 5"),
    "length past 2^64": _lengths("Content-Length: 18446744073709551621"),
    "length of 2^63": _lengths("Content-Length: 9223372036854775808"),
    "length of a gigabyte": _lengths("Content-Length: 1073741824"),
    "thousand digits": _lengths("Content-Length: " + "9" * 1000),
    "length and chunked": _lengths("Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunked and length": _lengths("Transfer-Encoding: chunked", "Content-Length: 5"),
    "chunked twice": _lengths("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    "chunked, not last": _lengths("Transfer-Encoding: chunked, identity"),
    "unknown coding": _lengths("Transfer-Encoding: gzip"),
    "hidden chunked": _lengths("Transfer-Encoding: xchunked"),
    "tab in chunked": _lengths("Transfer-Encoding:\tchunked"),
    "vertical tab in chunked": _lengths("Transfer-Encoding: \x0bchunked"),
    "quoted chunked": _lengths('Transfer-Encoding: "chunked"'),
    "chunk size of letters": _lengths("Transfer-Encoding: chunked", body="zz\r\n\r\n"),
    "negative chunk": _lengths("Transfer-Encoding: chunked", body="-5\r\nhello\r\n0\r\n\r\n"),
    "huge chunk": _lengths("Transfer-Encoding: chunked", body="ffffffffffffffffff\r\nhello"),
    "chunk without its end": _lengths("Transfer-Encoding: chunked", body="5\r\nhelloXX0\r\n\r\n"),
    "chunk extension that never ends": _lengths("Transfer-Encoding: chunked", body="5;" + "x" * 40_000),
    "trailers that never end": _lengths("Transfer-Encoding: chunked", body="0\r\n" + "X: y\r\n" * 10_000),
    "many tiny chunks": _lengths("Transfer-Encoding: chunked", body="1\r\nx\r\n" * 200_000 + "0\r\n\r\n"),
    "line feeds alone": b"POST /v1/cluster HTTP/1.1\nContent-Length: 5\n\nhello",
    "body of a GET": get("/nothing", "Content-Length: 5", body=b"hello"),
    "chunked GET": get("/nothing", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"),
    "expect": get("/nothing", "Expect: 100-continue", "Content-Length: 5", method="POST"),
    "garbage behind a request": get("/nothing", "Connection: close") + b"\x00\xff" * 1000,
}

# -- where nothing lies ----------------------------------------------------------------------------------------------

_UP = ("..", "%2e%2e", "%2E%2e", ".%2e", "..%2f..", "..%5c..", "..\\..", "....//", "%252e%252e", "..;", "%c0%ae%c0%ae")
_FOR = "canary"
PATHS: tuple[str, ...] = (
    *(f"/{up}/{up}/{up}/{_FOR}" for up in _UP),
    *(f"/v1/snapshots/{up}/{_FOR}" for up in _UP),
    *(f"/v1/snapshots/{up}%2f{_FOR}" for up in _UP),
    *(f"/v1/datasets/{up}%2f{up}%2f{_FOR}" for up in _UP),
    f"/v1/snapshots/{_FOR}",
    f"/v1/snapshots/{_FOR}.arrow",
    "/v1/snapshots/" + "0" * 32,
    "/v1/snapshots/" + "0" * 31,
    "/v1/snapshots/" + "٣" * 32,
    "/v1/snapshots/" + "f" * 10_000,
    "/v1/snapshots//etc/passwd",
    "/v1/snapshots/%00",
    "//etc/passwd",
    "///",
    "/./canary",
    "/v1",
    "/v1/",
    "/V1/CLUSTER",
    "/v1/cluster/",
    "/v1//cluster",
    "/v1/cluster%00",
    "/v1/cluster%0d%0aX:%20y",
    "/v1/cluster;x",
    "*",
    "/%ff%fe",
    "/%",
    "/%zz",
    "/%u0041",
    "/ünïcødé",
    "/v1/datasets/%00",
    "/v1/datasets/" + "x" * 5000,
    "/v1/datasets/set%2f..%2f..",
    "/v1/resolve",
    "/v1/resolve?url=",
    "/v1/resolve?url=file:///etc/passwd",
    "/v1/resolve?url=http://169.254.169.254/latest/meta-data/",
    "/v1/resolve?url=s3://x%00y",
    "/v1/resolve?url=%ff",
    "/v1/resolve?url=" + "x" * 8000,
    "/v1/resolve?" + "&".join(f"a{i}=1" for i in range(1000)),
    "/v1/resolve?url=file:///&url=file:///etc",
    "http://evil.example/v1/nothing",
    "http://x:y@evil.example:99999/",
    "file:///etc/passwd",
    "http://[::1",
    "?x",
    "#x",
)

#: After a snapshot's digest.
PLACES: tuple[str, ...] = (
    "/rows/-1/shards/0",
    "/rows/0/shards/-1",
    "/rows/2/shards/0",
    "/rows/0/shards/1",
    "/rows/4294967296/shards/0",
    "/rows/99999999999999999999999/shards/0",
    f"/rows/{'9' * 5000}/shards/0",
    f"/rows/0/shards/{'9' * 5000}",
    "/rows/0x0/shards/0",
    "/rows/٣/shards/٣",
    "/rows/²/shards/0",
    "/rows/ 0/shards/0",
    "/rows/0.0/shards/0",
    "/rows/1e0/shards/0",
    "/rows//shards/",
    "/rows/0/shards/0/",
    "/rows/0/shards/0/../../canary",
    "/rows/../shards/0",
    "/rows/%2e%2e/shards/%2e%2e",
    "/rows/NaN/shards/0",
    "/ranges/x",
)

#: Queries for an index of samples. Neither object of the dataset is of any format that has one.
INDEXES: tuple[str, ...] = (
    "",
    "?",
    "?pattern=a.bin",
    "?format=arrow",
    "?pattern=&format=arrow",
    "?pattern=a.bin&format=",
    "?pattern=a.bin&format=objects",
    "?pattern=a.bin&format=ARROW",
    "?pattern=a.bin&format=../../canary",
    "?pattern=a.bin&format=arrow%00",
    "?pattern=a.bin&format=" + "x" * 8000,
    "?pattern=a.bin&format=arrow",
    "?pattern=*&format=parquet",
    "?pattern=**&format=tar",
    "?pattern=../../../canary&format=arrow",
    "?pattern=%2e%2e/canary&format=tar",
    "?pattern=/etc/passwd&format=tar",
    "?pattern=canary&format=arrow",
    "?pattern=a.bin%00&format=arrow",
    "?pattern=a%0d%0aX:%20y&format=arrow",
    "?pattern=%1b[2J*&format=arrow",
    "?pattern=%ff%fe*&format=arrow",
    "?pattern=%ed%a0%80*&format=arrow",
    "?pattern=" + "x" * 4097 + "&format=arrow",
    "?pattern=" + "%f0%9f%90%9f" * 900 + "&format=arrow",
    "?pattern=" + "*" * 4000 + "&format=arrow",
    "?pattern=" + "*a" * 2000 + "&format=arrow",
    "?pattern=" + "[" * 4000 + "&format=arrow",
    "?pattern=[z-a]*&format=arrow",
    "?pattern=[!]&format=arrow",
    "?pattern=(a|a)*$(?:x{1000}){1000}*&format=arrow",
    "?pattern=a.bin&pattern=*&format=arrow&format=tar",
    "?" + "&".join(f"pattern={i}" for i in range(1000)),
    "/?pattern=a.bin&format=arrow",
    "/..?pattern=a.bin&format=arrow",
)

#: Values of a Range header. What is no single byte range is ignored, as RFC 9110 has it, and all is served.
RANGES: tuple[str, ...] = (
    "bytes=-0",
    "bytes=300000-",
    "bytes=300000-300000",
    "bytes=999999999999999999999999-",
    f"bytes={'9' * 5000}-",
    f"bytes={'9' * 5000}-{'9' * 5001}",
    f"bytes=0-{'9' * 5000}",
    f"bytes=-{'9' * 5000}",
    f"bytes={'0' * 5000}1-2",
    "bytes=5-4",
    "bytes=-",
    "bytes=",
    "bytes",
    "bytes=0-0,1-1",
    "bytes=" + ",".join(f"{i}-{i}" for i in range(1000)),
    "bytes=0-18446744073709551615",
    "bytes=18446744073709551616-18446744073709551617",
    "bytes=-18446744073709551616",
    "bytes=--5",
    "bytes=+1-2",
    "bytes= 1 - 2",
    "bytes=0x1-0x2",
    "bytes=1.0-2.0",
    "bytes=٣-٤",
    "bytes=a-b",
    "items=0-1",
    "bytes=0-1\x0b",
)

#: Further headers of a request for a shard.
HEADERS: tuple[tuple[str, ...], ...] = (
    ("Range: bytes=0-1", "Range: bytes=5-6"),
    ("Shoal-Descriptor: 1",),
    ("Shoal-Descriptor: -1",),
    ("Shoal-Descriptor: " + "9" * 5000,),
    ("Shoal-Want-Checksums: " + "x" * 5000,),
    ("Shoal-Suspect: 1",),
    ("Shoal-Epoch: 99999999999999999999",),
    ("Via: " + "1.1 x, " * 1000,),
    ("Cache-Control: only-if-cached, no-store, max-age=-1",),
    ("Accept-Encoding: gzip;q=1e9",),
    ("Host: a", "Host: b"),
    ("Host: evil\r\n\tfolded",),
    ("Connection: close, keep-alive, upgrade",),
    ("Connection: " + "x," * 4000,),
    ("Content-Length: 0", "Transfer-Encoding: identity"),
    ("If-Range: x", "If-Match: *", "If-None-Match: *", "If-Modified-Since: never"),
)


def _ranges(*rows: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<IIII", *row) for row in rows)


#: Bodies of a batch, none of which is one.
BATCHES: Mapping[str, bytes] = {
    "empty": b"",
    "one byte": b"x",
    "one byte short": _ranges((0, 0, 0, 1))[:-1],
    "one byte more": _ranges((0, 0, 0, 1)) + b"x",
    "no such row": _ranges((99, 0, 0, 1)),
    "largest row": _ranges((2**32 - 1, 0, 0, 1)),
    "no such shard": _ranges((0, 1, 0, 1)),
    "largest shard": _ranges((0, 2**32 - 1, 0, 1)),
    "past the end": _ranges((0, 0, 299_999, 2)),
    "far past the end": _ranges((0, 0, 2**32 - 1, 1)),
    "start and length that overflow": _ranges((0, 0, 2**32 - 1, 262_144)),
    "no bytes": _ranges((0, 0, 0, 0)),
    "largest length": _ranges((0, 0, 0, 2**32 - 1)),
    "longer than one may be": _ranges((0, 0, 0, 262_145)),
    "good ones and a bad one": _ranges(*[(0, 0, 0, 1)] * 100, (0, 0, 0, 0)),
    "more bytes than one may ask for": _ranges(*[(0, 0, 0, 262_144)] * 129),
    "more ranges than one may ask for": _ranges(*[(0, 0, 0, 1)] * 8193),
    "a megabyte": bytes(1 << 20),
    "random": random.Random(2).randbytes(16 * 1000),
    "JSON": b'[{"row": 0, "start": -1}]' + b" " * 7,
}


def _post(
    *needs: tuple[int, int, int], version: int = 1, flags: int = 0, count: int = -1, waits: int = 0, rest: bytes = b""
) -> bytes:
    head = struct.pack("<HHII", version, flags, len(needs) if count < 0 else count, waits)
    return head + b"".join(struct.pack("<III", *need) for need in needs) + rest


def _wait(cause: int, node: bytes = b"") -> bytes:
    return struct.pack("<II16s", cause, 1, node)


#: Posts of a stream, none of which is one.
POSTS: Mapping[str, bytes] = {
    "empty": b"",
    "half a head": _post()[:-1],
    "one byte more": _post() + b"x",
    "no version": _post(version=0),
    "another version": _post(version=2),
    "unknown flags": _post(flags=2),
    "all flags": _post(flags=0xFFFF),
    "no such row": _post((2, 0, 0)),
    "largest row": _post((2**32 - 1, 0, 0)),
    "no such shard": _post((0, 1, 0)),
    "largest shard": _post((0, 2**32 - 1, 0)),
    "largest of all": _post((2**32 - 1, 2**32 - 1, 0)),
    "needed next year": _post((0, 0, 2**32 - 1)),
    "not sorted": _post((0, 0, 2), (1, 0, 1)),
    "a shard twice": _post((0, 0, 1), (0, 0, 2)),
    "leaving with needs": _post((0, 0, 1), flags=1),
    "more needs than there are bytes": _post((0, 0, 1), count=2),
    "fewer": _post((0, 0, 1), (1, 0, 1), count=1),
    "most needs that can be said": _post(count=2**32 - 1, waits=2**32 - 1),
    "more needs than one may have": _post(*((row, 0, 0) for row in range(4097))),
    "more waits than one may have": _post(waits=1025, rest=_wait(0) * 1025),
    "no such cause": _post(waits=1, rest=_wait(len(Cause))),
    "a wait twice": _post(waits=2, rest=_wait(0) * 2),
    "a node of odd letters": _post(waits=1, rest=_wait(0, b'"}\n')),
    "a node that is not text": _post(waits=1, rest=_wait(0, b"\xff\xfe")),
    "a node with zeros within": _post(waits=1, rest=_wait(0, b"a\x00b")),
    "a megabyte": bytes(1 << 20),
    "random": random.Random(3).randbytes(12_000),
    "JSON": b'{"needs": [[0, 0, 0]]}',
}
#: In the place of a stream's id, with a good post.
STREAM_IDS: tuple[str, ...] = (
    "",
    "0",
    "A" * 32,
    "0" * 31,
    "0" * 33,
    "g" * 32,
    "٣" * 32,
    "..",
    "%2e%2e",
    "0" * 32 + "/x",
)


def cases(target: Target) -> Iterator[tuple[str, bytes, bool]]:
    """Name, bytes, and whether the answer may be what was asked for."""
    for name, data in BROKEN.items():
        yield name, data, name == "space before the target"  # a second space harms nobody
    for name, data in SMUGGLING.items():
        yield name, data, False
    for path in PATHS:
        # An absolute URL's path counts, whatever its host (RFC 9112, 3.2.2).
        yield path[:60], get(path), False
    for place in PLACES:
        yield place[:60], get(f"/v1/snapshots/{target.digest}{place}"), False
    for query in INDEXES:
        yield f"index{query[:60]}", get(f"/v1/snapshots/{target.digest}/index{query}"), False
    yield "an index of nothing", get(f"/v1/snapshots/{'0' * 32}/index?pattern=*&format=arrow"), False
    for method in ("POST", "PUT"):
        index = f"/v1/snapshots/{target.digest}/index?pattern=a.bin&format=arrow"
        yield f"{method} an index", get(index, "Content-Length: 2", method=method, body=b"{}"), False
    for value in RANGES:
        yield f"Range: {value[:40]}", get(target.shard, f"Range: {value}"), True
        yield f"snapshot, Range: {value[:40]}", get(f"/v1/snapshots/{target.digest}", f"Range: {value}"), True
    for headers in HEADERS:
        yield f"headers {headers[0][:40]}", get(target.shard, *headers), True
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "PURGE", "POST"):
        yield method, get(target.shard, "Content-Length: 2", method=method, body=b"{}"), False
    for name, body in BATCHES.items():
        length = f"Content-Length: {len(body)}"
        yield f"batch: {name}", get(target.batch, length, method="POST", body=body), False
    for name, body in POSTS.items():
        length = f"Content-Length: {len(body)}"
        yield f"stream: {name}", get(target.stream, length, method="POST", body=body), False
    for stream_id in STREAM_IDS:
        path, length = f"{target.stream[:-32]}{stream_id}", f"Content-Length: {len(_post())}"
        yield f"stream id: {stream_id}", get(path, length, method="POST", body=_post()), False
    yield "a stream that is got", get(target.stream), False
    yield (
        "a stream over nothing",
        get(
            f"/v1/snapshots/{'0' * 32}/streams/{'0' * 32}",
            f"Content-Length: {len(_post())}",
            method="POST",
            body=_post(),
        ),
        False,
    )


def test_every_hostile_request_is_refused_and_the_servers_go_on(target: Target) -> None:
    count = 0
    wrong: list[str] = []
    for server in target.ports:
        for name, data, may_serve in cases(target):
            count += 1
            try:
                target.refuses(server, data, may_serve=may_serve)
            except (AssertionError, OSError, httptools.HttpParserError) as error:
                wrong.append(f"{server}: {name}: {str(error)[:300]}")
        target.check_alive()
    assert not wrong, "\n".join(wrong)
    assert count >= 2 * 200


def test_bytes_of_odd_ranges_are_the_right_ones(target: Target) -> None:
    for value, expected in (
        ("bytes=0-18446744073709551615", DATA),
        (f"bytes=1-{'9' * 5000}", DATA[1:]),
        (f"bytes=-{'9' * 5000}", DATA),
        (f"bytes={'0' * 5000}7-9", DATA[7:10]),
        ("bytes=0-0,1-1", DATA),
    ):
        (answer,) = raw_http.parse(raw_http.exchange(target.ports["node"], get(target.shard, f"Range: {value}")))
        assert answer.body == expected, value


def test_requests_sent_behind_a_body_are_not_mistaken_for_it(target: Target) -> None:
    """Pipelined: each is answered in its turn, and nothing inside a body is."""
    body = _SMUGGLED.encode().ljust(48)  # three ranges of a batch, as far as the node can tell
    bad = get(target.batch, f"Content-Length: {len(body)}", method="POST", body=body)
    good = get(target.shard, "Range: bytes=5-9")
    answers = raw_http.parse(raw_http.exchange(target.ports["node"], bad + good + bad + good))
    assert [answer.status for answer in answers] == [400, 206, 400, 206]
    assert [answer.body for answer in answers[1::2]] == [DATA[5:10]] * 2


def test_many_pipelined_requests(target: Target) -> None:
    answers = raw_http.parse(raw_http.exchange(target.ports["node"], get(target.shard, "Range: bytes=0-0") * 3000))
    assert len(answers) == 3000
    assert {answer.body for answer in answers} == {DATA[:1]}


# -- fuzzed ----------------------------------------------------------------------------------------------------------

_words = st.sampled_from(
    [
        *(
            b"GET",
            b"POST",
            b"HEAD",
            b" ",
            b"\t",
            b"\r\n",
            b"\n",
            b"\r",
            b":",
            b"HTTP/1.1",
            b"HTTP/1.0",
            b"/",
            b"..",
            b"%",
        ),
        *(
            b"/v1/cluster",
            b"/v1/snapshots/",
            b"/rows/",
            b"/shards/",
            b"/ranges",
            b"/healthz",
            b"?url=",
            b"\x00",
            b"\xff",
        ),
        *(b"Range: bytes=", b"-", b",", b"Content-Length: ", b"Transfer-Encoding: chunked", b"Connection: ", b"close"),
        *(b"Shoal-Descriptor: 1", b"Via: 1.1 x", b"0", b"1", b"99999999999999999999", b"Host: x", b"\r\n\r\n"),
    ]
)
_heads = st.lists(st.one_of(_words, st.binary(max_size=20)), max_size=40).map(b"".join)


def mutated(target: Target) -> st.SearchStrategy[bytes]:
    """A good request with a few bytes changed, doubled, cut out or put in."""
    good = [
        get(target.shard, "Range: bytes=0-9"),
        get("/v1/cluster"),
        get(target.batch, "Content-Length: 16", method="POST", body=_ranges((0, 0, 0, 5))),
    ]

    def apply(base: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
        data = bytearray(base)
        for place, length, new in changes:
            at = place % (len(data) + 1)
            data[at : at + length] = new
        return bytes(data)

    change = st.tuples(st.integers(0, 1000), st.integers(0, 8), st.binary(max_size=8))
    return st.builds(apply, st.sampled_from(good), st.lists(change, min_size=1, max_size=4))


@pytest.mark.parametrize("server", ["controller", "node"])
def test_fuzzed_heads(target: Target, server: str) -> None:
    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(_heads, mutated(target)))
    def fuzz(data: bytes) -> None:
        target.refuses(server, data, may_serve=True)

    fuzz()
    target.check_alive()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_decoding_a_batch_gives_ranges_within_the_bounds_or_says_no(body: bytes) -> None:
    with contextlib.suppress(ShoalError):
        found = batch.decode(body)
        assert batch.encode(found) == body
        assert all(0 < each.length <= batch.MAX_RANGE_BYTES for each in found)


# -- the gRPC port ---------------------------------------------------------------------------------------------------


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")
GRPC: Mapping[str, bytes] = {
    "nothing": b"",
    "HTTP/1.1": get("/shoal.v1.Control/ListDatasets", method="POST"),
    "TLS hello": _HELLO,
    "zeros": bytes(10_000),
    "random": random.Random(3).randbytes(10_000),
    "half a preface": _START[:10],
    "frames of random bytes": _START + random.Random(4).randbytes(10_000),
    "headers that are none": _START + _frame(1, 5, 1, b"\xff" * 1000),
    "endless headers": _START + _frame(1, 0, 1, b"\x00") + _frame(9, 0, 1, b"\x00" * 16_000) * 50,
    "data of no stream": _START + _frame(0, 0, 99, b"x" * 1000),
    "even stream": _START + _frame(1, 4, 2, b"\x82"),
    "frame of 16 MiB": _START + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + b"x" * 1000,
    "settings storm": _START + _frame(4, 0, 0, b"\x00\x03\x00\x00\x00\x01") * 5000,
    "ping storm": _START + _frame(6, 0, 0, b"12345678") * 5000,
    "reset storm": _START + b"".join(_frame(3, 0, 2 * i + 1, b"\x00\x00\x00\x08") for i in range(2000)),
    "window overflow": _START + _frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "window of nothing": _START + _frame(8, 0, 0, b"\x00\x00\x00\x00"),
    "goaway": _START + _frame(7, 0, 0, b"\x00" * 8),
    "push": _START + _frame(5, 4, 1, b"\x00\x00\x00\x02"),
    "priority of itself": _START + _frame(2, 0, 1, b"\x00\x00\x00\x01\x00"),
}


@pytest.mark.parametrize("name", sorted(GRPC))
def test_bytes_that_are_no_call(target: Target, name: str) -> None:
    with socket.create_connection(("127.0.0.1", target.grpc_port), timeout=20) as sock:
        found = bytearray()
        with contextlib.suppress(OSError):  # it may refuse before it has read everything
            sock.sendall(GRPC[name])
            sock.shutdown(socket.SHUT_WR)
            while more := sock.recv(65536):
                found += more
    assert CANARY not in found


def _methods() -> Iterator[str]:
    from shoal.wire import shoal_pb2

    for service in shoal_pb2.DESCRIPTOR.services_by_name.values():
        yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


def _answer(channel: grpc.Channel, method: str, request: bytes) -> grpc.StatusCode:
    call: Callable[..., Iterator[bytes]] = channel.unary_stream(method)
    try:
        for found in call(request, timeout=20):
            assert CANARY not in found
            return grpc.StatusCode.OK
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, f"{method} hangs"
        return error.code()
    return grpc.StatusCode.OK


def test_calls_with_garbage_for_a_message(target: Target) -> None:
    """Messages that are none, of every method there is; those that happen to be one ask for nothing that exists."""
    garbage = [
        b"\xff" * 100,
        b"\x0a\xff\xff\xff\xff\x7f",
        b"\x0a\x05\xff\xfe\xfd\xfc\xfb",
        random.Random(5).randbytes(500),
    ]
    with grpc.insecure_channel(target.cluster.controller_grpc, [("grpc.enable_http_proxy", 0)]) as channel:
        for method in _methods():
            for request in garbage:
                code = _answer(channel, method, request)
                # To a request without fields anything that parses is one with fields of a newer version.
                assert code is not grpc.StatusCode.INTERNAL and code is not grpc.StatusCode.UNKNOWN, method
                assert code is not grpc.StatusCode.OK or "List" in method or "Status" in method, method
        for method in (
            "/shoal.v1.Control/Nothing",
            "/x/y",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ):
            assert _answer(channel, method, b"") is grpc.StatusCode.UNIMPLEMENTED
    target.check_alive()


def test_a_message_larger_than_any_is_refused(target: Target) -> None:
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(target.cluster.controller_grpc, options) as channel:
        code = _answer(channel, "/shoal.v1.Control/GetDataset", bytes(65 << 20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    target.check_alive()
