"""Fills: bringing the parts of one shard in, once, for everybody who waits.

What is fetched next, of all fills of a node, is the scheduler's to say (`shoal_cachenode.scheduler`).

A fill for readers brings in the part that one waits for, and then the rest. Where streams have said what they will read
of the shard, they *lead* the fill: they say which part is next, and the rest comes when nothing nearer is to be done,
unless it is prefetched or moved too.

The rule: a waiter never fetches. It asks its fill for a part and waits; whoever gives up waiting harms nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable

from shoal.errors import NotCached, OriginUnavailable, Overloaded, SnapshotNotFound, Unavailable
from shoal.shards import Key
from shoal_cachenode.origin_budget import OriginBudget
from shoal_cachenode.pace import Pace
from shoal_cachenode.partial_file import PartialFile
from shoal_cachenode.scheduler import DiskFailed, Scheduler, Urgency
from shoal_cachenode.source import NobodyHasIt, Source
from shoal_cachenode.store import Store

log = logging.getLogger(__name__)

#: Bytes that come in before readers of a part on its way are woken again.
WAKE_STRIDE = 1 << 20
#: The longest that a reader waits for news of its part: shorter than its own patience, so that it is told why.
NEWS_TIMEOUT_S = 45.0
#: A part that is queued is queued anew where it turns out to be needed earlier by so much.
SOONER_S = 0.5


class NotNeeded(NotCached):
    """The streams that a shard was filled for are over."""


class Fill:
    """One shard on its way in. Lives on the event loop; only `fetch` and `seal` run in threads."""

    def __init__(
        self,
        partial: PartialFile,
        source: Source,
        budget: OriginBudget,
        scheduler: Scheduler,
        urgency: Urgency,
        first: int,
    ) -> None:
        """Begin with part `first`, for a stream with none. `budget` is that of the origin which `source` may ask."""
        self.partial = partial
        self.budget = budget
        self._loop = asyncio.get_running_loop()
        self.sealed: asyncio.Future[None] = self._loop.create_future()
        self.sealed.add_done_callback(lambda f: f.cancelled() or f.exception())  # waiting for it is optional
        self._source = source
        self._scheduler = scheduler
        self._waiters: dict[int, asyncio.Future[None]] = {}
        self._written: dict[int, int] = {}  # bytes of parts on their way, by the threads that write them
        self._in_flight: set[int] = set()
        self._is_sealing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._missing = {part for part, known in enumerate(partial.header.checksums) if known is None}
        self._urgency_of_rest = max(urgency, Urgency.REST)
        #: Whether somebody beside streams wants the shard, and it is to be filled whatever becomes of them.
        self.is_kept = urgency is not Urgency.NEED
        #: Called on the loop whenever a part is in.
        self.on_arrived: Callable[[], None] = lambda: None
        self._is_led = urgency is Urgency.NEED
        self._is_wanted_whole = urgency in (Urgency.PREFETCH, Urgency.REBALANCE)
        self._seal_is_taken = False
        self._dues: dict[int, float] = {}  # of the parts that are queued because streams need them
        self._has_begun = False
        self._queued: set[int] = set()
        self._wanted: deque[int] = deque()  # by readers, in their order
        self._rest = deque(sorted(self._missing))
        if urgency >= Urgency.NEED:
            self._begin()  # for a stream nothing yet
        elif first in self._missing:
            self._push(urgency, first)
        elif self._missing:
            self._push(urgency, self._rest.popleft())
        if not self._missing:
            scheduler.push(urgency, self, 0)  # a partial that crashed just before its seal: only that is left

    @property
    def key(self) -> Key:
        return self.partial.key

    @property
    def has_failed(self) -> bool:
        """Whether the fill is over without a seal; it is still on the list until its file is put away."""
        return self.sealed.done() and self.sealed.exception() is not None

    @property
    def bytes_present(self) -> int:
        """Bytes of the parts that are in."""
        missing = sum(end - start for start, end in map(self.partial.header.part_range, self._missing))
        return self.partial.header.size_bytes - missing

    @property
    def needs_origin(self) -> bool:
        """Whether nobody but the origin is left to ask."""
        return self._source.needs_origin

    @property
    def is_complete(self) -> bool:
        """Whether every part is in."""
        return not self._missing

    def is_awaited(self, part: int) -> bool:
        """Whether a reader waits for `part` now."""
        return part in self._waiters

    def has(self, parts: range) -> bool:
        """Whether all of these parts are in."""
        return self._missing.isdisjoint(parts)

    def join(self, urgency: Urgency) -> None:
        """Somebody else asks for the shard: streams, which lead it from now on; or anybody for good."""
        if urgency is Urgency.NEED:
            self._is_led = True  # what is queued already stays
            return
        self.is_kept |= urgency is not Urgency.REBALANCE  # which would not ask the origin either
        if self._urgency_of_rest is Urgency.NEED:
            self._urgency_of_rest = max(urgency, Urgency.REST)
        if urgency in (Urgency.PREFETCH, Urgency.REBALANCE) and not self._is_wanted_whole:
            self._is_wanted_whole = True
            self._feed()

    def need(self, start: int, end: int, due: float) -> int:
        """Streams need bytes [start, end) of the shard at `due` (`time.monotonic`); return `missing` parts of them."""
        missing = self._missing_within(start, end)
        for part in missing:
            is_sooner = part not in self._dues or due < self._dues[part] - SOONER_S
            if is_sooner and part not in self._in_flight:
                self._dues[part] = due
                self._push(Urgency.NEED, part, due)
        return len(missing)

    def missing(self, start: int, end: int) -> int:
        """Parts of bytes [start, end) of the shard that are not in, or that go beyond these."""
        return len(self._missing_within(start, end))

    def _missing_within(self, start: int, end: int) -> list[int]:
        size = self.partial.header.part_size
        return [part for part in range(start // size, min(-(-end // size), self._part_count)) if part in self._missing]

    def need_rest(self, due: float) -> int:
        """As `need`, of the whole shard."""
        return self.need(0, self.partial.header.size_bytes, due)

    def let_go(self) -> None:
        """No stream needs the shard any more: the rest comes for those who do, or no part that is not on its way."""
        self._is_led = False
        if self.is_kept:
            self._feed()
        elif not self.is_complete:
            self.failed(NotNeeded("the streams that needed this shard are over: it is fetched when it is read"))

    def want(self, parts: range) -> None:
        """Bring these parts forward: a reader will wait for them, for the first one now."""
        wanted = [part for part in parts if part in self._missing and part not in self._in_flight]
        if wanted:
            self._push(Urgency.DEMAND, wanted[0])
            self._wanted.extend(wanted[1:])
            self._feed()

    def _begin(self) -> None:
        """The first bytes are here, or nobody waits for them: parts may be fetched beside each other from now on."""
        if not self._has_begun:
            self._has_begun = True
            self._feed()

    def _feed(self) -> None:
        """Queue more parts: as many as are in already, and two.

        So a fill begins with the part that a reader waits for, whose first bytes come as soon as they can, and is soon
        as wide as the scheduler lets it be.
        """
        if not self._has_begun:
            return
        present = self._part_count - len(self._missing)
        while len(self._queued - self._dues.keys()) < 2 + present and (
            self._wanted or (self._rest and not self._is_only_led)
        ):
            queue, urgency = (self._wanted, Urgency.DEMAND) if self._wanted else (self._rest, self._urgency_of_rest)
            part = queue.popleft()
            if part in self._missing and part not in self._in_flight:
                self._push(urgency, part)

    @property
    def _is_only_led(self) -> bool:
        """Whether the rest waits for the streams' word: a prefetch or a move wants it all as soon as may be."""
        return self._is_led and not self._is_wanted_whole

    @property
    def _part_count(self) -> int:
        return len(self.partial.header.checksums)

    def _push(self, urgency: Urgency, part: int, due: float = 0.0) -> None:
        self._queued.add(part)
        self._scheduler.push(urgency, self, part, due)

    async def available(self, part: int, beyond: int) -> int:
        """Wait until more than the first `beyond` bytes of `part` are in the file; return how many are.

        Raises:
            ShoalError: the source failed for good.
            DiskFailed: the disk did.
        """
        while True:
            if self.sealed.done():
                self.sealed.result()
            start, end = self.partial.header.part_range(part)
            if self.sealed.done() or part not in self._missing:
                return end - start
            written = self._written.get(part, 0)
            if written > beyond:
                return written
            if part not in self._waiters:
                self._waiter(part)
                continue  # look again: the thread that writes may have missed that somebody waits
            try:
                async with asyncio.timeout(NEWS_TIMEOUT_S):
                    await asyncio.shield(self._waiter(part))
            except TimeoutError as error:
                raise OriginUnavailable(
                    f"no byte of a part of shard {self.key.hex()} came for {NEWS_TIMEOUT_S:.0f} s "
                    f"({self.budget.in_flight} reads of its origin are under way, {self.budget.width} may be): the "
                    "origin is slow or throttles, try later"
                ) from error

    async def settled(self, part: int) -> None:
        """Wait until all of `part` is in and its checksum known, or the drive failed.

        Raises:
            ShoalError: the source failed for good, so what came of the part may be wrong.
        """
        with contextlib.suppress(DiskFailed):  # the bytes are the source's all the same
            while part in self._missing and not self.sealed.done():
                await asyncio.shield(self._waiter(part))
            if part in self._missing:
                self.sealed.result()

    def _waiter(self, part: int) -> asyncio.Future[None]:
        waiter = self._waiters.get(part)
        if waiter is None:
            waiter = self._waiters[part] = self._loop.create_future()
            if part in self._missing and part not in self._in_flight:
                self._push(Urgency.DEMAND, part)  # it may be queued for a stream that needs it much later
        return waiter

    def size_of(self, part: int) -> int:
        """Bytes of a part."""
        start, end = self.partial.header.part_range(part)
        return end - start

    def take(self, part: int) -> bool:
        """Whether the scheduler should fetch `part` now: a part may be queued twice, and is fetched once."""
        if self.sealed.done() or part in self._in_flight or (self._missing and part not in self._missing):
            return False
        if not self._missing:  # all that is left is the seal, whichever part it comes with
            if self._seal_is_taken:
                return False
            self._seal_is_taken = True
        self._in_flight.add(part)
        self._idle.clear()
        return True

    def fetch(self, part: int) -> bool:
        """In a thread: bring `part` in. Returns whether it was the last, so that the caller is to seal."""
        header = self.partial.header
        if header.checksums[part] is None:
            try:
                writer = self.partial.writer(part)
            except OSError as error:
                raise DiskFailed(f"{self.partial.key.hex()}: {error}") from error
            told = 0

            def take(data: memoryview) -> None:
                nonlocal told
                try:
                    writer.write(data)
                except OSError as error:
                    raise DiskFailed(f"{self.partial.key.hex()}: {error}") from error
                self._written[part] = writer.written
                # The first bytes at once, then in strides: a source may hand over thousands of pieces a second.
                if part in self._waiters and (not told or writer.written - told >= WAKE_STRIDE):
                    told = writer.written
                    self._loop.call_soon_threadsafe(self._wake, part)

            start, end = header.part_range(part)
            self._source.stream(start, end, take)
            try:
                writer.finish()
            except OSError as error:
                raise DiskFailed(f"{self.partial.key.hex()}: {error}") from error
        return self.partial.claim_seal()

    def seal(self) -> None:
        """In a thread: verify, make durable, publish; nothing, where the fill failed while this waited for its turn."""
        if self.has_failed:
            return
        try:
            self.partial.seal()
        except OSError as error:
            raise DiskFailed(f"{self.partial.key.hex()}: {error}") from error

    def arrived(self, part: int) -> None:
        """On the loop: `part` is in the file. Readers go on at once; they need not wait for the drive."""
        self._missing.discard(part)
        self._written.pop(part, None)
        self._queued.discard(part)
        self._dues.pop(part, None)
        self._begin()
        self._feed()
        self._wake(part)
        self.on_arrived()

    def _wake(self, part: int) -> None:
        self._begin()
        waiter = self._waiters.pop(part, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def landed(self, part: int) -> None:
        """On the loop: no thread works on `part` any more."""
        self._in_flight.discard(part)
        self._rest_if_idle()

    def will_seal(self) -> None:
        """On the loop: a thread works on the file from now on until `seal_ended`, or waits for its turn to."""
        self._is_sealing = self._seal_is_taken = True
        self._idle.clear()

    def seal_ended(self) -> None:
        """On the loop: it does not any more."""
        self._is_sealing = False
        self._rest_if_idle()

    def _rest_if_idle(self) -> None:
        if not self._in_flight and not self._is_sealing:
            self._idle.set()

    def finished(self) -> None:
        """On the loop: the shard is sealed."""
        if not self.sealed.done():
            self.sealed.set_result(None)

    def failed(self, error: BaseException) -> None:
        """On the loop: a part failed for good, and with it the fill; parts in flight are let run out."""
        if self.sealed.done():
            return
        self.sealed.set_exception(error)
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # a waiter whose reader has left is not an error of its own
        self._waiters.clear()

    async def wait_idle(self) -> None:
        """Wait until no thread works on the file."""
        await self._idle.wait()


class Fills:
    """All fills of a node, at most one a shard: the single flight."""

    def __init__(
        self, store: Store, fetches: int, *, on_sealed: Callable[[Key], None], pace: Pace | None = None
    ) -> None:
        """`pace`: of shards that are only moved here."""
        self._store = store
        self._scheduler = Scheduler(fetches, pace)
        self._loop = asyncio.get_running_loop()
        self._fills: dict[Key, asyncio.Task[Fill]] = {}
        self._running: dict[Key, Fill] = {}
        self._on_sealed = on_sealed
        self._watchers: dict[Key, asyncio.Task[None]] = {}

    def running(self, key: Key) -> Fill | None:
        """The fill of `key` that one may still join."""
        fill = self._running.get(key)
        return None if fill is None or fill.has_failed else fill

    def all(self) -> list[tuple[Key, Fill]]:
        """Every fill that runs."""
        return list(self._running.items())

    @property
    def count(self) -> int:
        return len(self._fills)

    @property
    def fetches_in_flight(self) -> int:
        return self._scheduler.in_flight

    @property
    def fetches_waiting(self) -> int:
        return self._scheduler.waiting

    def on_room(self) -> None:
        """An origin's budget has room again. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._scheduler.dispatch)
        except RuntimeError:
            pass  # the loop has ended, and with it the fills

    async def join(
        self, key: Key, size_bytes: int, source: Source, budget: OriginBudget, urgency: Urgency, first: int
    ) -> Fill:
        """The fill of `key`: the one that runs, or a new one that begins with part `first`.

        Raises:
            StoreFull: there is no room.
            DiskFailed: the data directory failed.
        """
        while (failed := self._running.get(key)) is not None and failed.has_failed:
            await asyncio.shield(self._watchers[key])  # a failure is the answer to those who waited, not to newcomers
        task = self._fills.get(key)
        if task is None:
            make = functools.partial(
                Fill, source=source, budget=budget, scheduler=self._scheduler, urgency=urgency, first=first
            )
            task = self._fills[key] = asyncio.create_task(self._begin(key, size_bytes, make))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())  # all who asked may have left
        try:
            fill = await asyncio.shield(task)
        except asyncio.CancelledError:
            if urgency is Urgency.NEED:  # or nobody would lead it
                task.add_done_callback(_let_go)
            raise
        fill.join(urgency)
        return fill

    async def _begin(self, key: Key, size_bytes: int, make: Callable[[PartialFile], Fill]) -> Fill:
        try:
            if self._store.begin_blocks(key):
                partial = await asyncio.to_thread(self._store.begin, key, size_bytes)
            else:
                partial = self._store.begin(key, size_bytes, waits=False)
        except BaseException as error:
            del self._fills[key]
            if isinstance(error, OSError):
                raise DiskFailed(str(error)) from error
            raise
        fill = self._running[key] = make(partial)
        self._watchers[key] = asyncio.create_task(self._watch(fill))
        return fill

    async def _watch(self, fill: Fill) -> None:
        """Take the fill off the list when it is over, in the state that its end calls for."""
        try:
            await asyncio.shield(fill.sealed)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whoever waits for the fill has the error; here only the file matters
            level = logging.DEBUG if isinstance(error, NotNeeded | SnapshotNotFound) else logging.WARNING
            log.log(level, "fill of %s stopped: %s", fill.key.hex(), error)
            await fill.wait_idle()
            if self._store.is_sealed(fill.key):
                self._on_sealed(fill.key)  # the drive came round while the seal was waiting for it
                return
            passing = (OriginUnavailable, Unavailable, Overloaded, NobodyHasIt, NotNeeded)
            end = self._store.suspend if isinstance(error, passing) else PartialFile.drop
            try:
                await asyncio.to_thread(end, fill.partial)
            except OSError as failure:  # newcomers wait for this task: a sick drive is none of their errors
                log.error("what is left of %s stays on the drive: %s", fill.key.hex(), failure)
        else:
            self._on_sealed(fill.key)
        finally:
            for by_key in (self._fills, self._running, self._watchers):
                by_key.pop(fill.key, None)

    def end(self, keys: Iterable[Key]) -> None:
        """End the fills of shards that no dataset has any more; what came of them goes from the drive."""
        for key in keys:
            fill = self._running.get(key)
            if fill is not None:
                fill.failed(SnapshotNotFound("the dataset or the snapshot was removed while the shard was fetched"))

    async def settle(self) -> None:
        """Wait until every fill that runs now is over."""
        await asyncio.gather(*map(asyncio.shield, self._watchers.values()), return_exceptions=True)

    async def close(self) -> None:
        for task in (*self._watchers.values(), *self._fills.values()):
            task.cancel()
        await self._scheduler.close()


def _let_go(task: asyncio.Task[Fill]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().let_go()
