"""Skims: an object as a format reads it for an index, which wants few of its bytes: its foot, and heads here and there.

    foot     the last bytes come together, since a format reads there how long its footer is, and then the footer
    ahead    some bytes after those asked for come along, since the next head is often near
    aside    what is read lies far apart, and nodes pass on what they do not have of it: they fill nothing
    through  it lies close together, or the object is small: nodes fill the shards, which takes no longer, and the epoch
             that comes reads them

The rule: what the skims of a build hold is bounded (`Room`), and a skim that waits for room holds nothing, so that one
of them always goes on. An object that has more in one place than a node would hold is refused by its name.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import pyarrow as pa

from shoal import sizes
from shoal.errors import InvalidRequest
from shoal.parallel import run_parallel
from shoal.streaming.formats.source import Source

#: The last bytes of an object, as many as Arrow's Parquet reader asks for at first.
FOOT_BYTES = 64 << 10
#: Heads of which the next begins within so many bytes are read through the cache: one aside takes as long as so many
#: bytes of a fill (measured: docs/streaming.md).
NEAR_BYTES = 1 << 20
#: Reads that have to be so near to each other.
NEAR_READS = 4
#: Bytes that are read aside at a time, at least: the head of a batch, or of a tar's member, mostly is not longer.
HEAD_BYTES = 4 << 10
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


_NOTHING = _Stretch(0, pa.py_buffer(b""), 0)


class Skim:
    """One object; a `Source`. For one thread. A context manager: at its end it holds nothing.

    Args:
        name: of the object, for messages.
        through, aside: the object, and the same without that nodes keep what they have to fetch.
        ahead_bytes: that are read through the cache at a time, at least.
        weight: bytes that the format holds, decoded ones too, for each that is read.
        check: called before each read; what it raises ends the skim.
    """

    def __init__(
        self,
        name: str,
        through: Source,
        aside: Source,
        room: Room,
        *,
        ahead_bytes: int,
        weight: int,
        check: Callable[[], None],
    ) -> None:
        self._name, self._through, self._aside, self._room = name, through, aside, room
        self._ahead_bytes, self._weight, self._check = ahead_bytes, weight, check
        self._foot = self._last = _NOTHING
        self._starts: deque[int] = deque(maxlen=NEAR_READS)  # of the last reads that were not of the foot

    @property
    def size_bytes(self) -> int:
        return self._through.size_bytes

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        """Bytes [start, end), cut at the object's end. They count as held until another read takes their place.

        Raises:
            InvalidRequest: they are more than `MAX_BYTES`.
            ShoalError: as the source does.
        """
        starts = self._starts
        is_near = len(starts) == NEAR_READS and 0 <= start - starts[0] < NEAR_READS * NEAR_BYTES
        return self._get(start, end, is_near=is_near)

    def read_several(self, spans: Sequence[tuple[int, int]]) -> list[pa.Buffer]:
        """Ranges [start, end) of the object: far apart they are read at once. They count as held until the next read.

        Raises: as `read_buffer`.
        """
        if len(spans) == 1:
            return [self.read_buffer(*spans[0])]
        distance = (spans[-1][0] - spans[0][0]) // (len(spans) - 1)
        if distance < NEAR_BYTES or self.size_bytes <= NEAR_BYTES:
            return [self._get(start, end, is_near=True) for start, end in spans]
        found = {span: self._known(*span) for span in spans}
        missing = [span for span, known in found.items() if known is None]
        for start, end in missing:
            self._check_length(end - start)

        def read(span: tuple[int, int]) -> pa.Buffer:
            self._check()
            return self._aside.read_buffer(*span)

        self._room.give_back(self._last.held_bytes)
        self._last = _NOTHING
        held_bytes = self._weight * sum(end - start for start, end in missing)
        self._take(held_bytes)
        self._last = _Stretch(0, _NOTHING.data, held_bytes)
        found.update(zip(missing, run_parallel(read, missing), strict=True))
        return [found[span] for span in spans]

    def _get(self, start: int, end: int, *, is_near: bool) -> pa.Buffer:
        size = self.size_bytes
        end = min(end, size)
        self._check_length(end - start)
        known = self._known(start, end)
        if known is not None:
            return known
        is_small = size <= NEAR_BYTES
        if end > size - FOOT_BYTES:
            first = max(0, min(start, size - FOOT_BYTES))
            self._room.give_back(self._foot.held_bytes)
            self._foot = _NOTHING
            found = self._foot = self._read(self._through if is_small else self._aside, first, size)
        else:
            self._room.give_back(self._last.held_bytes)
            self._last = _NOTHING
            self._starts.append(start)
            source, ahead = (self._through, self._ahead_bytes) if is_near or is_small else (self._aside, HEAD_BYTES)
            found = self._last = self._read(source, start, max(end, min(start + ahead, size)))
        return found.data.slice(start - found.start, end - start)

    def _known(self, start: int, end: int) -> pa.Buffer | None:
        for each in (self._last, self._foot):
            if each.start <= start and end <= each.start + each.data.size:
                return each.data.slice(start - each.start, end - start)
        return None

    def _check_length(self, length: int) -> None:
        if length > MAX_BYTES:
            raise InvalidRequest(
                f"{self._name} has {sizes.format(length)} of footer or header in one piece, and an index is made of at "
                f"most {sizes.format(MAX_BYTES)}: write it with fewer columns, row groups or batches a file, or leave "
                "it out of the pattern"
            )

    def _read(self, source: Source, start: int, end: int) -> _Stretch:
        held_bytes = self._weight * (end - start)
        self._take(held_bytes)
        try:
            self._check()
            return _Stretch(start, source.read_buffer(start, end), held_bytes)
        except BaseException:
            self._room.give_back(held_bytes)
            raise

    def _take(self, size_bytes: int) -> None:
        if not self._room.take(size_bytes, waits=False):
            self._let_go()
            self._room.take(size_bytes, waits=True)

    def _let_go(self) -> None:
        self._room.give_back(self._foot.held_bytes + self._last.held_bytes)
        self._foot = self._last = _NOTHING

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()
