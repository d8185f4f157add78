"""What the daemons of one mount have counted, added up over all of them, where anybody may read it.

    daemon    counts in plain integers; each second a thread adds what predecessors left, and writes the sums into the
              mount's state (`shoal_csi.state`), which outlives it
    reader    opens that memory through a process that has it (``/proc/PID/fd``): a daemon that hangs is not asked

A daemon that is killed takes the last second's counts with it; one that ends in order takes none.

What the kernel reads by itself, of files that were passed through, no daemon sees: those are opens without READs.

The rule: a place in the memory keeps its meaning for good. New numbers come last, and an older daemon leaves alone what
it does not know.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from shoal_csi import state_head
from shoal_csi.rundir import Record

if TYPE_CHECKING:
    from shoal_csi.state import State

#: Between two times that a daemon writes its numbers.
EVERY_S = 1.0

#: What only grows over all daemons of a mount, in the order of its places.
COUNTERS = (
    "requests",  # taken off /dev/fuse
    "reads",  # READ requests among them
    "read_bytes",  # that those asked for
    "read_wait_us",  # how long they took that were not answered at once
    "opens_node",  # answered with a sealed file of the node on this machine, which the kernel reads by itself
    "opens_tier",  # with a file of the local tier
    "opens_read",  # neither: the kernel sends READs
    "received_local_bytes",  # from the node on this machine, mapped or sent
    "received_peer_bytes",  # from nodes that had them
    "received_origin_bytes",  # that a node, or the mount itself, had to fetch from the origin
    "ahead_bytes",  # of the received ones, what was fetched before it was asked for
    "errors_enoent",
    "errors_estale",
    "errors_eacces",
    "errors_etimedout",
    "errors_eio",
    "tier_brought",  # objects
    "tier_brought_bytes",
    "tier_damaged",  # objects that were dropped for that
    "tier_dropped",  # objects that made room
    "tier_dropped_bytes",
)
#: Of now, behind them.
GAUGES = (
    "open_files",
    "waiting",  # requests that wait for nodes
    "window_bytes",  # held of what was fetched ahead
)
assert len(COUNTERS) < state_head.NUMBERS // 2
#: Gauges have the second half, so that counters may be added.
_GAUGES_AT = state_head.NUMBERS // 2

#: Daemons that there were, the one that serves included.
STARTS = "daemon_starts"

Numbers = Mapping[str, int]


class Publisher:
    """Keeps the numbers of a mount up to date while its daemon serves.

    Args:
        count: what this daemon has counted so far, by name.
    """

    def __init__(self, state: State, count: Callable[[], Numbers]) -> None:
        self._state, self._count = state, count
        self._before = decode(state.numbers())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="shoal-numbers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Write them a last time."""
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._over.wait(EVERY_S)
            counted = self._count()
            for place, name in enumerate(COUNTERS):
                self._state.set_number(place, self._before[name] + counted.get(name, 0))
            for place, name in enumerate(GAUGES, _GAUGES_AT):
                self._state.set_number(place, 0 if is_over else counted.get(name, 0))


def decode(words: tuple[int, ...]) -> dict[str, int]:
    """Numbers by name. Pure."""
    places = (*enumerate(COUNTERS), *enumerate(GAUGES, _GAUGES_AT))
    return {name: words[place] for place, name in places}


def read(record: Record) -> dict[str, int] | None:
    """The numbers of a mount, and `STARTS`; None where no process that has them can be seen from here."""
    daemon = record.living_daemon
    if daemon is None:
        return None
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{daemon.pid}/fd/{daemon.state_fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = state_head.peek(fd)
        finally:
            os.close(fd)
        if found is not None:
            starts, words = found
            return {STARTS: starts, **decode(words)}
    return None
