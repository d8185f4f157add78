"""Room on the drive: who needs it, what `retention` is told of the datasets, and the bound on what nobody has read yet.

A prefetch may use free room, and drop what no reader of any dataset misses. Beyond that, what was prefetched and not
read yet has an allowance: only within it do idle datasets make room for a prefetch, so that prefetches of data that
nobody reads cannot push out, one after the other, everything that is read from time to time.

The rule: one search for room at a time; two would drop twice what is needed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from shoal import sizes
from shoal.snapshot import Snapshot
from shoal_cachenode.disk import DiskStalls
from shoal_cachenode.inventory import DatasetState
from shoal_cachenode.library import KnownDataset, ShardSpec
from shoal_cachenode.retention import Mask, Step, guaranteed_bytes
from shoal_cachenode.scheduler import Urgency
from shoal_cachenode.store import StoreFull

if TYPE_CHECKING:
    from shoal_cachenode.node import CacheNode

log = logging.getLogger(__name__)

#: What peers said they hold may be so old when room is looked for: a shard is surplus once its owner has it.
SURPLUS_KNOWN_S = 30.0
#: A part of a shard that nobody has gone on with for so long, and that is another node's to go on with, is dropped.
ABANDONED_AFTER_S = 60.0


class Room:
    """Makes room on one node's drive."""

    def __init__(self, node: CacheNode) -> None:
        self._node = node
        self._search = asyncio.Lock()  # guards what `make` counts free between looking and dropping
        self.allowance_bytes = int(node.config.capacity_bytes * node.config.unread_share)

    async def make(self, spec: ShardSpec, urgency: Urgency) -> bool:
        """Drop what may be dropped for a shard until it fits; whether it does.

        A read, and what a running stream will read, is worth any idle dataset, a prefetch as far as its allowance goes.
        A move is worth one if its own dataset is in use: else two idle ones would push each other out for ever.

        Raises:
            StoreFull: only what prefetches have used up keeps it from fitting.
        """
        usage, size_bytes = self._node.usage, spec.size_bytes
        match urgency:
            case Urgency.PREFETCH:
                may_drop_idle = usage.unread_bytes + size_bytes <= self.allowance_bytes
            case Urgency.REBALANCE:
                may_drop_idle = not usage.is_idle(spec.dataset.record.name, self._node.config.idle_after_s)
            case _:
                may_drop_idle = True
        async with self._search:
            states = await self._states()
            if states is None:
                return False  # without its listing nobody can say which files a dataset still needs
            try:
                dropped = await self._node.disk.unless_it_stalls(
                    asyncio.to_thread(
                        self._node.inventory.make_room,
                        size_bytes,
                        states,
                        asker=spec.dataset.record.name,
                        may_drop_idle=may_drop_idle,
                    )
                )
            except DiskStalls:
                return False
            except OSError as error:
                self._node.disk.failed(error)
                return False
        for step, freed in (dropped or {}).items():
            self._node.counters.dropped_bytes.add(step.name.lower(), freed)
        if dropped is None and urgency is Urgency.PREFETCH and not may_drop_idle:
            raise StoreFull(
                f"{sizes.format(usage.unread_bytes)} of prefetched data on this node wait for their first reader, and "
                f"only {sizes.format(self.allowance_bytes)} may take the room of idle datasets (--unread-share)"
            )
        return dropped is not None

    async def for_prefetch(self, asker: str) -> int:
        """Bytes of the dataset `asker` that a prefetch may bring in now."""
        node = self._node
        free_bytes = max(0, node.store.free_bytes)
        states = await self._states()
        if states is None:
            return free_bytes
        found = await asyncio.to_thread(node.inventory.droppable_bytes, states, asker=asker)
        missed = sum(size for step, size in found.items() if step >= Step.IDLE)
        unmissed = free_bytes + sum(found.values()) - missed
        return max(unmissed, min(unmissed + missed, self.allowance_bytes - node.usage.unread_bytes))

    async def drop_abandoned(self) -> None:
        """Drop partial shards that nobody goes on with, unless this node owns them: it may, when they are read next.

        A fill is left over where its source failed, and the readers turned to the shard's owner meanwhile.
        """
        node = self._node
        idle = node.store.idle_partials(ABANDONED_AFTER_S)
        if not idle or not node.library.knowledge.snapshots():
            return
        for digest in node.library.knowledge.snapshots():
            if await node.holdings_of(digest) is None:
                return  # without its listing nobody can say whose shards these are
        for key in idle:
            spec = await node.spec_of(key)
            if spec is not None:
                order = node.order(spec)
                rank = node.rank(order)
                if not order or (rank is not None and rank < spec.dataset.record.replicas):
                    continue  # this node's; or there is no map now to say whose
            try:
                freed = await node.disk.run(node.store.evict, key)
            except DiskStalls:
                return
            except OSError as error:
                node.disk.failed(error)
                return
            if freed:  # else somebody went on with it just now
                node.usage.forget(key)
                log.info("what came of shard %s is dropped: nobody went on with it", key.hex())

    async def _states(self) -> tuple[DatasetState, ...] | None:
        """What retention must know of each dataset; None while the listing of one is not to be had."""
        node = self._node
        knowledge = node.library.knowledge
        for digest in knowledge.snapshots():
            if await node.holdings_of(digest) is None:
                return None
        owners = knowledge.cluster_map.owners()
        total_weight = sum(owner.weight for owner in owners)
        weight = next((owner.weight for owner in owners if owner.id == node.id), 0)
        states = []
        for known in knowledge.datasets:
            record = known.record
            opened = await node.library.snapshot(record.snapshot)
            await node.whereabouts.ask(opened.digest, newer_than=time.monotonic() - SURPLUS_KNOWN_S)
            states.append(
                DatasetState(
                    record.name,
                    record.snapshot,
                    functools.partial(self._needed, known, opened),
                    (knowledge.cluster_map.epoch, node.whereabouts.asked_at(opened.digest)),
                    record.pinned,
                    not node.usage.is_idle(record.name, node.config.idle_after_s),
                    node.usage.last_used_s(record.name),
                    guaranteed_bytes(record.quota_bytes, weight, total_weight),
                )
            )
        return tuple(states)

    def _needed(self, known: KnownDataset, opened: Snapshot) -> Mask:
        """Shards that are no surplus here: this node owns them, or no owner said that it has them."""
        placement = self._node.library.placement(opened, known.record.replicas)
        needed = np.ones(placement.shard_count, np.bool_)
        for peer, held in self._node.whereabouts.masks(opened.digest, placement.shard_count).items():
            needed &= ~(held & placement.owned_by(peer))
        return needed | placement.owned_by(self._node.id)
