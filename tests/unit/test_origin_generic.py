"""Any fsspec protocol: the contract over fsspec's memory file system, and a web server."""

from __future__ import annotations

import datetime
import http.server
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shoal.errors import (
    InvalidRequest,
    OriginChanged,
    OriginDenied,
    OriginError,
    OriginNotFound,
    OriginUnavailable,
    ShoalError,
)
from shoal.origin import Deadlines, generic, open_origin
from tests.support.origin_contract import OriginContract, Pieces, Place, content, rows

IMPATIENT = Deadlines(contact_s=0.3, read_s=0.3, connect_s=0.2, idle_s=0.2)


class Memory:
    """A `Place` in this process."""

    def __init__(self) -> None:
        self.url = f"memory://{uuid.uuid4().hex}"
        self.options: dict[str, Any] = {}
        self.filesystem = fsspec.filesystem("memory")

    def write(self, path: str, data: bytes) -> None:
        self.filesystem.pipe_file(f"{self.url}/{path}", data)

    def remove(self, path: str) -> None:
        self.filesystem.rm_file(f"{self.url}/{path}")


class TestMemory(OriginContract):
    @pytest.fixture
    def place(self) -> Iterator[Place]:
        memory = Memory()
        yield memory
        memory.filesystem.rm(memory.url, recursive=True)


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"size": 3, "ETag": '"abc"', "mtime": 1.5}, "ETag:abc"),
        ({"size": 3, "etag": "abc", "LastModified": "x"}, "etag:abc"),
        ({"size": 3, "generation": 17, "updated": "x"}, "generation:17"),
        ({"size": 3, "checksum": 99, "created": 1}, "checksum:99"),
        ({"size": 3, "ETag": "", "mtime": 1.5}, "mtime:1.500000-3"),
        ({"size": 3, "LastModified": "Tue, 24 Nov 2026 04:21:07 GMT"}, "LastModified:Tue, 24 Nov 2026 04:21:07 GMT-3"),
        ({"size": 3, "created": 7, "mtime": 8}, "mtime:8.000000-3"),
        ({"size": 3, "created": 0.25}, "created:0.250000-3"),
        ({"size": 3, "created": datetime.datetime.fromtimestamp(0.25, datetime.UTC)}, "created:0.250000-3"),
        ({"size": 3, "created": datetime.datetime(1970, 1, 1, 0, 0, 1)}, "created:1.000000-3"),
        ({"size": 3}, "size:3"),
        ({"size": 3, "ETag": None, "checksum": {"sha": 1}}, "size:3"),
    ],
)
def test_the_version_is_the_first_thing_that_tells_contents_apart(info: dict[str, Any], version: str) -> None:
    assert generic.version_of(info) == version


class Described(MemoryFileSystem):  # type: ignore[misc] # fsspec has no types
    """A file system whose listing and descriptions are given by the test."""

    protocol = "described"
    cachable = False
    listing: ClassVar[Mapping[str, dict[str, Any]]] = {}
    infos: ClassVar[Mapping[str, dict[str, Any]]] = {}
    asked: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.replace("described://", "/")

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        return dict(self.listing)

    def info(self, path: str, **_: Any) -> Any:
        self.asked.append(path)
        return self.infos[path]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return content(100)[start:end]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> type[Described]:
    fsspec.register_implementation("described", Described, clobber=True)
    monkeypatch.setattr(Described, "asked", [])
    return Described


def test_what_a_listing_leaves_out_is_asked_for(described: type[Described]) -> None:
    described.listing = {
        "/r/whole": {"size": 1, "type": "file", "etag": "e"},
        "/r/sizeless": {"size": None, "type": "file", "etag": "e"},
        "/r/versionless": {"size": 3, "type": "file"},
        "/r/dir": {"size": 0, "type": "directory"},
    }
    described.infos = {"/r/sizeless": {"size": 2, "etag": "e2"}, "/r/versionless": {"size": 3, "mtime": 5}}
    found = rows(open_origin("described://r", {}))
    assert {p: (r.size_bytes, r.version) for p, r in found.items()} == {
        "whole": (1, "etag:e"),
        "sizeless": (2, "etag:e2"),
        "versionless": (3, "mtime:5.000000-3"),
    }
    assert sorted(described.asked) == ["/r/sizeless", "/r/versionless"]


def test_a_file_without_a_size_is_refused(described: type[Described]) -> None:
    described.listing = {"/r/x": {"size": None, "type": "file"}}
    described.infos = {"/r/x": {"size": None}}
    with pytest.raises(InvalidRequest, match="described://r/x has no known size"):
        rows(open_origin("described://r", {}))


def test_only_the_field_of_the_version_is_compared(described: type[Described]) -> None:
    """`info` may know more than the listing did; that is no change."""
    described.infos = {"/r/x": {"size": 100, "ETag": "late", "mtime": 5}}
    origin = open_origin("described://r", {})
    assert bytes(origin.read("x", "mtime:5.000000-100", 3, 9)) == content(100)[3:9]
    with pytest.raises(OriginChanged):
        origin.read("x", "mtime:6.000000-100", 3, 9)


def test_a_change_during_the_read_is_noticed(described: type[Described], monkeypatch: pytest.MonkeyPatch) -> None:
    described.infos = {"/r/x": {"size": 100, "etag": "old"}}
    read = Described.cat_file

    def read_and_change(self: Described, path: str, **kwargs: Any) -> bytes:
        data = read(self, path, **kwargs)
        described.infos = {"/r/x": {"size": 100, "etag": "new"}}
        return data

    monkeypatch.setattr(Described, "cat_file", read_and_change)
    sink = Pieces()
    with pytest.raises(OriginChanged, match="described://r/x has changed since"):
        open_origin("described://r", {}).stream("x", "etag:old", 0, 100, sink)
    assert not sink.pieces


def test_short_bodies_are_tried_again(described: type[Described], monkeypatch: pytest.MonkeyPatch) -> None:
    described.infos = {"/r/x": {"size": 100, "etag": "e"}}
    read = Described.cat_file
    sizes = [50, 0, 7]
    asked: list[tuple[int, int]] = []

    def cut_off(self: Described, path: str, *, start: int, end: int) -> bytes:
        asked.append((start, end))
        data = read(self, path, start=start, end=end)
        return data[: sizes.pop(0)] if sizes else data

    monkeypatch.setattr(Described, "cat_file", cut_off)
    sink = Pieces()
    patient = open_origin("described://r", {}, deadlines=Deadlines(read_s=60, idle_s=0))
    patient.stream("x", "etag:e", 10, 90, sink)
    assert sink.data == content(100)[10:90]
    assert asked == [(10, 90), (60, 90), (60, 90), (67, 90)], "from the byte reached"
    sizes[:] = [0] * 1000
    with pytest.raises(OriginUnavailable, match="sent 0 bytes of described://r/x where 80 were asked"):
        open_origin("described://r", {}, deadlines=IMPATIENT).read("x", "etag:e", 0, 80)


def test_more_than_was_asked_for_is_an_error_at_once(
    described: type[Described], monkeypatch: pytest.MonkeyPatch
) -> None:
    described.infos = {"/r/x": {"size": 100, "etag": "e"}}
    monkeypatch.setattr(Described, "cat_file", lambda *_, **__: content(81))
    sink = Pieces()
    with pytest.raises(OriginError, match="sent more of described://r/x than the 80 bytes asked for") as caught:
        open_origin("described://r", {}).stream("x", "etag:e", 0, 80, sink)
    assert type(caught.value) is OriginError
    assert not sink.pieces


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("no"), OriginDenied),
        (FileNotFoundError("gone"), OriginChanged),
        (ConnectionRefusedError(111, "Connection refused"), OriginUnavailable),
        (TimeoutError(), OriginUnavailable),
        (OSError(5, "Input/output error"), OriginUnavailable),
        (RuntimeError("surprise"), OriginError),
    ],
)
def test_foreign_errors_are_converted(
    described: type[Described], monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[ShoalError]
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise error

    monkeypatch.setattr(Described, "cat_file", fail)
    with pytest.raises(kind) as caught:
        open_origin("described://r", {}, deadlines=IMPATIENT).read("x", "etag:e", 0, 1)
    assert type(caught.value) is kind
    chain = [caught.value.__cause__, caught.value.__cause__ and caught.value.__cause__.__cause__]
    assert error in chain


def test_identity_tells_options_apart_but_not_secrets() -> None:
    def identity(options: dict[str, Any]) -> str:
        return open_origin("described://r/p", options).identity

    fsspec.register_implementation("described", Described, clobber=True)
    assert identity({}) == "described://r"
    assert identity({"revision": "a"}) != identity({"revision": "b"})
    assert identity({"revision": "a", "token": "1"}) == identity({"revision": "a", "token": "2"})
    assert "hunter2" not in identity({"token": "hunter2"})


def test_options_that_the_file_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Described, **_: Any) -> None:
        raise TypeError("unexpected keyword 'nonsense'")

    fsspec.register_implementation("described", Described, clobber=True)
    monkeypatch.setattr(Described, "__init__", refuse)
    with pytest.raises(InvalidRequest, match=r"fsspec cannot open described://r with .*unexpected keyword 'nonsense'"):
        open_origin("described://r", {"nonsense": 1})


# -- the web ---------------------------------------------------------------------------------------------------------


class Site:
    """A small web server: files of a directory, with ETags and ranges, an index page for a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.status = 0  # answered to everything instead, unless 0
        self.honours_ranges = True
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, with_body: bool) -> None:
                path = site.root / self.path.lstrip("/")
                body, headers, status = b"", {}, 200
                if site.status or not path.exists():
                    status = site.status or 404
                elif path.is_dir():
                    body = "".join(f'<a href="{p.name}{"/" * p.is_dir()}">x</a>' for p in path.iterdir()).encode()
                    body += b'<a href="?sort=size">sort</a><a href="../">up</a>'
                    headers = {"Content-Type": "text/html"}
                else:
                    body = path.read_bytes()
                    headers = {"Content-Type": "application/x-data", "ETag": f'"{hash(body) & 0xFFFF:x}"'}
                    wanted = self.headers.get("Range")
                    if wanted and site.honours_ranges:
                        start, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
                        headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                        body, status = body[start : end + 1], 206
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    thread = threading.Thread(target=site.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()


def test_a_web_url_is_one_object(site: Site) -> None:
    (site.root / "data.bin").write_bytes(content(1000))
    origin = open_origin(f"{site.url}/data.bin", {})
    found = rows(origin)
    assert {p: r.size_bytes for p, r in found.items()} == {"": 1000}
    assert found[""].version.startswith("ETag:")
    assert bytes(origin.read("", found[""].version, 10, 990)) == content(1000)[10:990]
    assert (origin.identity, origin.key_prefix) == (site.url, "data.bin/")


def test_links_of_an_index_page_are_objects(site: Site) -> None:
    (site.root / "set" / "sub").mkdir(parents=True)
    (site.root / "set" / "a.bin").write_bytes(b"1")
    (site.root / "set" / "sub" / "b.bin").write_bytes(b"22")
    (site.root / "other").write_bytes(b"333")
    origin = open_origin(f"{site.url}/set/", {})
    found = rows(origin)
    assert {p: r.size_bytes for p, r in found.items()} == {"a.bin": 1, "sub/b.bin": 2}
    assert bytes(origin.read("sub/b.bin", found["sub/b.bin"].version, 0, 2)) == b"22"


def test_a_web_object_that_changes(site: Site) -> None:
    (site.root / "x").write_bytes(content(10))
    origin = open_origin(f"{site.url}/x", {})
    version = rows(origin)[""].version
    (site.root / "x").write_bytes(content(10, seed=1))
    with pytest.raises(OriginChanged, match="has changed since"):
        origin.read("", version, 0, 10)
    (site.root / "x").unlink()
    with pytest.raises(OriginChanged, match="was removed since"):
        origin.read("", version, 0, 10)


def test_a_web_server_without_ranges(site: Site) -> None:
    (site.root / "x").write_bytes(content(10))
    site.honours_ranges = False
    origin = open_origin(f"{site.url}/x", {})
    version = rows(origin)[""].version
    assert bytes(origin.read("", version, 0, 10)) == content(10)
    with pytest.raises(OriginError, match="Shoal needs a server that honours ranges"):
        origin.read("", version, 2, 10)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, OriginNotFound),
        (403, OriginDenied),
        (401, OriginDenied),
        (503, OriginUnavailable),
        (429, OriginUnavailable),
    ],
)
def test_web_answers(site: Site, status: int, kind: type[OriginError]) -> None:
    site.status = status
    with pytest.raises(kind):
        rows(open_origin(f"{site.url}/x", {}, deadlines=IMPATIENT))


def test_a_web_server_that_is_down(site: Site) -> None:
    site.server.server_close()
    with pytest.raises(OriginUnavailable, match=r"127.0.0.1:\d+ does not answer .*connection refused"):
        rows(open_origin(f"{site.url}/x", {}, deadlines=IMPATIENT))
