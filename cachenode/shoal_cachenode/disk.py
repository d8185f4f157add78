"""Whether the drive under the data directory is to be relied on, and work that waits for it.

    ok         reads and fills use it
    failing    a write failed (no space, read-only, an error): fills pass through, sealed shards are served
    stalling   an operation has not come back: nothing waits for the drive, what is not in the page cache passes through

A drive that failed is tried again every few seconds with a small file, written, synced and read back; one that stalls
is taken up when all that hung has come back and the trial succeeds. Damage to one shard is the shard's (see the
store), not the drive's.

The rule: the event loop never waits for the drive without also waiting for word that it stalls. Threads that hang in
the kernel cannot be helped; they are this module's own, a fixed number, and the rest of the node does not need them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from shoal import sizes
from shoal_cachenode.operations import Operations

log = logging.getLogger(__name__)

Args = TypeVarTuple("Args")
T = TypeVar("T")

#: Operations on the drive at a time that readers wait for.
THREADS = 32
WATCH_INTERVAL_S = 0.5
TRIAL_BYTES = 64 << 10
#: Failures that are this process's own, or pass by themselves.
_NOT_THE_DRIVES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN))
#: After the drive was full it is used again with so much room, or a sixteenth of it where it is small.
ROOM_TO_RESUME = 64 << 20


class DiskStalls(Exception):
    """The drive does not answer; the bytes must come from elsewhere."""


class Disk:
    """The drive of one data directory. Lives on the event loop; `failed` may come from any thread.

    Args:
        operations: what the store has under way.
        capacity_bytes: what the node may use, for the sentence of a full drive.
        stall_s: an operation that takes longer hangs.
        retry_s: from one trial of a failed drive to the next.
        on_stall: called on the loop when the drive begins to stall.
        on_recovery: called in a thread when it is good again, before it is used.
    """

    def __init__(
        self,
        directory: Path,
        operations: Operations,
        *,
        capacity_bytes: int,
        stall_s: float,
        retry_s: float,
        on_stall: Callable[[], None],
        on_recovery: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._operations = operations
        self._reads = Operations()
        operations.followers.append(self._reads)
        self._capacity_bytes = capacity_bytes
        self._stall_s = stall_s
        self._retry_s = retry_s
        self._on_stall = on_stall
        self._on_recovery = on_recovery
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="drive")
        self._stalls: asyncio.Future[None] = self._loop.create_future()  # done while the drive stalls
        self._trial: asyncio.Future[None] | None = None
        self._was_full = False
        self.fault = ""  #: why fills pass through, with the remedy; "" while they do not
        self.failures = 0  #: times that it began to fail or to stall
        self.free_bytes: int | None = None  #: of its file system, as `look` last found it
        self._watch = asyncio.create_task(self._watch_for_ever())

    @property
    def is_stalling(self) -> bool:
        return self._stalls.done()

    @property
    def oldest_read_s(self) -> float:
        """Seconds that a reader has been waiting for the drive; 0.0 where none is."""
        return self._reads.oldest_s()

    async def run(
        self, function: Callable[[*Args], T], *args: *Args, discard: Callable[[T], None] = lambda _: None
    ) -> T:
        """The result of a function that reads the drive, in a thread of this module's.

        Args:
            discard: gets the result where nobody waits for it any more.

        Raises:
            DiskStalls: the drive does. The function goes on all the same.
        """
        if self.is_stalling:
            raise DiskStalls(self.fault)

        def timed() -> T:
            with self._operations.timed, self._reads.timed:
                return function(*args)

        def let_go(job: asyncio.Future[T]) -> None:
            if not job.cancelled() and job.exception() is None:
                discard(job.result())

        job = self._loop.run_in_executor(self._threads, timed)
        either: list[asyncio.Future[Any]] = [job, self._stalls]
        is_taken = False
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            is_taken = job.done()
        finally:
            if not is_taken:
                job.add_done_callback(let_go)
        if not is_taken:
            raise DiskStalls(self.fault)
        return job.result()

    async def unless_it_stalls(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work of which a part waits for the drive in a thread elsewhere.

        Raises:
            DiskStalls: the drive does; the work is cancelled.
        """
        task = asyncio.ensure_future(work)
        either: list[asyncio.Future[Any]] = [task, self._stalls]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
        if not task.done():
            raise DiskStalls(self.fault)
        return task.result()

    def look(self) -> None:
        """In a thread: see how much room the file system has. Raises OSError."""
        found = os.statvfs(self._directory)
        self.free_bytes = found.f_bavail * found.f_frsize

    def failed(self, error: OSError) -> None:
        """A write failed: nothing is written from now on until a trial succeeds."""
        if self.fault or error.errno in _NOT_THE_DRIVES:
            return
        self._was_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        self.fault = self._sentence(error)
        self.failures += 1
        log.error("reads pass through: %s", self.fault)

    def _sentence(self, error: OSError) -> str:
        where = f"the file system of {self._directory}"
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                offered = sizes.format(self._capacity_bytes)
                return (
                    f"{where} is full although this node may use {offered} of it: free space there, or start the node "
                    "with a smaller --capacity"
                )
            case errno.EROFS:
                return f"{where} is read-only: see 'dmesg' for why, mend it and mount it writable again"
            case _:
                return f"{where} fails ({error.strerror}): see 'dmesg'; replace the drive if it goes on"

    async def _watch_for_ever(self) -> None:
        next_trial = 0.0
        while True:
            await asyncio.sleep(min(WATCH_INTERVAL_S, self._stall_s / 4))
            oldest_s = self._operations.oldest_s()
            if oldest_s >= self._stall_s:
                self._begin_stall(oldest_s)
                continue
            if self._trial is not None and not self._trial.done():
                continue
            if self._trial is not None:
                self._finish(self._trial)
                self._trial = None
            elif self.fault and self._loop.time() >= next_trial:
                next_trial = self._loop.time() + self._retry_s
                # Not awaited here: this watches over the trial too.
                self._trial = self._loop.run_in_executor(self._threads, self._try)
                self._trial.add_done_callback(lambda trial: trial.cancelled() or trial.exception())

    def _begin_stall(self, oldest_s: float) -> None:
        if self._stalls.done():
            return
        self.fault = (
            f"the drive of {self._directory} does not answer (an operation takes {oldest_s:.0f} s): see 'dmesg' and "
            "the drive's health"
        )
        self.failures += 1
        log.error("reads pass through: %s", self.fault)
        self._stalls.set_result(None)
        self._on_stall()

    def _finish(self, trial: asyncio.Future[None]) -> None:
        error = trial.exception()
        if error is not None:
            log.info("the drive of %s is not good yet: %s", self._directory, error)
            if isinstance(error, OSError) and not self.is_stalling:
                self._was_full = self._was_full or error.errno in (errno.ENOSPC, errno.EDQUOT)
                self.fault = self._sentence(error)
            return
        log.warning("the drive of %s is good again", self._directory)
        self.fault, self._was_full = "", False
        if self._stalls.done():
            self._stalls = self._loop.create_future()

    def _try(self) -> None:
        """In a thread: write, sync, read back. Raises OSError as the drive does."""
        path = self._directory / "trial"
        data = os.urandom(TRIAL_BYTES)
        with self._operations.timed:
            found = os.statvfs(self._directory)
            room = min(ROOM_TO_RESUME, found.f_blocks * found.f_frsize // 16)
            if self._was_full and found.f_bavail * found.f_frsize < room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                with path.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if path.read_bytes() != data:
                    raise OSError(errno.EIO, "it does not read back what was written")
            finally:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        self._on_recovery()

    async def close(self) -> None:
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
