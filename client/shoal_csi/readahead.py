"""What to fetch ahead of the reads of one object: decided from the reads alone. Pure.

Reads that follow each other are a stream; several may go through one object at the same time, as when eight processes
read a tar each from another place. The kernel's own requests for one stream come a little out of order, so a stream
that has been followed is also followed over small gaps and steps back.

    the first read           nothing: whoever looks at a head or a foot wants no more
    one that follows         a window behind it, then one twice as long, up to `MAX_WINDOW`; in all twice as much as the
                             stream has read
    one somewhere else       a new stream, of which nothing is known: exactly what was asked

Windows end where multiples of their own length do, so the longest are whole parts, whose checksums are compared. Where
many streams share the room for windows they are shorter: one is read while two are fetched, and what is dropped to make
room for others is fetched twice.

The rule: never more than three windows ahead of what was read.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.shards import PART_SIZE

MIN_WINDOW = 1 << 20
MAX_WINDOW = PART_SIZE
#: Windows of a stream that are held at one time: one is read, two are fetched.
WINDOWS_HELD = 3
#: How far from its end a stream's next read may be: requests of the kernel that are under way at one time.
SLACK_BYTES = 8 << 20
#: Streams of one object that are known at one time.
MAX_STREAMS = 16


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes [start, end) of an object."""

    start: int
    end: int


@dataclass(slots=True)
class _Stream:
    """Reads that follow each other from `start` on.

    `reach` is the furthest byte read, `ahead_to` that of the windows.
    """

    start: int
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

    @property
    def followed(self) -> int:
        """Streams that windows are fetched for."""
        return sum(stream.is_followed for stream in self._streams)

    def observe(self, start: int, end: int, room_bytes: int = WINDOWS_HELD * MAX_WINDOW) -> list[Window]:
        """Note a read of bytes [start, end); the windows to fetch now, in the order in which they will be wanted.

        Args:
            room_bytes: what the windows of one stream may hold.
        """
        stream = self._find(start)
        if stream is None:
            self._streams.append(_Stream(start, end))
            del self._streams[:-MAX_STREAMS]
            return []
        self._streams.remove(stream)
        self._streams.append(stream)
        stream.is_followed = True
        stream.reach = max(stream.reach, end)
        stream.ahead_to = max(stream.ahead_to, stream.reach)
        longest = _longest(room_bytes)
        windows: list[Window] = []
        while True:
            length = min(stream.next_window, longest)
            ahead = min((WINDOWS_HELD - 1) * length, 2 * (stream.reach - stream.start))
            if stream.ahead_to >= min(self._size_bytes, stream.reach + ahead):
                return windows
            stop = min(self._size_bytes, (stream.ahead_to + length) // length * length)
            windows.append(Window(stream.ahead_to, stop))
            stream.ahead_to = stop
            stream.next_window = min(MAX_WINDOW, 2 * length)
            if length == longest:
                return windows  # one a read, once they are as long as they get

    def _find(self, start: int) -> _Stream | None:
        exact = next((s for s in reversed(self._streams) if s.reach == start), None)
        if exact is not None:
            return exact
        near = (s for s in reversed(self._streams) if s.is_followed and abs(start - s.reach) <= SLACK_BYTES)
        return next(near, None)


def _longest(room_bytes: int) -> int:
    """The longest window of which as many as are held have room."""
    length = MAX_WINDOW
    while length > MIN_WINDOW and WINDOWS_HELD * length > room_bytes:
        length //= 2
    return length
