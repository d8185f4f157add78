"""Locks by name that all driver processes of a node share, and that no process can leave behind.

While one driver replaces another both may be called. A name is one byte of one file, locked by the kernel for an open
file description: it excludes threads as well as processes, and ends with its holder, also by ``kill -9``.

The rule: whoever cannot have a lock is told so and repeats; nobody waits longer than the call may take.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from shoal_csi.refusals import Busy

#: Between two attempts.
_POLL_S = 0.02


class Locks:
    """The names' locks in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.touch(mode=0o600)

    @contextmanager
    def hold(self, name: str, *, wait_s: float = 0.0) -> Iterator[None]:
        """Exclude all others who hold `name`.

        Args:
            wait_s: how long to wait for another holder.

        Raises:
            Busy: another one holds it for longer.
        """
        deadline = time.monotonic() + wait_s
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            while not _lock(fd, name):
                if time.monotonic() >= deadline:
                    raise Busy(f"another call is at work on {name}: repeat this one when that has ended")
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(fd)


def _lock(fd: int, name: str) -> bool:
    byte = xxhash.xxh3_64_intdigest(name.encode()) >> 2  # below 2**62, an offset
    flock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock)
    except BlockingIOError:
        return False
    return True
