"""The sorted path column of a snapshot as a directory tree, looked up where it lies.

A dataset has millions of names and a training node dozens of processes, so names stay the mapped bytes that all of them
share: a look-up bisects those bytes and decodes only what it returns.

The rule: nothing here is proportional to the dataset, except a match over the rows that the caller asked to be matched.

Bytes of UTF-8 order as code points do, and as `bytes` compare. Hence everything under one prefix is one run of rows, a
directory is the run under ``path + "/"``, and the next name after a whole directory is the first row not below
``path + "0"`` ("0" follows "/").
"""

from __future__ import annotations

import bisect
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shoal.errors import InvalidRequest

#: What RE2 reads otherwise than Python's `re`, or reads at all where `re` does not: class and anchor letters, groups
#: other than plain ones, POSIX classes, counts, and "$" (which in `re` also matches before a last newline). It sees
#: escaped characters too: a needless hit costs time, never a different answer.
_DIALECT = re.compile(r"\\[A-Za-z0-9]|\(\?(?!:|s:)|\[:|[{$]")


class Text:
    """One ``large_utf8`` column without nulls. It keeps the column's memory alive and decodes a row at a time."""

    __slots__ = ("_data", "_offsets", "array")

    def __init__(self, array: Any) -> None:
        """Wrap `array`, a ``pyarrow.LargeStringArray`` whose offset is 0."""
        self.array = array
        offsets, data = text_buffers(array)
        # Items of a memoryview are Python integers at a third of the cost of numpy's scalars.
        self._offsets = offsets.data
        self._data = data.data

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def raw(self, row: int) -> bytes:
        """A copy of the row's bytes. `row` is not checked."""
        offsets = self._offsets
        return bytes(self._data[offsets[row] : offsets[row + 1]])

    def __getitem__(self, row: int) -> str:
        """The row's text. `row` is not checked."""
        return self.raw(row).decode()


class Paths(Text):
    """Paths in strictly ascending order of their bytes, "/" between names. Thread-safe: it never changes."""

    __slots__ = ()

    def find(self, path: str) -> int | None:
        """The row of `path`; None where it is not listed."""
        wanted = _encode(path)
        row = self.first_not_below(wanted)
        return row if row < len(self) and self.raw(row) == wanted else None

    def under(self, prefix: str) -> range:
        """The rows whose path starts with `prefix`, which may end within a name."""
        return self._under(_encode(prefix))

    def is_dir(self, path: str) -> bool:
        """Whether anything lies under ``path + "/"``. The root, "", is a directory also when it is empty."""
        if not path:
            return True
        prefix = _encode(path) + b"/"
        row = self.first_not_below(prefix)
        return row < len(self) and self.raw(row).startswith(prefix)

    def children(self, path: str) -> tuple[list[int], list[str]]:
        """The rows of the objects directly in directory `path`, and the full paths of its directories, both in order.

        Costs one step an object and one bisection a directory, however much lies below. Both lists are empty where
        `path` is no directory.
        """
        prefix = _encode(path) + b"/" if path else b""
        rows = self._under(prefix)
        row, stop, skip = rows.start, rows.stop, len(prefix)
        objects: list[int] = []
        directories: list[str] = []
        while row < stop:
            name = self.raw(row)
            slash = name.find(b"/", skip)
            if slash < 0:
                # The root may itself be an object, named ""; it is no more its own child than "a" is a child of "a".
                if len(name) > skip:
                    objects.append(row)
                row += 1
            else:
                directories.append(name[:slash].decode())
                row = self.first_not_below(name[:slash] + b"0", row + 1, stop)
        return objects, directories

    def matching(self, regex: str, rows: range) -> npt.NDArray[np.int64]:
        """Those of `rows` whose whole path matches `regex`, a pattern of Python's `re`.

        RE2 runs patterns that mean the same to it (those of globs do) over the mapped column at once; the rest go
        path by path through `re`.

        Raises:
            InvalidRequest: `regex` is no regular expression, or `rows` is no run of rows of this column.
        """
        start, stop = bounds(rows, len(self))
        try:
            full_match = re.compile(regex).fullmatch
        except re.error as error:
            raise InvalidRequest(f"{regex!r} is not a regular expression ({error}): correct it") from error
        if (pattern := re2_pattern(regex)) is not None:
            try:
                hits = pc.match_substring_regex(self.array.slice(start, stop - start), pattern)
            except (pa.ArrowInvalid, UnicodeEncodeError):
                pass  # for RE2 it is too large, or it has a lone surrogate
            else:
                # Not by way of `to_numpy`, which imports pandas: 27 MiB in every process.
                return numbers(pc.indices_nonzero(hits), "<u8").astype(np.int64) + start
        return np.fromiter((row for row in range(start, stop) if full_match(self[row])), np.int64)

    def first_not_below(self, wanted: bytes, start: int = 0, stop: int | None = None) -> int:
        """The first row from `start` on, and before `stop`, whose path is not below `wanted`; `stop` where all are."""
        return bisect.bisect_left(range(len(self)), wanted, start, stop, key=self.raw)

    def _under(self, prefix: bytes) -> range:
        if not prefix:
            return range(len(self))
        start = self.first_not_below(prefix)
        # No byte of UTF-8 is 0xFF, so the last one always has a successor.
        return range(start, self.first_not_below(prefix[:-1] + bytes([prefix[-1] + 1]), start))


def text_buffers(array: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Views of a ``large_utf8`` array's n + 1 offsets and of the bytes between the first and the last of them.

    The views keep the array's memory alive. `array` has offset 0.
    """
    _, offsets_buffer, data_buffer = array.buffers()
    if len(array) == 0:  # Arrow allows an empty array to have no offsets at all
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    offsets = np.frombuffer(offsets_buffer, "<i8", len(array) + 1)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    return offsets, data[: offsets[-1]]


def numbers(column: Any, dtype: str) -> npt.NDArray[Any]:
    """A view of a column of numbers, or of fixed binary as numbers; it keeps the memory alive."""
    if not len(column):
        return np.empty(0, dtype)
    count = len(column) * column.type.byte_width // np.dtype(dtype).itemsize
    return np.frombuffer(column.buffers()[1], dtype, count)


def bounds(rows: range, count: int) -> tuple[int, int]:
    """Start and stop of `rows`, a run of the rows [0, `count`).

    Raises:
        InvalidRequest: `rows` has gaps, or reaches outside.
    """
    if not rows:
        return 0, 0
    if rows.step != 1 or rows.start < 0 or rows.stop > count:
        raise InvalidRequest(f"{rows!r} is no run of the {count:,} rows of this snapshot: use the ranges it hands out")
    return rows.start, rows.stop


def is_text(text: str) -> bool:
    """Whether `text` can be UTF-8. What cannot is most often a file name in another encoding."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def re2_pattern(regex: str) -> str | None:
    """`regex`, which `re` accepts, anchored at both ends for RE2; None where RE2 might read it otherwise."""
    body = regex.removesuffix("\\Z")
    if len(body.rstrip("\\")) % 2 != len(body) % 2:
        body = regex  # the backslash was itself escaped, so that "Z" is a letter
    # A glob's translation ends in \Z, which RE2 lacks; a full match implies it.
    return None if _DIALECT.search(body) else rf"\A(?:{body})\z"


def _encode(text: str) -> bytes:
    # A lone surrogate becomes bytes that are no UTF-8, hence equal to no path: not found, rather than an error.
    return text.encode("utf-8", "surrogatepass")
