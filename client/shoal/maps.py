"""The shards that this process has mapped, so that a second read of one costs a dictionary look-up.

A map is made from a descriptor that the local node passed, and the descriptor is closed at once: maps cost address
space, neither memory of this process nor descriptors (Python's `mmap` would keep one each, of the 1,024 that a process
commonly has). All processes of the machine share the pages.

How long is a map good? The node never truncates or writes a sealed file; it evicts by ``unlink``. So a map, and every
buffer sliced from it, stays valid and unchanged as long as somebody holds it, even after the node evicted the shard,
was killed, or was removed. The drive's bytes come free when the last holder lets go. This cache holds the most recent
`MAX_MAPS`; dropping one here takes nothing from a reader that still has its buffer.

Reads through maps send no requests, and a node takes a dataset that nobody asks for as idle. So an entry is found for
`RENEW_S` only: the read after that asks the node again, which costs a request each ten minutes and shard.

The rule: an entry is a whole sealed shard, or it is not here.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections import OrderedDict

import pyarrow as pa

#: Maps kept by a process; with 256 MiB each, 256 GiB of its 128 TiB of addresses.
MAX_MAPS = 1024

#: How long an entry is found before the node is asked again; well below the hour after which a dataset is idle.
RENEW_S = 600.0

#: A shard is worth a map from this size on: smaller ones are batched, and their descriptors do not go along.
MAP_FROM = 1 << 20

ShardId = tuple[str, int, int]
"""(snapshot digest, row, index of the shard)."""


class Maps:
    """Open maps by shard, the least recently used dropped first. Thread-safe, and good after a fork."""

    def __init__(self, limit: int = MAX_MAPS) -> None:
        self._limit = limit
        self._maps: OrderedDict[ShardId, tuple[pa.Buffer, float]] = OrderedDict()  # and when each is to be renewed
        self.reset_lock()

    def reset_lock(self) -> None:
        """A new lock, for a fork's child: the thread that held the old one is not there to release it."""
        self._lock = threading.Lock()  # guards _maps

    def __len__(self) -> int:
        return len(self._maps)

    def get(self, shard: ShardId) -> pa.Buffer | None:
        """The whole shard if it is mapped, and not to be asked for again."""
        with self._lock:
            found = self._maps.get(shard)
            if found is None:
                return None
            buffer, until = found
            if time.monotonic() >= until:
                del self._maps[shard]
                return None
            self._maps.move_to_end(shard)
            return buffer

    def add(self, shard: ShardId, descriptor: int, length: int) -> pa.Buffer:
        """Map the file behind `descriptor`, which stays the caller's, and keep the map.

        Raises:
            OSError: it cannot be mapped, or is shorter than `length`.
        """
        buffer = _map(descriptor, length)
        with self._lock:
            # Another thread may have been faster: share its map.
            kept, _ = self._maps.setdefault(shard, (buffer, time.monotonic() + RENEW_S))
            self._maps.move_to_end(shard)
            while len(self._maps) > self._limit:
                self._maps.popitem(last=False)
            return kept


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


class Region:
    """Mapped memory of a file, unmapped with the last that has this as its base. The descriptor stays the caller's.

    Raises:
        OSError: it cannot be mapped, or is shorter than `length`.
    """

    __slots__ = ("_unmap", "address", "length")

    def __init__(self, descriptor: int, length: int, access: int = mmap.PROT_READ) -> None:
        if os.fstat(descriptor).st_size < length:  # touching pages past the end of a file is a SIGBUS
            raise OSError(errno.EINVAL, "the file is shorter than what is to be mapped")
        address = _libc.mmap(None, length, access, mmap.MAP_SHARED, descriptor, 0)
        if address is None or address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address, self.length = address, length
        self._unmap = _libc.munmap  # its own reference: modules may be gone when the interpreter ends

    def __del__(self) -> None:
        if hasattr(self, "_unmap"):
            self._unmap(self.address, self.length)


def _map(descriptor: int, length: int) -> pa.Buffer:
    region = Region(descriptor, length)
    return pa.foreign_buffer(region.address, length, base=region)
