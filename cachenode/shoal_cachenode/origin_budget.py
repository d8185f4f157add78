"""What a node may ask of one dataset's origin at a time: a budget that adapts to what the origin bears.

    Window          how many reads at a time: halved when the origin asks for less, one more after a round without that
    Rate            how many bytes a second, where the operator set a limit; all datasets of the node share it
    OriginBudget    both together for one dataset, and who may begin now

The rule: a budget only says whether a read may begin. It never holds a thread of the fills: a fetch that may not begin
raises `OriginBusy`, and the scheduler lets others go first. Readers whose bytes pass through have threads of their own;
they wait, and go before fills.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator

from shoal.errors import OriginUnavailable, Overloaded

#: Trouble within so long after the window was halved is from reads that began before, so it does not halve it again.
ROUND_S = 1.0
#: The longest that a read waits because the origin asked for a pause: after that a reader is told, not kept.
MAX_PAUSE_S = 10.0
#: The longest that a reader whose bytes pass through waits for its turn.
MAX_WAIT_S = 20.0


class OriginBusy(Exception):
    """The budget has no room now: try again when it has."""


class Window:
    """How many reads at a time: additive increase, multiplicative decrease (RFC 5681, 3.1). Pure.

    Args:
        most: never more; it begins there, since an origin is taken for well until it says otherwise.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._width = float(most)
        self._halved_s = -ROUND_S

    @property
    def width(self) -> int:
        """Reads at a time, 1 at least."""
        return int(self._width)

    def succeeded(self) -> None:
        """A read ended without trouble: a whole window of them makes it one wider."""
        self._width = min(float(self._most), self._width + 1 / self._width)

    def asked_for_less(self, now_s: float) -> None:
        """The origin throttles, or does not answer."""
        if now_s - self._halved_s >= ROUND_S:
            self._width = max(1.0, self._width / 2)
            self._halved_s = now_s


class Rate:
    """Bytes a second: a read may begin while what began before is paid for. Thread-safe; the clock is the caller's.

    So the first read begins at once, a read's own size never holds it up, and over time no more than the rate begins.

    Args:
        bytes_per_s: 0: no limit.
    """

    def __init__(self, bytes_per_s: int = 0) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()  # guards _paid_s
        self._paid_s = 0.0  # when what began so far is paid for

    def wait_s(self, now_s: float) -> float:
        """Seconds until a read may begin."""
        return max(0.0, self._paid_s - now_s) if self._bytes_per_s else 0.0

    def spend(self, size_bytes: int, now_s: float) -> None:
        if self._bytes_per_s:
            with self._lock:
                self._paid_s = max(self._paid_s, now_s) + size_bytes / self._bytes_per_s


class OriginBudget:
    """The budget of one dataset's origin. Thread-safe.

    Args:
        most: reads at a time.
        rate: shared with the node's other datasets.
        on_room: called, in any thread, when a fill's read may begin because a reader that waited has gone. After a
            fill's own read its scheduler looks by itself, once it knows how that ended.

    Attributes:
        retries, throttles: attempts that failed for now, and those of them in which the origin asked for less.
    """

    def __init__(
        self, most: int, rate: Rate, on_room: Callable[[], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window = Window(most)
        self._rate = rate
        self._on_room = on_room
        self._clock = clock
        self._changed = threading.Condition()  # guards what follows
        self._in_flight = 0
        self._waiting = 0
        self._paused_until_s = 0.0
        self.retries = 0
        self.throttles = 0
        self._successes = 0

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def width(self) -> int:
        """Reads at a time that the origin is trusted with now."""
        return self._window.width

    @property
    def successes(self) -> int:
        """Reads that came to their end."""
        return self._successes

    def room_in_s(self, share: float = 1.0) -> float:
        """0 where a fill's read may begin now, else seconds to look again, or infinity: when a read has ended.

        Args:
            share: of the window that such reads may have.
        """
        with self._changed:
            if self._waiting or self._in_flight >= max(1.0, share * self._window.width):
                return math.inf
            return self._room_in_s()

    def _room_in_s(self) -> float:
        if self._in_flight >= self._window.width:
            return math.inf
        now_s = self._clock()
        return max(0.0, self._paused_until_s - now_s, self._rate.wait_s(now_s))

    @contextlib.contextmanager
    def read(self, size_bytes: int, *, waits: bool) -> Iterator[None]:
        """`with` it, read `size_bytes` from the origin.

        Args:
            waits: for room, in this thread.

        Raises:
            OriginBusy: there is no room, and this read does not wait.
            Overloaded: there was none for `MAX_WAIT_S`.
        """
        with self._changed:
            if waits:
                self._wait_for_room()
            elif self._waiting or self._room_in_s() > 0:
                raise OriginBusy
            self._in_flight += 1
            self._rate.spend(size_bytes, self._clock())
        retries = self.retries
        try:
            yield
            # Another read's trouble counts too: the round was not quiet.
            self._succeeded(quietly=self.retries == retries)
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify()
            if waits:
                self._on_room()

    def _wait_for_room(self) -> None:
        deadline_s = self._clock() + MAX_WAIT_S
        self._waiting += 1
        try:
            while (room_in_s := self._room_in_s()) > 0:
                left_s = deadline_s - self._clock()
                if left_s <= 0:
                    self._on_room()  # fills gave way to this reader
                    raise Overloaded(
                        f"the origin was busy for {MAX_WAIT_S:.0f} s with {self._in_flight} other reads of this node: "
                        "ask again later"
                    )
                self._changed.wait(min(room_in_s, left_s))
        finally:
            self._waiting -= 1

    def _succeeded(self, *, quietly: bool) -> None:
        with self._changed:
            self._successes += 1
            if quietly:
                self._window.succeeded()

    def trouble(self, error: OriginUnavailable) -> None:
        """An attempt failed for now."""
        with self._changed:
            self.retries += 1
            if not error.is_busy:
                return
            self.throttles += 1
            now_s = self._clock()
            self._window.asked_for_less(now_s)
            self._paused_until_s = max(self._paused_until_s, now_s + min(error.retry_after_s, MAX_PAUSE_S))
