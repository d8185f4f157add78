"""The origin of plain files: the contract, and what only files can be."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import InvalidRequest, OriginChanged, OriginDenied, OriginError, OriginNotFound
from shoal.origin import base, local, open_origin, pieces
from tests.support.origin_contract import LARGE_BYTES, OriginContract, Pieces, Place, content, rows


class Directory:
    """A `Place` on disk. Each write gets a time of its own, as a slower writer's would have."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"file://{root}"
        self.options: dict[str, Any] = {}
        self._clock_ns = 1_700_000_000_000_000_000

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        self._clock_ns += 1
        os.utime(target, ns=(self._clock_ns, self._clock_ns))

    def remove(self, path: str) -> None:
        (self.root / path).unlink()


@pytest.fixture
def place(tmp_path: Path) -> Directory:
    return Directory(tmp_path)


class TestContract(OriginContract):
    pass


class TestPlainPath(OriginContract):
    @pytest.fixture
    def place(self, place: Directory) -> Place:
        place.url = str(place.root)
        return place


def test_batches_are_bounded(place: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PAGE_ROWS", 4)
    for i in range(10):
        place.write(f"{i % 3}/{i}", b"")
    assert [len(batch) for batch in open_origin(place.url, {}).list()] == [4, 4, 2]


def test_links_are_followed_out_of_the_prefix_too(place: Directory, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "blob").write_bytes(b"12345")
    (outside / "dir").mkdir()
    (outside / "dir" / "inner").write_bytes(b"1")
    (place.root / "file").symlink_to(outside / "blob")
    (place.root / "dir").symlink_to(outside / "dir")
    origin = open_origin(place.url, {})
    found = rows(origin)
    assert {path: row.size_bytes for path, row in found.items()} == {"file": 5, "dir/inner": 1}
    assert bytes(origin.read("file", found["file"].version, 1, 4)) == b"234"


def test_a_loop_of_links_ends(place: Directory) -> None:
    place.write("a/b/x", b"1")
    (place.root / "a" / "b" / "up").symlink_to(place.root / "a")
    (place.root / "a" / "root").symlink_to(place.root)
    assert set(rows(open_origin(place.url, {}))) == {"a/b/x"}


def test_a_directory_linked_twice_is_listed_twice(place: Directory) -> None:
    place.write("real/x", b"1")
    (place.root / "alias").symlink_to(place.root / "real")
    assert set(rows(open_origin(place.url, {}))) == {"real/x", "alias/x"}


def test_a_link_to_nothing_is_named(place: Directory) -> None:
    (place.root / "broken").symlink_to("gone")
    with pytest.raises(OriginNotFound, match=r"broken is a link to nothing \(gone\)"):
        rows(open_origin(place.url, {}))


def test_a_name_that_is_no_utf8_is_refused(place: Directory) -> None:
    (Path(os.fsdecode(bytes(place.root) + b"/bad\xff"))).write_bytes(b"1")
    with pytest.raises(InvalidRequest, match=r"bad\\xff"):
        rows(open_origin(place.url, {}))


def test_sockets_and_pipes_are_left_out(place: Directory) -> None:
    place.write("x", b"1")
    os.mkfifo(place.root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.root / "socket"))
        assert set(rows(open_origin(place.url, {}))) == {"x"}


def test_a_directory_without_files(place: Directory) -> None:
    (place.root / "empty" / "too").mkdir(parents=True)
    with pytest.raises(OriginNotFound, match="without files"):
        rows(open_origin(f"{place.url}/empty", {}))


def test_a_file_removed_while_listing_is_left_out(place: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("stays", b"1")
    place.write("goes", b"1")
    stat_entry = local.LocalOrigin._stat

    def remove_first(self: local.LocalOrigin, entry: os.DirEntry[str], path: str) -> os.stat_result | None:
        if path == "goes":
            place.remove(path)
        return stat_entry(self, entry, path)

    monkeypatch.setattr(local.LocalOrigin, "_stat", remove_first)
    assert set(rows(open_origin(place.url, {}))) == {"stays"}


def test_a_file_that_changes_while_it_is_read(place: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("x", b"1" * 100)
    origin = open_origin(place.url, {})
    version = rows(origin)["x"].version
    read = os.preadv

    def write_after(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = read(descriptor, buffers, offset)
        place.write("x", b"2" * 100)
        return count

    monkeypatch.setattr(os, "preadv", write_after)
    with pytest.raises(OriginChanged, match="has changed"):
        origin.read("x", version, 0, 100)


def test_a_step_of_a_changed_file_is_not_handed_on(place: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "STEP_BYTES", 30)
    place.write("x", content(100))
    origin = open_origin(place.url, {})
    version, sink = rows(origin)["x"].version, Pieces()
    read = os.preadv

    def write_before_the_third(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 60:
            place.write("x", content(100, seed=1))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", write_before_the_third)
    with pytest.raises(OriginChanged, match="has changed"):
        origin.stream("x", version, 0, 100, sink)
    assert sink.pieces == [content(100)[:30], content(100)[30:60]]


def test_a_stream_leaves_no_file_open(place: Directory) -> None:
    place.write("x", content(LARGE_BYTES))
    origin = open_origin(place.url, {})
    version = rows(origin)["x"].version

    def refuse(_: memoryview) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError):
        origin.stream("x", version, 0, LARGE_BYTES, refuse)
    opened = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    assert str(place.root / "x") not in opened


def test_short_reads_are_continued(place: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(100))
    place.write("x", data)
    origin = open_origin(place.url, {})
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, buffers, at: read(d, [buffers[0][:7]], at))
    assert bytes(origin.read("x", rows(origin)["x"].version, 3, 99)) == data[3:99]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd"])
def test_a_path_out_of_the_prefix_is_refused(place: Directory, path: str) -> None:
    with pytest.raises(InvalidRequest, match="no path below"):
        open_origin(place.url, {}).read(path, "v", 0, 1)


@pytest.mark.parametrize(
    ("code", "kind"), [(13, OriginDenied), (5, OriginError), (116, OriginError), (36, OriginError)]
)
def test_errors_of_the_kernel(
    place: Directory, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[OriginError]
) -> None:
    place.write("x", b"1")
    origin = open_origin(place.url, {})
    version = rows(origin)["x"].version

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(kind, match=r"/x cannot be read") as caught:
        origin.read("x", version, 0, 1)
    assert isinstance(caught.value.__cause__, OSError)


def test_storage_options_are_refused(place: Directory) -> None:
    with pytest.raises(InvalidRequest, match="takes no storage options: leave out auto_mkdir"):
        open_origin(place.url, {"auto_mkdir": True})
