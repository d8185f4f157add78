"""What every origin must do, whatever reads it: subclass `OriginContract` and give it a place to write objects.

The expectations are those of `shoal.origin.Origin`, line by line; a new reader passes all of them or is none.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pytest

from shoal.errors import InvalidRequest, OriginChanged, OriginNotFound, OriginUnavailable
from shoal.origin import ObjectInfo, Origin, key_path, open_origin

#: Names that break whoever quotes too often, too rarely, or splits where nothing should be split.
ODD_NAMES = (
    "sp ace",
    " lead",
    "trail ",
    "ünï-ćødé-日本-🐟",
    "e\u0301 combining",
    "per%20cent",
    "100%",
    "ha#sh",
    "pl+us",
    "q?uestion=mark&and;semicolon",
    "star*[a-c]{d}",
    "til~de",
    "co:lon",
    "@at",
    "quo'te\"s",
    "<less>",
    "..dots",
    ".hidden",
    "long-" + "n" * 245,
    "/".join(["deep"] * 30 + ["file"]),
)


class Place(Protocol):
    """Somewhere that objects can be written, empty to begin with.

    Attributes:
        url: of a prefix that belongs to the test alone.
        options: storage options that `open_origin` needs for it.
    """

    url: str
    options: dict[str, Any]

    def write(self, path: str, data: bytes) -> None:
        """Create or replace the object at `path` below `url`."""

    def remove(self, path: str) -> None:
        """Delete it."""


def rows(origin: Origin) -> dict[str, ObjectInfo]:
    """The listing by path; a path listed twice fails."""
    found: dict[str, ObjectInfo] = {}
    for batch in origin.list():
        assert batch, "a batch has rows"
        for row in batch:
            assert row.path not in found, f"{row.path} is listed twice"
            found[row.path] = row
    return found


def content(length: int, seed: int = 0) -> bytes:
    """Bytes whose every position differs from its neighbours."""
    i = np.arange(length)
    return ((seed + i * 7 + i // 251) % 256).astype(np.uint8).tobytes()


class Pieces:
    """A sink that keeps what it is given. Nothing of a view is used after the call, where its memory may change."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)

    def __call__(self, piece: memoryview) -> None:
        assert piece.format == "B" and piece.contiguous
        assert len(piece), "a piece has bytes"
        self.pieces.append(bytes(piece))


def streamed(origin: Origin, path: str, version: str, start: int, end: int) -> bytes:
    """What `Origin.stream` hands over."""
    sink = Pieces()
    origin.stream(path, version, start, end, sink)
    return sink.data


#: More than the pieces of any origin, and no multiple of them.
LARGE_BYTES = (3 << 20) + 17


class OriginContract:
    """Subclasses define the fixture `place`."""

    #: Names that this origin cannot hold at all.
    impossible_names: frozenset[str] = frozenset()

    def open(self, place: Place, below: str = "") -> Origin:
        return open_origin(f"{place.url}/{below}" if below else place.url, place.options)

    def test_lists_every_object_with_its_size(self, place: Place) -> None:
        expected = {"a.bin": 10, "b/c.bin": 20, "b/d/e.bin": 30, "b/d/f.bin": 1}
        for path, size in expected.items():
            place.write(path, content(size))
        assert {path: row.size_bytes for path, row in rows(self.open(place)).items()} == expected

    def test_odd_names_come_back_as_they_are(self, place: Place) -> None:
        names = [name for name in ODD_NAMES if name not in self.impossible_names]
        for name in names:
            place.write(name, name.encode())
            place.write(f"in {name}/{name}" if len(name) < 100 else f"in/{name}", name.encode())
        origin = self.open(place)
        found = rows(origin)
        wanted = set(names) | {f"in {name}/{name}" if len(name) < 100 else f"in/{name}" for name in names}
        assert set(found) == wanted
        for path, row in found.items():
            assert bytes(origin.read(path, row.version, 0, row.size_bytes)).decode() in path

    @pytest.mark.parametrize("name", ["sp ace", "per%20cent", "ha#sh", "q?m", "pl+us", "ünï"])
    def test_odd_prefixes(self, place: Place, name: str) -> None:
        place.write(f"{name}/x", b"1")
        origin = self.open(place, name)
        found = rows(origin)
        assert set(found) == {"x"}
        assert bytes(origin.read("x", found["x"].version, 0, 1)) == b"1"

    def test_an_empty_object_is_listed(self, place: Place) -> None:
        place.write("full", b"x")
        place.write("sub/empty", b"")
        assert {p: r.size_bytes for p, r in rows(self.open(place)).items()} == {"full": 1, "sub/empty": 0}

    def test_an_empty_object_alone(self, place: Place) -> None:
        place.write("empty", b"")
        assert {p: r.size_bytes for p, r in rows(self.open(place)).items()} == {"empty": 0}

    @pytest.mark.parametrize(
        ("start", "end"), [(0, 1), (0, 1000), (999, 1000), (1, 999), (500, 501), (0, 0), (1000, 1000), (7, 7)]
    )
    def test_ranges(self, place: Place, start: int, end: int) -> None:
        data = content(1000)
        place.write("x", data)
        origin = self.open(place)
        buffer = memoryview(origin.read("x", rows(origin)["x"].version, start, end))
        assert buffer.nbytes == end - start
        assert bytes(buffer) == data[start:end]

    @pytest.mark.parametrize(("start", "end"), [(-1, 1), (2, 1)])
    def test_a_wrong_range_is_refused(self, place: Place, start: int, end: int) -> None:
        place.write("x", b"12")
        origin = self.open(place)
        version = rows(origin)["x"].version
        with pytest.raises(InvalidRequest, match="no range"):
            origin.read("x", version, start, end)
        with pytest.raises(InvalidRequest, match="no range"):
            origin.stream("x", version, start, end, Pieces())

    @pytest.mark.parametrize(("start", "end"), [(0, 11), (9, 11), (10, 11), (500, 600)])
    def test_bytes_past_the_end_mean_another_object(self, place: Place, start: int, end: int) -> None:
        place.write("x", content(10))
        origin = self.open(place)
        version, sink = rows(origin)["x"].version, Pieces()
        with pytest.raises(OriginChanged, match="shoal dataset refresh"):
            origin.read("x", version, start, end)
        with pytest.raises(OriginChanged, match="shoal dataset refresh"):
            origin.stream("x", version, start, end, sink)
        assert not sink.pieces

    def test_a_url_that_is_one_object(self, place: Place) -> None:
        place.write("dir/only", content(9))
        place.write("dir/only-not", b"x")
        origin = self.open(place, "dir/only")
        found = rows(origin)
        assert {p: r.size_bytes for p, r in found.items()} == {"": 9}
        assert bytes(origin.read("", found[""].version, 2, 9)) == content(9)[2:]

    def test_a_name_that_starts_alike_is_outside(self, place: Place) -> None:
        place.write("train/a", b"1")
        place.write("training/b", b"2")
        assert set(rows(self.open(place, "train"))) == {"a"}

    def test_keys_do_not_depend_on_where_the_prefix_is_cut(self, place: Place) -> None:
        place.write("a/b/c", b"1")
        whole, part, single = self.open(place), self.open(place, "a/b"), self.open(place, "a/b/c")
        assert whole.identity == part.identity == single.identity
        keys = {key_path(o.key_prefix, path) for o, path in ((whole, "a/b/c"), (part, "c"), (single, ""))}
        assert len(keys) == 1
        versions = {r.version for o in (whole, part, single) for r in rows(o).values()}
        assert len(versions) == 1

    def test_slashes_at_the_end_change_nothing(self, place: Place) -> None:
        place.write("a/b", b"1")
        origin = open_origin(place.url + "/a//", place.options)
        assert origin.url == self.open(place, "a").url
        assert not origin.url.endswith("/")
        assert set(rows(origin)) == {"b"}

    def test_the_same_content_has_the_same_version_each_time(self, place: Place) -> None:
        place.write("a", content(5))
        assert rows(self.open(place)) == rows(self.open(place))

    @pytest.mark.parametrize("later", [content(10, seed=1), content(11), b""])
    def test_a_changed_object(self, place: Place, later: bytes) -> None:
        place.write("x", content(10))
        origin = self.open(place)
        before = rows(origin)["x"]
        place.write("x", later)
        with pytest.raises(OriginChanged, match=r"x (has|was) .* 'shoal dataset refresh NAME'"):
            origin.read("x", before.version, 0, 10)
        sink = Pieces()
        with pytest.raises(OriginChanged, match=r"x (has|was) .* 'shoal dataset refresh NAME'"):
            origin.stream("x", before.version, 0, 10, sink)
        assert not sink.pieces
        after = rows(origin)["x"]
        assert after.version != before.version
        assert bytes(origin.read("x", after.version, 0, after.size_bytes)) == later

    def test_a_removed_object(self, place: Place) -> None:
        place.write("x", content(10))
        place.write("y", content(10))
        origin = self.open(place)
        version = rows(origin)["x"].version
        place.remove("x")
        with pytest.raises(OriginChanged, match=r"x was removed since .* 'shoal dataset refresh NAME'"):
            origin.read("x", version, 0, 10)
        sink = Pieces()
        with pytest.raises(OriginChanged, match=r"x was removed since .* 'shoal dataset refresh NAME'"):
            origin.stream("x", version, 0, 10, sink)
        assert not sink.pieces
        assert set(rows(origin)) == {"y"}

    def test_nothing_there(self, place: Place) -> None:
        place.write("somewhere/else", b"1")
        with pytest.raises(OriginNotFound, match="nowhere") as caught:
            rows(self.open(place, "nowhere"))
        assert isinstance(caught.value, FileNotFoundError)

    def test_a_stream_is_the_range_in_order(self, place: Place) -> None:
        data = content(LARGE_BYTES)
        place.write("x", data)
        origin = self.open(place)
        version = rows(origin)["x"].version
        cuts = random.Random(0)
        inner = [sorted(cuts.sample(range(LARGE_BYTES), 2)) for _ in range(12)]
        edges = [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, LARGE_BYTES - 1]
        for start, end in [*inner, *((at, LARGE_BYTES) for at in edges), *((0, at) for at in edges[1:])]:
            assert streamed(origin, "x", version, start, end) == data[start:end], (start, end)
        assert bytes(origin.read("x", version, 5, LARGE_BYTES)) == data[5:]

    @pytest.mark.parametrize("at", [0, 7, 1000])
    def test_a_stream_of_nothing_calls_nothing(self, place: Place, at: int) -> None:
        place.write("x", content(1000))
        sink = Pieces()
        self.open(place).stream("x", "whatever version", at, at, sink)
        assert not sink.pieces

    @pytest.mark.parametrize("later", [content(LARGE_BYTES, seed=1), b"short", None], ids=["other", "short", "gone"])
    def test_an_object_that_changes_while_it_is_streamed(self, place: Place, later: bytes | None) -> None:
        """It is either all of the version asked for, or the beginning of that and an error."""
        data = content(LARGE_BYTES)
        place.write("x", data)
        place.write("y", b"stays")
        origin = self.open(place)
        version, sink = rows(origin)["x"].version, Pieces()

        def change_at_first(piece: memoryview) -> None:
            if not sink.pieces:
                if later is None:
                    place.remove("x")
                else:
                    place.write("x", later)
            sink(piece)

        try:
            origin.stream("x", version, 0, LARGE_BYTES, change_at_first)
        except OriginChanged:
            assert data.startswith(sink.data)
        else:
            assert sink.data == data

    @pytest.mark.parametrize("error", [RuntimeError("mine"), OriginUnavailable("mine"), FileNotFoundError("mine")])
    def test_what_the_sink_raises_ends_the_stream(self, place: Place, error: Exception) -> None:
        data = content(LARGE_BYTES)
        place.write("x", data)
        origin = self.open(place)
        version = rows(origin)["x"].version
        calls = 0

        def refuse(_: memoryview) -> None:
            nonlocal calls
            calls += 1
            raise error

        with pytest.raises(type(error), match="mine") as caught:
            origin.stream("x", version, 0, LARGE_BYTES, refuse)
        assert caught.value is error
        assert caught.value.__cause__ is None
        assert calls == 1
        assert streamed(origin, "x", version, 0, LARGE_BYTES) == data, "the next one is not disturbed"

    def test_many_threads_read_at_once(self, place: Place) -> None:
        data = content(60_000)
        place.write("x", data)
        origin = self.open(place)
        version = rows(origin)["x"].version
        starts = range(0, len(data), 1000)
        with ThreadPoolExecutor(16) as pool:
            pieces = pool.map(lambda start: bytes(origin.read("x", version, start, start + 1000)), starts)
            assert b"".join(pieces) == data
            pieces = pool.map(lambda start: streamed(origin, "x", version, start, start + 1000), starts)
            assert b"".join(pieces) == data
        origin.close()
