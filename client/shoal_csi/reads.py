"""READs that the kernel does not answer by itself: through the client, with what follows fetched ahead.

    1. at hand     bytes of shards that this process has mapped, or of windows that have come: no waiting, and for maps
                   no memory
    2. window      one that is on its way is waited for
    3. exact       anything else, read as it was asked

A window is dropped when all of it was read, because the kernel keeps pages by itself; else when room is needed, the one
used longest ago first; and when nobody has its object open any more. One that is on its way, or being sent, counts
until it is gone.

A read is over when its reader's time limit is, counted from when it was asked for: what it waited for a thread and for
a window is inside. Where the kernel's own reading ahead failed, it asks once more, for the page that somebody wants: a
failure that took long is the answer to that, too, or each would take twice its time.

The rule: windows hold `limit_bytes` at most, and what is read exactly is what the threads that read it can hold.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

import pyarrow as pa

from shoal import provenance
from shoal.errors import DeadlineExceeded, ShoalError
from shoal.memory import Allocate
from shoal.reader import ObjectReader
from shoal.shards import PART_SIZE
from shoal.threads import Threads
from shoal_csi.readahead import Readahead
from shoal_csi.readahead import Window as Range
from shoal_csi.sources import Sources
from shoal_csi.window_memory import WindowMemory, held_bytes

log = logging.getLogger(__name__)

#: Bytes of all windows of one mount.
LIMIT_BYTES = 64 << 20
#: Windows that are fetched at one time.
FETCHES = 4
#: Objects whose readers, and whose streams, are remembered.
OBJECTS_KEPT = 4096
#: A failure after so long is told again, without asking anybody, to who asks for the same bytes within `TOLD_AGAIN_S`.
LONG_S, TOLD_AGAIN_S = 0.5, 1.0
_FAILURES_KEPT = 64

Send = Callable[[Sequence[pa.Buffer]], None]
"""Takes the bytes of a read, in order. They are valid until it returns."""


@dataclass(slots=True, eq=False)
class _Window:
    """A window of one object.

    `users` are those that hold its memory: its fetch, and reads that wait for it or send from it. `left` are the bytes
    that nobody has read yet.
    """

    row: int
    start: int
    end: int
    left: int
    future: Future[pa.Buffer]
    users: int = 1
    is_dropped: bool = False

    @property
    def size(self) -> int:
        return held_bytes(self.end - self.start)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Bytes [start, end) of an object, which could not be had; `at`: `time.monotonic`."""

    row: int
    start: int
    end: int
    at: float
    error: ShoalError


class Reads:
    """The reads of one mount. Thread-safe.

    Args:
        reader_of: gives the reader of a row.

    Attributes:
        window_bytes, most_window_bytes: held by windows, now and at most so far.
        exact_bytes, ahead_bytes: read exactly, and fetched ahead, so far.
        fetching: windows that are on their way.
        sources: where all of it came from.
    """

    def __init__(self, reader_of: Callable[[int], ObjectReader], limit_bytes: int = LIMIT_BYTES) -> None:
        self.reader_of = functools.lru_cache(OBJECTS_KEPT)(reader_of)
        self._limit_bytes = limit_bytes
        self._threads = Threads(FETCHES, "shoal-ahead")
        self._memory = WindowMemory()
        self._lock = threading.RLock()  # guards all below; a fetch that fails at once ends under it
        self._streams: OrderedDict[int, Readahead] = OrderedDict()
        self._windows: OrderedDict[_Window, None] = OrderedDict()  # the one used longest ago first
        self._of_row: dict[int, list[_Window]] = {}
        self._failures: deque[_Failure] = deque(maxlen=_FAILURES_KEPT)  # in the order of their ends
        self.sources = Sources()
        self.window_bytes = self.most_window_bytes = self.exact_bytes = self.ahead_bytes = self.fetching = 0

    def close(self) -> None:
        """Begin no more windows."""
        self._threads.close()

    def read_at_hand(self, row: int, start: int, end: int, send: Send) -> bool:
        """As `read`, where nobody is to be waited for; else nothing happens. Whether it was."""
        mapped = self._mapped(row, start, end)
        if mapped is not None:
            self.sources.local_bytes += end - start
            send(mapped)
            return True
        reader = self.reader_of(row)
        with self._lock:
            windows = self._of_row.get(row, ())
            window = next((each for each in windows if each.start <= start and end <= each.end), None)
            if window is None or not window.future.done() or _has_failed(window.future):
                return False
            window.users += 1
            self._windows.move_to_end(window)
            for ahead in self._observe(row, reader.size_bytes, start, end):
                self._fetch(reader, ahead)
        try:
            send([window.future.result().slice(start - window.start, end - start)])
        finally:
            with self._lock:
                self._release(window, end - start)
        return True

    def read(self, row: int, start: int, end: int, send: Send, since: float | None = None) -> None:
        """Give bytes [start, end) of an object, which lie inside it, to `send`.

        Args:
            since: `time.monotonic` when they were asked for; None: now.

        Raises:
            ShoalError: they cannot be had. `send` was not called.
        """
        mapped = self._mapped(row, start, end)
        if mapped is not None:
            self.sources.local_bytes += end - start
            send(mapped)
            return
        since = time.monotonic() if since is None else since
        reader = self.reader_of(row)
        with self._lock:
            failure = self._failure_at(row, start)
            if failure is not None:
                raise failure
            used = self._use(row, start, end)
            for ahead in self._observe(row, reader.size_bytes, start, end):
                self._fetch(reader, ahead)
        pieces: list[pa.Buffer] = []
        until = since + reader.timeout_s
        try:
            position = start
            for window in used:
                if position < window.start:
                    pieces.append(self._exact(reader, position, window.start, until))
                    position = window.start
                stop = min(end, window.end)
                pieces.append(self._from_window(window, reader, position, stop, until))
                position = stop
            if position < end:
                pieces.append(self._exact(reader, position, end, until))
            send(pieces)
        except ShoalError as error:
            self._note_failure(reader, start, end, since, error)
            raise
        finally:
            pieces.clear()
            with self._lock:
                for window in used:
                    self._release(window, min(end, window.end) - max(start, window.start))

    def forget(self, row: int) -> None:
        """Nobody has the object open any more: let go of what was fetched ahead for it."""
        with self._lock:
            self._streams.pop(row, None)
            for window in list(self._of_row.get(row, ())):
                self._drop(window)

    def _receive(self, reader: ObjectReader, ahead: Range) -> pa.Buffer:
        """A window's bytes, in memory that is its own. What was taken and is not that is given back: a read that failed
        may have some, and so may one that went on at the local node, whose map is returned instead."""
        taken: list[pa.Buffer] = []
        found: pa.Buffer | None = None

        def allocate(length: int) -> pa.Buffer:
            taken.append(self._memory.allocate(length))
            return taken[-1]

        try:
            found = self._read_buffer(reader, ahead.start, ahead.end, None, allocate)
            return found
        finally:
            for buffer in taken:
                if found is None or buffer.address != found.address:
                    self._memory.free(buffer)

    def _fetched(self, window: _Window) -> None:
        with self._lock:
            self.fetching -= 1
            self._release(window, 0)

    def _mapped(self, row: int, start: int, end: int) -> list[pa.Buffer] | None:
        reader = self.reader_of(row)
        found = []
        for piece in reader.pieces(start, end):
            buffer = reader.mapped(piece)
            if buffer is None:
                return None
            found.append(buffer)
        return found

    def _exact(self, reader: ObjectReader, start: int, end: int, until: float) -> pa.Buffer:
        if time.monotonic() >= until:
            raise DeadlineExceeded(
                f"it waited {reader.timeout_s:g} s for reads before it; see 'shoal status' for what is slow"
            )
        buffer = self._read_buffer(reader, start, end, until)
        with self._lock:
            self.exact_bytes += end - start
        return buffer

    def _read_buffer(
        self, reader: ObjectReader, start: int, end: int, until: float | None = None, allocate: Allocate | None = None
    ) -> pa.Buffer:
        def read(limit: float | None) -> pa.Buffer:
            return reader.read_buffer(start, end, limit, allocate=allocate)

        return provenance.carried(read, self.sources)(until)

    def _from_window(self, window: _Window, reader: ObjectReader, start: int, end: int, until: float) -> pa.Buffer:
        try:
            fetched = window.future.result(max(0.0, until - time.monotonic()))
            return fetched.slice(start - window.start, end - start)
        except (ShoalError, CancelledError, TimeoutError) as error:
            log.debug("a window failed, reading just what was asked: %s", error)
        return self._exact(reader, start, end, until)

    def _note_failure(self, reader: ObjectReader, start: int, end: int, since: float, error: ShoalError) -> None:
        """Keep a failure that took long, where all of its bytes fail together: one part of one shard has one fate."""
        now = time.monotonic()
        pieces = reader.pieces(start, end)
        is_one = len(pieces) == 1 and pieces[0].start // PART_SIZE == (pieces[0].end - 1) // PART_SIZE
        if is_one and now - since >= LONG_S:
            with self._lock:
                self._failures.append(_Failure(reader.row, start, end, now, error))

    # Under the lock

    def _failure_at(self, row: int, start: int) -> ShoalError | None:
        """Why the byte at `start` could not be had just now; None where nobody knows."""
        oldest = time.monotonic() - TOLD_AGAIN_S
        while self._failures and self._failures[0].at < oldest:
            self._failures.popleft()
        return next((each.error for each in self._failures if each.row == row and each.start <= start < each.end), None)

    def _observe(self, row: int, size_bytes: int, start: int, end: int) -> list[Range]:
        streams = self._streams.get(row)
        if streams is None:
            streams = self._streams[row] = Readahead(size_bytes)
            if len(self._streams) > OBJECTS_KEPT:
                self._streams.popitem(last=False)
        self._streams.move_to_end(row)
        others = len(self._of_row) - (row in self._of_row)
        return streams.observe(start, end, self._limit_bytes // (others + max(1, streams.followed)))

    def _use(self, row: int, start: int, end: int) -> list[_Window]:
        """The windows that have bytes of [start, end), in order, kept for the caller."""
        found: list[_Window] = []
        for window in sorted(self._of_row.get(row, ()), key=lambda window: window.start):
            if window.start < end and window.end > max(start, found[-1].end if found else start):
                window.users += 1
                self._windows.move_to_end(window)
                found.append(window)
        return found

    def _release(self, window: _Window, read_bytes: int) -> None:
        window.users -= 1
        window.left -= read_bytes
        if window.is_dropped:
            self._forget(window)
        elif window.left <= 0 or _has_failed(window.future):
            self._drop(window)

    def _fetch(self, reader: ObjectReader, ahead: Range) -> None:
        """Begin a window, where there is room for it, or can be made."""
        size = held_bytes(ahead.end - ahead.start)
        for window in list(self._windows):
            if self.window_bytes + size <= self._limit_bytes:
                break
            if not window.users:
                self._drop(window)
        if self.window_bytes + size > self._limit_bytes:
            return
        self._memory.keep_at_most(self._limit_bytes - self.window_bytes - size)
        future = self._threads.submit(self._receive, reader, ahead)
        window = _Window(reader.row, ahead.start, ahead.end, ahead.end - ahead.start, future)
        self._windows[window] = None
        self._of_row.setdefault(reader.row, []).append(window)
        self.window_bytes += size
        self.ahead_bytes += ahead.end - ahead.start
        self.fetching += 1
        self.most_window_bytes = max(self.most_window_bytes, self.window_bytes)
        future.add_done_callback(lambda _: self._fetched(window))

    def _drop(self, window: _Window) -> None:
        window.is_dropped = True
        del self._windows[window]
        others = self._of_row[window.row]
        others.remove(window)
        if not others:
            del self._of_row[window.row]
        self._forget(window)

    def _forget(self, window: _Window) -> None:
        if not window.users:
            self.window_bytes -= window.size
            if not _has_failed(window.future):
                self._memory.free(window.future.result())


def _has_failed(future: Future[pa.Buffer]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
