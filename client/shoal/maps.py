"""The shards that this process has mapped, so that a second read of one costs a dictionary look-up.

A map is made from a descriptor that the local node passed, and the descriptor is closed at once: maps cost address
space, neither memory of this process nor descriptors. All processes of the machine share the pages.

How long is a map good? The node never truncates or writes a sealed file; it evicts by ``unlink``. So a map, and every
buffer sliced from it, stays valid and unchanged as long as somebody holds it, even after the node evicted the shard,
was killed, or was removed. The drive's bytes come free when the last holder lets go. This cache holds the most recent
`MAX_MAPS`; dropping one here takes nothing from a reader that still has its buffer.

The rule: an entry is a whole sealed shard, or it is not here.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict

import pyarrow as pa

#: Maps kept by a process; with 256 MiB each, 256 GiB of its 128 TiB of addresses.
MAX_MAPS = 1024

ShardId = tuple[str, int, int]
"""(snapshot digest, row, index of the shard)."""


class Maps:
    """Open maps by shard, the least recently used dropped first. Thread-safe, and good after a fork."""

    def __init__(self, limit: int = MAX_MAPS) -> None:
        self._limit = limit
        self._maps: OrderedDict[ShardId, pa.Buffer] = OrderedDict()
        self.reset_lock()

    def reset_lock(self) -> None:
        """A new lock, for a fork's child: the thread that held the old one is not there to release it."""
        self._lock = threading.Lock()  # guards _maps

    def __len__(self) -> int:
        return len(self._maps)

    def get(self, shard: ShardId) -> pa.Buffer | None:
        """The whole shard if it is mapped."""
        with self._lock:
            buffer = self._maps.get(shard)
            if buffer is not None:
                self._maps.move_to_end(shard)
            return buffer

    def add(self, shard: ShardId, descriptor: int, length: int) -> pa.Buffer:
        """Map the file behind `descriptor`, which stays the caller's, and keep the map.

        Raises:
            OSError, ValueError: it cannot be mapped, or is shorter than `length`.
        """
        buffer = pa.py_buffer(mmap.mmap(descriptor, length, prot=mmap.PROT_READ))
        with self._lock:
            kept = self._maps.setdefault(shard, buffer)  # another thread may have been faster: share its map
            while len(self._maps) > self._limit:
                self._maps.popitem(last=False)
            return kept
