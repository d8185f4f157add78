"""The shell around the core: it brings the clock, carries actions out, and shows the state to everybody else.

    apply(event):  core.handle → record (a thread of its own, in the order of the events) → publish → return

The rule: what is published is durable, so an answer, an order or a map that somebody saw survives `kill -9`. Whoever
reads takes `state`, a value, and needs no lock.

A record that cannot be written ends the controller. The core is then ahead of the record, and nobody was told; the next
start goes on from what was recorded, and reads never needed the controller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from shoal.errors import AlreadyExists, StoreUnusable
from shoal_controller.core import Core
from shoal_controller.events import Action, Event, LogWarning, PublishJobs, PublishOrders, RefuseNode, TimePassed, Write
from shoal_controller.latest import Latest
from shoal_controller.model import Moment, Policy, State
from shoal_controller.record import Record

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Jobs are looked at, and leases end, at most so long after they could.
TICK_S = 0.2


def system_clock() -> Moment:
    return Moment(time.monotonic(), time.time())


class Shell:
    """The running controller without its network. For one event loop.

    Attributes:
        state: the newest that is durable.
        cluster_id: made once with the data directory.
        orders: published when nodes are to be told something.
        jobs: published when a prefetch job changed.
    """

    def __init__(
        self,
        record: Record,
        cluster_id: str,
        thread: ThreadPoolExecutor,
        core: Core,
        policy: Policy,
        clock: Callable[[], Moment],
    ) -> None:
        """Use `start`."""
        self.record = record
        self.cluster_id = cluster_id
        self.policy = policy
        self.state = core.state
        self.orders: Latest[State] = Latest(core.state)
        self.jobs: Latest[State] = Latest(core.state)
        self._core = core
        self._clock = clock
        self._thread = thread
        self._uncommitted = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self._ticking = asyncio.create_task(self._tick_forever())

    @classmethod
    async def start(
        cls, open_record: Callable[[], Record], policy: Policy, clock: Callable[[], Moment] = system_clock
    ) -> Shell:
        """Open the record and go on from there.

        Args:
            open_record: called in the record's own thread.

        Raises:
            StoreUnusable: as `open_record` and `Record.load`.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="record")
        loop = asyncio.get_running_loop()
        record = await loop.run_in_executor(thread, open_record)
        try:
            contents = await loop.run_in_executor(thread, record.load)
        except BaseException:
            record.close()
            raise
        core = Core(
            policy=policy,
            now=clock(),
            cluster_map=contents.map,
            draining=contents.draining,
            datasets=contents.datasets,
            jobs=contents.jobs,
        )
        return cls(record, contents.cluster_id, thread, core, policy, clock)

    async def close(self) -> None:
        """Stop, after what was begun is recorded."""
        self._ticking.cancel()
        await asyncio.gather(self._ticking, *self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(self._thread, self.record.close)
        self._thread.shutdown()
        self._failure.cancel()

    async def failed(self) -> NoReturn:
        """Wait until the controller cannot go on, and raise why."""
        await asyncio.shield(self._failure)
        raise AssertionError("this future is only ever failed")

    def now(self) -> Moment:
        return self._clock()

    async def apply(self, event: Event, staged: Path | None = None) -> State:
        """Take one event in; return the published state that has it.

        Cancelling the caller does not undo the event.

        Args:
            staged: the file of the snapshot that the event brings. It stays until this returns.

        Raises:
            ShoalError: what was asked for is refused, or cannot be recorded.
        """
        actions = self._core.handle(event, self._clock())
        writes = [action for action in actions if isinstance(action, Write)]
        if writes or self._uncommitted:
            # Without writes of its own it still waits its turn: this state includes the changes before it.
            self._uncommitted += 1
            written = asyncio.get_running_loop().run_in_executor(self._thread, self.record.write, writes, staged)
            await asyncio.shield(self.own(self._commit(written, self._core.state, actions)))
        else:
            self._publish(self._core.state, actions)
        for action in actions:
            if isinstance(action, RefuseNode):
                raise AlreadyExists(action.sentence)
        return self.state

    def own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` to its end whatever becomes of who asked for it; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def with_record(self, call: Callable[[], T]) -> T:
        """Do something else with the record, in its thread and in turn.

        Raises:
            StoreUnusable: as `call`. Then the controller cannot go on.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except StoreUnusable as error:
            self._fail(error)
            raise

    async def _commit(self, written: asyncio.Future[None], state: State, actions: tuple[Action, ...]) -> None:
        try:
            await written
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self._uncommitted -= 1
        self._publish(state, actions)

    def _publish(self, state: State, actions: tuple[Action, ...]) -> None:
        self.state = state
        for action in actions:
            if isinstance(action, LogWarning):
                log.warning("%s", action.sentence)
        if any(isinstance(action, PublishOrders) for action in actions):
            self.orders.publish(state)
        if any(isinstance(action, PublishJobs) for action in actions):
            self.jobs.publish(state)

    async def _tick_forever(self) -> None:
        interval_s = min(TICK_S, self.policy.lease_s / 8)
        try:
            while True:
                await asyncio.sleep(interval_s)
                await self.apply(TimePassed())
        except Exception as error:
            self._fail(error)
            raise

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, StoreUnusable):
            log.error("the controller cannot go on", exc_info=error)
        if not self._failure.done():
            self._failure.set_exception(error)
