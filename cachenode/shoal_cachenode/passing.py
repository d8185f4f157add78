"""Bytes that pass through: read from a source in a thread, sent by the event loop, never stored.

They are read in steps, and the next step begins when less than one of them waits to be sent. So a reader holds at most
two steps, however slow it is, and a thread only while its source gives bytes. All readers share one bound: the more
they hold, the smaller are the steps, and whoever comes when even the smallest find no room is told to come back.

The rule: no thread ever waits for a reader, and no reader's end for a thread. What a reader that left had asked for
does not begin; what had begun ends by itself, and its bytes count until then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial

from shoal.errors import Overloaded
from shoal_cachenode.source import Source
from shoal_cachenode.turns import Turns

#: What all bytes that wait to be passed on may hold. Half of it is for the smallest steps, two for each reader.
PASSING_BYTES = 512 << 20
#: A smaller step is not worth a request to the source.
MIN_STEP_BYTES = 128 << 10
#: Of what is left of the other half, a reader's next step may take so much: the first ones leave some to the next.
_FREE_SHARE = 1 / 8
#: Threads that read sources. They are not the default ones, which short work waits for: opening a file, sending from a
#: cold one. One dataset has half of them at most, so that an origin that hangs leaves the others' readers some.
THREADS = 64
#: Steps that a reader holds at most: one that is sent, one that comes in.
_STEPS_HELD = 2


class Passing:
    """Everything that passes through a node. Lives on the event loop.

    Args:
        part_size: the largest step, so that whole parts come with their checksums compared while there is room.
    """

    def __init__(self, part_size: int, *, limit_bytes: int = PASSING_BYTES) -> None:
        self._part_size = part_size
        self._limit_bytes = limit_bytes
        self._most = max(1, limit_bytes // 2 // (_STEPS_HELD * min(MIN_STEP_BYTES, part_size)))
        self._turns = Turns(THREADS, max(1, THREADS // 2), name="through")
        self.readers = 0
        #: Bytes that wait to be sent or are being read.
        self.held_bytes = 0

    @property
    def step_bytes(self) -> int:
        """Bytes that a reader asks its source for next, as things stand."""
        free = self._limit_bytes // 2 - self.held_bytes
        return min(self._part_size, max(MIN_STEP_BYTES, int(free * _FREE_SHARE)))

    async def stream(self, source: Source, start: int, end: int, *, dataset: str) -> AsyncGenerator[bytes, None]:
        """Bytes [start, end) of `source`, a shard's of `dataset`, as they come.

        Raises:
            Overloaded: too many readers already.
            ShoalError: what the source raises, after the bytes that it gave before.
        """
        if self.readers >= self._most:
            raise Overloaded(
                f"{self.readers} readers have bytes pass through this node, which cannot keep them: ask another node, "
                "or again in a moment"
            )
        self.readers += 1
        pieces = _Pieces(self)
        reading: asyncio.Future[None] | None = None
        try:
            while True:
                if reading is not None and reading.done() and not pieces.waiting:
                    reading.result()
                    reading = None
                if reading is None or reading.done():
                    step = self.step_bytes
                    if start < end and pieces.held_bytes < step and (reading is None or not reading.exception()):
                        stop = min(end, (start // self._part_size + 1) * self._part_size, start + step)
                        reading = self._turns.begin(dataset, partial(pieces.read, source, start, stop))
                        reading.add_done_callback(pieces.tell)
                        pieces.hold(stop - start)
                        start = stop
                    elif not pieces.waiting:
                        return
                if pieces.waiting:
                    yield pieces.take()
                else:
                    await pieces.news()
        finally:
            self.readers -= 1
            if reading is None or reading.done() or self._turns.withdraw(dataset, reading):
                pieces.abandon()
            else:
                pieces.abandon(reading)

    def close(self) -> None:
        self._turns.close()


class _Abandoned(Exception):
    """Nobody wants the rest."""


class _Pieces:
    """Pieces on their way from the thread that puts them to the loop that takes them."""

    def __init__(self, passing: Passing) -> None:
        self._passing = passing
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._is_abandoned = False
        self.waiting: deque[bytes] = deque()
        self.held_bytes = 0

    def hold(self, size_bytes: int) -> None:
        """So many bytes are asked for: they count from now until they are taken. Negative: they are here no more."""
        self.held_bytes += size_bytes
        self._passing.held_bytes += size_bytes

    def read(self, source: Source, start: int, end: int) -> None:
        """In a thread: have `source` put bytes [start, end) here."""
        if not self._is_abandoned:
            source.stream(start, end, self._put)

    def _put(self, data: memoryview) -> None:
        """In a thread: hand over a copy, since a source's view is valid only during the call."""
        if self._is_abandoned:
            raise _Abandoned
        if data:  # else the source only asks whether anybody is here
            self._loop.call_soon_threadsafe(self._arrived, bytes(data))

    def _arrived(self, piece: bytes) -> None:
        if not self._is_abandoned:
            self.waiting.append(piece)
            self._news.set()

    def tell(self, reading: asyncio.Future[None]) -> None:
        """A reading has ended."""
        if not reading.cancelled():
            reading.exception()  # told to the reader, or of no use to one who left
        self._news.set()

    def take(self) -> bytes:
        piece = self.waiting.popleft()
        self.hold(-len(piece))
        return piece

    async def news(self) -> None:
        """Wait until a piece came, or the source ended."""
        self._news.clear()
        await self._news.wait()

    def abandon(self, reading: asyncio.Future[None] | None = None) -> None:
        """Nobody takes any more. What `reading` still brings counts until it ends; all else is here no more."""
        self._is_abandoned = True
        if reading is None:
            self._drop()
            return
        self.hold(-sum(map(len, self.waiting)))
        self.waiting.clear()
        reading.add_done_callback(self._drop)

    def _drop(self, _: object = None) -> None:
        self.waiting.clear()
        self.hold(-self.held_bytes)
