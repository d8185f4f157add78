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

from shoal import memory, shard_client
from shoal.errors import NotCached, Overloaded, ShardCorrupt, SnapshotNotFound, Unavailable
from shoal.origin import Origin, Sink
from shoal.shard_client import ShardAt
from shoal.transport import Transport
from shoal_cachenode.origin_budget import OriginBudget

log = logging.getLogger(__name__)


class Source(Protocol):
    """Reads of one shard.

    Attributes:
        needs_origin: nobody but the origin is left to ask.
    """

    @property
    def needs_origin(self) -> bool: ...

    def stream(self, start: int, end: int, sink: Sink) -> None:
        """Hand bytes [start, end) of the shard to `sink` as they come; see `Origin.stream`. Raises ShoalError."""
        ...


@dataclass(frozen=True, slots=True)
class OriginSource:
    """The shard's slice of its object at the origin, at the version that the snapshot lists.

    Attributes:
        waits: for room in the budget, in the thread that reads; else `OriginBusy` is raised where there is none.
    """

    origin: Origin
    path: str
    version: str
    offset: int
    on_read: Counter
    budget: OriginBudget
    waits: bool

    @property
    def needs_origin(self) -> bool:
        return True

    def stream(self, start: int, end: int, sink: Sink) -> None:
        with self.budget.read(end - start, waits=self.waits):
            self.origin.stream(self.path, self.version, self.offset + start, self.offset + end, sink)
        self.on_read.add(end - start)


@dataclass(frozen=True, slots=True)
class PeerSource:
    """Another node's copy. `cached_only`: what it holds sealed, and nothing it would have to fetch itself."""

    transport: Transport
    address: str
    shard: ShardAt
    node_id: str
    cached_only: bool
    on_read: Counter

    @property
    def needs_origin(self) -> bool:
        return False

    def stream(self, start: int, end: int, sink: Sink) -> None:
        """See `Source`. The range comes in one piece, after its checksums were compared."""
        # Via: the peer must answer by itself, so two nodes with different maps cannot ask each other in a circle.
        headers = {"Via": f"1.1 {self.node_id}"}
        if self.cached_only:
            headers["Cache-Control"] = "only-if-cached"
        # pyarrow's pool reuses pages; a fresh bytearray would fault in each of them anew.
        view = memory.view(memory.allocate(end - start))
        shard_client.read(
            self.transport, self.address, self.shard, start, end, lambda: view, verify=True, headers=headers
        )
        self.on_read.add(end - start)
        sink(view)


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

    @property
    def needs_origin(self) -> bool:
        return not self._peers and self._last.needs_origin

    def stream(self, start: int, end: int, sink: Sink) -> None:
        for peer in self._peers:
            try:
                return peer.stream(start, end, sink)  # all of it or nothing was handed over
            except (Unavailable, NotCached, SnapshotNotFound, Overloaded, ShardCorrupt) as error:
                log.debug("a peer did not give the bytes: %s", error)
                self._peers = tuple(p for p in self._peers if p is not peer)
        return self._last.stream(start, end, sink)
