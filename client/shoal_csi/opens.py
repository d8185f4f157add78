"""How each inode is open: the kernel reads the sealed file itself, or it asks the server and caches what that says.

The kernel wants all opens of an inode to agree: cached ones and passthrough do not go together, and passthrough is with
one backing file. So the first open of an inode decides, and the others follow, until the last one is released.

A successor finds the table in `shoal_csi.state`. An OPEN or RELEASE that is handed out to it again, because the answer
was lost, may have been counted before: then it is in the journal, and is answered as it was, and not counted twice.

The rule: no backing file is kept beyond the last release, and none is closed before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from shoal_csi.protocol import RESEND_BIT
from shoal_csi.state import MAX_THREADS, Change, Slot, State

CACHED = 0
#: Backing ids that a server may have been given and not noted when it died; more than it has threads, to be sure.
_NOT_NOTED = 64


class Opens:
    """The open inodes of a mount. Thread-safe.

    Args:
        state: where they are kept.
        close: lets go of a backing id. It may be told ids that are none.

    Attributes:
        passthrough, cached: opens that were answered so by this server.
    """

    def __init__(self, state: State, close: Callable[[int], None]) -> None:
        self._lock = threading.Lock()  # guards all below, and the table
        self._state = state
        self._close = close
        journal = state.redo()
        self._order = journal[-1].order if journal else 0
        self._seen = {change.unique: change for change in journal}
        used = state.used()
        self._slots = {slot.inode: (number, slot) for number, slot in used.items()}
        self._free = [number for number in reversed(range(state.slots)) if number not in used]
        self.passthrough = self.cached = 0
        self._close_leftovers()

    def __len__(self) -> int:
        """Inodes that are open."""
        return len(self._slots)

    def inodes(self) -> list[int]:
        """Those that are open."""
        with self._lock:
            return list(self._slots)

    def backing_of(self, inode: int) -> int | None:
        """The backing id of an open inode, or `CACHED`; None where it is not open."""
        with self._lock:
            found = self._slots.get(inode)
            return None if found is None else found[1].backing

    def open(self, thread: int, unique: int, inode: int, choose: Callable[[], int]) -> int:
        """Count an open of `inode`; returns how it is open: a backing id, or `CACHED`.

        Args:
            thread: the number of the calling thread, below `MAX_THREADS`; no two have the same.
            unique: of the request.
            choose: called where the inode is not open; gives a new backing id or `CACHED`, and may take its time.
        """
        with self._lock:
            found = self._slots.get(inode)
            if found is not None:
                return self._count(thread, unique, inode, found)
        backing = choose()
        with self._lock:
            if backing != CACHED:
                self._state.note_backing(max(backing, self._state.last_backing))
            found = self._slots.get(inode)
            if found is None:
                if not self._free:
                    before = self._state.slots
                    self._state.grow()
                    self._free = list(reversed(range(before, 2 * before)))
                found = self._free.pop(), Slot(inode, backing, 0)
            result = self._count(thread, unique, inode, found)
        if backing not in (CACHED, result):
            self._close(backing)  # another thread was faster
        return result

    def release(self, thread: int, unique: int, inode: int) -> bool:
        """Count the end of an open; whether it was the last one, after which the inode's next open decides anew."""
        with self._lock:
            found = self._slots.get(inode)
            if found is None or self._is_repeated(unique, inode):
                return False
            number, slot = found
            left = Slot(inode, slot.backing, slot.count - 1)
            self._change(thread, unique, number, left)
            if left.count:
                return False
            del self._slots[inode]
            self._free.append(number)
        if left.backing != CACHED:
            self._close(left.backing)
        return True

    def _count(self, thread: int, unique: int, inode: int, found: tuple[int, Slot]) -> int:
        number, slot = found
        if not self._is_repeated(unique, inode):
            self._change(thread, unique, number, Slot(inode, slot.backing, slot.count + 1))
        if slot.backing == CACHED:
            self.cached += 1
        else:
            self.passthrough += 1
        return slot.backing

    def _is_repeated(self, unique: int, inode: int) -> bool:
        """Whether a request was handed out before, and counted by the server that is gone."""
        if not unique & RESEND_BIT:
            return False
        before = self._seen.get(unique & ~RESEND_BIT)
        return before is not None and before.slot.inode == inode

    def _change(self, thread: int, unique: int, number: int, slot: Slot) -> None:
        assert thread < MAX_THREADS
        self._order += 1
        self._state.change(thread, Change(self._order, unique, number, slot))
        self._slots[slot.inode] = number, slot

    def _close_leftovers(self) -> None:
        """Close what the server that is gone had opened and not noted, or let go of and not closed."""
        kept = {slot.backing for _, slot in self._slots.values()}
        last = self._state.last_backing
        suspects = {change.slot.backing for change in self._seen.values() if not change.slot.count}
        # The kernel numbers backing files in turn: what did not come into the table is near the last that was noted.
        suspects |= set(range(last - _NOT_NOTED, last + 1 + _NOT_NOTED)) if self._state.starts > 1 else set()
        for backing in sorted(suspects - kept):
            if backing > CACHED:
                self._close(backing)
