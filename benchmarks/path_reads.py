"""What programs do with files that they know by path, the same for a mount and for any other directory.

These run in the workers. Files are opened plainly: Python's own `open` also asks whether it is a terminal, which a
mount's server would have to answer.

The rule: opening and closing are inside the clock, because whoever reads a file does both.
"""

from __future__ import annotations

import mmap
import os
import random
import resource
import subprocess
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.harness import Outcome

SEQUENTIAL_BYTES, RANDOM_BYTES, SMALL_BYTES = 1 << 20, 128 << 10, 4096
#: In `Outcome.values`: operations, where they are what is counted, and bytes that this process had read from a drive.
OPERATIONS, DRIVE_BYTES = "operations", "drive_bytes"


def sequential(paths: Sequence[str]) -> Outcome:
    """Each file from its first byte to its last, 1 MiB at a time into one buffer."""
    buffer, size = bytearray(SEQUENTIAL_BYTES), 0
    from_drive, started = _drive_bytes(), time.perf_counter()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        while count := os.readv(fd, [buffer]):
            size += count
        os.close(fd)
    return _outcome(started, size, from_drive)


def scattered(paths: Sequence[str], file_bytes: int, count: int) -> Outcome:
    """`count` reads of 128 KiB, each at a random page of a random file: the same ones for every contender."""
    buffer, chance = bytearray(RANDOM_BYTES), random.Random(1)
    places = [(chance.randrange(len(paths)), chance.randrange(file_bytes - len(buffer)) & ~4095) for _ in range(count)]
    size = 0
    from_drive, started = _drive_bytes(), time.perf_counter()
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    for number, offset in places:
        size += os.preadv(fds[number], [buffer], offset)
    for fd in fds:
        os.close(fd)
    return _outcome(started, size, from_drive)


def scanned(paths: Sequence[str]) -> Outcome:
    """Each file mapped, every byte of it touched, and unmapped."""
    size = 0
    from_drive, started = _drive_bytes(), time.perf_counter()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            os.close(fd)
            words = np.frombuffer(mapped, np.uint64)
            size += words.nbytes
            int(words.max())
            del words
    return _outcome(started, size, from_drive)


def opened(paths: Sequence[str]) -> Outcome:
    """Each file opened, its first 4 KiB read, and closed."""
    started = time.perf_counter()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, SMALL_BYTES)
        os.close(fd)
    return Outcome(time.perf_counter() - started, 0, {OPERATIONS: len(paths)})


def found(directory: str, count: int) -> Outcome:
    """``find DIRECTORY -type f``, which must name `count` files."""
    started = time.perf_counter()
    names = subprocess.run(["find", directory, "-type", "f"], capture_output=True, check=True).stdout
    seconds = time.perf_counter() - started
    if (known := names.count(b"\n")) != count:
        raise RuntimeError(f"{directory} has {known} files instead of {count}")
    return Outcome(seconds, 0, {OPERATIONS: count})


def _outcome(started: float, size: int, from_drive: int) -> Outcome:
    return Outcome(time.perf_counter() - started, size, {DRIVE_BYTES: _drive_bytes() - from_drive})


def _drive_bytes() -> int:
    """getrusage(2) counts in units of 512 bytes; what another process reads for this one is not in it."""
    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock
