"""Plain files and maps: what the hardware and the kernel give when nothing is in between.

The rule: the files read here are the sealed files of the cache node, so page cache and file system are the same.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import reads
from benchmarks.harness import Outcome
from benchmarks.reads import Range

SETTINGS = "mmap and open().read(): the sealed files of the cache node themselves, page cache warm"
STRIDE = 1 << 20  # as large as the columns of the set's batches


def prepare() -> None:
    """Called in a fresh process, so that importing this is not part of its first turn."""


def unbuffered(path: str) -> Any:
    return Path(path).open("rb", buffering=0)


def read_whole(paths: Sequence[str]) -> Outcome:
    return reads.whole(lambda path: Path(path).open("rb"), paths)


def read_sequential(paths: Sequence[str], length: int) -> Outcome:
    return reads.sequential(unbuffered, paths, length)


def read_seeking(ranges: Sequence[Range]) -> Outcome:
    return reads.seeking(unbuffered, ranges)


def scan(paths: Sequence[str]) -> Outcome:
    """Map each file and touch every byte; the maps are held until the end."""
    held = []
    size = 0
    started = time.perf_counter()
    for path in paths:
        with Path(path).open("rb") as file:
            held.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        mapped = held[-1]
        for start in range(0, len(mapped) // 8 * 8, STRIDE):
            words = np.frombuffer(mapped, np.uint64, min(STRIDE, len(mapped) - start) // 8, start)
            words.max()
            size += words.nbytes
    return Outcome(time.perf_counter() - started, size)


def write(directory: str, size_bytes: int) -> Outcome:
    """What the disk takes: `size_bytes` in writes of 8 MiB, then fdatasync, as ``dd conv=fdatasync`` does."""
    block = os.urandom(8 << 20)
    path = Path(directory) / "written"
    try:
        with path.open("wb", buffering=0) as file:
            started = time.perf_counter()
            left = size_bytes
            while left:
                left -= file.write(block[: min(left, len(block))])
            os.fdatasync(file.fileno())
            return Outcome(time.perf_counter() - started, size_bytes)
    finally:
        path.unlink(missing_ok=True)
