"""The bytes of one range as pieces: in order, without a gap, each once, whatever fails on the way.

An origin describes one attempt, a generator of the pieces from some byte on. What every origin shares is here: an
attempt that fails is followed by another from the byte reached, and pieces are counted.

The rule: pieces are pulled out of the attempt and the sink is called outside of it, so that an error of the sink is
never taken for one of the origin, and an attempt is closed, its connection with it, however the read ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from shoal import memory
from shoal.errors import OriginError
from shoal.origin import base
from shoal.origin.base import Deadlines, Origin, Sink

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: A library is asked for no piece below this, but for the last: the first of a range is here a millisecond later at
#: 64 MB/s, and 128 calls of a sink for 8 MiB cost nothing that can be measured.
MIN_BYTES = 256 << 10
#: Where we choose the size. 8 MiB of a file take 0.5 ms through a buffer that stays in a core's own cache, and 0.9 ms
#: through one of 1 MiB.
STEP_BYTES = 256 << 10

Pieces = Generator[memoryview, None, None]
"""Consecutive pieces, none empty, of format "B"; each is valid until the next is asked for. Raises `shoal.errors`."""


def hand_over(pieces: Pieces, sink: Sink) -> None:
    """Give `sink` each piece as it comes."""
    with contextlib.closing(pieces):
        for piece in pieces:
            sink(piece)


def stream(
    attempt: Callable[[int], Pieces],
    start: int,
    end: int,
    sink: Sink,
    *,
    url: str,
    service: str,
    deadlines: Deadlines,
) -> None:
    """`Origin.stream` where attempts may fail. `attempt` gives the pieces from some byte to `end`, as far as they come.

    Raises:
        OriginUnavailable: attempts failed, or ended early, until the deadline of a read.
        OriginError: more came than was asked for, so that nobody knows which bytes they are.
    """
    base.check_range(url, start, end)
    if start < end:
        hand_over(_retried(attempt, start, end, url=url, service=service, deadlines=deadlines), sink)


def _retried(
    attempt: Callable[[int], Pieces], start: int, end: int, *, url: str, service: str, deadlines: Deadlines
) -> Pieces:
    reached = start
    for each in deadlines.attempts(deadlines.read_s):
        with each:
            began = reached
            with contextlib.closing(attempt(began)) as pieces:
                for piece in pieces:
                    if reached + len(piece) > end:
                        raise OriginError(f"{service} sent more of {url} than the {end - began} bytes asked for")
                    reached += len(piece)
                    yield piece
            if reached < end:
                raise base.wrong_length(url, reached - began, end - began, service)


def collected(origin: Origin, path: str, version: str, start: int, end: int) -> Buffer:
    """`Origin.read` by way of `Origin.stream`. The buffer comes from pyarrow's pool, whose pages are warm."""
    buffer: Buffer = b""
    filled = 0

    def keep(piece: memoryview) -> None:
        nonlocal buffer, filled
        if not filled:
            # Not sooner: that `end - start` is a size, and of bytes that exist, is known now.
            buffer = memory.allocate(end - start)
        memory.view(buffer)[filled : filled + len(piece)] = piece
        filled += len(piece)

    origin.stream(path, version, start, end, keep)
    return buffer
