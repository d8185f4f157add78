"""Selections and indexes: a pattern finds what fsspec's glob finds; an index travels unchanged, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import snapshot
from shoal.errors import InvalidRequest, NotFound, ShardCorrupt
from shoal.snapshot import Snapshot
from shoal.streaming.formats.format import Format
from shoal.streaming.formats.source import Extent
from shoal.streaming.index import Index, check_schema
from shoal.streaming.selection import Selection

PATHS = ["a/0.arrow", "a/1.arrow", "a/b/2.arrow", "a/notes.txt", "c/0.parquet", "img/x.jpg", "img/y.JPG", "t/0.tar"]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    rows = [(path, 10 + number, "1") for number, path in enumerate(PATHS)]
    directory = tmp_path_factory.mktemp("snapshots")
    path = snapshot.write(
        directory, origin="memory://set", identity="memory://set", key_prefix="", shard_size=4096, rows=rows
    )
    return Snapshot.open(Path(path))


@pytest.mark.parametrize(
    ("path", "format", "names", "kind"),
    [
        ("a/*.arrow", None, ["a/0.arrow", "a/1.arrow"], Format.ARROW),
        ("a/**/*.arrow", None, ["a/0.arrow", "a/1.arrow", "a/b/2.arrow"], Format.ARROW),
        ("a/b", None, ["a/b/2.arrow"], Format.ARROW),
        ("a/b/", None, ["a/b/2.arrow"], Format.ARROW),
        ("a/0.arrow", None, ["a/0.arrow"], Format.ARROW),
        ("img", None, ["img/x.jpg", "img/y.JPG"], Format.OBJECTS),
        ("c", None, ["c/0.parquet"], Format.PARQUET),
        ("t/*", None, ["t/0.tar"], Format.TAR),
        ("", "objects", PATHS, Format.OBJECTS),
    ],
)
def test_a_path_selects(listed: Snapshot, path: str, format: str | None, names: list[str], kind: Format) -> None:
    selection = Selection.of_path(listed, path, format)
    assert [listed.path(row) for row in selection.rows(listed).tolist()] == names
    assert selection.format is kind


def test_what_selects_nothing_or_several_formats_is_refused(listed: Snapshot) -> None:
    with pytest.raises(NotFound, match=r"'b/\*\.arrow'.*shoal ls"):
        Selection.of_path(listed, "b/*.arrow")
    with pytest.raises(InvalidRequest, match=r"a/0\.arrow and a/notes\.txt are of different formats.*format="):
        Selection.of_path(listed, "a")
    with pytest.raises(InvalidRequest, match="'csv' is no format: use one of arrow, parquet, tar, objects"):
        Selection.of_path(listed, "a/*.arrow", "csv")


def test_selections_of_other_things_have_other_keys() -> None:
    base = Selection("0" * 32, "a/*", Format.ARROW)
    others = [Selection("1" * 32, "a/*", Format.ARROW), Selection("0" * 32, "b/*", Format.ARROW)]
    others.append(Selection("0" * 32, "a/*", Format.TAR))
    assert len({base.key, *(other.key for other in others)}) == 4


runs = st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1 << 40), st.integers(0, 1 << 30)), max_size=4))


@given(runs, st.binary(max_size=20))
def test_an_index_travels_unchanged(objects: list[list[tuple[int, int, int]]], schema: bytes) -> None:
    selection = Selection("0" * 32, "**", Format.ARROW)
    extents = [[Extent(n, s, a, a + b) for n, (s, a, b) in enumerate(each)] for each in objects]
    index = Index.of_runs(range(len(objects)), extents, schema)
    again = Index.from_buffer(index.to_buffer(selection), selection)
    assert again.digest == index.digest and again.schema == schema
    for name in ("rows", "numbers", "samples", "starts", "ends"):
        assert np.array_equal(getattr(again, name), getattr(index, name))
    assert again.sample_count == sum(s for each in objects for s, _, _ in each)
    assert (again.samples > 0).all()


def test_a_damaged_index_or_that_of_something_else_is_refused() -> None:
    selection = Selection("0" * 32, "**", Format.ARROW)
    good = Index.of_runs([3], [[Extent(0, 7, 8, 4096)]]).to_buffer(selection).to_pybytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        try:
            index = Index.from_buffer(pa.py_buffer(bytes(damaged)), selection)
        except ShardCorrupt:
            continue
        assert (index.rows.tolist(), index.samples.tolist(), index.ends.tolist()) == ([3], [7], [4096])
    with pytest.raises(ShardCorrupt, match="another selection"):
        Index.from_buffer(pa.py_buffer(good), Selection("0" * 32, "*", Format.ARROW))
    with pytest.raises(ShardCorrupt):
        Index.from_buffer(pa.py_buffer(good[:-40]), selection)


def test_objects_are_their_own_index(listed: Snapshot) -> None:
    selection = Selection.of_path(listed, "img")
    index = Index.of_objects(listed, selection.rows(listed))
    assert index.samples.tolist() == [1, 1]
    assert index.ends.tolist() == [15, 16]


def test_schemas_that_differ_are_named() -> None:
    ours, theirs = pa.schema([("a", pa.int64())]), pa.schema([("a", pa.int32())])
    check_schema("x", ours, "y", ours.with_metadata({"k": "v"}))
    with pytest.raises(InvalidRequest, match=r"x and y have different columns .*a: int32, a: int64"):
        check_schema("x", ours, "y", theirs)
