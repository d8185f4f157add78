"""A snapshot as a tree of inodes: numbers, look-ups and directories, answered from the mapped path column. Pure.

    1                     the root: the dataset, or the directory of it that is mounted
    2 + row               a file, by its row in the snapshot
    2 + rows + ordinal    a directory, by its place among all directories in the order of the snapshot

So an inode's number is the same on every node and after every restart, and nothing has to be remembered for it. Where a
directory's reader stands is a row, too: whoever takes over from a server that died goes on there.

What no file system can hold is left out, and counted: names of more than 255 bytes, empty ones, "." and "..", and an
object whose path is also a directory's.

The rule: what is held is eight bytes a directory; a listing costs what it lists, in arrays and not entry by entry.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shoal import listing
from shoal.errors import InvalidRequest, NotFound
from shoal_csi import protocol
from shoal_csi.protocol import NAME_MAX, ROOT_ID, Attributes

FIRST_FILE = 2
#: No origin tells a time. This one every archive format can hold, in every time zone: the second day of 1980.
MTIME_S = 315_619_200
#: Rows that are looked at together while directories are found.
_STRIDE_ROWS = 256
_SLASH, _DOT = ord("/"), ord(".")
#: Offsets of a directory's reader: after ".", after "..", and from there on 2 and the next row.
_AFTER_DOT, _AFTER_DOTS = 1, 2
#: Directories whose place is remembered.
_PLACES_KEPT = 4096

Words = npt.NDArray[np.uint64]


class Place(NamedTuple):
    """A directory: how the paths below it begin (with its slash, "" for the whole dataset), and their rows."""

    prefix: bytes
    start: int
    stop: int


class Tree:
    """The inodes of a snapshot. Thread-safe: it never changes.

    Args:
        paths, sizes: of the snapshot's objects, by row.
        subpath: the directory that is the root; "" for the whole dataset.
        object_name: what the object of an empty path is called, which is a whole origin.

    Attributes:
        left_out: objects that no file system can hold, below the whole dataset.

    Raises:
        NotFound: there is no directory `subpath`.
        InvalidRequest: `subpath` is an object, or no path.
    """

    def __init__(
        self, paths: listing.Paths, sizes: npt.NDArray[np.int64], subpath: str = "", object_name: str = "object"
    ) -> None:
        self._paths, self._sizes = paths, sizes
        self._rows = len(paths)
        self._offsets, self._data = listing.text_buffers(paths.array)
        self._directories, shadows, bad = _survey(paths, self._offsets, self._data)
        self._hidden, self.left_out = self._find_hidden(shadows, bad)
        self._first_directory = FIRST_FILE + self._rows
        self._object_name = object_name.encode() if self._rows and not paths.raw(0) else b""
        self._place = functools.lru_cache(_PLACES_KEPT)(self._find_place)
        self._root = self._find_root(subpath.strip("/"))
        if self._root.prefix or self._find(self._root, self._object_name) is not None:
            self._object_name = b""

    # Inodes

    def __len__(self) -> int:
        """Files below the root."""
        return self._root.stop - self._root.start

    @property
    def rows(self) -> range:
        """Of the files below the root."""
        return range(self._root.start, self._root.stop)

    def is_dir(self, inode: int) -> bool:
        return inode == ROOT_ID or inode >= self._first_directory

    def row(self, inode: int) -> int | None:
        """The row of a file; None for a directory, and for what is no inode of this tree."""
        return inode - FIRST_FILE if FIRST_FILE <= inode < self._first_directory else None

    def attributes(self, inode: int) -> Attributes | None:
        """What stat(2) tells; None where there is no such inode."""
        row = self.row(inode)
        if row is not None:
            return Attributes(inode, int(self._sizes[row]), False, MTIME_S)
        if inode == ROOT_ID or self._first_directory <= inode < self._first_directory + len(self._directories):
            return Attributes(inode, 0, True, MTIME_S)
        return None

    def path(self, inode: int) -> str:
        """The path of a file or directory in the dataset. Raises NotFound."""
        row = self.row(inode)
        if row is not None:
            return self._paths[row]
        return self._place_of(inode).prefix.decode().rstrip("/")

    def lookup(self, directory: int, name: bytes) -> int | None:
        """The inode of `name` in `directory`; None where it has none. Raises NotFound: there is no such directory."""
        found = self._find(self._place_of(directory), name)
        if found is None and name and name == self._object_name and directory == ROOT_ID:
            return FIRST_FILE
        return found

    def _find(self, place: Place, name: bytes) -> int | None:
        if not _is_name(name):
            return None
        path = place.prefix + name
        found = self._directory(path, place.start, place.stop)
        if found is not None:
            return found
        row = self._paths.first_not_below(path, place.start, place.stop)
        if row < place.stop and self._paths.raw(row) == path:
            return FIRST_FILE + row
        return None

    # Listing

    def read_dir(self, inode: int, offset: int, limit: int, *, is_plus: bool) -> bytes:
        """Entries of a directory from `offset` on, as many as fit into `limit` bytes; none at its end.

        Args:
            is_plus: each with its attributes, as after a look-up.

        Raises:
            NotFound: there is no such directory.
        """
        return b"".join(self._entries(inode, offset, limit, is_plus))

    def _entries(self, inode: int, offset: int, limit: int, is_plus: bool) -> Iterator[bytes]:
        place = self._place_of(inode)
        for number, name in ((_AFTER_DOT, b"."), (_AFTER_DOTS, b"..")):
            if offset < number:
                if limit < protocol.dirent_size(len(name), plus=is_plus):
                    return
                dot = inode if name == b"." else self._parent(place)
                entry = protocol.pack_dirent(dot, number, name, None, is_plus=is_plus)
                limit -= len(entry)
                yield entry
        row = self._first_unlisted(place, max(place.start, offset - _AFTER_DOTS))
        if row == 0 and self._rows and not self._paths.raw(0):
            if self._object_name:
                entry, count = self._pack(np.zeros(1, np.int64), self._object_name, limit, is_plus)
                if not count:
                    return
                limit -= len(entry)
                yield entry
            row = 1
        smallest = protocol.dirent_size(1, plus=is_plus)
        while row < place.stop and limit >= smallest:
            stop = min(place.stop, row + limit // smallest)
            nested, slash = self._first_nested(row, stop, len(place.prefix))
            if nested > row:
                entry, is_whole = self._pack_run(row, nested, len(place.prefix), limit, is_plus)
                limit -= len(entry)
                yield entry
                if not is_whole:
                    return
                row = nested
            if row < stop:
                path = self._paths.raw(row)[:slash]
                after = self._paths.first_not_below(path + b"0", row + 1, place.stop)  # "0" follows "/"
                name = path[len(place.prefix) :]
                if _is_name(name):
                    if limit < protocol.dirent_size(len(name), plus=is_plus):
                        return
                    found = self._directory_at(row, len(path))
                    entry = protocol.pack_dirent(
                        found, _AFTER_DOTS + after, name, Attributes(found, 0, True, MTIME_S), is_plus=is_plus
                    )
                    limit -= len(entry)
                    yield entry
                row = after

    def _first_unlisted(self, place: Place, row: int) -> int:
        """`row`, or the first one after the directory that it lies in, which the entry before it was.

        Anybody may seek to anywhere, and what an entry says the kernel takes for the name's inode, for all who use the
        mount: one that begins inside a directory would give its name to another one.
        """
        if place.start < row < place.stop:
            path = self._paths.raw(row)
            slash = path.find(b"/", len(place.prefix))
            if slash >= 0 and self._paths.raw(row - 1).startswith(path[: slash + 1]):
                return self._paths.first_not_below(path[:slash] + b"0", row + 1, place.stop)
        return row

    def _first_nested(self, start: int, stop: int, skip: int) -> tuple[int, int]:
        """The first row from `start` on, and before `stop`, in a directory of this one, and where its name ends."""
        offsets = self._offsets[start : stop + 1]
        slashes = np.flatnonzero(self._data[offsets[0] : offsets[-1]] == _SLASH) + offsets[0]
        rows = np.searchsorted(offsets, slashes, "right") - 1
        within = slashes - offsets[rows]
        found = np.flatnonzero(within >= skip)
        return (start + int(rows[found[0]]), int(within[found[0]])) if len(found) else (stop, 0)

    def _pack_run(self, start: int, stop: int, skip: int, limit: int, is_plus: bool) -> tuple[bytes, bool]:
        """Entries for rows [start, stop), which are files of one directory; and whether all had room."""
        rows = np.arange(start, stop)
        first, last = np.searchsorted(self._hidden, (start, stop))
        if last > first:
            rows = np.setdiff1d(rows, self._hidden[first:last], assume_unique=True)
        starts = self._offsets[rows] + skip
        lengths = self._offsets[rows + 1] - starts
        packed, count = protocol.pack_files(
            (rows + FIRST_FILE).astype(np.uint64),
            (rows + (_AFTER_DOTS + 1)).astype(np.uint64),
            self._sizes[rows],
            self._data,
            starts,
            lengths,
            limit,
            MTIME_S,
            is_plus=is_plus,
        )
        return packed, count == len(rows)

    def _pack(self, rows: npt.NDArray[np.int64], name: bytes, limit: int, is_plus: bool) -> tuple[bytes, int]:
        """An entry for the file of one row under another name than its path's."""
        return protocol.pack_files(
            (rows + FIRST_FILE).astype(np.uint64),
            (rows + (_AFTER_DOTS + 1)).astype(np.uint64),
            self._sizes[rows],
            np.frombuffer(name, np.uint8),
            np.zeros(1, np.int64),
            np.array([len(name)]),
            limit,
            MTIME_S,
            is_plus=is_plus,
        )

    # Directories

    def _find_root(self, subpath: str) -> Place:
        if not subpath:
            return Place(b"", 0, self._rows)
        path = subpath.encode("utf-8", "surrogatepass")
        if not all(_is_name(name) for name in path.split(b"/")):
            raise InvalidRequest(f"{subpath!r} is no subpath: write names with one '/' between them")
        inode = self._directory(path, 0, self._rows)
        if inode is None:
            if self._paths.find(subpath) is not None:
                raise InvalidRequest(f"{subpath!r} is an object: a subpath is a directory, so mount the one it lies in")
            raise NotFound(f"the snapshot has no directory {subpath!r}: 'shoal ls' lists what there is")
        return self._find_place(inode)

    def _place_of(self, inode: int) -> Place:
        return self._root if inode == ROOT_ID else self._place(inode)

    def _find_place(self, inode: int) -> Place:
        ordinal = inode - self._first_directory
        if not 0 <= ordinal < len(self._directories):
            raise NotFound(f"inode {inode} is no directory of this snapshot")
        row, length = divmod(int(self._directories[ordinal]), 1 << 32)
        path = self._paths.raw(row)[:length]
        return Place(path + b"/", row, self._paths.first_not_below(path + b"0", row + 1))

    def _directory(self, path: bytes, start: int, stop: int) -> int | None:
        """The inode of directory `path`, whose rows lie in [start, stop); None where there is none."""
        prefix = path + b"/"
        row = self._paths.first_not_below(prefix, start, stop)
        if row >= stop or not self._paths.raw(row).startswith(prefix):
            return None
        return self._directory_at(row, len(path))

    def _directory_at(self, row: int, length: int) -> int:
        """The inode of the directory that begins at `row`, and whose path is the first `length` bytes of that one's."""
        ordinal = bisect.bisect_left(self._directories.data, row << 32 | length)
        return self._first_directory + ordinal

    def _parent(self, place: Place) -> int:
        path, slash, _ = place.prefix[:-1].rpartition(b"/")
        if place == self._root or path + slash == self._root.prefix:
            return ROOT_ID
        return self._directory(path, 0, self._rows) or ROOT_ID

    def _find_hidden(self, shadows: Words, bad: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
        """Rows whose name cannot be listed, in order; and how many objects cannot be reached in all."""
        hidden = set()
        for key in shadows.tolist():
            row, length = divmod(key, 1 << 32)
            path = self._paths.raw(row)[:length]
            found = self._paths.first_not_below(path)
            if self._paths.raw(found) == path:
                hidden.add(found)
        unreachable = len(hidden)
        for row in bad.tolist():
            path = self._paths.raw(row)
            unreachable += row not in hidden and bool(path)
            if not _is_name(path.rpartition(b"/")[2]) and path:
                hidden.add(row)
        return np.array(sorted(hidden), np.int64), unreachable


def _is_name(name: bytes) -> bool:
    return 0 < len(name) <= NAME_MAX and name not in (b".", b"..") and b"/" not in name


def _survey(
    paths: listing.Paths, offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]
) -> tuple[Words, Words, npt.NDArray[np.int64]]:
    """Go over a sorted path column once.

    Returns:
        All directories, and those that an object of the same path may stand before, each as ``row << 32 | length``:
        the first row below it, and the length of its path, without the slash. And the rows whose path has a name that
        is none, but for a path that is empty itself. All ascending.
    """
    found: list[Words] = [np.empty(0, np.uint64)]
    shadows: list[Words] = [np.empty(0, np.uint64)]
    bad: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for start in range(0, len(paths), _STRIDE_ROWS):
        stop = min(len(paths), start + _STRIDE_ROWS)
        if start and _goes_on(paths, offsets, data, start, stop):
            continue
        shared = _shared(offsets, data, start, stop)
        slashes = np.flatnonzero(data[offsets[start] : offsets[stop]] == _SLASH) + offsets[start]
        rows = np.searchsorted(offsets[start : stop + 1], slashes, "right") - 1
        lengths = slashes - offsets[start + rows]
        begins = lengths >= shared[rows]  # the path before shares less than this slash: the directory is new
        keys = ((start + rows) << 32 | lengths).astype(np.uint64)
        found.append(keys[begins])
        # An object "a" stands before "a/b", and only names that begin with "a" lie between them.
        shadows.append(keys[lengths == shared[rows]])
        bad.append(_with_bad_names(offsets, data, start, stop))
    return np.concatenate(found), np.concatenate(shadows), np.concatenate(bad)


def _goes_on(
    paths: listing.Paths, offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8], start: int, stop: int
) -> bool:
    """Whether rows [start, stop) are files of the directory of the row before, all of ordinary names. May say no.

    What begins with one prefix is one run of rows, so it is enough that the last row does.
    """
    before = paths.raw(start - 1)
    prefix = before[: before.rfind(b"/") + 1]
    if not paths.raw(stop - 1).startswith(prefix) or not all(map(_is_name, prefix.split(b"/")[:-1])):
        return False
    slashes = np.count_nonzero(data[offsets[start] : offsets[stop]] == _SLASH)
    lengths = np.diff(offsets[start : stop + 1]) - len(prefix)
    return (
        slashes == (stop - start) * prefix.count(b"/")
        and int(lengths.min()) > len(b"..")
        and int(lengths.max()) <= NAME_MAX
    )


def _shared(
    offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8], start: int, stop: int
) -> npt.NDArray[np.int64]:
    """How many bytes each row of [start, stop) begins with as the row before it does."""
    shared = np.zeros(stop - start, np.int64)
    first = max(start, 1)
    here, lengths = offsets[first:stop], np.diff(offsets[first - 1 : stop + 1])
    compared = np.minimum(lengths[:-1], lengths[1:])
    some = np.flatnonzero(compared)
    if not len(some):
        return shared
    counts = compared[some]
    begins = np.cumsum(counts) - counts
    within = np.arange(int(counts.sum())) - np.repeat(begins, counts)
    at = np.repeat(here[some], counts) + within
    other = np.repeat(offsets[first - 1 : stop - 1][some], counts) + within
    differs = np.where(data[at] != data[other], within, np.repeat(counts, counts))
    shared[first - start + some] = np.minimum.reduceat(differs, begins)
    return shared


def _with_bad_names(
    offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8], start: int, stop: int
) -> npt.NDArray[np.int64]:
    """The rows of [start, stop) whose path has a name that is none, ascending; but for a path that is empty itself."""
    if start == 0 and offsets[1] == 0:
        start = 1
    slashes = np.flatnonzero(data[offsets[start] : offsets[stop]] == _SLASH) + offsets[start]
    starts = np.sort(np.concatenate([offsets[start:stop], slashes + 1]))
    ends = np.sort(np.concatenate([offsets[start + 1 : stop + 1], slashes]))
    lengths = ends - starts
    is_bad = (lengths > NAME_MAX) | (lengths == 0)
    for dots in (1, 2):
        some = np.flatnonzero(lengths == dots)
        is_bad[some] = (data[starts[some]] == _DOT) & (data[ends[some] - 1] == _DOT)
    return np.unique(np.searchsorted(offsets, starts[is_bad], "right") - 1)
