"""The scrubber: reads every sealed shard in turn, slowly, and has what is damaged fetched again.

It goes by key, notes how far it came (`scrub.json`, at most once a minute), and goes on from there after a restart, so
that no shard is skipped however often a node restarts; after the last key it begins anew. A shard that was sealed
behind its position is read in the next round.

It reads with one thread of the lowest priority, at most `rate` bytes a second, leaves nothing in the page cache, and
steps aside while the node fetches parts that somebody waits for.

The rule: it finds and drops; fetching again is the node's, behind everything that somebody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.shards import KEY_SIZE, Key
from shoal_cachenode.data_directory import write_atomically
from shoal_cachenode.disk import DiskStalls
from shoal_cachenode.sealed_file import Damage, SealedFile, check_part

if TYPE_CHECKING:
    from shoal_cachenode.node import CacheNode

log = logging.getLogger(__name__)

SAVE_INTERVAL_S = 60.0
#: A node without shards is looked at again after this.
IDLE_S = 1.0
#: How long one part waits at most for the node to have no fetches in flight.
PATIENCE_S = 1.0
#: ioprio_set(2) by its number, because libc has no function for it: of a thread, the idle class.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_IDLE = 1, 3 << 13


class Scrubber:
    """Runs from its making to `close`."""

    def __init__(self, node: CacheNode) -> None:
        self._node = node
        self._path: Path = node.config.data_dir / "scrub.json"
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="scrub", initializer=_lowest_priority)
        self._position = bytes(KEY_SIZE)
        self._saved_at = time.monotonic()
        self._refetches: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run()) if node.config.scrub_rate > 0 else None

    async def _run(self) -> None:
        self._position = await asyncio.to_thread(self._load)
        while True:
            for key in await asyncio.to_thread(self._round):
                try:
                    await self.scrub(key)
                    self._position = key
                    await self._save()
                except (OSError, DiskStalls) as error:
                    log.warning("the scrubber waits: %s", error)
                    await asyncio.sleep(IDLE_S)
            self._position = bytes(KEY_SIZE)
            await asyncio.sleep(IDLE_S)

    def _round(self) -> list[Key]:
        """The sealed shards behind the position."""
        return sorted(key for key in self._node.store.sealed_sizes() if key > self._position)

    async def scrub(self, key: Key) -> None:
        """Read one shard and drop it where it is damaged. Raises OSError where it cannot be opened now."""
        node = self._node
        file = await node.disk.run(node.store.open_sealed, key, discard=release)
        if file is None:
            return  # evicted, or found damaged when it was opened
        try:
            for part in range(len(file.header.checksums)):
                await self._wait_for_quiet()
                start, end = file.header.part_range(part)
                began = time.monotonic()
                damage = await asyncio.get_running_loop().run_in_executor(self._threads, _read, file, part)
                node.counters.scrubbed_bytes.add(end - start)
                if damage is not None:
                    await node.lose(key, damage)
                    task = asyncio.create_task(node.refetch(key))
                    self._refetches.add(task)
                    task.add_done_callback(self._refetches.discard)
                    return
                await asyncio.sleep((end - start) / node.config.scrub_rate - (time.monotonic() - began))
        finally:
            file.release()

    async def _wait_for_quiet(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while (self._node.fills.fetches_in_flight or self._node.disk.is_stalling) and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def _load(self) -> Key:
        try:
            return bytes.fromhex(json.loads(self._path.read_text())["position"])
        except (OSError, ValueError, KeyError, TypeError):
            return bytes(KEY_SIZE)  # the worst of it: some shards are read once more

    async def _save(self, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._saved_at >= SAVE_INTERVAL_S:
            self._saved_at = time.monotonic()
            document = json.dumps({"position": self._position.hex()}).encode()
            await asyncio.to_thread(write_atomically, self._path, document)

    async def close(self) -> None:
        tasks = [*self._refetches, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._task is not None:
            with contextlib.suppress(OSError):
                await self._save(at_once=True)


def release(file: SealedFile | None) -> None:
    if file is not None:
        file.release()


def _read(file: SealedFile, part: int) -> Damage | None:
    """In the scrubber's thread, which may outlive whoever asked."""
    if not file.retain():
        return None
    try:
        return check_part(file.fd, file.header, part, keeps_cache=True)
    finally:
        file.release()


def _lowest_priority() -> None:
    """Only spare time of the processor and of the drive for this thread. Refused, it reads as others do."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, 19)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, _IOPRIO_WHO_PROCESS, thread, _IOPRIO_IDLE)
