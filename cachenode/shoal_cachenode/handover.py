"""Bytes handed from a thread that reads a source to the event loop that sends them, a bounded number of pieces ahead.

The rule: the thread stops soon after the loop lost interest, and the loop never waits for a thread that has failed.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator

from shoal_cachenode.source import Source


class _Abandoned(Exception):
    """Nobody wants the rest."""


class Handover:
    """One range on its way. Made on the loop that iterates it; `fill` runs in a thread.

    Args:
        ahead_bytes: how many bytes may wait, at least one piece.
    """

    def __init__(self, ahead_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._ahead_bytes = ahead_bytes
        self._room = threading.Condition()  # guards _pieces, _waiting_bytes, _is_abandoned
        self._pieces: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._is_abandoned = False
        self._is_over = False
        self._news = asyncio.Event()

    def fill(self, source: Source, start: int, end: int, step: int) -> None:
        """In a thread: read bytes [start, end) of `source`, no more than to the next multiple of `step` at a time.

        What the source raises is raised; the pieces so far are sent nevertheless.
        """
        try:
            while start < end:
                stop = min(end, (start // step + 1) * step)
                source.stream(start, stop, self._put)
                start = stop
        except _Abandoned:
            pass
        finally:
            self._is_over = True
            self._tell()

    def _put(self, data: memoryview) -> None:
        piece = bytes(data)  # a source's view is valid only during the call
        with self._room:
            self._room.wait_for(lambda: self._is_abandoned or self._waiting_bytes < self._ahead_bytes)
            if self._is_abandoned:
                raise _Abandoned
            self._pieces.append(piece)
            self._waiting_bytes += len(piece)
        self._tell()

    def _tell(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:
            pass  # the loop has ended, and with it the reader

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self._news.clear()
            is_over = self._is_over  # read before the pieces: what came before the end is not missed
            while self._pieces:
                with self._room:
                    piece = self._pieces.popleft()
                    self._waiting_bytes -= len(piece)
                    self._room.notify()
                yield piece
            if is_over:
                return
            await self._news.wait()

    def close(self) -> None:
        """Let the thread stop: nobody iterates any more."""
        with self._room:
            self._is_abandoned = True
            self._room.notify()
