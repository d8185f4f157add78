"""s3fs, fsspec's S3 client: what most Python training code reads S3 with.

Whole objects come by `cat_file`, which since 2025 fetches large ones as concurrent ranges; small pieces by `cat_file`
with a range and by `cat_ranges`. How many objects at once, and how large the pieces, is tried before the measurement.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import s3fs

from benchmarks import reads
from benchmarks.harness import Outcome
from benchmarks.origin import Origin
from benchmarks.reads import Range

SETTINGS = "s3fs: pool of 64 connections, no listings cache; whole objects as the fastest of the variants tried"


@functools.cache
def filesystem(origin: Origin, block_bytes: int = 50 << 20) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        **origin.storage_options,
        config_kwargs={"max_pool_connections": 64},
        default_block_size=block_bytes,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def read_whole(origin: Origin, paths: Sequence[str], block_bytes: int) -> Outcome:
    """One object after the other; those larger than a block as concurrent ranges, ten at a time."""
    fs = filesystem(origin, block_bytes)
    started = time.perf_counter()
    size = sum(len(fs.cat_file(path)) for path in paths)
    return Outcome(time.perf_counter() - started, size)


def read_together(origin: Origin, paths: Sequence[str], at_once: int) -> Outcome:
    """Several objects at once, each in one request."""
    fs = filesystem(origin, 1 << 40)
    size = 0
    started = time.perf_counter()
    for first in range(0, len(paths), at_once):
        size += sum(len(data) for data in fs.cat(list(paths[first : first + at_once])).values())
    return Outcome(time.perf_counter() - started, size)


def read_each(origin: Origin, ranges: Sequence[Range]) -> Outcome:
    fs = filesystem(origin)
    return reads.each(lambda r: len(fs.cat_file(r.path, start=r.start, end=r.end)), ranges)


def read_ranges(origin: Origin, ranges: Sequence[Range]) -> Outcome:
    fs = filesystem(origin)
    paths, starts, ends = [r.path for r in ranges], [r.start for r in ranges], [r.end for r in ranges]
    started = time.perf_counter()
    found = fs.cat_ranges(paths, starts, ends, on_error="raise")
    seconds = time.perf_counter() - started
    return Outcome(seconds, sum(map(len, found)), {"per_s": len(ranges) / seconds})


def cold_whole(origin: Origin, paths: Sequence[str]) -> Outcome:
    """Value: ``p50_ms`` of one object."""
    fs = filesystem(origin)
    return reads.cold(lambda path: len(fs.cat_file(path)), paths)
