"""An open sealed shard, shared by everybody who reads it.

The rule: the descriptor stays open as long as somebody uses it, and not a moment longer.
"""

from __future__ import annotations

import os
import threading

import xxhash

from shoal_cachenode.shard_file import ShardHeader

READ_BYTES = 256 << 10
_of_thread = threading.local()


class SealedFile:
    """An open sealed shard. Counted: whoever got it calls `release` once; the descriptor closes after the last."""

    __slots__ = ("_lock", "_users", "fd", "header")

    def __init__(self, fd: int, header: ShardHeader) -> None:
        self.fd = fd
        self.header = header
        self._users = 1
        self._lock = threading.Lock()  # guards _users

    def retain(self) -> bool:
        """Count one more user; False where the last one has gone and the descriptor with it."""
        with self._lock:
            if self._users == 0:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            os.close(self.fd)


def part_is_good(fd: int, header: ShardHeader, part: int) -> bool:
    """Whether `part` reads back with the checksum that its header has.

    Read through a buffer that stays in the processor's cache: a new one of a part's size costs more than the hash.
    """
    position, end = header.part_range(part)
    hasher = xxhash.xxh3_64()
    buffer = _read_buffer()
    try:
        while position < end:
            count = os.preadv(fd, [buffer[: end - position]], position)
            if count == 0:
                return False
            hasher.update(buffer[:count])
            position += count
    except OSError:
        return False
    return hasher.intdigest() == header.checksums[part]


def _read_buffer() -> memoryview:
    """This thread's own, made once."""
    buffer: memoryview | None = getattr(_of_thread, "buffer", None)
    if buffer is None:
        buffer = _of_thread.buffer = memoryview(bytearray(READ_BYTES))
    return buffer
