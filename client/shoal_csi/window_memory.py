"""The memory that windows are received into: taken from the kernel once, and used again.

Fresh memory costs a mount about as much as receiving into it does: the kernel clears each page that is touched first.
So what a window had is kept for the next one of its size, in huge pages where there are any. Meanwhile it is the
kernel's for the taking (MADV_FREE): an idle mount gives it to whoever needs some.

The rule: a block has one user at a time.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import defaultdict

import pyarrow as pa

from shoal import memory

#: Blocks are multiples of this; what is shorter is not worth one.
BLOCK_BYTES = 1 << 20


def held_bytes(length: int) -> int:
    """What a buffer of `length` bytes takes."""
    return length if length < BLOCK_BYTES else -(-length // BLOCK_BYTES) * BLOCK_BYTES


class WindowMemory:
    """Thread-safe.

    Attributes:
        kept_bytes: of blocks that wait for their next user.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._kept: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by size
        self._used: dict[int, mmap.mmap] = {}  # by address
        self.kept_bytes = 0

    def allocate(self, length: int) -> pa.Buffer:
        """A writable buffer of `length` bytes, not zeroed; good until it is given to `free`."""
        if length < BLOCK_BYTES:
            return memory.allocate(length)
        size = held_bytes(length)
        with self._lock:
            kept = self._kept[size]
            if kept:
                block = kept.pop()
                self.kept_bytes -= size
            else:
                block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                _advise(block, mmap.MADV_HUGEPAGE)
            buffer = pa.py_buffer(memoryview(block)[:length])
            self._used[buffer.address] = block
        return buffer

    def free(self, buffer: pa.Buffer) -> None:
        """Nobody reads or writes `buffer` any more. Other memory than that of `allocate` is left alone."""
        with self._lock:
            block = self._used.pop(buffer.address, None)
            if block is not None:
                _advise(block, mmap.MADV_FREE)
                self._kept[len(block)].append(block)
                self.kept_bytes += len(block)

    def keep_at_most(self, limit_bytes: int) -> None:
        """Give back blocks that nobody uses, until no more than `limit_bytes` are kept."""
        with self._lock:
            for size, kept in self._kept.items():
                while kept and self.kept_bytes > limit_bytes:
                    kept.pop()  # unmapped with the last view of it
                    self.kept_bytes -= size


def _advise(block: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError):  # a kernel that has no such thing
        block.madvise(advice)
