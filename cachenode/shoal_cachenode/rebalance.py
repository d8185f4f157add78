"""Bringing shards to their owners: what this node owns and lacks, and some peer holds, is fetched from there.

After a map change (a node joined, left, drains, or offers other bytes), after a change of a dataset's replicas, and now
and then in between, because a shard that was read on demand has one copy where its dataset wants more. So a lost
replica is made again from the other one, and a drained node's shards are elsewhere before it goes.

Only bytes that the cluster has are moved: the origin is never asked here, and a shard that nobody holds is left to
whoever reads it. Nothing live is dropped to make room. Parts that a reader waits for go first, and moves keep their own
pace (`shoal_cachenode.pace`).

The rule: a shard is fetched by its owner, once, from one peer; so what moves is what the map says must move.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.cluster_map import Node, NodeState
from shoal.errors import ShoalError
from shoal.snapshot import Snapshot
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.library import KnownDataset, ShardSpec
from shoal_cachenode.scheduler import DiskFailed, Urgency
from shoal_cachenode.store import AlreadySealed, StoreFull
from shoal_cachenode.whereabouts import Mask

if TYPE_CHECKING:
    from shoal_cachenode.node import CacheNode

log = logging.getLogger(__name__)

#: From one look to the next where no map change calls for one: datasets of one copy; several, while a node drains, or
#: after a look that did not bring in all it found.
LOOK_INTERVAL_S = 600.0
REPAIR_INTERVAL_S = 30.0
#: While this node drains: its controller waits for what it says.
DRAIN_INTERVAL_S = 1.0
#: Map changes come in bursts, when a rack is started.
SETTLE_S = 0.2
#: Shards on their way at a time: enough to keep one source busy while the next seals.
AT_A_TIME = 3


Ordinals = npt.NDArray[np.int64]


def plan(owned: Mask, held: Mask, elsewhere: Mapping[str, Mask]) -> Ordinals:
    """What a node is to fetch: the shards that it owns and lacks, and some peer holds.

    Args:
        owned, held: by this node. Shape (n,).
        elsewhere: for each peer that answered, what it holds. Each of shape (n,).
    """
    available = np.zeros_like(held)
    for mask in elsewhere.values():
        available |= mask
    return np.flatnonzero(owned & ~held & available)


def left_to_hand_over(held: Mask, owned_by: Mapping[str, Mask], elsewhere: Mapping[str, Mask], copies: int) -> Ordinals:
    """The shards that a draining node holds and fewer than `copies` of their new owners do.

    Args:
        held: by this node. Shape (n,).
        owned_by: for each node that owns shards, which those are; fewer than `copies` such nodes can hold no more.
        elsewhere: for each peer, what it holds.
    """
    count = np.zeros(len(held), np.int64)
    for node_id, owned in owned_by.items():
        mask = elsewhere.get(node_id)
        if mask is not None:
            count += owned & mask
    return np.flatnonzero(held & (count < min(copies, len(owned_by))))


class Rebalance:
    """The background task of one node.

    Args:
        is_on: whether shards are moved here.

    Attributes:
        handover_bytes: what this node, which drains, holds and the owners of the present map do not yet; None while
            that is not known, and for a node that does not drain.
        is_busy: it looks, or moves.
    """

    def __init__(self, node: CacheNode, *, is_on: bool) -> None:
        self._node = node
        self._is_on = is_on
        self._wanted = asyncio.Event()
        self._wanted.set()  # at the start, too: the map may have changed while this node was away
        self._looked: dict[str, tuple[str, int, int]] = {}  # snapshot, copies and epoch, by dataset
        self._short: dict[str, int] = {}
        self._handover: tuple[int, int] | None = None  # epoch of the map it is about, bytes
        self._is_due = False
        self._is_unfinished = False
        self.is_busy = False
        self._task = asyncio.create_task(self._run())

    @property
    def handover_bytes(self) -> int | None:
        if self._handover is None or self._handover[0] != self._node.library.knowledge.cluster_map.epoch:
            return None  # a newer map has other owners, and whoever hears 0 may stop this node
        return self._handover[1]

    @property
    def short_bytes(self) -> int:
        """What this node owns and peers hold, and there was no room for at the last look."""
        return sum(self._short.values())

    def will_bring(self, spec: ShardSpec, order: tuple[Node, ...]) -> bool:
        """Whether a shard that some peer holds is brought here sooner or later, so that readers need not do it."""
        is_owner = any(owner.id == self._node.id for owner in order[: spec.dataset.record.replicas])
        return self._is_on and is_owner and spec.snapshot.digest == spec.dataset.record.snapshot

    def wake(self, *, is_due: bool = False) -> None:
        """There are new orders; or, `is_due`, look over all datasets now rather than when their time comes."""
        self._is_due |= is_due
        self._wanted.set()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._interval_s()):
                    await self._wanted.wait()
                await asyncio.sleep(SETTLE_S)
            except TimeoutError:
                self._is_due = True
            self._wanted.clear()
            is_due, self._is_due = self._is_due, False
            self.is_busy = True
            try:
                await self._look(is_due=is_due)
            except ShoalError as error:
                self._is_unfinished = True
                log.info("rebalancing goes on later: %s", error)
            except Exception:
                # One look's surprise must not end all later ones: nobody would hear that replicas are made no more.
                self._is_unfinished = True
                log.exception("rebalancing goes on later")
            finally:
                self.is_busy = False

    def _interval_s(self) -> float:
        if self._is_draining():
            return DRAIN_INTERVAL_S
        knowledge = self._node.library.knowledge
        if self._is_unfinished or any(each.state is NodeState.DRAINING for each in knowledge.cluster_map.nodes):
            return REPAIR_INTERVAL_S  # somebody waits for what the first look could not move
        several = any(known.record.replicas > 1 for known in knowledge.datasets)
        return REPAIR_INTERVAL_S if several and len(knowledge.cluster_map.owners()) > 1 else LOOK_INTERVAL_S

    def _is_draining(self) -> bool:
        me = self._node.library.knowledge.cluster_map.node(self._node.id)
        return me is not None and me.state is NodeState.DRAINING

    async def _look(self, *, is_due: bool) -> None:
        """Bring in what is missing: of all datasets where that `is_due`, else of those that orders changed."""
        self._is_unfinished = False
        node, knowledge = self._node, self._node.library.knowledge
        node.whereabouts.forget(knowledge.snapshots())
        cluster_map = knowledge.cluster_map
        if not any(peer.id != node.id and peer.state is not NodeState.DOWN for peer in cluster_map.nodes):
            return  # nobody to fetch from; the last owner still takes what nodes that drain hold
        if not cluster_map.owners():
            return  # nobody to hand over to
        looked_at, is_draining = time.monotonic(), self._is_draining()
        names = {known.record.name for known in knowledge.datasets}
        self._looked = {name: what for name, what in self._looked.items() if name in names}
        self._short = {name: size for name, size in self._short.items() if name in names}
        left_bytes = 0
        for known in knowledge.datasets:
            record = known.record
            what = record.snapshot, record.replicas, cluster_map.epoch
            if not is_due and not is_draining and self._looked.get(record.name) == what:
                continue
            holdings = await node.holdings_of(record.snapshot)
            if holdings is None:
                if is_draining:
                    return  # whoever hears that nothing is left may stop this node, and that is not known
                self._is_unfinished = True
                continue
            opened = await node.library.snapshot(record.snapshot)
            if is_draining:
                if holdings.held.any():
                    await node.whereabouts.ask(opened.digest, newer_than=looked_at)
                    left_bytes += await asyncio.to_thread(self._left_bytes, known, opened, holdings)
            elif self._is_on:
                self._short[record.name] = await self._take_over(known, opened, holdings, looked_at if is_due else -1.0)
            if self._wanted.is_set():
                return  # newer orders: what is left is looked at anew
            self._looked[record.name] = what
        if is_draining:
            self._handover = cluster_map.epoch, left_bytes

    async def _take_over(self, known: KnownDataset, opened: Snapshot, holdings: Holdings, newer_than: float) -> int:
        """Fetch what is missing of a dataset; return the bytes that there was no room for."""
        placement = self._node.library.placement(opened, known.record.replicas)
        owned = await asyncio.to_thread(placement.owned_by, self._node.id)
        if not (owned & ~holdings.held).any():
            return 0
        await self._node.whereabouts.ask(opened.digest, newer_than=newer_than)
        elsewhere = self._node.whereabouts.masks(opened.digest, len(holdings.table))
        return await self._move_all(known, opened, holdings, plan(owned, holdings.held, elsewhere))

    def _left_bytes(self, known: KnownDataset, opened: Snapshot, holdings: Holdings) -> int:
        placement = self._node.library.placement(opened, known.record.replicas)
        elsewhere = self._node.whereabouts.masks(opened.digest, len(holdings.table))
        owned_by = {owner.id: placement.owned_by(owner.id) for owner in placement.nodes}
        left = left_to_hand_over(holdings.held, owned_by, elsewhere, known.record.replicas)
        return int(holdings.table.sizes[left].sum())

    async def _move_all(self, known: KnownDataset, opened: Snapshot, holdings: Holdings, moves: Ordinals) -> int:
        """Fetch shards, a few at a time, until a newer map is there; return the bytes that there was no room for."""
        queue, table, short_bytes = iter(moves.tolist()), holdings.table, 0

        async def move_some() -> None:
            nonlocal short_bytes
            for ordinal in queue:
                if self._wanted.is_set():
                    return
                size_bytes = int(table.sizes[ordinal])
                key = table.keys[ordinal].astype("<u8").tobytes()
                row, index = int(table.rows[ordinal]), int(table.indexes[ordinal])
                if not await self._move(ShardSpec(known, opened, row, index, key, size_bytes)):
                    short_bytes += size_bytes

        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_A_TIME, len(moves))):
                group.create_task(move_some())
        if short_bytes:
            name = known.record.name
            extra = {"dataset": name, "bytes": short_bytes}
            log.warning("%d bytes of %s that this node owns find no room here", short_bytes, name, extra=extra)
        return short_bytes

    async def _move(self, spec: ShardSpec) -> bool:
        """Fetch one shard from a peer that has it; False where there is no room for it."""
        try:
            fill = await self._node.fill(spec, self._node.order(spec), Urgency.REBALANCE)
            await asyncio.shield(fill.sealed)
            self._node.counters.rebalanced_bytes.add(spec.size_bytes)
        except AlreadySealed:
            pass
        except StoreFull:
            return False
        except (DiskFailed, ShoalError) as error:
            # Whoever reads it fetches it; else it is tried again at the next look, which is soon.
            self._is_unfinished = True
            log.info("shard %s was not moved here: %s", spec.key.hex(), error)
        return True
