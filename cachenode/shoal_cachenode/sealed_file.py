"""An open sealed shard, shared by everybody who reads it, and how its parts are checked.

The rule: the descriptor stays open as long as somebody uses it, and not a moment longer.
"""

from __future__ import annotations

import enum
import errno
import os
import threading
from collections.abc import Callable

import xxhash

from shoal_cachenode.shard_file import ShardHeader

READ_BYTES = 256 << 10
#: For reads that leave nothing in the page cache that was not there (preadv2(2), since Linux 6.14).
RWF_DONTCACHE = 0x80
_of_thread = threading.local()


class Damage(enum.StrEnum):
    """What is wrong with a sealed shard, so that it was dropped."""

    MISSING = "missing"  #: its file is gone
    TORN = "torn"  #: its file has another length, or an attribute that is not its own
    CHECKSUM = "checksum"  #: a part does not read back as it was sealed
    UNREADABLE = "unreadable"  #: the drive gives an error for it


def stamp(fd: int) -> tuple[int, int]:
    """What changes whenever somebody writes to, cuts or renames a file: its length and its time of change.

    Nobody sets the latter back. What it does not tell of is a drive that lies; parts' checksums and the scrubber do.
    """
    found = os.fstat(fd)
    return found.st_size, found.st_ctime_ns


class SealedFile:
    """An open sealed shard. Counted: whoever got it calls `release` once; the descriptor closes after the last."""

    __slots__ = ("_lock", "_stamp", "_users", "fd", "header")

    def __init__(self, fd: int, header: ShardHeader) -> None:
        self.fd = fd
        self.header = header
        self._stamp = stamp(fd)
        self._users = 1
        self._lock = threading.Lock()  # guards _users

    @property
    def is_untouched(self) -> bool:
        """Whether nobody wrote to the file since this object was made. Of sealed files only."""
        return stamp(self.fd) == self._stamp

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
    """Whether `part` reads back with the checksum that its header has."""
    return check_part(fd, header, part) is None


def check(fd: int, header: ShardHeader, beat: Callable[[], None]) -> Damage | None:
    """What is wrong with a shard: the first thing found, or None. Calls `beat` after each part."""
    for part in range(len(header.checksums)):
        damage = check_part(fd, header, part)
        beat()
        if damage is not None:
            return damage
    return None


def check_part(fd: int, header: ShardHeader, part: int, *, keeps_cache: bool = False) -> Damage | None:
    """What is wrong with `part`: it does not have its checksum, its file ends before it, or it cannot be read.

    Read through a buffer that stays in the processor's cache: a new one of a part's size costs more than the hash.

    Args:
        keeps_cache: leave nothing in the page cache that was not there, where the kernel can do that.
    """
    position, end = header.part_range(part)
    hasher = xxhash.xxh3_64()
    buffer = _read_buffer()
    try:
        while position < end:
            count = _read(fd, buffer[: end - position], position, keeps_cache=keeps_cache)
            if count == 0:
                return Damage.TORN
            hasher.update(buffer[:count])
            position += count
    except OSError:
        return Damage.UNREADABLE
    return None if hasher.intdigest() == header.checksums[part] else Damage.CHECKSUM


def warm(fd: int, offset: int, length: int) -> Damage | None:
    """Read bytes [offset, offset + length) so that they are in the page cache; says what keeps them from being read."""
    end = offset + length
    buffer = _read_buffer()
    try:
        while offset < end:
            count = os.preadv(fd, [buffer[: end - offset]], offset)
            if count == 0:
                return Damage.TORN
            offset += count
    except OSError:
        return Damage.UNREADABLE
    return None


def _read(fd: int, into: memoryview, position: int, *, keeps_cache: bool) -> int:
    if not keeps_cache:
        return os.preadv(fd, [into], position)
    try:
        return os.preadv(fd, [into], position, RWF_DONTCACHE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    # An older kernel or another file system. Pages that somebody else wanted go too where they are not in use; the
    # scrubber passes by once in days.
    count = os.preadv(fd, [into], position)
    os.posix_fadvise(fd, position, count, os.POSIX_FADV_DONTNEED)
    return count


def _read_buffer() -> memoryview:
    """This thread's own, made once."""
    buffer: memoryview | None = getattr(_of_thread, "buffer", None)
    if buffer is None:
        buffer = _of_thread.buffer = memoryview(bytearray(READ_BYTES))
    return buffer
