"""What to fetch ahead of the reads of one object: decided from the reads alone. Pure.

Reads that follow each other are a stream; several may go through one object at the same time, as when eight processes
read a tar each from another place. The kernel's own requests for one stream come a little out of order, so a stream
that has been followed is also followed over small gaps and steps back.

    the first read           nothing: whoever looks at a head or a foot wants no more
    one that follows         a window behind it, then one twice as long, up to `MAX_WINDOW`
    one somewhere else       a new stream, of which nothing is known: exactly what was asked

Windows end where multiples of their own length do, so the longest are whole parts, whose checksums are compared.

The rule: never more than two windows ahead of what was read.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.shards import PART_SIZE

MIN_WINDOW = 1 << 20
MAX_WINDOW = PART_SIZE
#: How far from its end a stream's next read may be: requests of the kernel that are under way at one time.
SLACK_BYTES = 4 << 20
#: Streams of one object that are known at one time.
MAX_STREAMS = 16


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes [start, end) of an object."""

    start: int
    end: int


@dataclass(slots=True)
class _Stream:
    """Reads that follow each other. `reach` is the furthest byte read, `ahead_to` that of the windows."""

    reach: int
    ahead_to: int = 0
    next_window: int = MIN_WINDOW
    is_followed: bool = False


class Readahead:
    """The streams of one object of `size_bytes`. Not thread-safe."""

    __slots__ = ("_size_bytes", "_streams")

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._streams: list[_Stream] = []  # the one used longest ago first

    def observe(self, start: int, end: int) -> list[Window]:
        """Note a read of bytes [start, end); the windows to fetch now, in the order in which they will be wanted."""
        stream = self._find(start)
        if stream is None:
            self._streams.append(_Stream(end))
            del self._streams[:-MAX_STREAMS]
            return []
        self._streams.remove(stream)
        self._streams.append(stream)
        stream.is_followed = True
        stream.reach = max(stream.reach, end)
        stream.ahead_to = max(stream.ahead_to, stream.reach)
        windows = []
        while stream.ahead_to < min(self._size_bytes, stream.reach + stream.next_window):
            length = stream.next_window
            stop = min(self._size_bytes, (stream.ahead_to + length) // length * length)
            windows.append(Window(stream.ahead_to, stop))
            stream.ahead_to = stop
            stream.next_window = min(MAX_WINDOW, 2 * length)
            if length == stream.next_window:
                break  # one a read, once they are as long as they get
        return windows

    def _find(self, start: int) -> _Stream | None:
        exact = next((s for s in reversed(self._streams) if s.reach == start), None)
        if exact is not None:
            return exact
        near = (s for s in reversed(self._streams) if s.is_followed and abs(start - s.reach) <= SLACK_BYTES)
        return next(near, None)
