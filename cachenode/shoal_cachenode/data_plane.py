"""Answers to reads of shards: the steps of a read on the node that was asked.

    sealed here              its file, by sendfile or, on the local socket, its descriptor
    only-if-cached           504
    moves here               a reader that takes the name of who has it gets that; else it is relayed from there
    another node's shard     relayed from its owner; nothing is stored. Owners that are silent, to this node or
                             to the asker, are passed over
    no-store                 from the fill that runs, else passed through: nothing is filled for it
    else                     one fill, many readers: parts are sent as they come, the wanted ones first
    no room, or a sick disk  passed through from where the fill would read

The rule: an error before the first byte is a status with a sentence; one after it cuts the connection, and the client
asks the next node for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from shoal import checksums, shard_client
from shoal.cluster_map import Node as MapNode
from shoal.connection import MAX_DESCRIPTORS
from shoal.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotCached,
    Overloaded,
    ShardCorrupt,
    ShoalError,
    SnapshotNotFound,
    Unavailable,
)
from shoal.maps import MAP_FROM
from shoal.shards import Key
from shoal.wire import cache_status
from shoal.wire.byte_range import ByteRange
from shoal.wire.http_messages import Buffer, FileSlice, Request, Response
from shoal.wire.places import format_places
from shoal_cachenode.disk import DiskStalls
from shoal_cachenode.fill import Fill, NotNeeded
from shoal_cachenode.library import Knowledge, ShardSpec, find_shard
from shoal_cachenode.node import CacheNode
from shoal_cachenode.scheduler import DiskFailed, Urgency
from shoal_cachenode.sealed_file import Damage, SealedFile, warm
from shoal_cachenode.shard_file import ShardHeader
from shoal_cachenode.source import FirstThatHasIt, Nobody, NobodyHasIt, Source
from shoal_cachenode.store import AlreadySealed, StoreFull

log = logging.getLogger(__name__)

#: Shards whose look-up is remembered; it costs as much as the rest of a small request.
SHARDS_REMEMBERED = 1 << 16
#: Descriptors go along for shards so near in the snapshot.
ALONG_WITHIN = 4096
BINARY = "application/octet-stream"

Body = AsyncIterator[Buffer | FileSlice]


class DataPlane:
    """The handler of ``/v1/snapshots/{digest}/rows/{row}/shards/{index}``."""

    def __init__(self, node: CacheNode) -> None:
        self.node = node
        self._found: dict[tuple[str, int, int], ShardSpec] = {}
        self._found_under: Knowledge | None = None

    async def __call__(self, request: Request, digest: str, row: int, index: int) -> Response:
        if "shoal-timeout" not in request.headers:
            return await self._read(request, await self.find(digest, row, index))
        seconds = parse_timeout(request.headers["shoal-timeout"])
        try:
            async with asyncio.timeout(seconds):
                return await self._read(request, await self.find(digest, row, index))
        except TimeoutError as error:
            if isinstance(error, ShoalError):
                raise
            raise DeadlineExceeded(f"row {row}, shard {index} had no first byte within {seconds:g} s") from error

    async def find(self, digest: str, row: int, index: int) -> ShardSpec:
        """A shard by its place. Raises NotFound, DatasetNotFound, SnapshotNotFound."""
        library, place = self.node.library, (digest, row, index)
        if library.knowledge is not self._found_under or len(self._found) >= SHARDS_REMEMBERED:
            self._found, self._found_under = {}, library.knowledge
        spec = self._found.get(place)
        if spec is None:
            opened = await library.snapshot(digest)
            spec = find_shard(library.knowledge.dataset_of(digest), opened, row, index)
            if library.knowledge is self._found_under:
                self._found[place] = spec
        return spec

    async def _read(self, request: Request, spec: ShardSpec) -> Response:
        wanted = ByteRange.parse(request.headers.get("range"), spec.size_bytes)
        length = wanted.end - wanted.start
        if request.method == "HEAD":  # whose sender reads what no node sees
            self.node.usage.used(spec.dataset.record.name)
            return Response(wanted.status, {"Content-Type": BINARY, **wanted.headers(spec.size_bytes)}, length=length)
        if "shoal-suspect" in request.headers:
            await self.node.check(spec.key)
        directives = shard_client.directives(request.headers)
        only_cached = "only-if-cached" in directives
        if "no-store" in directives:  # which reads a few bytes to know what there is
            self.node.usage.used(spec.dataset.record.name)
        # One that takes only what is cached is no reader, but a node that takes over; unless it takes a descriptor.
        elif not only_cached or "shoal-descriptor" in request.headers:
            self.node.usage.read(spec.dataset.record.name, spec.key)
        while True:
            try:
                file = await self.sealed(spec)
            except (OSError, DiskStalls) as error:
                log.debug("shard %s is not read from the drive: %s", spec.key.hex(), error)
                if only_cached:
                    raise NotCached(f"shard {spec.key.hex()} cannot be read here now") from error
                status, body = await self._passed(spec, wanted, Asker.of(request))
                headers = {"Content-Type": BINARY, "Cache-Status": status, **wanted.headers(spec.size_bytes)}
                return Response(wanted.status, headers, body, length=length)
            if file is not None:
                return self._from_file(request, spec, wanted, file)
            if only_cached:
                raise NotCached(f"shard {spec.key.hex()} is not sealed here")
            try:
                return await self._from_elsewhere(request, spec, wanted)
            except AlreadySealed:
                continue

    async def _from_elsewhere(self, request: Request, spec: ShardSpec, wanted: ByteRange) -> Response:
        """The answer for a shard that is not sealed here; with the checksums of its parts behind it, where it fills."""
        length = wanted.end - wanted.start
        asker = Asker.of(request)
        if "shoal-takes-holder" in request.headers and not asker.is_node:
            holders = await self._holders(spec, wanted, self.node.order(spec), asker)
            if holders:
                # Another one for each shard: after a loss of replicas many may hold many.
                holder = holders[spec.ordinal % len(holders)]
                self.node.counters.referrals.add(1)
                return Response(shard_client.SEE_HOLDER, {shard_client.HELD_BY: holder.id})
        status, body = await self.unsealed(spec, wanted, asker)
        headers = {"Content-Type": BINARY, "Cache-Status": status, **wanted.headers(spec.size_bytes)}
        fill = self.node.fills.running(spec.key) if "shoal-want-checksums" in request.headers else None
        header = fill.partial.header if fill is not None else None
        parts = _whole_parts(wanted, header)
        if fill is not None and header is not None and parts:
            headers |= {"Shoal-Part-Size": str(header.part_size), "Shoal-Checksums": shard_client.TRAILING}
            length += checksums.WORD_BYTES * len(parts)
            body = _with_checksums(body, fill, parts)
        return Response(wanted.status, headers, body, length=length)

    def known(self, key: Key) -> ShardHeader | None:
        """What is known of a shard that fills or is open: its parts and their checksums."""
        fill = self.node.fills.running(key)
        if fill is not None:
            return fill.partial.header
        file = self.node.store.open_cached(key)
        if file is None:
            return None
        file.release()
        return file.header

    def _from_file(self, request: Request, spec: ShardSpec, wanted: ByteRange, file: SealedFile) -> Response:
        if request.is_local and "shoal-descriptor" in request.headers:
            return self._descriptors(request.headers["shoal-descriptor"], spec, file)
        length = wanted.end - wanted.start
        self.node.counters.served_sealed_bytes.add(length)
        headers = {"Content-Type": BINARY, "Cache-Status": cache_status.HIT, **wanted.headers(spec.size_bytes)}
        parts = _whole_parts(wanted, file.header) if "shoal-want-checksums" in request.headers else ()
        if parts:
            headers["Shoal-Part-Size"] = str(file.header.part_size)
            headers["Shoal-Checksums"] = checksums.encode(file.header.checksums[part] or 0 for part in parts)
        rescue = Rescue(self, spec, file)
        return Response(wanted.status, headers, FileSlice(file.fd, wanted.start, length, file.release, rescue))

    def _descriptors(self, wanted: str, spec: ShardSpec, file: SealedFile) -> Response:
        """The descriptor of a shard, and of large shards after it that are open here: one request opens many."""
        places = [(spec.row, spec.index, spec.size_bytes)]
        also: list[FileSlice] = []
        holdings = self.node.inventory.known().get(spec.snapshot.digest)
        count = min(int(wanted), MAX_DESCRIPTORS) if wanted.isdecimal() and len(wanted) < 5 else 1
        if count > 1 and holdings is not None and spec.size_bytes >= MAP_FROM:
            near, table = slice(spec.ordinal + 1, spec.ordinal + 1 + ALONG_WITHIN), holdings.table
            chosen = np.flatnonzero(holdings.held[near] & (table.sizes[near] >= MAP_FROM))[: count - 1]
            for ordinal in (near.start + chosen).tolist():
                other = self.node.store.open_cached(table.keys[ordinal].astype("<u8").tobytes())
                if other is not None:
                    size_bytes = int(table.sizes[ordinal])
                    places.append((int(table.rows[ordinal]), int(table.indexes[ordinal]), size_bytes))
                    also.append(FileSlice(other.fd, 0, size_bytes, other.release))
        self.node.counters.descriptors.add(len(places))
        headers = {
            "Content-Type": BINARY,
            "Cache-Status": cache_status.HIT,
            "Shoal-Descriptors": format_places(places),
        }
        body = FileSlice(file.fd, 0, spec.size_bytes, file.release)
        return Response(200, headers, body, pass_descriptor=True, also=also)

    async def sealed(self, spec: ShardSpec) -> SealedFile | None:
        """The sealed file of a shard, counted for the caller; None where it is not here.

        Raises:
            DiskStalls: the drive does, and nothing is to wait for it.
            OSError: the file is here and cannot be opened now.
        """
        node, store = self.node, self.node.store
        if not store.is_sealed(spec.key):
            return None
        if node.disk.is_stalling:
            raise DiskStalls(node.disk.fault)
        file = store.open_cached(spec.key)
        if file is None:
            file = await node.disk.run(store.open_sealed, spec.key, discard=release)
        if file is not None and file.header.size_bytes != spec.size_bytes:
            file.release()
            await node.lose(spec.key, Damage.TORN)
            return None
        return file

    async def _source_past(self, spec: ShardSpec, *, is_kept: bool = True) -> Source:
        """Where a fill would read, for bytes that go past this node's drive.

        What is to be kept and cannot be is kept for a moment, for others who want the same.
        """
        order = self.node.order(spec)
        source = await asyncio.to_thread(partial(self.node.source, spec, order, waits=True, is_kept=is_kept))
        return self.node.recent.source(spec.key, source) if is_kept else source

    async def _passed(self, spec: ShardSpec, wanted: ByteRange, asker: Asker) -> tuple[str, Body]:
        """As `unsealed`, past this node's drive."""
        if not asker.is_kept:  # as a fill does; else each of many small reads would ask around who has the shard
            await self.node.whereabouts.settle(spec.snapshot.digest)
        source = await self._source_past(spec, is_kept=asker.is_kept)
        body = await _begun(self._through(spec, source, wanted.start, wanted.end))
        return cache_status.missed(from_origin=source.needs_origin), body

    async def through(self, spec: ShardSpec, start: int, end: int) -> Body:
        """The bytes from where a fill would read, past this node's drive."""
        body = self._through(spec, await self._source_past(spec), start, end)
        try:
            async for piece in body:
                yield piece
        finally:
            await body.aclose()  # type: ignore[attr-defined] # an async generator

    async def begin_fill(self, spec: ShardSpec, asker: Asker) -> Fill | None:
        """The fill of a shard that is not here and is this node's to fill, else None. Raises as `CacheNode.fill`."""
        order = self.node.order(spec)
        rank = self.node.rank(order)
        is_owner = rank is not None and rank < spec.dataset.record.replicas
        if not is_owner or not asker.is_kept or self.node.store.is_sealed(spec.key):
            return None
        return await self.node.fill(spec, order, Urgency.DEMAND, avoid=asker.avoid)

    def expected_status(self, spec: ShardSpec) -> str:
        """Where bytes of a shard that is not sealed here will probably come from, as its ``Cache-Status``."""
        node = self.node
        fill = node.fills.running(spec.key)
        if fill is not None:
            return cache_status.missed(from_origin=fill.needs_origin)
        is_first = node.rank(node.order(spec)) == 0
        return cache_status.missed(
            from_origin=is_first and not node.whereabouts.holders(spec.snapshot.digest, spec.ordinal)
        )

    async def unsealed(self, spec: ShardSpec, wanted: ByteRange, asker: Asker) -> tuple[str, Body]:
        """A body whose first piece is at hand, so that a failure so far is still a status; and its ``Cache-Status``."""
        order = self.node.order(spec)
        if not asker.is_node:
            body = await self._relayed(spec, wanted, order, asker)
            if body is not None:
                return cache_status.FROM_PEER, body
        body = await self._from_holder(spec, wanted, order, asker)
        if body is not None:
            return cache_status.FROM_PEER, body
        while True:
            try:
                if asker.is_kept:
                    fill = await self.node.fill(spec, order, Urgency.DEMAND, wanted.start, asker.avoid)
                else:
                    running = self.node.fills.running(spec.key)
                    if running is None:
                        return await self._passed(spec, wanted, asker)
                    fill = running
            except (StoreFull, DiskFailed) as error:
                log.info("shard %s passes through: %s", spec.key.hex(), error)
                return await self._passed(spec, wanted, asker)
            is_here = fill.has(self._parts(wanted))
            try:
                body = await _begun(self._from_fill(spec, fill, wanted.start, wanted.end))
                if is_here:
                    return cache_status.HIT, body
                return cache_status.missed(from_origin=fill.needs_origin), body
            except (NobodyHasIt, NotNeeded) as error:
                # A move that this read joined, or what a stream needed until now; from here on the origin is asked.
                log.info("shard %s is read anew: %s", spec.key.hex(), error)

    def _parts(self, wanted: ByteRange) -> range:
        part_size = self.node.config.part_size
        return range(wanted.start // part_size, -(-wanted.end // part_size))

    async def _relayed(
        self, spec: ShardSpec, wanted: ByteRange, order: tuple[MapNode, ...], asker: Asker
    ) -> Body | None:
        """The body from the first owner that answers; None where this node is to fill.

        Owners that do not answer the asker, or this node, are passed over.
        """
        replicas = spec.dataset.record.replicas
        rank = self.node.rank(order)
        if rank is not None and rank < replicas:
            return None
        for node in order if rank is None else order[:rank]:
            if self.node.is_avoided(node, asker.avoid):
                continue
            source = self.node.peer(
                node, spec, cached_only=False, avoid=asker.avoid, until=asker.until, is_kept=asker.is_kept
            )
            try:
                return await _begun(self._through(spec, source, wanted.start, wanted.end))
            except (Unavailable, Overloaded, SnapshotNotFound, ShardCorrupt) as error:
                log.info("node %s did not answer for its shard: %s", node.id, error)
        return None

    async def _from_holder(
        self, spec: ShardSpec, wanted: ByteRange, order: tuple[MapNode, ...], asker: Asker
    ) -> Body | None:
        """The body from a peer that has the shard while it is on its way to this node; None where a fill is better."""
        node = self.node
        sources = [
            node.peer(peer, spec, cached_only=True, until=asker.until, counter=node.counters.relayed_bytes)
            for peer in await self._holders(spec, wanted, order, asker)
        ]
        if not sources:
            return None
        try:
            return await _begun(self._through(spec, FirstThatHasIt(sources, Nobody()), wanted.start, wanted.end))
        except NobodyHasIt:
            return None

    async def _holders(
        self, spec: ShardSpec, wanted: ByteRange, order: tuple[MapNode, ...], asker: Asker
    ) -> list[MapNode]:
        """Peers that have a shard while it is on its way to this node; none where a fill is better.

        A reader of a few bytes does not wait until the whole part is here: a peer has just these.
        """
        node, part_size = self.node, self.node.config.part_size
        if _holds_whole_part(wanted, spec.size_bytes, part_size) or not node.rebalance.will_bring(spec, order):
            return []
        fill = node.fills.running(spec.key)
        if fill is not None and fill.has(self._parts(wanted)):
            return []
        await node.whereabouts.settle(spec.snapshot.digest)
        holders = node.whereabouts.holders(spec.snapshot.digest, spec.ordinal)
        nodes = node.library.knowledge.cluster_map.nodes
        return [each for each in nodes if each.id in holders and not node.is_avoided(each, asker.avoid)]

    async def _from_fill(self, spec: ShardSpec, fill: Fill, start: int, end: int) -> Body:
        header = fill.partial.header
        fill.want(range(start // header.part_size, -(-end // header.part_size)))
        file: SealedFile | None = None
        try:
            while start < end:
                part = start // header.part_size
                first, last = header.part_range(part)
                try:
                    reached = first + await fill.available(part, start - first)
                except DiskFailed as error:
                    log.info("the rest of shard %s passes through: %s", spec.key.hex(), error)
                    async for buffer in self.through(spec, start, end):
                        yield buffer
                    return
                except ShoalError:
                    self.node.counters.fills_failed.add(1)
                    raise
                if file is None:
                    file = fill.partial.retain()
                    if file is None:
                        raise AlreadySealed  # or it failed just now: either way the look from the start says which
                stop = min(end, last, reached)
                self.node.counters.served_filling_bytes.add(stop - start)
                yield FileSlice(file.fd, start, stop - start)
                start = stop
        finally:
            if file is not None:
                file.release()

    async def _through(self, spec: ShardSpec, source: Source, start: int, end: int) -> Body:
        """Read from `source` and send, storing nothing; a bounded number of bytes ahead of the reader."""
        passed = self.node.passing.stream(source, start, end, dataset=spec.dataset.record.name)
        async with contextlib.aclosing(passed) as pieces:
            async for piece in pieces:
                self.node.counters.served_through_bytes.add(len(piece))
                yield piece


class Rescue:
    """The bytes of a sealed shard from elsewhere, where the drive does not give them (`shoal.wire.http_messages`)."""

    __slots__ = ("_file", "_plane", "_spec")

    def __init__(self, plane: DataPlane, spec: ShardSpec, file: SealedFile) -> None:
        self._plane = plane
        self._spec = spec
        self._file = file

    async def warm(self, offset: int, length: int) -> bool:
        """Read the bytes in a thread, so that the loop finds them in the page cache; False: they are not to be had."""
        node = self._plane.node
        try:
            damage = await node.disk.run(_warm, self._file, offset, length)
        except DiskStalls:
            return False
        if damage is not None:
            await node.lose(self._spec.key, damage)
        return damage is None

    def rest(self, start: int, end: int) -> Body:
        return self._plane.through(self._spec, start, end)


def _warm(file: SealedFile, offset: int, length: int) -> Damage | None:
    """In a thread, which may hang and outlive the request."""
    if not file.retain():
        return None
    try:
        return warm(file.fd, offset, length)
    finally:
        file.release()


def release(file: SealedFile | None) -> None:
    """Let go of what `Store.open_sealed` gave."""
    if file is not None:
        file.release()


def _holds_whole_part(wanted: ByteRange, size_bytes: int, part_size: int) -> bool:
    return bool(checksums.whole_parts(wanted.start, wanted.end, size_bytes, part_size))


def _whole_parts(wanted: ByteRange, shard: ShardHeader | None) -> range:
    if shard is None:
        return range(0)
    return checksums.whole_parts(wanted.start, wanted.end, shard.size_bytes, shard.part_size)


async def _with_checksums(body: Body, fill: Fill, parts: range) -> Body:
    """`body`, and then what the fill has learnt of `parts` meanwhile."""
    try:
        async for piece in body:
            yield piece
        for part in parts:
            await fill.settled(part)
        yield checksums.pack(fill.partial.header.checksums[part] or 0 for part in parts)
    finally:
        await body.aclose()  # type: ignore[attr-defined] # an async generator


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, as far as it matters to where the bytes come from.

    Attributes:
        is_node: another node, which relays already: this one must answer by itself.
        avoid: nodes that do not answer the asker.
        until: `time.monotonic` at which it does not wait any more.
        is_kept: nodes are to keep what they fetch for it (`shard_client.NO_STORE`).
    """

    is_node: bool
    avoid: frozenset[str]
    until: float
    is_kept: bool

    @classmethod
    def of(cls, request: Request) -> Asker:
        """Raises InvalidRequest where its time limit is none."""
        text = request.headers.get("shoal-timeout")
        until = math.inf if text is None else time.monotonic() + parse_timeout(text)
        is_kept = "no-store" not in shard_client.directives(request.headers)
        return cls("via" in request.headers, shard_client.avoided(request.headers), until, is_kept)


def parse_timeout(text: str) -> float:
    """The seconds of a ``Shoal-Timeout`` header. Raises InvalidRequest."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"Shoal-Timeout: {text[:40]!r} is no number of seconds above 0")
    return seconds


async def _begun(body: Body) -> Body:
    """Wait for the first piece of `body`, then hand out all of it."""
    first = await anext(body)

    async def whole() -> Body:
        try:
            yield first
            async for piece in body:
                yield piece
        finally:
            await body.aclose()  # type: ignore[attr-defined] # both bodies are async generators

    return whole()
