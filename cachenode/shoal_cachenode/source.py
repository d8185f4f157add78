"""Where the bytes of a shard come from: the origin, or a peer that has them.

The rule: a source gives exactly the bytes asked for or raises; it never gives fewer and never another version's.
All of them block and are used from several threads at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from shoal.errors import NotCached, Overloaded, ShardCorrupt, SnapshotNotFound, Unavailable
from shoal.origin import Origin
from shoal.transport import Transport

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview


class Source(Protocol):
    """Reads of one shard."""

    def read(self, start: int, end: int) -> Buffer:
        """Bytes [start, end) of the shard. Raises ShoalError."""
        ...


@dataclass(frozen=True, slots=True)
class OriginSource:
    """The shard's slice of its object at the origin, at the version that the snapshot lists."""

    origin: Origin
    path: str
    version: str
    offset: int
    on_read: Counter

    def read(self, start: int, end: int) -> Buffer:
        data = self.origin.read(self.path, self.version, self.offset + start, self.offset + end)
        self.on_read.add(end - start)
        return memoryview(data)


@dataclass(frozen=True, slots=True)
class PeerSource:
    """Another node's copy. `cached_only`: what it holds sealed, and nothing it would have to fetch itself."""

    transport: Transport
    address: str
    target: str
    node_id: str
    cached_only: bool
    on_read: Counter

    def read(self, start: int, end: int) -> Buffer:
        # Via: the peer must answer by itself, so two nodes with different maps cannot ask each other in a circle.
        headers = {"Via": f"1.1 {self.node_id}"}
        if self.cached_only:
            headers["Cache-Control"] = "only-if-cached"
        # pyarrow's pool reuses pages; a fresh bytearray would fault in each of them anew.
        buffer: memoryview = memoryview(pa.allocate_buffer(end - start)).cast("B")
        self.transport.read_into(self.address, self.target, start, end, buffer, headers)
        self.on_read.add(end - start)
        return buffer


class Counter:
    """A count that threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards value
        self.value = 0

    def add(self, amount: int) -> None:
        with self._lock:
            self.value += amount


class FirstThatHasIt:
    """Peers in order, then the last resort. A peer that fails once for this shard is not asked again."""

    def __init__(self, peers: Sequence[Source], last: Source) -> None:
        self._peers = tuple(peers)
        self._last = last

    def read(self, start: int, end: int) -> Buffer:
        for peer in self._peers:
            try:
                return peer.read(start, end)
            except (Unavailable, NotCached, SnapshotNotFound, Overloaded, ShardCorrupt) as error:
                log.debug("a peer did not give the bytes: %s", error)
                self._peers = tuple(p for p in self._peers if p is not peer)
        return self._last.read(start, end)
