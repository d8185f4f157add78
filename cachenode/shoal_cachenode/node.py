"""A cache node's parts, put together, and the decisions that need several of them: who fills, from where, into what.

The rule: the node answers every read it can answer. A full or sick drive, a missing controller or a map that names
nobody changes where the bytes come from, never whether they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from shoal import shard_client
from shoal.cluster_map import Node as MapNode
from shoal.cluster_map import NodeState
from shoal.errors import ClusterUnavailable, ShoalError
from shoal.shards import PART_SIZE, Key
from shoal.snapshot import Snapshot
from shoal.transport import Transport
from shoal_cachenode.disk import Disk, DiskStalls
from shoal_cachenode.fill import Fill, Fills
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.indexes import Indexes
from shoal_cachenode.inventory import Inventory
from shoal_cachenode.library import Knowledge, Library, ShardSpec, find_shard
from shoal_cachenode.origin_budget import OriginBudget, Rate
from shoal_cachenode.pace import Pace
from shoal_cachenode.passing import Passing
from shoal_cachenode.rebalance import Rebalance
from shoal_cachenode.recent import RECENT_BYTES, Recent
from shoal_cachenode.retention import Step
from shoal_cachenode.room import Room
from shoal_cachenode.scheduler import DiskFailed, Urgency
from shoal_cachenode.scrub import Scrubber
from shoal_cachenode.sealed_file import Damage
from shoal_cachenode.source import Counter, FirstThatHasIt, Nobody, OriginSource, PeerSource, Source
from shoal_cachenode.store import AlreadySealed, Store, StoreFull
from shoal_cachenode.streams import Streams
from shoal_cachenode.usage import Usage
from shoal_cachenode.whereabouts import Whereabouts

log = logging.getLogger(__name__)

#: From one time to the next that what changed of the uses is written, and what nobody goes on with is dropped.
HOUSEKEEPING_INTERVAL_S = 15.0
#: Nodes that are asked for a shard they do not own, while it is not known who holds it: the next in order.
FORMER_OWNERS_ASKED = 2
#: The longest silence of a peer that answers probes: it may be waiting for a slow origin.
PEER_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Config:
    """What a cache node is started with.

    Attributes:
        advertise: ``host:port`` of the data plane, as others reach it.
        fetches: part fetches of one dataset at a time, and the most that its origin is asked for at a time.
        origin_bytes_per_s: what all origins together may be asked for; 0: no limit.
        idle_after_s: a dataset that was not used for so long is idle, and gives way to others.
        unread_share: of the capacity: so much that was prefetched and not read yet may have taken idle datasets' room.
        scrub_rate: bytes a second that the scrubber reads; 0: none.
        rebalance_rate: bytes a second that are moved here from peers because this node owns them now; 0: none.
        recent_bytes: of what passed through a moment ago, held in memory for others who want it; 0: none.
        stall_s: an operation on the drive that takes longer hangs.
        retry_s: from one trial of a failed drive to the next.
    """

    data_dir: Path
    capacity_bytes: int
    topology: Mapping[str, str] = field(default_factory=dict)
    fetches: int = 16
    part_size: int = PART_SIZE
    origin_bytes_per_s: int = 0
    idle_after_s: float = 3600.0
    unread_share: float = 0.5
    scrub_rate: int = 16 << 20
    rebalance_rate: int = 200 << 20
    recent_bytes: int = RECENT_BYTES
    stall_s: float = 5.0
    retry_s: float = 5.0


class CountByCause:
    """Counts by a cause that is one of an enumeration."""

    def __init__(self, causes: Iterable[str]) -> None:
        self.by_cause: Mapping[str, Counter] = {str(cause): Counter() for cause in causes}

    def add(self, cause: str, amount: int = 1) -> None:
        self.by_cause[str(cause)].add(amount)

    @property
    def value(self) -> int:
        """Of all causes together."""
        return sum(counter.value for counter in self.by_cause.values())


@dataclass(frozen=True, slots=True)
class Counters:
    """Bytes by where they came from, since the start."""

    origin_bytes: Counter = field(default_factory=Counter)
    peer_bytes: Counter = field(default_factory=Counter)
    served_sealed_bytes: Counter = field(default_factory=Counter)
    served_filling_bytes: Counter = field(default_factory=Counter)
    served_through_bytes: Counter = field(default_factory=Counter)
    descriptors: Counter = field(default_factory=Counter)
    fills_failed: Counter = field(default_factory=Counter)
    shards_corrupt: CountByCause = field(default_factory=lambda: CountByCause(Damage))
    dropped_bytes: CountByCause = field(default_factory=lambda: CountByCause(step.name.lower() for step in Step))
    scrubbed_bytes: Counter = field(default_factory=Counter)
    rebalanced_bytes: Counter = field(default_factory=Counter)
    relayed_bytes: Counter = field(default_factory=Counter)
    referrals: Counter = field(default_factory=Counter)


class CacheNode:
    """The state of one cache node. Made on a running event loop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.store = Store(config.data_dir, config.capacity_bytes, part_size=config.part_size)
        self.transport = Transport(read_timeout_s=PEER_TIMEOUT_S)
        self.library = Library(config.data_dir, self.transport, lambda name, error: self.budget_of(name).trouble(error))
        self._origin_rate = Rate(config.origin_bytes_per_s)
        self._budgets: dict[str, OriginBudget] = {}  # by dataset
        self.usage = Usage(config.data_dir)
        self.usage.adopt(self.store.sealed_sizes() | self.store.reserved_sizes())
        self.inventory = Inventory(self.store, on_dropped=self.usage.forget)
        self.store.on_lost = self._on_lost
        pace = Pace(config.rebalance_rate) if config.rebalance_rate > 0 else None
        self.fills = Fills(self.store, config.fetches, on_sealed=self._on_sealed, pace=pace)
        self.id = self.store.node_id
        self.address = ""
        self.disk = Disk(
            config.data_dir,
            self.store.operations,
            capacity_bytes=config.capacity_bytes,
            stall_s=config.stall_s,
            retry_s=config.retry_s,
            on_stall=self._on_stall,
            on_recovery=self._on_recovery,
        )
        self.room = Room(self)
        self._checks: dict[Key, asyncio.Task[None]] = {}
        self._counting: dict[str, asyncio.Task[Holdings]] = {}  # by snapshot
        self._on_knowledge: list[Callable[[], None]] = []
        self.passing = Passing(config.part_size)
        self.recent = Recent(config.recent_bytes)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32, thread_name_prefix="io"))
        self._scrubber = Scrubber(self)
        self.whereabouts = Whereabouts(self)
        self.rebalance = Rebalance(self, is_on=pace is not None)
        self.streams = Streams(self)
        self.indexes = Indexes(
            config.data_dir,
            self.disk,
            lambda: self.address,
            self.library.snapshot,
            lambda digest: self.library.knowledge.dataset_of(digest).record.replicas,
            lambda digest: digest in self.library.knowledge.snapshots(),
        )
        self._keeping = asyncio.create_task(self._keep_house())

    @property
    def condition(self) -> str:
        """``ok``, or why reads pass through."""
        if self.disk.fault:
            return f"passing reads through: {self.disk.fault}"
        return "ok" if self.store.free_bytes > 0 else "full"

    def describe(self) -> MapNode:
        """This node as it wants to stand in the map."""
        return MapNode(self.id, self.address, self.config.capacity_bytes, dict(self.config.topology), NodeState.UP)

    def on_knowledge(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop after new orders were applied."""
        self._on_knowledge.append(callback)

    async def apply(self, knowledge: Knowledge) -> None:
        """Take new orders: keep them, fetch new snapshots, drop what no dataset names any more."""
        before = self.library.knowledge
        if knowledge == before:
            return
        for digest in knowledge.newest() - before.newest():
            # Before the dataset is told of: who sees it here can then read it here, whatever becomes of the controller.
            try:
                await self.library.snapshot_path(digest, knowledge)
            except ShoalError as error:
                log.warning("snapshot %s is not to be had yet: %s", digest, error)
        self.library.apply(knowledge)
        try:
            await self.disk.run(self.library.keep)
        except DiskStalls:
            pass  # they are kept when the drive is back
        except OSError as error:
            self.disk.failed(error)
        self.usage.keep({known.record.name for known in knowledge.datasets})
        served = knowledge.snapshots()
        self.inventory.forget(served)
        self.streams.forget(served)
        if knowledge.cluster_id == before.cluster_id and before.snapshots() - served:
            # Only a controller that once told of a dataset may take it away: one that lost its disk knows of none.
            await self._drop_unserved(served)
        self.rebalance.wake()
        for callback in self._on_knowledge:
            callback()

    async def _drop_unserved(self, served: set[str]) -> None:
        for digest in served:
            if await self.holdings_of(digest) is None:
                return  # without its listing nobody can say which files a dataset still needs
        # A removed dataset's prefetch is cancelled, but what it began would come in all the same, and stay.
        self.fills.end(await asyncio.to_thread(self.inventory.unserved, [key for key, _ in self.fills.all()]))
        try:
            freed = await self.disk.run(self.inventory.drop_unserved)
            log.info("dropped %d bytes of datasets and snapshots that are gone", freed)
        except DiskStalls:
            pass  # they go when room is needed
        except OSError as error:
            self.disk.failed(error)

    async def holdings_of(self, digest: str) -> Holdings | None:
        """What is held of a snapshot; None where nobody has the snapshot now."""
        try:
            opened = await self.library.snapshot(digest)
        except ShoalError as error:
            log.warning("snapshot %s is not to be had: %s", digest, error)
            return None
        return await self.holdings(opened)

    async def holdings(self, opened: Snapshot) -> Holdings:
        """What is held of a snapshot; counted once for all who ask first."""
        known = self.inventory.known().get(opened.digest)
        if known is not None:
            return known
        task = self._counting.get(opened.digest)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self.inventory.of, opened))
            self._counting[opened.digest] = task
            task.add_done_callback(lambda _: self._counting.pop(opened.digest))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())  # all who asked may have left
        return await asyncio.shield(task)

    def order(self, spec: ShardSpec) -> tuple[MapNode, ...]:
        """Owners of a shard, then everybody else; empty while the map names nobody."""
        try:
            placement = self.library.placement(spec.snapshot, spec.dataset.record.replicas)
            return placement.order(spec.ordinal, spec.key)
        except ClusterUnavailable:
            return ()

    def rank(self, order: tuple[MapNode, ...]) -> int | None:
        """This node's place in an order; None where it is not in it."""
        return next((rank for rank, node in enumerate(order) if node.id == self.id), None)

    def source(
        self,
        spec: ShardSpec,
        order: tuple[MapNode, ...],
        avoid: frozenset[str] = shard_client.NOBODY,
        *,
        waits: bool = False,
        is_move: bool = False,
        is_kept: bool = True,
    ) -> Source:
        """Where a fill of `spec` here reads: owners before this one, then whoever may still hold it, then the origin.

        Args:
            avoid: nodes that did not answer whoever asks.
            waits: for room in the origin's budget, in the thread that reads; else `OriginBusy` is raised.
            is_move: from peers that have it, and from nobody else.
            is_kept: those owners are to keep what they have to fetch themselves.

        May block while the origin is opened.
        """
        replicas = min(spec.dataset.record.replicas, len(order))
        rank = self.rank(order)
        before = order[: min(rank, replicas)] if rank is not None and not is_move else ()
        peers = [
            self.peer(node, spec, cached_only=False, avoid=avoid, is_kept=is_kept)
            for node in before
            if not self.is_avoided(node, avoid)
        ]
        others = [
            node
            for node in self._may_hold(spec, order, replicas)
            if node.id != self.id and node not in before and not self.is_avoided(node, avoid)
        ]
        peers += [self.peer(node, spec, cached_only=True) for node in others]
        last = Nobody() if is_move else self.origin_source(spec, waits=waits)
        return FirstThatHasIt(peers, last, functools.partial(self._late_holders, spec))

    def _late_holders(self, spec: ShardSpec) -> list[PeerSource]:
        """In a thread: who has a shard now that the origin does not give, asked again if need be."""
        digest = spec.snapshot.digest
        self.whereabouts.ask_from_thread(digest)
        holders = self.whereabouts.holders(digest, spec.ordinal)
        nodes = self.library.knowledge.cluster_map.nodes
        return [self.peer(node, spec, cached_only=True, is_hasty=False) for node in nodes if node.id in holders]

    def _may_hold(self, spec: ShardSpec, order: tuple[MapNode, ...], replicas: int) -> list[MapNode]:
        """Nodes that may hold a shard, those that own it first."""
        owners, rest = order[:replicas], order[replicas:]
        draining = [n for n in self.library.knowledge.cluster_map.nodes if n.state is NodeState.DRAINING]
        digest = spec.snapshot.digest
        if not self.whereabouts.is_current(digest):
            return [*owners, *rest[:FORMER_OWNERS_ASKED], *draining]
        holders = self.whereabouts.holders(digest, spec.ordinal)
        return [*owners, *(node for node in (*rest, *draining) if node.id in holders)]

    def is_avoided(self, node: MapNode, avoid: frozenset[str]) -> bool:
        """Whether a node is not to be waited for: it did not answer whoever asks, or does not answer this one."""
        return node.id in avoid or self.transport.health.is_open(node.address)

    def peer(
        self,
        node: MapNode,
        spec: ShardSpec,
        *,
        cached_only: bool,
        avoid: frozenset[str] = shard_client.NOBODY,
        until: float = math.inf,
        counter: Counter | None = None,
        is_hasty: bool = True,
        is_kept: bool = True,
    ) -> PeerSource:
        counter = counter or self.counters.peer_bytes
        return PeerSource(
            self.transport, node.address, spec.at, self.id, cached_only, counter, avoid, until, is_hasty, is_kept
        )

    def budget_of(self, dataset: str) -> OriginBudget:
        """What may be asked of a dataset's origin at a time."""
        budget = self._budgets.get(dataset)
        if budget is None:
            made = OriginBudget(self.config.fetches, self._origin_rate, self.fills.on_room)
            budget = self._budgets.setdefault(dataset, made)  # threads may come together: one of theirs is everybody's
        return budget

    def origin_source(self, spec: ShardSpec, *, waits: bool) -> Source:
        budget = self.budget_of(spec.dataset.record.name)
        opened = self.library.origin(spec.dataset)
        path, version = spec.snapshot.path(spec.row), spec.snapshot.version(spec.row)
        return OriginSource(opened, path, version, spec.offset, self.counters.origin_bytes, budget, waits)

    async def fill(
        self,
        spec: ShardSpec,
        order: tuple[MapNode, ...],
        urgency: Urgency,
        start: int = 0,
        avoid: frozenset[str] = shard_client.NOBODY,
    ) -> Fill:
        """The one fill of a shard, with room made for it; a new one begins with the part that byte `start` is in.

        Raises:
            AlreadySealed: another fill was faster.
            StoreFull: there is no room, and none can be made.
            DiskFailed: the drive is sick.
            ShoalError: the origin's options are wrong.
        """
        if urgency is Urgency.PREFETCH:
            self.usage.used(spec.dataset.record.name)
        if self.disk.fault:
            raise DiskFailed(self.disk.fault)
        running = self.fills.running(spec.key)
        if running is not None:
            running.join(urgency)
            return running
        is_move = urgency is Urgency.REBALANCE
        await self.whereabouts.settle(spec.snapshot.digest)
        if is_move or self.library.has_opened_origin(spec.dataset):
            source = self.source(spec, order, avoid, is_move=is_move)
        else:
            source = await asyncio.to_thread(self.source, spec, order, avoid)
        first = start // self.config.part_size
        is_new = not self.store.has_partial(spec.key)
        try:
            fill = await self._join(spec, source, urgency, first)
        except StoreFull:
            if not await self.room.make(spec, urgency):
                raise
            fill = await self._join(spec, source, urgency, first)
        if urgency is Urgency.PREFETCH and is_new:
            self.usage.prefetched(spec.key, spec.size_bytes)
        fill.sealed.add_done_callback(functools.partial(self._on_filled, spec.key))
        return fill

    async def _join(self, spec: ShardSpec, source: Source, urgency: Urgency, first: int) -> Fill:
        budget = self.budget_of(spec.dataset.record.name)
        joining = self.fills.join(spec.key, spec.size_bytes, source, budget, urgency, first)
        if not self.store.begin_blocks(spec.key):
            return await joining
        try:  # what an earlier fill left is read first, and what is being removed is waited for
            return await self.disk.unless_it_stalls(joining)
        except DiskStalls as error:
            raise DiskFailed(str(error)) from None

    def _on_filled(self, key: Key, sealed: asyncio.Future[None]) -> None:
        error = None if sealed.cancelled() else sealed.exception()
        if error is not None:
            self.usage.forget(key)
            if isinstance(error.__cause__, OSError) and isinstance(error, DiskFailed):
                self.disk.failed(error.__cause__)

    async def check(self, key: Key) -> None:
        """Verify a sealed shard, and drop it where it is bad: it is fetched anew by whoever asks next.

        Once for all who ask at a time: readers of one bad shard find it together.
        """
        task = self._checks.get(key)
        if task is None:
            task = self._checks[key] = asyncio.create_task(self._check(key))
            task.add_done_callback(lambda _: self._checks.pop(key))
        await asyncio.shield(task)

    async def _check(self, key: Key) -> None:
        try:
            await self.disk.run(self.store.verify, key)
        except (OSError, DiskStalls) as error:
            log.warning("shard %s cannot be checked now: %s", key.hex(), error)

    async def lose(self, key: Key, damage: Damage) -> None:
        """`Store.lose`, for which nobody waits longer than the drive answers."""
        with contextlib.suppress(DiskStalls):
            await self.disk.run(self.store.lose, key, damage)

    async def refetch(self, key: Key) -> None:
        """Fill a shard that was lost, where this node owns it: nobody waits for it. Failures are logged."""
        for served in self.library.knowledge.snapshots():
            await self.holdings_of(served)
        try:
            spec = await self.spec_of(key)
            if spec is None:
                return
            order = self.order(spec)
            rank = self.rank(order)
            if rank is None or rank >= spec.dataset.record.replicas:
                return
            # As urgent as a prefetch, and none: somebody read the shard before it was lost.
            fill = await self.fill(spec, order, Urgency.PREFETCH)
            self.usage.forget(key)
            await asyncio.shield(fill.sealed)
        except (ShoalError, StoreFull, DiskFailed, AlreadySealed) as error:
            log.warning("shard %s is not fetched again now: %s", key.hex(), error)

    async def spec_of(self, key: Key) -> ShardSpec | None:
        """Which shard of which snapshot a key is of, among those whose holdings are known; None: of none.

        Raises:
            ShoalError: the snapshot is not to be had now.
        """
        place = self.inventory.place_of(key)
        if place is None:
            return None
        digest, ordinal = place
        opened = await self.library.snapshot(digest)
        table = opened.shard_table()
        row, index = int(table.rows[ordinal]), int(table.indexes[ordinal])
        return find_shard(self.library.knowledge.dataset_of(digest), opened, row, index)

    async def _keep_house(self) -> None:
        while True:
            with contextlib.suppress(OSError, DiskStalls):  # what is wrong with it shows elsewhere
                await self.disk.run(self.disk.look)
            await asyncio.sleep(HOUSEKEEPING_INTERVAL_S)
            self.recent.expire()
            try:
                await self.room.drop_abandoned()
            except ShoalError as error:
                log.info("abandoned shards are dropped later: %s", error)
            except Exception:
                # One look's surprise must not end all later ones.
                log.exception("abandoned shards are dropped later")
            try:
                await asyncio.to_thread(self.usage.save)
            except OSError as error:
                log.warning("the last uses of datasets could not be kept: %s", error)
                self.disk.failed(error)

    def _on_sealed(self, key: Key) -> None:
        self.inventory.sealed(key)

    def _on_lost(self, key: Key, damage: Damage) -> None:
        self.counters.shards_corrupt.add(damage)
        self.inventory.gone(key)

    def _on_stall(self) -> None:
        for _, fill in self.fills.all():
            fill.failed(DiskFailed(self.disk.fault))

    def _on_recovery(self) -> None:
        """In a thread, when the drive takes writes again."""
        self.store.bury()
        self.library.keep()

    async def close(self) -> None:
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        await self.indexes.close()
        await self.streams.close()
        await self.rebalance.close()
        await self.whereabouts.close()
        await self._scrubber.close()
        await self.fills.close()
        await self.disk.close()
        self.passing.close()
        self.transport.close()
        try:
            await asyncio.to_thread(self.usage.save, at_once=True)
        except OSError as error:
            log.warning("the last uses of datasets could not be kept: %s", error)
        await asyncio.to_thread(self.store.close)
