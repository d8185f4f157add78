"""This node's share of prefetch jobs: work it out, say whether it fits, fetch it, check it.

A job names a snapshot and a prefix; the share is what placement gives this node under the map of now, so no list is
shipped and a new map is a new share.

The rule: `complete` is said only after every shard of the share was found sealed in the store.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shoal.errors import OriginChanged, ShoalError
from shoal.snapshot import Snapshot
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.library import KnownDataset, ShardSpec
from shoal_cachenode.node import CacheNode
from shoal_cachenode.scheduler import DiskFailed, Urgency
from shoal_cachenode.store import AlreadySealed, StoreFull

log = logging.getLogger(__name__)

#: Shards on their way at a time, for each fetch that may run: small shards then keep every fetch busy.
SHARDS_A_FETCH = 2
#: About how long to wait after each failed attempt at a shard but the last, so that a drive or a peer can come back.
PAUSES_S = (1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Order:
    """What the controller asks: say whether a share fits or, with `run`, fetch it."""

    job_id: str
    dataset: str
    snapshot: str
    prefix: str
    run: bool


@dataclass(frozen=True, slots=True)
class ShareReport:
    """Where this node's share of a job stands; the fields of the wire's PrefetchShare."""

    job_id: str
    epoch: int
    bytes_total: int
    bytes_done: int
    bytes_short: int
    complete: bool
    failure: str


@dataclass(slots=True)
class _Share:
    order: Order
    epoch: int
    task: asyncio.Task[None]
    known: KnownDataset | None = None
    opened: Snapshot | None = None
    holdings: Holdings | None = None
    ordinals: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    bytes_short: int = 0
    is_planned: bool = False
    is_complete: bool = False
    failure: str = ""


class Prefetches:
    """All shares this node works on."""

    def __init__(self, node: CacheNode) -> None:
        self._node = node
        self._shares: dict[str, _Share] = {}

    def apply(self, orders: list[Order]) -> None:
        """Take the controller's unfinished jobs: start what is new or planned under an old map, stop what is gone."""
        epoch = self._node.library.knowledge.cluster_map.epoch
        wanted = {order.job_id: order for order in orders}
        for job_id, share in list(self._shares.items()):
            order = wanted.get(job_id)
            if order is None or order != share.order or epoch != share.epoch:
                share.task.cancel()
                del self._shares[job_id]
        for job_id, order in wanted.items():
            if job_id not in self._shares:
                share = self._shares[job_id] = _Share(order, epoch, asyncio.current_task())  # type: ignore[arg-type]
                share.task = asyncio.create_task(self._work(share))

    async def reports(self) -> list[ShareReport]:
        """Every share that is worked out, for the next report to the controller."""
        shares = [share for share in self._shares.values() if share.is_planned]  # orders may come between two reports
        return [await asyncio.to_thread(self._report, share) for share in shares]

    async def close(self) -> None:
        for share in self._shares.values():
            share.task.cancel()
        await asyncio.gather(*(share.task for share in self._shares.values()), return_exceptions=True)

    def _report(self, share: _Share) -> ShareReport:
        total = done = 0
        if share.holdings is not None:
            sizes = share.holdings.table.sizes[share.ordinals]
            held = share.holdings.held[share.ordinals]
            total, done = int(sizes.sum()), int(sizes[held].sum())
            for key, fill in self._node.fills.all():
                ordinal = share.holdings.ordinal(key)
                if ordinal is not None and not share.holdings.held[ordinal] and ordinal in share.ordinals:
                    done += fill.bytes_present
        return ShareReport(
            share.order.job_id, share.epoch, total, done, share.bytes_short, share.is_complete, share.failure
        )

    async def _work(self, share: _Share) -> None:
        try:
            await self._plan(share)
            if share.order.run:
                await self._fetch(share)
        except asyncio.CancelledError:
            raise
        except (ShoalError, StoreFull, DiskFailed) as error:
            log.warning("prefetch %s stopped: %s", share.order.job_id, error, extra={"job": share.order.job_id})
            share.failure, share.is_planned = str(error), True
        except Exception as error:
            log.exception("prefetch %s failed", share.order.job_id, extra={"job": share.order.job_id})
            share.failure, share.is_planned = f"internal error: {error!r}", True

    async def _plan(self, share: _Share) -> None:
        node = self._node
        share.known = node.library.knowledge.dataset_of(share.order.snapshot)
        share.opened = await node.library.snapshot(share.order.snapshot)
        share.holdings = await node.holdings(share.opened)
        share.ordinals = await asyncio.to_thread(self._ordinals, share)
        share.bytes_short = await self._short(share)
        share.is_planned = True

    def _ordinals(self, share: _Share) -> npt.NDArray[np.int64]:
        """Ordinals of the shards under the prefix that placement gives this node."""
        opened, known = share.opened, share.known
        assert opened is not None and known is not None
        rows = opened.rows_under(share.order.prefix)
        first, last = opened.first_shard(rows.start), opened.first_shard(rows.stop)
        ordinals = np.arange(first, last, dtype=np.int64)
        placement = self._node.library.placement(opened, known.record.replicas)
        return ordinals[placement.owned_by(self._node.id, ordinals)]

    async def _short(self, share: _Share) -> int:
        """Bytes that the share needs beyond what is free or may be dropped for a prefetch."""
        holdings, node = share.holdings, self._node
        assert holdings is not None
        missing = share.ordinals[~holdings.held[share.ordinals]]
        needed = int(holdings.table.sizes[missing].sum())
        wanted = set(missing.tolist())
        for key, size_bytes in node.store.reserved_sizes().items():
            if holdings.ordinal(key) in wanted:
                needed -= size_bytes
        assert share.known is not None
        return max(0, needed - await node.room.for_prefetch(share.known.record.name))

    async def _fetch(self, share: _Share) -> None:
        holdings, node = share.holdings, self._node
        assert holdings is not None
        missing = iter(share.ordinals[~holdings.held[share.ordinals]].tolist())

        async def fetch_some() -> None:
            for ordinal in missing:
                await self._fetch_shard(share, ordinal)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(SHARDS_A_FETCH * node.config.fetches):
                    group.create_task(fetch_some())
        except ExceptionGroup as failed:  # of failures at a time one tells enough; a surprise is told before others
            surprises = failed.split(ShoalError)[1]
            raise (surprises or failed).exceptions[0] from None
        sealed = node.store.sealed_sizes()
        words = holdings.table.keys[share.ordinals].astype("<u8")
        absent = sum(row.tobytes() not in sealed for row in words)
        if absent:
            share.failure = f"{absent} shards of the share are not there after the fetch: prefetch again"
        share.is_complete = not absent

    async def _fetch_shard(self, share: _Share, ordinal: int) -> None:
        assert share.known is not None and share.opened is not None and share.holdings is not None
        table = share.holdings.table
        key = table.keys[ordinal].astype("<u8").tobytes()
        row, index = int(table.rows[ordinal]), int(table.indexes[ordinal])
        spec = ShardSpec(share.known, share.opened, row, index, key, int(table.sizes[ordinal]))
        for pause_s in (*PAUSES_S, None):
            if self._node.store.is_sealed(key):
                break
            try:
                fill = await self._node.fill(spec, self._node.order(spec), Urgency.PREFETCH)
                await asyncio.shield(fill.sealed)
                break
            except AlreadySealed:
                break
            except (StoreFull, DiskFailed, ShoalError) as error:
                # The source has retried what may pass already; another attempt is for a peer or a drive that came back.
                if pause_s is None or isinstance(error, StoreFull | OriginChanged):
                    path = share.opened.path(row)
                    raise ShoalError(f"{path or share.known.record.origin}: {error}") from error
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # not all shards of all nodes at once
        # The store may know of a seal sooner than what is reported beside the job: both are to say the same.
        self._node.inventory.sealed(key)
