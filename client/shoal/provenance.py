"""Where the bytes of reads came from, and how long each was waited for: for whoever wants to know where time goes.

    with provenance.observed() as seen:
        reader.read_buffer(0, 1 << 20)
    seen.causes     # [Seen(Cause.ORIGIN, "3f9a…", 0.041, 1048576)]

A node says of the bytes that it sends whether it had them (``Cache-Status``, RFC 9211, docs/wire.md).

The rule: who observes hears of every byte once; who does not pays for one look at a variable.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from shoal.wire.cache_status import FROM_ORIGIN, FROM_PEER
from shoal.wire.stream_post import Cause

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer.

    Attributes:
        cause: what was waited for. `Cause.OTHER`: a node that did not give what it was asked for, or not all of it.
        node_id: who was asked; "" for the origin, read directly.
        seconds: from the question to the last byte. Those of pieces that are read at once overlap.
        bytes: good ones that came.
    """

    cause: Cause
    node_id: str
    seconds: float
    bytes: int


@dataclass(slots=True)
class Observation:
    """What was seen so far. Threads may add to it."""

    causes: list[Seen] = field(default_factory=list)

    def add(self, cause: Cause, node_id: str, since: float, bytes: int) -> None:
        """Note an answer to a question of `time.monotonic` `since`."""
        self.causes.append(Seen(cause, node_id, time.monotonic() - since, bytes))


_observation: ContextVar[Observation | None] = ContextVar("shoal_observation", default=None)

#: The observation of this thread's reads; None where nobody observes them.
current: Callable[[], Observation | None] = _observation.get


@contextlib.contextmanager
def observed() -> Iterator[Observation]:
    """Observe the reads of this thread, and of threads that do parts of them. Within another one: instead of it."""
    observation = Observation()
    token = _observation.set(observation)
    try:
        yield observation
    finally:
        _observation.reset(token)


def carried(function: Callable[[T], U], observation: Observation) -> Callable[[T], U]:
    """`function` for another thread, whose reads `observation` is to hear of."""

    def observed_there(argument: T) -> U:
        token = _observation.set(observation)
        try:
            return function(argument)
        finally:
            _observation.reset(token)

    return observed_there


def cause_of(headers: Mapping[str, str], *, is_local: bool) -> Cause:
    """What bytes were waited for, from their answer's headers.

    Args:
        is_local: it came from the node of this machine.
    """
    status = headers.get("cache-status")
    if status == FROM_ORIGIN:
        return Cause.ORIGIN
    if is_local and status != FROM_PEER:  # it had them, or is of a version that does not say
        return Cause.LOCAL
    return Cause.PEER
