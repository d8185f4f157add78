"""A snapshot as inodes and directories, compared with the same paths put into nested dictionaries."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import listing
from shoal.errors import InvalidRequest, NotFound
from shoal_csi import tree as trees
from shoal_csi.protocol import DT_DIR, ENTRY_BYTES, ROOT_ID
from shoal_csi.tree import Tree

#: Names that sort around "/", are empty, are dots, are long, or are not ASCII.
_names = st.sampled_from(["a", "a-", "a.b", "a0", "b", "ü", "", ".", "..", "n" * 255, "n" * 256, "zz"])
_paths = st.lists(st.lists(_names, min_size=1, max_size=4).map("/".join), max_size=25, unique=True).map(
    lambda paths: sorted((p for p in paths if p and not p.startswith("/") and not p.endswith("/")), key=str.encode)
)


def make(paths: list[str], **kwargs: Any) -> Tree:
    sizes = np.arange(len(paths), dtype=np.int64) * 1000
    return Tree(listing.Paths(pa.array(paths, pa.large_utf8())), sizes, **kwargs)


def is_name(name: str) -> bool:
    return 0 < len(name.encode()) <= 255 and name not in (".", "..")


def model(paths: list[str], under: str = "") -> dict[str, Any]:
    """Nested dictionaries; a file is its row. Directories win over files, and what cannot be named is not there."""
    root: dict[str, Any] = {}
    for row, path in enumerate(paths):
        if path.startswith(under):
            *parents, name = path[len(under) :].split("/")
            at = root
            for parent in itertools.takewhile(is_name, parents):
                if not isinstance(at.get(parent), dict):
                    at[parent] = {}
                at = at[parent]
            if all(map(is_name, [*parents, name])):
                at.setdefault(name, row)
    return root


def entries(tree: Tree, inode: int, limit: int, *, is_plus: bool, offset: int = 0) -> list[tuple[str, int, bool]]:
    """Entries of a directory from `offset` on (name, inode, is directory), read as the kernel does: `limit` a time."""
    found = []
    while data := tree.read_dir(inode, offset, limit, is_plus=is_plus):
        assert len(data) <= limit
        at = 0
        while at < len(data):
            if is_plus:
                node, _, valid, _, _, _, ino, size = struct.unpack_from("<4Q2IQQ", data, at)
                at += ENTRY_BYTES
            ino_of, offset, length, kind = struct.unpack_from("<QQII", data, at)
            name = data[at + 24 : at + 24 + length].decode()
            at += 24 + (length + 7) // 8 * 8
            if is_plus and name not in (".", ".."):
                attributes = tree.attributes(node)
                assert attributes is not None
                assert valid > 0
                assert (node, ino, size) == (ino_of, ino_of, attributes.size_bytes)
            found.append((name, ino_of, kind == DT_DIR))
    return found


def walk(tree: Tree, inode: int, limit: int, is_plus: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    (dot, own, _), (dots, _, _), *others = entries(tree, inode, limit, is_plus=is_plus)
    assert (dot, own, dots) == (".", inode, "..")
    for name, child, is_dir in others:
        assert name not in result
        assert tree.lookup(inode, name.encode()) == child
        assert tree.is_dir(child) == is_dir
        result[name] = walk(tree, child, limit, is_plus) if is_dir else tree.row(child)
    return result


@given(_paths, st.integers(min_value=450, max_value=4096), st.booleans())
def test_the_tree_is_that_of_the_paths(paths: list[str], limit: int, is_plus: bool) -> None:
    tree = make(paths)
    assert walk(tree, ROOT_ID, limit, is_plus) == model(paths)
    assert tree.left_out == len(paths) - sum(1 for _ in _files(model(paths)))


@given(_paths, st.integers(0, 30), st.booleans())
def test_entries_are_what_their_names_are_wherever_a_reader_begins(
    paths: list[str], offset: int, is_plus: bool
) -> None:
    """Whoever has a directory open may seek to any offset, also to one that no entry gave."""
    tree = make(paths)
    whole = entries(tree, ROOT_ID, 4096, is_plus=is_plus)
    assert set(entries(tree, ROOT_ID, 4096, is_plus=is_plus, offset=offset)) <= set(whole)


def _files(found: dict[str, Any]) -> Any:
    for value in found.values():
        if isinstance(value, dict):
            yield from _files(value)
        else:
            yield value


@given(_paths)
def test_strides_change_nothing(paths: list[str]) -> None:
    tree = make(paths)
    before, trees._STRIDE_ROWS = trees._STRIDE_ROWS, 2
    try:
        other = make(paths)
    finally:
        trees._STRIDE_ROWS = before
    assert np.array_equal(tree._directories, other._directories)
    assert np.array_equal(tree._hidden, other._hidden)


@given(_paths, st.data())
def test_a_subpath_is_the_root(paths: list[str], data: st.DataObject) -> None:
    directories = [
        d for path in paths for d in [path.rpartition("/")[0]] if d and all(is_name(n) for n in d.split("/"))
    ]
    if directories:
        under = data.draw(st.sampled_from(directories))
        tree = make(paths, subpath=under)
        assert walk(tree, ROOT_ID, 4096, True) == model(paths, f"{under}/")
        assert tree.path(ROOT_ID) == under


@given(_paths)
def test_paths_come_back(paths: list[str]) -> None:
    tree = make(paths)
    for row, path in enumerate(paths):
        assert tree.path(trees.FIRST_FILE + row) == path


def test_numbers_do_not_depend_on_the_subpath() -> None:
    paths = ["a/b/c", "a/d", "e"]
    whole, part = make(paths), make(paths, subpath="a")
    a = whole.lookup(ROOT_ID, b"a")
    assert a is not None
    assert whole.lookup(a, b"d") == part.lookup(ROOT_ID, b"d")
    assert whole.lookup(a, b"b") == part.lookup(ROOT_ID, b"b")


def test_a_whole_origin_is_a_file() -> None:
    tree = make([""], object_name="x.tar")
    assert walk(tree, ROOT_ID, 4096, False) == {"x.tar": 0}
    assert make(["", "x.tar"], object_name="x.tar").lookup(ROOT_ID, b"x.tar") == trees.FIRST_FILE + 1


@pytest.mark.parametrize("subpath", ["a/..", "a//b", "n" * 256])
def test_what_is_no_subpath(subpath: str) -> None:
    with pytest.raises(InvalidRequest, match="no subpath"):
        make(["a/b"], subpath=subpath)


def test_a_subpath_that_is_not_there() -> None:
    with pytest.raises(NotFound, match="no directory 'c'"):
        make(["a/b"], subpath="c")
    with pytest.raises(InvalidRequest, match="is an object"):
        make(["a/b"], subpath="/a/b/")


def test_inodes_of_nobody() -> None:
    tree = make(["a/b"])
    assert tree.attributes(0) is None
    assert tree.attributes(4) is None
    with pytest.raises(NotFound):
        tree.lookup(4, b"x")
    with pytest.raises(NotFound):
        tree.read_dir(2, 0, 4096, is_plus=False)
