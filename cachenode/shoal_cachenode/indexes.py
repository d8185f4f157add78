"""Indexes of samples: built once in the cluster for whoever streams, and kept (`shoal.streaming.index`).

    asked for        the file is here: it is sent
    not here         it is built, once however many ask; who asks meanwhile is told to come again
    cannot be built  whoever asks within a while is told why, and nothing is read again for it
    a sick drive     it is kept in memory, and what lies on the drive is built anew

The node reads the heads and feet of objects as any client does, from itself and its peers, so they are fetched from the
origin once. Files lie in ``indexes/``, named after their snapshot and a hash of their selection; their times of
modification say when they were last sent, and those that were sent longest ago go first.

The rule: an index is checked against its own digest before this process sends it for the first time; a damaged one is
built anew. What builds hold, and what is kept, is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from shoal.cluster import Cluster
from shoal.errors import InvalidRequest, Overloaded, ShardCorrupt, ShoalError
from shoal.snapshot import Snapshot
from shoal.streaming import indexing
from shoal.streaming.formats.format import Format
from shoal.streaming.index import Index
from shoal.streaming.selection import Selection
from shoal.streaming.skim import Room
from shoal.threads import Threads
from shoal.wire.http_messages import FileSlice
from shoal_cachenode.data_directory import write_atomically
from shoal_cachenode.disk import Disk, DiskStalls

log = logging.getLogger(__name__)

#: Indexes that are built at a time. Each reads many objects at a time.
BUILDS = 2
#: Those that are built or wait for their turn.
MAX_WAITING = 64
#: A request waits so long for a build before it is told to come again.
WAIT_S = 2.0
#: Why an index could not be built is remembered for so long, of so many at most.
FAILURE_S = 10.0
FAILURES_KEPT = 256
#: Files that are kept, and their bytes. The newest is kept whatever its size.
MAX_FILES = 256
LIMIT_BYTES = 1 << 30
#: The same of indexes that the drive did not take. The newest is kept whatever its size.
MEMORY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Served:
    """An index to send. `digest` is its own; a file in `body` is the server's to release."""

    digest: str
    body: bytes | FileSlice


class Indexes:
    """The indexes of a node. Lives on the event loop.

    Args:
        disk: under `directory`.
        address: of the node itself, once it has one.
        replicas: of the dataset that a snapshot belongs to; raises SnapshotNotFound.

    Attributes:
        builds: that were begun.
        kept_bytes: of the files.
    """

    def __init__(
        self,
        directory: Path,
        disk: Disk,
        address: Callable[[], str],
        snapshot: Callable[[str], Awaitable[Snapshot]],
        replicas: Callable[[str], int],
        is_served: Callable[[str], bool],
    ) -> None:
        self.builds = 0
        self._directory = directory / "indexes"
        self._directory.mkdir(exist_ok=True)
        for left_over in self._directory.glob("*.new"):
            with contextlib.suppress(OSError):
                left_over.unlink()
        self.kept_bytes = sum(size_bytes for _, size_bytes, _ in self._files())
        self._disk = disk
        self._address, self._snapshot, self._replicas, self._is_served = address, snapshot, replicas, is_served
        self._threads = Threads(BUILDS, "index")  # a build waits for an origin, and no exit waits for a build
        self._room = Room(indexing.HELD_BYTES)
        self._building: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, tuple[ShoalError, float]] = {}
        self._checked: dict[str, str] = {}  # digests of files that are whole, by the selection's key
        self._in_memory: dict[str, tuple[str, bytes]] = {}  # digest and bytes
        self._lock = threading.Lock()  # guards the making of _cluster
        self._cluster: Cluster | None = None

    async def get(self, digest: str, pattern: str, kind: str) -> Served | None:
        """The index of a selection; None: it is being built.

        Raises:
            InvalidRequest: the pattern or the format is none, or an object is not of that format.
            NotFound: nothing matches, or no dataset has the snapshot.
            Overloaded: too many are being built.
            ShoalError: it could not be built, as reads fail.
        """
        selection = parse(digest, pattern, kind)
        key, replicas = selection.key, self._replicas(digest)
        self._raise_failure(key)
        served = await self._served(selection)
        if served is not None:
            return served
        task = self._building.get(key)
        if task is None:
            if len(self._building) >= MAX_WAITING:
                raise Overloaded(f"this node has {MAX_WAITING} indexes of samples to build: ask another one")
            task = self._building[key] = asyncio.create_task(self._provide(selection, replicas))
            task.add_done_callback(lambda _: self._building.pop(key))
        done, _ = await asyncio.wait([task], timeout=WAIT_S)
        if not done:
            return None
        self._raise_failure(key)
        return await self._served(selection)

    def _path(self, selection: Selection) -> Path:
        return self._directory / f"{selection.digest}-{selection.key}.arrow"

    def _raise_failure(self, key: str) -> None:
        error, at = self._failures.get(key, (None, 0.0))
        if error is None:
            return
        if time.monotonic() - at < FAILURE_S:
            raise copy.copy(error)  # each raise adds to an error's traceback
        del self._failures[key]

    async def _served(self, selection: Selection) -> Served | None:
        """What is in memory, or in a file that was checked."""
        key = selection.key
        if key in self._in_memory:
            return Served(*self._in_memory[key])
        digest = self._checked.get(key)
        if digest is None:
            return None
        try:
            body = await self._disk.run(_use, self._path(selection), discard=FileSlice.done)
        except (OSError, DiskStalls) as error:
            log.warning("an index of samples is built anew: %s", error)
            self._checked.pop(key, None)
            return None
        return Served(digest, body)

    async def _provide(self, selection: Selection, replicas: int) -> None:
        """Have the index in a checked file or in memory, or a failure."""
        key, path = selection.key, self._path(selection)
        try:
            kept = await self._kept(path, selection)
            if kept is not None:
                self._checked[key] = kept
                return
            snapshot = await self._snapshot(selection.digest)
            building = self._threads.submit(self._build, snapshot, selection, replicas)
            digest, data = await asyncio.wrap_future(building)
            try:
                left = await self._disk.run(self._keep, path, data)
                self._checked = {each: known for each, known in self._checked.items() if each in left} | {key: digest}
                return
            except DiskStalls:
                pass
            except OSError as error:
                log.warning("an index of samples stays in memory, the drive does not take it: %s", error)
                self._disk.failed(error)
            self._in_memory[key] = digest, data
            while len(self._in_memory) > 1 and sum(len(each) for _, each in self._in_memory.values()) > MEMORY_BYTES:
                del self._in_memory[next(iter(self._in_memory))]
        except ShoalError as error:
            self._failed(key, error)
        except Exception as error:
            log.exception("the index of %r in snapshot %s failed", selection.pattern, selection.digest)
            self._failed(key, ShoalError(f"internal error while indexing: {error!r}"))

    def _failed(self, key: str, error: ShoalError) -> None:
        self._failures.pop(key, None)
        self._failures[key] = copy.copy(error), time.monotonic()  # without what its frames hold
        while len(self._failures) > FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]

    async def _kept(self, path: Path, selection: Selection) -> str | None:
        """The digest of the index that the file is; None where it is not whole, or the drive does not say."""
        try:
            return await self._disk.run(self._look, path, selection)
        except (OSError, DiskStalls) as error:
            log.warning("an index of samples is built anew, the drive does not give it: %s", error)
            return None

    def _look(self, path: Path, selection: Selection) -> str | None:
        """As `_kept`. In a thread."""
        digest = _check(path, selection)
        if digest is None:
            self.kept_bytes = sum(size_bytes for _, size_bytes, _ in self._files())
        return digest

    def _build(self, snapshot: Snapshot, selection: Selection, replicas: int) -> tuple[str, bytes]:
        """Its digest and bytes. In a thread."""
        selection.rows(snapshot)  # what matches nothing is no build
        with self._lock:
            self.builds += 1
            if self._cluster is None:
                self._cluster = Cluster(self._address(), use_local=False)
        index = indexing.build(self._cluster, snapshot, selection, replicas, room=self._room)
        return index.digest, index.to_buffer(selection).to_pybytes()

    def _keep(self, path: Path, data: bytes) -> set[str]:
        """Write it, and remove those of snapshots that are gone and those that are too many. In a thread.

        Returns:
            The keys of the selections whose files are left.
        """
        write_atomically(path, data)
        left: dict[Path, int] = {}  # from the one that was used longest ago
        for _, size_bytes, file in sorted(self._files(), key=lambda each: (each[2] == path, each)):
            if file == path or self._is_served(file.name.partition("-")[0]):
                left[file] = size_bytes
            else:
                file.unlink(missing_ok=True)
        self.kept_bytes = sum(left.values())
        while len(left) > 1 and (len(left) > MAX_FILES or self.kept_bytes > LIMIT_BYTES):
            oldest = next(iter(left))
            oldest.unlink(missing_ok=True)
            self.kept_bytes -= left.pop(oldest)
        return {file.stem.partition("-")[2] for file in left}

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each was last used (its time of modification), its bytes, and where it lies."""
        found = []
        for file in self._directory.glob("*.arrow"):
            with contextlib.suppress(FileNotFoundError):
                state = file.stat()
                found.append((state.st_mtime_ns, state.st_size, file))
        return found

    async def close(self) -> None:
        tasks = list(self._building.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._cluster is not None:
            self._cluster.transport.close()  # a build ends at its next read
        self._threads.close()


def parse(digest: str, pattern: str, kind: str) -> Selection:
    """What a request names. Raises InvalidRequest."""
    if not indexing.is_askable(pattern):
        raise InvalidRequest(
            f"an index is of a pattern of 1 to {indexing.MAX_PATTERN} bytes, as it stands in a URL, without control "
            "characters: give ?pattern=GLOB"
        )
    try:
        found = Format(kind)
    except ValueError:
        kinds = ", ".join(each for each in Format if each is not Format.OBJECTS)
        raise InvalidRequest(
            f"{kind[:80]!r} is no format that has an index: give &format= with one of {kinds}"
        ) from None
    if found is Format.OBJECTS:
        raise InvalidRequest("objects that are a sample each need no index: the snapshot lists them")
    return Selection(digest, pattern, found)


def _use(path: Path) -> FileSlice:
    """The file, whose last use is now. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a drive that takes no writes gives what it has
        os.utime(fd)
    return FileSlice(fd, 0, os.fstat(fd).st_size, lambda: os.close(fd))


def _check(path: Path, selection: Selection) -> str | None:
    """The digest of the index that the file is. A damaged one is removed. Raises OSError."""
    try:
        return Index.from_buffer(pa.py_buffer(path.read_bytes()), selection).digest
    except FileNotFoundError:
        return None
    except ShardCorrupt as error:
        log.warning("%s is built anew: %s", path.name, error)
        path.unlink(missing_ok=True)
        return None
