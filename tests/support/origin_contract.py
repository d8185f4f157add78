"""What every origin must do, whatever reads it: subclass `OriginContract` and give it a place to write objects.

The expectations are those of `shoal.origin.Origin`, line by line; a new reader passes all of them or is none.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import pytest

from shoal.errors import InvalidRequest, OriginChanged, OriginNotFound
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
    return bytes((seed + i * 7 + i // 251) % 256 for i in range(length))


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
        with pytest.raises(InvalidRequest, match="no range"):
            origin.read("x", rows(origin)["x"].version, start, end)

    @pytest.mark.parametrize(("start", "end"), [(0, 11), (9, 11), (10, 11), (500, 600)])
    def test_bytes_past_the_end_mean_another_object(self, place: Place, start: int, end: int) -> None:
        place.write("x", content(10))
        origin = self.open(place)
        with pytest.raises(OriginChanged, match="shoal dataset refresh"):
            origin.read("x", rows(origin)["x"].version, start, end)

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
        assert set(rows(origin)) == {"y"}

    def test_nothing_there(self, place: Place) -> None:
        place.write("somewhere/else", b"1")
        with pytest.raises(OriginNotFound, match="nowhere") as caught:
            rows(self.open(place, "nowhere"))
        assert isinstance(caught.value, FileNotFoundError)

    def test_many_threads_read_at_once(self, place: Place) -> None:
        data = content(60_000)
        place.write("x", data)
        origin = self.open(place)
        version = rows(origin)["x"].version
        starts = range(0, len(data), 1000)
        with ThreadPoolExecutor(16) as pool:
            pieces = pool.map(lambda start: bytes(origin.read("x", version, start, start + 1000)), starts)
            assert b"".join(pieces) == data
        origin.close()
