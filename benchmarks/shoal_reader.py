"""Shoal's side of each comparison. These functions run in the workers.

The rule: what a version of Shoal does not have is `Missing`, never measured as something else.
"""

from __future__ import annotations

import functools
import gc
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from benchmarks import reads
from benchmarks.harness import Missing, Outcome, percentile
from benchmarks.reads import Range
from shoal.filesystem import ShoalFileSystem


@dataclass(frozen=True, slots=True)
class Access:
    """How a worker reaches the cluster. Picklable, and the key of its file system in a process."""

    endpoint: str
    socket: str
    local: bool
    verify: bool = True


def require(*names: str) -> None:
    """Raise `Missing` unless the file system has these methods, or arguments of its constructor."""
    arguments = inspect.signature(ShoalFileSystem.__init__).parameters
    for name in names:
        if name not in arguments and not hasattr(ShoalFileSystem, name):
            raise Missing(f"this version of Shoal has no {name}")


@functools.cache
def filesystem(access: Access) -> Any:
    # fsspec takes any argument in silence, so one that this version lacks must not be passed.
    verify = {"verify": access.verify} if "verify" in inspect.signature(ShoalFileSystem.__init__).parameters else {}
    return fsspec.filesystem(
        "shoal",
        endpoint=access.endpoint,
        socket=access.socket,
        local=access.local,
        skip_instance_cache=True,
        **verify,
    )


def connect(access: Access, url: str) -> None:
    """Open the file system and pin the dataset, as a trainer that has started has."""
    filesystem(access).info(url)


def read_whole(access: Access, urls: Sequence[str]) -> Outcome:
    return reads.whole(filesystem(access).open, urls)


def read_buffers(access: Access, urls: Sequence[str]) -> Outcome:
    """Each object as a buffer of its own, let go before the next."""
    fs = filesystem(access)
    size = 0
    started = time.perf_counter()
    for url in urls:
        size += fs.open_buffer(url).size
    return Outcome(time.perf_counter() - started, size)


def read_into(access: Access, urls: Sequence[str], object_bytes: int) -> Outcome:
    """All objects one after the other into one buffer, which was written to before."""
    fs = filesystem(access)
    buffer = np.ones(object_bytes, np.uint8).data
    size = 0
    started = time.perf_counter()
    for url in urls:
        with fs.open(url) as file:
            size += file.readinto(buffer[: file.size])
    return Outcome(time.perf_counter() - started, size)


def read_sequential(access: Access, urls: Sequence[str], length: int) -> Outcome:
    return reads.sequential(filesystem(access).open, urls, length)


def read_steps(access: Access, urls: Sequence[str], length: int) -> Outcome:
    """``read(length)`` until nothing comes, each a bytes object of its own."""
    fs = filesystem(access)
    size = 0
    started = time.perf_counter()
    for url in urls:
        with fs.open(url) as file:
            while data := file.read(length):
                size += len(data)
    return Outcome(time.perf_counter() - started, size)


def cat(access: Access, urls: Sequence[str]) -> Outcome:
    """Each object as one bytes object."""
    fs = filesystem(access)
    started = time.perf_counter()
    size = sum(len(fs.cat_file(url)) for url in urls)
    return Outcome(time.perf_counter() - started, size)


def read_seeking(access: Access, ranges: Sequence[Range]) -> Outcome:
    return reads.seeking(filesystem(access).open, ranges)


def read_each(access: Access, ranges: Sequence[Range]) -> Outcome:
    fs = filesystem(access)
    return reads.each(lambda r: len(fs.cat_file(r.path, start=r.start, end=r.end)), ranges)


def read_ranges(access: Access, ranges: Sequence[Range]) -> Outcome:
    """All in one call."""
    fs = filesystem(access)
    paths, starts, ends = [r.path for r in ranges], [r.start for r in ranges], [r.end for r in ranges]
    started = time.perf_counter()
    found = fs.cat_ranges(paths, starts, ends, on_error="raise")
    seconds = time.perf_counter() - started
    return Outcome(seconds, sum(map(len, found)), {"per_s": len(ranges) / seconds})


def scan(access: Access, urls: Sequence[str]) -> Outcome:
    """Read each object as a table and touch every byte; the maps are held until the end."""
    fs = filesystem(access)
    held = []
    size = 0
    started = time.perf_counter()
    for url in urls:
        held.append(fs.read_arrow(url))
        size += touch(held[-1])
    return Outcome(time.perf_counter() - started, size)


def touch(table: pa.Table) -> int:
    """Read every byte of the columns, in the order of the file, and return how many there are."""
    size = 0
    for batch in table.to_batches():
        for column in batch.columns:
            words = np.frombuffer(column.buffers()[1], np.uint64)
            words.max()
            size += words.nbytes
    return size


def first_scan(access: Access, url: str) -> None:
    """What a process allocates only once is allocated after this."""
    connect(access, url)
    touch(filesystem(access).read_arrow(url))
    gc.collect()


def scan_memory(access: Access, urls: Sequence[str]) -> Outcome:
    """As `scan`, with what it costs in memory while all tables are held.

    Values: ``arrow_growth_bytes`` of `pa.total_allocated_bytes` at its most, ``private_growth_bytes`` of anonymous or
    privately written memory, ``page_tables_growth_bytes``, which the kernel needs for any map.
    """
    fs = filesystem(access)
    allocated, private, page_tables = pa.total_allocated_bytes(), _private_bytes(), _status_bytes("VmPTE")
    most = allocated
    held = []
    size = 0
    started = time.perf_counter()
    for url in urls:
        held.append(fs.read_arrow(url))
        size += touch(held[-1])
        most = max(most, pa.total_allocated_bytes())
    seconds = time.perf_counter() - started
    values = {
        "arrow_growth_bytes": most - allocated,
        "private_growth_bytes": _private_bytes() - private,
        "page_tables_growth_bytes": _status_bytes("VmPTE") - page_tables,
    }
    return Outcome(seconds, size, {name: float(max(0, value)) for name, value in values.items()})


def open_latency(access: Access, urls: Sequence[str], again: int) -> Outcome:
    """From URL to buffer: the first time of each object in this process, then `again` times more.

    Values: ``first_p50_us``, ``again_p50_us``.
    """
    fs = filesystem(access)

    def open_all() -> list[float]:
        taken = []
        for url in urls:
            before = time.perf_counter()
            buffer = fs.open_buffer(url)
            taken.append((time.perf_counter() - before) * 1e6)
            if not buffer.size:
                raise RuntimeError(f"{url} is empty")
        return taken

    started = time.perf_counter()
    first = open_all()
    more = [latency for _ in range(again) for latency in open_all()]
    seconds = time.perf_counter() - started
    return Outcome(seconds, 0, {"first_p50_us": percentile(first, 50), "again_p50_us": percentile(more, 50)})


def cold_whole(access: Access, urls: Sequence[str]) -> Outcome:
    """Objects that the cluster does not hold, each as a buffer. Value: ``p50_ms`` of one."""
    fs = filesystem(access)
    return reads.cold(lambda url: int(fs.open_buffer(url).size), urls)


def cold_first_byte(access: Access, urls: Sequence[str]) -> Outcome:
    """The first byte of such objects. Value: ``p50_ms`` of one."""
    fs = filesystem(access)

    def read(url: str) -> int:
        with fs.open(url) as file:
            return len(file.read(1))

    return reads.cold(read, urls)


def _private_bytes() -> int:
    """Memory that no other process can share. Clean pages of files are not: that one process alone maps a page at the
    moment, which the kernel then calls private, costs nobody anything."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        found[name] = int(value.split()[0]) * 1024
    return max(found["Anonymous"], found["Private_Dirty"])


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
