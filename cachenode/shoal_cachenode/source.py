"""Where the bytes of a shard come from: the origin, or a peer that has them.

The rule: a source gives exactly the bytes asked for or raises; it never gives another version's, and bytes that it gave
before it raised are good. A peer that is silent for no reason of its own is left within a fraction of a second
(`shoal.watch`), and then asked last by everybody here.
All of them block and are used from several threads at once.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from shoal import memory, shard_client
from shoal.connection import Interrupted
from shoal.errors import NotCached, OriginError, Overloaded, ShardCorrupt, SnapshotNotFound, Unavailable
from shoal.origin import Origin, Sink
from shoal.shard_client import ShardAt
from shoal.transport import Transport
from shoal.watch import Watch
from shoal_cachenode.origin_budget import OriginBudget

log = logging.getLogger(__name__)

_ASK_ANOTHER = (Unavailable, NotCached, SnapshotNotFound, Overloaded, ShardCorrupt)


class Source(Protocol):
    """Reads of one shard.

    Attributes:
        needs_origin: nobody but the origin is left to ask.
    """

    @property
    def needs_origin(self) -> bool: ...

    def stream(self, start: int, end: int, sink: Sink) -> None:
        """Hand bytes [start, end) of the shard to `sink` as they come; see `Origin.stream`. Raises ShoalError.

        `sink` may raise to end it, and may be asked with an empty piece whether it will.
        """
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
            if self.waits:
                sink(memoryview(b""))  # whoever wanted it may have left meanwhile, and is not to cost the origin a read
            self.origin.stream(self.path, self.version, self.offset + start, self.offset + end, sink)
        self.on_read.add(end - start)


@dataclass(frozen=True, slots=True)
class PeerSource:
    """Another node's copy.

    Attributes:
        cached_only: what it holds sealed, and nothing it would have to fetch itself.
        avoid: nodes that it is told to avoid.
        until: `time.monotonic` at which nobody waits any more.
        is_hasty: others can be asked instead, so that the first sign of trouble is enough.
        is_kept: the peer is to keep what it has to fetch itself.
    """

    transport: Transport
    address: str
    shard: ShardAt
    node_id: str
    cached_only: bool
    on_read: Counter
    avoid: frozenset[str] = shard_client.NOBODY
    until: float = math.inf
    is_hasty: bool = True
    is_kept: bool = True

    @property
    def needs_origin(self) -> bool:
        return False

    def stream(self, start: int, end: int, sink: Sink) -> None:
        """See `Source`. The range comes in one piece, after its checksums were compared; what is good of it where the
        peer fails within it."""
        # Via: the peer must answer by itself, so two nodes with different maps cannot ask each other in a circle.
        headers = {"Via": f"1.1 {self.node_id}", **shard_client.avoiding(self.avoid)}
        if self.cached_only:
            headers |= shard_client.ONLY_IF_CACHED
        elif not self.is_kept:
            headers |= shard_client.NO_STORE
        # pyarrow's pool reuses pages; a fresh bytearray would fault in each of them anew.
        view = memory.view(memory.allocate(end - start))
        watch = Watch(self.transport, self.address, until=self.until, is_hasty=self.is_hasty)
        try:
            shard_client.read(
                self.transport,
                self.address,
                self.shard,
                start,
                end,
                lambda: view,
                verify=True,
                headers=headers,
                watch=watch,
            )
        except Interrupted as error:
            self._hand_over(view[: error.received], sink)
            raise
        self._hand_over(view, sink)

    def _hand_over(self, view: memoryview, sink: Sink) -> None:
        if view:
            self.on_read.add(len(view))
            sink(view)


class Counter:
    """A count that threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards value
        self.value = 0

    def add(self, amount: int) -> None:
        with self._lock:
            self.value += amount


class NobodyHasIt(NotCached):
    """No peer gave a shard that was to be moved here."""


class Nobody:
    """The last resort of a fill that moves a shard between nodes: the origin is not asked."""

    needs_origin = False

    def stream(self, start: int, end: int, sink: Sink) -> None:
        raise NobodyHasIt("no peer gives the shard that was to be moved here: it is fetched when it is read")


class FirstThatHasIt:
    """Peers in order, then the last resort. A peer that fails once for this shard is not asked again.

    But where the last resort fails too: then those that were silent or overloaded are asked once more, and with
    patience. On a machine short of processors a peer may seem dead that has the only copy. And peers that got the shard
    since they were asked what they have: one of them may have filled it for a reader that this node did not answer.

    Args:
        late_holders: peers that have the shard by now. May block.
    """

    def __init__(
        self,
        peers: Sequence[PeerSource],
        last: Source,
        late_holders: Callable[[], Sequence[PeerSource]] = tuple,
    ) -> None:
        self._peers = tuple(peers)
        self._silent: tuple[PeerSource, ...] = ()
        self._lock = threading.Lock()  # guards who is in _peers and in _silent
        self._last = last
        self._late_holders = late_holders

    @property
    def needs_origin(self) -> bool:
        return not self._peers and self._last.needs_origin

    def stream(self, start: int, end: int, sink: Sink) -> None:
        reached = start

        def take(data: memoryview) -> None:
            nonlocal reached
            sink(data)
            reached += len(data)

        for peer in self._peers:
            try:
                return peer.stream(reached, end, take)
            except _ASK_ANOTHER as error:
                log.debug("a peer did not give the bytes from %d on: %s", reached, error)
                with self._lock:
                    self._peers = tuple(p for p in self._peers if p is not peer)
                    if isinstance(error, Unavailable | Overloaded):
                        self._silent += (replace(peer, is_hasty=False),)
        try:
            return self._last.stream(reached, end, take)
        except OriginError as failure:
            asked: set[str] = set()
            for peer in itertools.chain(self._silent, _lazily(self._late_holders)):
                if peer.address in asked:
                    continue  # to be silent with patience takes seconds, and a reader waits
                asked.add(peer.address)
                try:
                    peer.stream(reached, end, take)
                except _ASK_ANOTHER as error:
                    log.debug("a peer does not give the bytes from %d on, nor does the origin: %s", reached, error)
                else:
                    with self._lock:
                        if peer not in self._peers:
                            self._peers += (peer,)  # the next part need not wait until the origin has failed again
                    return None
            raise failure


def _lazily(late_holders: Callable[[], Sequence[PeerSource]]) -> Iterator[PeerSource]:
    yield from late_holders()
