"""Streams tell this node what they will read of it, and the node has it ready in that order.

    1. a post comes (docs/wire.md, "Streams"): what the stream needs now takes the place of what it needed before
    2. over all streams, what is missing here is put in the order of its next use (`shoal_cachenode.needs`)
    3. the nearest parts are fetched, as many as keep the fetches busy; readers who wait go first, prefetches last
    4. where that leaves fetches idle, or too many shards have been begun, the rest of these comes too
    5. what fails is logged, and tried again later: the reader who comes for it is told why

The dataset of a stream that posts is in use, and none of the shards that it will read is dropped.

The rule: nothing is begun that no running stream needs, and what was begun for streams alone ends with them, after the
part that is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shoal.errors import InvalidRequest, NotCached, ShoalError, SnapshotNotFound
from shoal.shards import PART_SIZE
from shoal.wire.stream_post import Cause, StreamPost
from shoal_cachenode import needs, whereabouts
from shoal_cachenode.fill import Fill, NotNeeded
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.library import KnownDataset, ShardSpec
from shoal_cachenode.needs import Need, Outlook, Place, Stream
from shoal_cachenode.scheduler import DiskFailed, Urgency
from shoal_cachenode.store import AlreadySealed, StoreFull

if TYPE_CHECKING:
    from shoal.snapshot import Snapshot
    from shoal_cachenode.node import CacheNode

log = logging.getLogger(__name__)

#: Posts come in bursts: ranks step together.
SETTLE_S = 0.05
#: Parts come in bursts too, and each look goes through all that is under way.
ARRIVALS_S = 0.01
#: Where there is no room for one shard of a dataset, or the drive is sick, no other one is tried for so long.
PAUSE_S = 5.0
#: Parts that may be queued for needs, for each fetch: one under way, and one that comes next.
PARTS_A_FETCH = 2
#: Shards that may be under way for streams: each has a file open, and none of them is safe until all of it is here.
MOST_FILLS = 1024
#: What no stream needs of a shard any more goes behind what streams need until then.
REST_IN_S = 10.0


@dataclass(slots=True)
class _UnderWay:
    """A shard that is being filled for streams.

    Attributes:
        fill: None until there is one.
        dues: the parts that were needed of it before that, and when.
    """

    task: asyncio.Task[None] | None = None
    fill: Fill | None = None
    dues: dict[int, float] = field(default_factory=dict)
    is_over: bool = False

    def need(self, part: int, due: float) -> None:
        if self.fill is None:
            self.dues[part] = due
        else:
            self.fill.need(*_bytes_of(part), due)

    def begun(self, fill: Fill) -> None:
        """There is a fill."""
        self.fill = fill
        for part, due in self.dues.items():
            fill.need(*_bytes_of(part), due)
        if self.is_over:
            fill.let_go()

    def end(self) -> None:
        """Nobody needs it any more: let the parts that are under way run out, unless others wait for the shard too."""
        self.is_over = True
        if self.fill is not None:
            self.fill.let_go()


class Streams:
    """The streams that read from one node. Lives on the event loop.

    Args:
        clock: seconds, monotonic.

    Attributes:
        waited: seconds that consumers waited, by what for and for which node; they may have waited for another one.
    """

    def __init__(self, node: CacheNode, clock: Callable[[], float] = time.monotonic) -> None:
        self._node = node
        self._clock = clock
        self._running = needs.Streams()
        self._outlook = Outlook()
        self._is_stale = False
        self._has_lost_one = False
        self._is_short = False  # as much was to be begun as there was
        self._changed = asyncio.Event()
        self._under_way: dict[Place, _UnderWay] = {}
        self._failures: dict[Place, tuple[int, float]] = {}  # how often in a row, and when it may be tried again
        self._paused_until: dict[str, float] = {}  # by dataset
        self.waited = {(cause, ""): 0.0 for cause in Cause}
        self._task = asyncio.create_task(self._run())

    @property
    def count(self) -> int:
        """Streams that are running."""
        return len(self._running)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the shards that they will read and that were not sealed here when one of them last posted."""
        return self._outlook.missing_bytes

    async def hear(self, digest: str, stream_id: str, post: StreamPost) -> bytes:
        """Take a post; one bit a need, whether it is sealed here, packed as `whereabouts.pack` does.

        Raises:
            InvalidRequest: the snapshot has no such shard.
            SnapshotNotFound: no dataset here has it, or it is not here yet.
            Overloaded: there are too many streams.
        """
        node = self._node
        known = node.library.knowledge.dataset_of(digest)
        node.usage.used(known.record.name)
        if post.is_leaving:
            self._has_lost_one |= self._running.leave(stream_id)
            self._wake()
            self._add_waits(post)
            return b""
        holdings = await node.holdings_of(digest)
        if holdings is None:
            raise SnapshotNotFound(f"snapshot {digest} is not here yet: ask another node")
        opened = await node.library.snapshot(digest)
        now = self._clock()
        ordinals, is_owned = await asyncio.to_thread(self._look_up, known, opened, holdings, post)
        parts, dues = post.parts[is_owned].astype(np.int64), now + post.in_ms[is_owned] / 1000
        self._running.hear(stream_id, Stream(digest, ordinals[is_owned], parts, dues, now))
        self._wake()
        self._add_waits(post)
        return whereabouts.pack(holdings.held[ordinals])

    def _add_waits(self, post: StreamPost) -> None:
        cluster_map = self._node.library.knowledge.cluster_map
        for wait in post.waits:
            # Whoever is not in the map counts as nobody: names that anybody may send are no labels of a metric.
            node_id = wait.node_id if cluster_map.node(wait.node_id) is not None else ""
            what = wait.cause, node_id
            self.waited[what] = self.waited.get(what, 0.0) + wait.seconds

    def _look_up(
        self, known: KnownDataset, opened: Snapshot, holdings: Holdings, post: StreamPost
    ) -> tuple[needs.Ordinals, needs.Mask]:
        """In a thread: the shards' ordinals, and which of them are this node's to fill."""
        table = holdings.table
        rows = post.rows.astype(np.int64)
        ordinals = np.searchsorted(table.rows, post.rows).astype(np.int64) + post.indexes
        inside = np.minimum(ordinals, max(0, len(table) - 1))
        wrong = np.ones(len(rows), np.bool_)
        if len(table):
            wrong = (inside != ordinals) | (table.rows[inside] != rows) | (table.indexes[inside] != post.indexes)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise InvalidRequest(
                f"row {post.rows[place]} of snapshot {opened.digest} has no shard {post.indexes[place]}, or is none"
            )
        outside = post.parts.astype(np.int64) * PART_SIZE >= np.maximum(table.sizes[ordinals], 1)
        if outside.any():
            place = int(np.argmax(outside))
            raise InvalidRequest(
                f"shard {post.indexes[place]} of row {post.rows[place]} has no part {post.parts[place]}: it has "
                f"{table.sizes[ordinals[place]]} bytes"
            )
        placement = self._node.library.placement(opened, known.record.replicas)
        return ordinals, placement.owned_by(self._node.id, ordinals)

    def forget(self, served: set[str]) -> None:
        """Streams over other snapshots than these are over; what they would have read may be dropped at once."""
        self._has_lost_one |= self._running.forget(served)
        self._set_needed({digest: mask for digest, mask in self._outlook.masks.items() if digest in served})
        self._wake()

    async def close(self) -> None:
        tasks = [self._task, *(each.task for each in self._under_way.values() if each.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wake(self) -> None:
        self._is_stale = True
        self._changed.set()

    def _set_needed(self, masks: Mapping[str, needs.Mask]) -> None:
        self._node.inventory.needed = masks

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                until = self._running.expires_at()
                async with asyncio.timeout(None if until == math.inf else max(0.0, until - self._clock())):
                    await self._changed.wait()
            try:
                await asyncio.sleep(SETTLE_S if self._is_stale else ARRIVALS_S)
                self._changed.clear()
                await self._look()
            except Exception:
                # One look's surprise must not end all later ones: streams would wait for every shard.
                log.exception("what streams need is looked at again later")

    async def _look(self) -> None:
        if self._running.expire(self._clock()):
            self._has_lost_one = self._is_stale = True
        if self._is_stale:
            self._is_stale = False
            streams = self._running.all()
            found = {digest: await self._node.holdings_of(digest) for digest in {each.digest for each in streams}}
            holdings = {digest: each for digest, each in found.items() if each is not None}
            self._outlook = await asyncio.to_thread(needs.outlook, streams, holdings)
            self._set_needed(self._outlook.masks)
            self._failures = {place: each for place, each in self._failures.items() if self._outlook.needs(place)}
        if self._has_lost_one:
            self._has_lost_one = False
            for place, under_way in self._under_way.items():
                if not self._outlook.needs(place):
                    under_way.end()
        self._fetch_nearest()

    def _fetch_nearest(self) -> None:
        now, known = self._clock(), self._node.inventory.known()

        def width(need: Need) -> int:
            under_way, holdings = self._under_way.get(need.place), known.get(need.digest)
            start, end = _bytes_of(need.part)
            if under_way is not None and under_way.fill is not None:
                return under_way.fill.missing(start, end)
            if holdings is None or holdings.held[need.ordinal]:
                return 0
            if under_way is None:
                name = self._node.library.knowledge.dataset_of(need.digest).record.name
                may_begin_at = max(self._failures.get(need.place, (0, 0.0))[1], self._paused_until.get(name, 0.0))
                if may_begin_at > now or len(self._under_way) >= MOST_FILLS:
                    return 0
            return -(-(min(end, int(holdings.table.sizes[need.ordinal])) - start) // self._node.config.part_size)

        fetches = PARTS_A_FETCH * self._node.config.fetches
        chosen, left = needs.to_fetch(self._outlook.nearest, width, fetches=fetches)
        self._is_short = left > 0
        for need in chosen:
            under_way = self._under_way.get(need.place)
            if under_way is None and len(self._under_way) < MOST_FILLS:
                under_way = self._under_way[need.place] = _UnderWay()
                known_dataset = self._node.library.knowledge.dataset_of(need.digest)
                under_way.task = asyncio.create_task(self._fill(known_dataset, need, under_way))
            if under_way is not None:
                under_way.need(need.part, need.due)
        self._fetch_rest(left)

    def _fetch_rest(self, fetches: int) -> None:
        """Have so many fetches bring in the rest of shards that have been begun, and of those that are in the way."""
        begun = [each.fill for each in self._under_way.values() if each.fill is not None]
        for fill in begun[: max(0, len(begun) + 1 - MOST_FILLS)]:
            fill.need_rest(self._clock())
        for place, each in self._under_way.items():
            if each.fill is not None and not self._outlook.needs(place):
                each.fill.need_rest(self._clock() + REST_IN_S)
        for fill in begun:
            if fetches <= 0:
                break
            fetches -= fill.need_rest(math.inf)

    async def _fill(self, known: KnownDataset, need: Need, under_way: _UnderWay) -> None:
        node, place = self._node, need.place
        try:
            opened = await node.library.snapshot(need.digest)
            spec = _spec(known, opened, need.ordinal)
            order = node.order(spec)
            rank = node.rank(order)
            if rank is None or rank >= known.record.replicas:
                raise NotCached("another node owns it now")
            fill = await node.fill(spec, order, Urgency.NEED)
            fill.on_arrived = self._changed.set
            under_way.begun(fill)
            await asyncio.shield(fill.sealed)
            node.inventory.sealed(spec.key)  # it may be known here later than to those who wait for the fill
            self._failures.pop(place, None)
            self._is_stale |= self._is_short and not self._outlook.is_all  # the nearest are here, and there are more
        except AlreadySealed:
            pass
        except NotNeeded as error:
            log.debug("shard %d of snapshot %s: %s", need.ordinal, need.digest, error)
        except (StoreFull, DiskFailed) as error:
            self._paused_until[known.record.name] = self._clock() + PAUSE_S
            name = known.record.name
            log.info("no shard of %s is filled ahead for a while: %s", name, error, extra={"dataset": name})
        except Exception as error:  # noqa: BLE001 - one shard's surprise must not end all that streams need
            level = logging.INFO if isinstance(error, ShoalError) else logging.ERROR
            count = self._failures.get(place, (0, 0.0))[0] + 1
            self._failures[place] = count, self._clock() + needs.pause_s(count)
            log.log(level, "shard %d of snapshot %s is not filled ahead now: %r", need.ordinal, need.digest, error)
        finally:
            del self._under_way[place]
            self._changed.set()


def _bytes_of(part: int) -> tuple[int, int]:
    """Of a shard, where it is long enough."""
    return part * PART_SIZE, (part + 1) * PART_SIZE


def _spec(known: KnownDataset, opened: Snapshot, ordinal: int) -> ShardSpec:
    table = opened.shard_table()
    key = table.keys[ordinal].astype("<u8").tobytes()
    return ShardSpec(
        known, opened, int(table.rows[ordinal]), int(table.indexes[ordinal]), key, int(table.sizes[ordinal])
    )
