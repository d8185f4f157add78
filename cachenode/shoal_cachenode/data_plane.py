"""Answers to reads of shards: the steps of a read on the node that was asked.

    sealed here              its file, by sendfile or, on the local socket, its descriptor
    only-if-cached           504
    another node's shard     relayed from its owner; nothing is stored
    else                     one fill, many readers: parts are sent as they come, the wanted ones first
    no room, or a sick disk  passed through from where the fill would read

The rule: an error before the first byte is a status with a sentence; one after it cuts the connection, and the client
asks the next node for the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator

from shoal.cluster_map import Node as MapNode
from shoal.errors import NotCached, NotFound, Overloaded, ShoalError, SnapshotNotFound, Unavailable
from shoal.wire.byte_range import ByteRange
from shoal.wire.http_server import FileSlice, Request, Response
from shoal_cachenode.fill import DiskFailed, Fill, Urgency
from shoal_cachenode.library import ShardSpec, find_shard
from shoal_cachenode.node import CacheNode
from shoal_cachenode.source import Buffer, Source
from shoal_cachenode.store import AlreadySealed, SealedFile, StoreFull

log = logging.getLogger(__name__)

#: Reads ahead of what a pass-through sends: enough to keep the source busy, and a bound on memory a request.
THROUGH_AHEAD = 2
BINARY = "application/octet-stream"


class DataPlane:
    """The handler of ``/v1/snapshots/{digest}/rows/{row}/shards/{index}``."""

    def __init__(self, node: CacheNode) -> None:
        self._node = node

    async def __call__(self, request: Request) -> Response:
        match request.path.split("/")[1:]:
            case ["v1", "snapshots", digest, "rows", row, "shards", index] if (row + index).isdecimal():
                spec = await self._find(digest, int(row), int(index))
                return await self._read(request, spec)
        raise NotFound(f"nothing is served at {request.path!r}: see docs/wire.md for the paths")

    async def _find(self, digest: str, row: int, index: int) -> ShardSpec:
        library = self._node.library
        return find_shard(library.knowledge.dataset_of(digest), await library.snapshot(digest), row, index)

    async def _read(self, request: Request, spec: ShardSpec) -> Response:
        wanted = ByteRange.parse(request.headers.get("range"), spec.size_bytes)
        headers = {"Content-Type": BINARY, **wanted.headers(spec.size_bytes)}
        length = wanted.end - wanted.start
        if request.method == "HEAD":
            return Response(wanted.status, headers, length=length)
        while True:
            file = await self._sealed(spec)
            if file is not None:
                return self._from_file(request, spec, wanted, file)
            if request.headers.get("cache-control") == "only-if-cached":
                raise NotCached(f"shard {spec.key.hex()} is not sealed here")
            try:
                body = await self._unsealed(spec, wanted, forwarded="via" in request.headers)
            except AlreadySealed:
                continue
            return Response(wanted.status, headers, body, length=length)

    def _from_file(self, request: Request, spec: ShardSpec, wanted: ByteRange, file: SealedFile) -> Response:
        if request.is_local and "shoal-descriptor" in request.headers:
            self._node.counters.descriptors.add(1)
            whole = FileSlice(file.fd, 0, spec.size_bytes, file.release)
            return Response(200, {"Content-Type": BINARY}, whole, pass_descriptor=True)
        length = wanted.end - wanted.start
        self._node.counters.served_sealed_bytes.add(length)
        headers = {"Content-Type": BINARY, **wanted.headers(spec.size_bytes)}
        return Response(wanted.status, headers, FileSlice(file.fd, wanted.start, length, file.release))

    async def _sealed(self, spec: ShardSpec) -> SealedFile | None:
        store = self._node.store
        file = store.open_cached(spec.key)
        if file is None and store.is_sealed(spec.key):
            file = await asyncio.to_thread(store.open_sealed, spec.key)
        return file

    async def _unsealed(
        self, spec: ShardSpec, wanted: ByteRange, *, forwarded: bool
    ) -> AsyncIterator[Buffer | FileSlice]:
        """A body whose first piece is at hand, so that a failure so far is still a status."""
        order = self._node.order(spec)
        if not forwarded:
            body = await self._relayed(spec, wanted, order)
            if body is not None:
                return body
        try:
            fill = await self._node.fill(spec, order, Urgency.DEMAND)
        except (StoreFull, DiskFailed) as error:
            self._note(error)
            source = await asyncio.to_thread(self._node.source, spec, order)
            return await _begun(self._through(source, wanted.start, wanted.end))
        return await _begun(self._from_fill(spec, order, fill, wanted.start, wanted.end))

    async def _relayed(
        self, spec: ShardSpec, wanted: ByteRange, order: tuple[MapNode, ...]
    ) -> AsyncIterator[Buffer | FileSlice] | None:
        """The body from the first owner that answers; None where this node is to fill."""
        replicas = spec.dataset.record.replicas
        rank = self._node.rank(order)
        if rank is not None and rank < replicas:
            return None
        for node in order if rank is None else order[:rank]:
            source = self._node.peer(node, spec, cached_only=False)
            try:
                return await _begun(self._through(source, wanted.start, wanted.end))
            except (Unavailable, Overloaded, SnapshotNotFound) as error:
                log.info("node %s did not answer for its shard: %s", node.id, error)
        return None

    async def _from_fill(
        self, spec: ShardSpec, order: tuple[MapNode, ...], fill: Fill, start: int, end: int
    ) -> AsyncIterator[Buffer | FileSlice]:
        file = fill.partial.file
        if not file.retain():
            raise AlreadySealed  # or it failed just now: either way the look from the start says which
        header = fill.partial.header
        try:
            parts = range(start // header.part_size, -(-end // header.part_size))
            fill.want(parts)
            for part in parts:
                try:
                    await fill.part(part)
                except DiskFailed as error:
                    self._note(error)
                    source = await asyncio.to_thread(self._node.source, spec, order)
                    async for buffer in self._through(source, start, end):
                        yield buffer
                    return
                except ShoalError:
                    self._node.counters.fills_failed.add(1)
                    raise
                stop = min(end, header.part_range(part)[1])
                self._node.counters.served_filling_bytes.add(stop - start)
                yield FileSlice(file.fd, start, stop - start)
                start = stop
        finally:
            file.release()

    async def _through(self, source: Source, start: int, end: int) -> AsyncIterator[Buffer | FileSlice]:
        """Read from `source` and send, storing nothing; a few reads ahead of the reader."""
        step = self._node.config.part_size
        pending: deque[asyncio.Task[Buffer]] = deque()
        try:
            while start < end or pending:
                while start < end and len(pending) < THROUGH_AHEAD:
                    stop = min(end, (start // step + 1) * step)
                    pending.append(asyncio.create_task(asyncio.to_thread(source.read, start, stop)))
                    start = stop
                buffer = await pending.popleft()
                self._node.counters.served_through_bytes.add(len(buffer))
                yield buffer
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def _note(self, error: StoreFull | DiskFailed) -> None:
        if isinstance(error, DiskFailed):
            log.error("the data directory failed, reads pass through: %s", error)
            self._node.disk_fault = str(error)


async def _begun(body: AsyncIterator[Buffer | FileSlice]) -> AsyncIterator[Buffer | FileSlice]:
    """Wait for the first piece of `body`, then hand out all of it."""
    first = await anext(body)

    async def whole() -> AsyncIterator[Buffer | FileSlice]:
        try:
            yield first
            async for piece in body:
                yield piece
        finally:
            await body.aclose()  # type: ignore[attr-defined] # both bodies are async generators

    return whole()
