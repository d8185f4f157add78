"""How fast a node takes over shards that nobody waits for: within a limit, and as fast as the machine has to spare.

The kernel counts the time in which somebody on this machine waited for a processor (``/proc/pressure/cpu``, PSI). A
move that adds to it makes readers wait, those of this node and the trainers beside it. So the rate grows while the
time waited is about what it is without moves, and halves where it is more, as TCP does with a network that it does not
know either. What it is without moves is seen before them, and whenever they are slow or it is less with them.

The rule: it slows down, and never stops: a node that drains is waited for. Without PSI there is the limit alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

#: The pace begins here after idling, and is never slower for others' sake, unless its limit is.
FIRST_BYTES_PER_S, LEAST_BYTES_PER_S = 4 << 20, 2 << 20
#: From one look at the pressure to the next: in less there is too much chance.
LOOK_S = 1.0
#: A share of the time that may always be waited: a move alone on a small machine waits for itself.
FREE_SHARE = 0.05
#: How much more than without moves is not yet more.
TOLERANCE = 1.1
FASTER, SLOWER = 1.1, 0.5
#: How much of what was known of the time without moves a new look replaces, where it is less, and where it is more:
#: that may be the moves of other nodes on this machine, and should they all think it is trainers, none would be slow.
LESS_NEWS, MORE_NEWS = 0.5, 0.05
#: Where the share falls below so much of that, others have gone, and how much it is now is found out at the least pace.
FALLEN = 0.5
#: Without a move for so long, what was known of the pressure is old.
IDLE_S = 2.0

_SOME = re.compile(r"^some .*total=(\d+)$", re.MULTILINE)
_PRESSURE = Path("/proc/pressure/cpu")


def waited_s() -> float | None:
    """Seconds since the machine started in which somebody waited for a processor; None where it is not counted."""
    try:
        found = _SOME.search(_PRESSURE.read_text())
    except OSError:
        return None
    return int(found[1]) / 1e6 if found else None


def much(without: float) -> float:
    """The share of the time waited that is too much, where `without` moves it is so much; at most halfway to all."""
    return max(FREE_SHARE, min(TOLERANCE * without, (1 + without) / 2))


class Pace:
    """Says when the next bytes may be moved.

    Args:
        most: bytes a second, above 0.
        waited: as `waited_s`.
    """

    def __init__(
        self,
        most: float,
        *,
        waited: Callable[[], float | None] = waited_s,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._least = min(LEAST_BYTES_PER_S, most)
        self._waited = waited
        self._clock = clock
        self.bytes_per_s = min(FIRST_BYTES_PER_S, most)
        self._free_at = 0.0
        self._looked_at = clock()
        self._waited_then = waited()
        self._without: float | None = None  # the share of the time waited when nothing moves

    def room_in_s(self) -> float:
        """How long to wait before more may be moved; 0: now."""
        return max(0.0, self._free_at - self._clock())

    def spend(self, size_bytes: int) -> None:
        """Count bytes that are moved from now on."""
        now = self._clock()
        if now - max(self._looked_at, self._free_at) > IDLE_S:
            self.bytes_per_s = min(FIRST_BYTES_PER_S, self._most)
            self._without = self._look(now)
        elif now - self._looked_at >= LOOK_S:
            self._adapt(now)
        self._free_at = max(now, self._free_at) + size_bytes / self.bytes_per_s

    def _adapt(self, now: float) -> None:
        share = self._look(now)
        if share is None:
            self.bytes_per_s = self._most
            return
        if self._without is None:
            self._without = share
        has_fallen = self._without > FREE_SHARE and share < FALLEN * self._without
        if share < self._without or self.bytes_per_s <= self._least:
            self._without += (LESS_NEWS if share < self._without else MORE_NEWS) * (share - self._without)
        factor = SLOWER if share > much(self._without) else FASTER
        self.bytes_per_s = self._least if has_fallen else min(self._most, max(self._least, self.bytes_per_s * factor))

    def _look(self, now: float) -> float | None:
        """The share of the time since the last look in which somebody waited; None where that is not known."""
        then, since = self._waited_then, now - self._looked_at
        self._looked_at, self._waited_then = now, self._waited()
        if then is None or self._waited_then is None or since <= 0:
            return None
        return min(1.0, (self._waited_then - then) / since)
