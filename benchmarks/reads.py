"""Loops that read the same way through whatever opens files: a mount, a plain directory, or a file system.

They run in the workers. The rule: a loop holds what its reader returned no longer than a trainer would.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Outcome, percentile

Opener = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Range:
    path: str
    start: int
    end: int


def scattered(paths: Sequence[str], object_bytes: int, count: int, length: int, seed: int = 1) -> tuple[Range, ...]:
    """`count` ranges of `length` bytes at random places of random objects, the same for every contender."""
    chosen = random.Random(seed)
    ranges = []
    for _ in range(count):
        start = chosen.randrange(max(1, object_bytes - length))
        ranges.append(Range(chosen.choice(paths), start, min(object_bytes, start + length)))
    return tuple(ranges)


def whole(opener: Opener, paths: Sequence[str]) -> Outcome:
    """``open(path).read()`` of each."""
    size = 0
    started = time.perf_counter()
    for path in paths:
        with opener(path) as file:
            size += len(file.read())
    return Outcome(time.perf_counter() - started, size)


def sequential(opener: Opener, paths: Sequence[str], length: int) -> Outcome:
    """From the first byte to the last, into one buffer of `length` bytes."""
    buffer = bytearray(length)
    size = 0
    started = time.perf_counter()
    for path in paths:
        with opener(path) as file:
            while got := file.readinto(buffer):
                size += got
    return Outcome(time.perf_counter() - started, size)


def seeking(opener: Opener, ranges: Sequence[Range]) -> Outcome:
    """Each range by a seek and a read into one buffer, of files that stay open."""
    files = {path: opener(path) for path in sorted({r.path for r in ranges})}
    buffer = memoryview(bytearray(max(r.end - r.start for r in ranges)))

    def read(wanted: Range) -> int:
        file = files[wanted.path]
        file.seek(wanted.start)
        return int(file.readinto(buffer[: wanted.end - wanted.start]))

    try:
        return each(read, ranges)
    finally:
        for file in files.values():
            file.close()


def cold(read: Callable[[str], int], names: Sequence[str]) -> Outcome:
    """Each by its name, once. Value: ``p50_ms`` of one."""
    size, latencies = 0, []
    for name in names:
        before = time.perf_counter()
        size += read(name)
        latencies.append((time.perf_counter() - before) * 1e3)
    return Outcome(sum(latencies) / 1e3, size, {"p50_ms": percentile(latencies, 50)})


def each(read: Callable[[Range], int], ranges: Sequence[Range]) -> Outcome:
    """One range after the other, each timed: `read` returns the bytes that came.

    Values: ``p50_us`` and ``p99_us`` of one read, ``per_s`` reads.
    """
    size = 0
    latencies = []
    started = time.perf_counter()
    for wanted in ranges:
        before = time.perf_counter()
        got = read(wanted)
        latencies.append((time.perf_counter() - before) * 1e6)
        if got != wanted.end - wanted.start:
            raise RuntimeError(f"{wanted} gave {got} bytes")
        size += got
    seconds = time.perf_counter() - started
    values = {
        "p50_us": percentile(latencies, 50),
        "p99_us": percentile(latencies, 99),
        "per_s": len(ranges) / seconds,
    }
    return Outcome(seconds, size, values)
