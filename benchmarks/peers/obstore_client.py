"""obstore, the Rust object_store for Python: the fastest S3 client that a Python trainer can have.

Its buffers are Rust's own memory, so nothing is copied into Python. Large objects are fetched as parallel ranges with
its asyncio calls, as its documentation does; how many at once is tried before the measurement.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from obstore.store import S3Store

from benchmarks import reads
from benchmarks.harness import Outcome
from benchmarks.origin import Origin
from benchmarks.reads import Range

SETTINGS = "obstore: results stay in Rust's memory; the fastest of one get and parallel ranges of 8 MiB"
PART_BYTES = 8 << 20


@functools.cache
def store(origin: Origin, bucket: str) -> S3Store:
    return S3Store(
        bucket,
        endpoint=origin.endpoint_url,
        access_key_id=origin.access_key,
        secret_access_key=origin.secret_key,
        region="us-east-1",
        client_options={"allow_http": True, "timeout": "120s"},
    )


def read_whole(origin: Origin, bucket: str, keys: Sequence[str]) -> Outcome:
    """One request an object, one after the other."""
    held = store(origin, bucket)
    started = time.perf_counter()
    size = sum(len(held.get(key).bytes()) for key in keys)
    return Outcome(time.perf_counter() - started, size)


def read_parallel(origin: Origin, bucket: str, keys: Sequence[str], object_bytes: int, at_once: int) -> Outcome:
    """All objects in ranges of 8 MiB, `at_once` requests in flight; each range is let go when it has come."""
    held = store(origin, bucket)

    async def read(part: tuple[str, int, int]) -> int:
        return len(await held.get_range_async(part[0], start=part[1], end=part[2]))

    parts = [(key, *part) for key in keys for part in _parts(object_bytes)]
    started = time.perf_counter()
    size = sum(asyncio.run(_bounded([functools.partial(read, part) for part in parts], at_once)))
    return Outcome(time.perf_counter() - started, size)


def read_each(origin: Origin, bucket: str, ranges: Sequence[Range]) -> Outcome:
    held = store(origin, bucket)
    return reads.each(lambda r: len(held.get_range(r.path, start=r.start, end=r.end)), ranges)


def read_ranges_coalesced(origin: Origin, bucket: str, ranges: Sequence[Range]) -> Outcome:
    """One `get_ranges` an object with its defaults: ranges less than 1 MiB apart become one request."""
    held = store(origin, bucket)
    by_path: dict[str, list[Range]] = {}
    for wanted in ranges:
        by_path.setdefault(wanted.path, []).append(wanted)

    async def read(path: str) -> int:
        mine = by_path[path]
        found = await held.get_ranges_async(path, starts=[r.start for r in mine], ends=[r.end for r in mine])
        return sum(map(len, found))

    started = time.perf_counter()
    size = sum(asyncio.run(_bounded([functools.partial(read, path) for path in by_path], 4)))
    seconds = time.perf_counter() - started
    return Outcome(seconds, size, {"per_s": len(ranges) / seconds})


def read_ranges_single(origin: Origin, bucket: str, ranges: Sequence[Range]) -> Outcome:
    """One request a range, 64 in flight."""
    held = store(origin, bucket)

    async def read(wanted: Range) -> int:
        return len(await held.get_range_async(wanted.path, start=wanted.start, end=wanted.end))

    started = time.perf_counter()
    size = sum(asyncio.run(_bounded([functools.partial(read, wanted) for wanted in ranges], 64)))
    seconds = time.perf_counter() - started
    return Outcome(seconds, size, {"per_s": len(ranges) / seconds})


def cold_whole(origin: Origin, bucket: str, keys: Sequence[str]) -> Outcome:
    """Each object in one request. Value: ``p50_ms`` of one."""
    held = store(origin, bucket)
    return reads.cold(lambda key: len(held.get(key).bytes()), keys)


def cold_parallel(origin: Origin, bucket: str, keys: Sequence[str], object_bytes: int) -> Outcome:
    """Each object as ranges of 8 MiB, eight at once. Value: ``p50_ms`` of one."""
    held = store(origin, bucket)

    async def read_all(key: str) -> int:
        gate = asyncio.Semaphore(8)

        async def read(start: int, end: int) -> int:
            async with gate:
                return len(await held.get_range_async(key, start=start, end=end))

        return sum(await asyncio.gather(*(read(*part) for part in _parts(object_bytes))))

    # The loop is made outside the clock, as that of a program which uses asyncio would be.
    with asyncio.Runner() as runner:
        return reads.cold(lambda key: runner.run(read_all(key)), keys)


def cold_first_chunk(origin: Origin, bucket: str, keys: Sequence[str]) -> Outcome:
    """The first chunk of a whole object's stream, whatever its size. Value: ``p50_ms`` of one."""
    held = store(origin, bucket)
    return reads.cold(lambda key: len(next(iter(held.get(key).stream(min_chunk_size=1)))), keys)


def cold_first_byte(origin: Origin, bucket: str, keys: Sequence[str]) -> Outcome:
    """A request for the first byte alone. Value: ``p50_ms`` of one."""
    held = store(origin, bucket)
    return reads.cold(lambda key: len(held.get_range(key, start=0, end=1)), keys)


def _parts(object_bytes: int) -> list[tuple[int, int]]:
    return [(start, min(object_bytes, start + PART_BYTES)) for start in range(0, object_bytes, PART_BYTES)]


async def _bounded(calls: Sequence[Any], at_once: int) -> list[int]:
    """Await all calls, `at_once` at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(call: Any) -> int:
        async with gate:
            answer: Awaitable[int] = call()
            return await answer

    return await asyncio.gather(*(one(call) for call in calls))
