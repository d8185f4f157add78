"""Answers to batches: many small ranges of one snapshot, one after the other in one body (`shoal.wire.batch`).

Ranges of sealed shards are read in a thread, a run of them at a time: one `pread` a range is cheaper than one
`sendfile`, and the run is one buffer to send. A range of any other shard takes the way of an ordinary read; the fills
that a batch needs begin at once, so that they run beside each other.

The rule: everything is looked up before the first byte, so that a wrong batch is a status; after it, bytes come in
order or the connection is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from shoal.errors import InvalidRequest, Overloaded, ShardCorrupt, ShoalError
from shoal.shards import Key
from shoal.wire import batch, cache_status
from shoal.wire.batch import ShardRange
from shoal.wire.byte_range import ByteRange
from shoal.wire.http_messages import Buffer, FileSlice, Request, Response
from shoal_cachenode.data_plane import BINARY, Asker, DataPlane
from shoal_cachenode.disk import DiskStalls
from shoal_cachenode.library import ShardSpec
from shoal_cachenode.node import CacheNode
from shoal_cachenode.scheduler import DiskFailed
from shoal_cachenode.sealed_file import Damage
from shoal_cachenode.shard_file import ShardHeader
from shoal_cachenode.store import AlreadySealed, StoreFull

log = logging.getLogger(__name__)

#: Bytes and ranges read in one go: the memory of a batch.
RUN_BYTES = 1 << 20
RUN_RANGES = 512
#: What all batches that are being answered may hold: their runs, and for each range what was looked up.
BATCHES_BYTES = 256 << 20
RANGE_BYTES = 1 << 10
#: Fills that one batch has under way ahead of its reader.
FILLS_BEGUN = 16

Pieces = AsyncIterator[Buffer | FileSlice]


@dataclass(frozen=True, slots=True)
class _Read:
    """One range of a shard that is sealed."""

    spec: ShardSpec
    range: ShardRange

    @property
    def key(self) -> Key:
        return self.spec.key


class Batches:
    """The handler of ``/v1/snapshots/{digest}/ranges``."""

    def __init__(self, plane: DataPlane, node: CacheNode) -> None:
        self._plane = plane
        self._node = node
        self._store = node.store
        self._served = node.counters.served_sealed_bytes
        self.held_bytes = 0

    async def __call__(self, request: Request, digest: str) -> Response:
        weight = RUN_BYTES + batch.MAX_RANGE_BYTES + RANGE_BYTES * (len(request.body) // batch.RANGE_ITEM_BYTES)
        if self.held_bytes + weight > BATCHES_BYTES:
            raise Overloaded(
                f"batches hold all of {BATCHES_BYTES} bytes on this node: ask another node, or again in a moment"
            )
        self.held_bytes += weight
        try:
            ranges = batch.decode(request.body)
            specs = await self._look_up(digest, ranges)
            asker = Asker.of(request)
            status = self._status(specs.values())
        except BaseException:
            self.held_bytes -= weight
            raise
        length = sum(each.length for each in ranges) + batch.SUM_BYTES * len(ranges)
        body = _Held(self, weight, self._body(ranges, specs, asker))
        return Response(200, {"Content-Type": BINARY, "Cache-Status": status}, body, length=length)

    async def _look_up(self, digest: str, ranges: Sequence[ShardRange]) -> dict[tuple[int, int], ShardSpec]:
        """The shards of a batch, by row and index. Raises InvalidRequest where a range ends past its shard."""
        specs: dict[tuple[int, int], ShardSpec] = {}
        for each in ranges:
            place = each.row, each.index
            spec = specs.get(place)
            if spec is None:
                spec = specs[place] = await self._plane.find(digest, *place)
            if each.start + each.length > spec.size_bytes:
                raise InvalidRequest(f"shard {place} has {spec.size_bytes} bytes: a range ends past them")
            self._node.usage.read(spec.dataset.record.name, spec.key)
        return specs

    def _status(self, specs: Iterable[ShardSpec]) -> str:
        """Of the whole batch: what its slowest range will probably be."""
        statuses = {self._plane.expected_status(spec) for spec in specs if not self._store.is_sealed(spec.key)}
        if not statuses:
            return cache_status.HIT
        return cache_status.FROM_ORIGIN if cache_status.FROM_ORIGIN in statuses else cache_status.FROM_PEER

    async def _body(
        self, ranges: Sequence[ShardRange], specs: dict[tuple[int, int], ShardSpec], asker: Asker
    ) -> AsyncGenerator[Buffer | FileSlice, None]:
        missing = [spec for spec in specs.values() if not self._store.is_sealed(spec.key)]
        fills = asyncio.create_task(self._begin_fills(missing, asker)) if missing else None
        sums: list[int] = []
        run: list[_Read] = []
        run_bytes = 0
        try:
            for each in ranges:
                spec = specs[each.row, each.index]
                is_sealed = self._store.is_sealed(spec.key)
                if is_sealed:
                    run.append(_Read(spec, each))
                    run_bytes += each.length
                if run and (not is_sealed or run_bytes >= RUN_BYTES or len(run) == RUN_RANGES):
                    async for piece in self._sealed(run, sums, asker):
                        yield piece
                    run, run_bytes = [], 0
                if not is_sealed:
                    async for piece in self._unsealed(spec, each, asker):
                        yield piece
                    sums.append(_sum_of(each, self._plane.known(spec.key)))
            if run:
                async for piece in self._sealed(run, sums, asker):
                    yield piece
            yield batch.encode_sums(sums)
        finally:
            if fills is not None:
                fills.cancel()
                # What failed there failed here too, or was not needed.
                await asyncio.gather(fills, return_exceptions=True)

    async def _sealed(self, run: Sequence[_Read], sums: list[int], asker: Asker) -> Pieces:
        """The bytes of a run; one by one from elsewhere where the drive does not give all of them."""
        try:
            data, known = await self._node.disk.run(self._read, run)
        except (OSError, DiskStalls, ShardCorrupt) as error:
            log.warning("ranges of sealed shards are read from elsewhere: %s", error)
            for each in run:
                async for piece in self._unsealed(each.spec, each.range, asker):
                    yield piece
                sums.append(_sum_of(each.range, self._plane.known(each.key)))
            return
        yield data
        sums += known

    async def _unsealed(self, spec: ShardSpec, each: ShardRange, asker: Asker) -> Pieces:
        wanted = ByteRange(each.start, each.start + each.length, True)
        try:
            _, body = await self._plane.unsealed(spec, wanted, asker)
        except AlreadySealed:
            try:
                data, _ = await self._node.disk.run(self._read, [_Read(spec, each)])
            except (OSError, DiskStalls, ShardCorrupt) as error:
                log.warning("a range of shard %s passes through: %s", spec.key.hex(), error)
                body = self._plane.through(spec, wanted.start, wanted.end)
            else:
                yield data
                return
        async with contextlib.aclosing(body):  # type: ignore[type-var] # an async generator
            async for piece in body:
                yield piece

    def _read(self, run: Sequence[_Read]) -> tuple[bytes, list[int]]:
        """In a thread: the bytes of `run`, and each range's checksum as the protocol wants it."""
        found: list[bytes] = []
        sums: list[int] = []
        for key, reads in itertools.groupby(run, lambda each: each.key):
            file = self._store.open_sealed(key)
            if file is None:
                raise ShardCorrupt(f"shard {key.hex()} was dropped while it was read")
            try:
                for each in reads:
                    data = os.pread(file.fd, each.range.length, each.range.start)
                    if len(data) != each.range.length:
                        self._store.lose(key, Damage.TORN)
                        raise ShardCorrupt(f"the file of shard {key.hex()} ends early")
                    found.append(data)
                    sums.append(_sum_of(each.range, file.header))
            except OSError:
                self._store.lose(key, Damage.UNREADABLE)
                raise
            finally:
                file.release()
        self._served.add(sum(map(len, found)))
        return b"".join(found), sums

    async def _begin_fills(self, specs: Sequence[ShardSpec], asker: Asker) -> None:
        """Begin what this node is to fill for the batch, some at a time; a failure shows again where it is read."""
        waiting = iter(specs)

        async def begin() -> None:
            for spec in waiting:
                try:
                    fill = await self._plane.begin_fill(spec, asker)
                    if fill is not None:  # one after the other: each holds a reservation and a file until its seal
                        await asyncio.wait([fill.sealed])
                except (ShoalError, StoreFull, DiskFailed, AlreadySealed) as error:
                    log.debug("shard %s is not filled ahead: %s", spec.key.hex(), error)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(FILLS_BEGUN, len(specs))):
                group.create_task(begin())


class _Held:
    """The body of a batch, whose `weight` is accounted for until it is closed: a generator never begun has no end."""

    def __init__(self, batches: Batches, weight: int, body: AsyncGenerator[Buffer | FileSlice, None]) -> None:
        self._batches = batches
        self._weight = weight
        self._body = body

    def __aiter__(self) -> _Held:
        return self

    async def __anext__(self) -> Buffer | FileSlice:
        return await anext(self._body)

    async def aclose(self) -> None:
        try:
            await self._body.aclose()
        finally:
            self._batches.held_bytes -= self._weight
            self._weight = 0


def _sum_of(wanted: ShardRange, shard: ShardHeader | None) -> int:
    """The checksum of a range that is one whole part, where that is known; else 0."""
    if shard is None or wanted.start % shard.part_size:
        return 0
    part = wanted.start // shard.part_size
    first, last = shard.part_range(part)
    return (shard.checksums[part] or 0) if wanted.length == last - first else 0
