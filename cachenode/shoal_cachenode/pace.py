"""How fast a node takes over shards that nobody waits for: within a limit, and as fast as the machine has to spare.

The kernel counts the time in which somebody on this machine waited for a processor (``/proc/pressure/cpu``, PSI). A
move that adds to it makes readers wait, those of this node and the trainers beside it. So the rate grows while next to
nobody waits, and halves where somebody does, as TCP does with a network that it does not know either.

The rule: it slows down, and never stops: a node that drains is waited for. Without PSI there is the limit alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

#: The pace begins here after idling, and is never slower for others' sake, unless its limit is.
FIRST_BYTES_PER_S, LEAST_BYTES_PER_S = 32 << 20, 8 << 20
#: From one look at the pressure to the next.
LOOK_S = 0.25
#: The share of the time in which somebody may wait for a processor before it is too much.
MUCH = 0.2
FASTER, SLOWER = 1.25, 0.5
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
        self._waited = waited
        self._clock = clock
        self.bytes_per_s = min(FIRST_BYTES_PER_S, most)
        self._free_at = 0.0
        self._looked_at = 0.0
        self._waited_then: float | None = None

    def room_in_s(self) -> float:
        """How long to wait before more may be moved; 0: now."""
        return max(0.0, self._free_at - self._clock())

    def spend(self, size_bytes: int) -> None:
        """Count bytes that are moved from now on."""
        now = self._clock()
        if now - max(self._looked_at, self._free_at) > IDLE_S:
            self.bytes_per_s = min(FIRST_BYTES_PER_S, self._most)
            self._look(now)
        elif now - self._looked_at >= LOOK_S:
            self._adapt(now)
        self._free_at = max(now, self._free_at) + size_bytes / self.bytes_per_s

    def _adapt(self, now: float) -> None:
        then, since = self._waited_then, now - self._looked_at
        waited = self._look(now)
        if waited is None or then is None:
            self.bytes_per_s = self._most
            return
        factor = SLOWER if (waited - then) / since > MUCH else FASTER
        self.bytes_per_s = min(self._most, max(LEAST_BYTES_PER_S, self.bytes_per_s * factor))

    def _look(self, now: float) -> float | None:
        self._looked_at, self._waited_then = now, self._waited()
        return self._waited_then
