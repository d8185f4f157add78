"""Skims: an object as a format reads it for an index, which wants few of its bytes: its foot, and heads here and there.

    foot     the last bytes come together, since a format reads there how long its footer is, and then the footer
    ahead    some bytes after those asked for come along, since the next head is often near

The rule: what the skims of a build hold is bounded (`Room`), and a skim that waits for room holds nothing, so that one
of them always goes on. An object that has more in one place than a node would hold is refused by its name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import pyarrow as pa

from shoal import sizes
from shoal.errors import InvalidRequest
from shoal.streaming.formats.source import Source

#: The last bytes of an object, as many as Arrow's Parquet reader asks for at first.
FOOT_BYTES = 64 << 10
#: The longest footer, or head of a batch or a member, that is read; docs/streaming.md names it.
MAX_BYTES = 64 << 20


class Room:
    """Bytes that some skims hold together. Threads share it.

    Args:
        limit_bytes: of all; a single read that is larger has to be the only one.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()  # guards held_bytes
        self.held_bytes = 0

    def take(self, size_bytes: int, *, waits: bool) -> bool:
        """Whether so many more bytes may be held; with `waits` they may, at last."""
        with self._changed:
            while self.held_bytes and self.held_bytes + size_bytes > self._limit_bytes:
                if not waits:
                    return False
                self._changed.wait()
            self.held_bytes += size_bytes
            return True

    def give_back(self, size_bytes: int) -> None:
        if size_bytes:
            with self._changed:
                self.held_bytes -= size_bytes
                self._changed.notify_all()


class _Stretch:
    """Bytes of the object from `start` on, which take `held_bytes` of the room."""

    __slots__ = ("data", "held_bytes", "start")

    def __init__(self, start: int, data: pa.Buffer, held_bytes: int) -> None:
        self.start, self.data, self.held_bytes = start, data, held_bytes

    def has(self, start: int, end: int) -> bool:
        return self.start <= start and end <= self.start + self.data.size


_NOTHING = _Stretch(0, pa.py_buffer(b""), 0)


class Skim:
    """One object; a `Source`. For one thread. A context manager: at its end it holds nothing.

    Args:
        name: of the object, for messages.
        ahead_bytes: that are read at a time, at least.
        weight: bytes that the format holds, decoded ones too, for each that is read.
        check: called before each read; what it raises ends the skim.
    """

    def __init__(
        self, name: str, source: Source, room: Room, *, ahead_bytes: int, weight: int, check: Callable[[], None]
    ) -> None:
        self._name, self._source, self._room = name, source, room
        self._ahead_bytes, self._weight, self._check = ahead_bytes, weight, check
        self._foot = self._last = _NOTHING

    @property
    def size_bytes(self) -> int:
        return self._source.size_bytes

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        """Bytes [start, end), cut at the object's end. They count as held until another read takes their place.

        Raises:
            InvalidRequest: they are more than `MAX_BYTES`.
            ShoalError: as the source does.
        """
        size = self.size_bytes
        end = min(end, size)
        if end - start > MAX_BYTES:
            raise InvalidRequest(
                f"{self._name} has {sizes.format(end - start)} of footer or header in one piece, and an index is made "
                f"of at most {sizes.format(MAX_BYTES)}: write it with fewer columns, row groups or batches a file, or "
                "leave it out of the pattern"
            )
        for known in (self._last, self._foot):
            if known.has(start, end):
                return known.data.slice(start - known.start, end - start)
        if end > size - FOOT_BYTES:
            first = max(0, min(start, size - FOOT_BYTES))
            self._room.give_back(self._foot.held_bytes)
            self._foot = _NOTHING
            found = self._foot = self._read(first, size)
        else:
            self._room.give_back(self._last.held_bytes)
            self._last = _NOTHING
            found = self._last = self._read(start, max(end, min(start + self._ahead_bytes, size)))
        return found.data.slice(start - found.start, end - start)

    def _read(self, start: int, end: int) -> _Stretch:
        held_bytes = self._weight * (end - start)
        if not self._room.take(held_bytes, waits=False):
            self._let_go()
            self._room.take(held_bytes, waits=True)
        try:
            self._check()
            return _Stretch(start, self._source.read_buffer(start, end), held_bytes)
        except BaseException:
            self._room.give_back(held_bytes)
            raise

    def _let_go(self) -> None:
        self._room.give_back(self._foot.held_bytes + self._last.held_bytes)
        self._foot = self._last = _NOTHING

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()
