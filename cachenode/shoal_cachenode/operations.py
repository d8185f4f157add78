"""Operations on the drive that are under way, so that somebody notices one that does not come back.

The rule: what threads do here cannot block. A thread that hangs in the kernel leaves its beginning for others to see.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType


class _Timed:
    """A context manager, shared by all threads, that notes when its outermost body began in this one."""

    __slots__ = ("_clock", "_since")

    def __init__(self, since: dict[int, tuple[float, int]], clock: Callable[[], float]) -> None:
        self._since = since
        self._clock = clock

    def __enter__(self) -> None:
        thread = threading.get_ident()
        began, depth = self._since.get(thread) or (self._clock(), 0)
        self._since[thread] = began, depth + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread = threading.get_ident()
        began, depth = self._since[thread]
        if depth == 1:
            del self._since[thread]
        else:
            self._since[thread] = began, depth - 1


class Operations:
    """Thread-safe without a lock: each thread writes to its own entry, and single dict operations are atomic.

    Attributes:
        timed: ``with operations.timed: os.pread(…)``. For what a healthy drive does within seconds, however busy.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._since: dict[int, tuple[float, int]] = {}  # by thread: when it began, and how deep it is nested
        self._clock = clock
        self.timed = _Timed(self._since, clock)
        self.followers: list[Operations] = []  #: told of every `beat`

    def beat(self) -> None:
        """What this thread has under way makes progress: it begins anew, for this one and its followers."""
        thread = threading.get_ident()
        if thread in self._since:
            self._since[thread] = self._clock(), self._since[thread][1]
        for follower in self.followers:
            follower.beat()

    def oldest_s(self) -> float:
        """Seconds since the oldest operation under way began; 0.0 where there is none."""
        under_way = list(self._since.values())
        return max(0.0, self._clock() - min(under_way)[0]) if under_way else 0.0

    @property
    def count(self) -> int:
        return len(self._since)
