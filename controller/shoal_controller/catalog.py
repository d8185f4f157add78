"""Datasets come and go here: list an origin into a snapshot written aside, then tell the core.

An origin may take minutes to list, so nothing else waits for it: the listing runs in a thread that a closing controller
leaves behind, and the name is claimed meanwhile, so one dataset is listed once at a time.

The rule: nothing is recorded before the listing is whole, and whoever gives up (Ctrl-C on ``shoal dataset add``) stops
it and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from shoal import datasets, origin, shards, sizes
from shoal.datasets import DatasetRecord
from shoal.errors import AlreadyExists, DatasetNotFound, InvalidRequest
from shoal_controller import core
from shoal_controller.events import DatasetAdded, DatasetRefreshed, DatasetRemoved, PolicyChanged
from shoal_controller.model import MAX_NUMBER, MAX_REPLICAS, Dataset, PolicyChange, SnapshotInfo
from shoal_controller.shell import Shell

T = TypeVar("T")

#: Origins that are listed at one time; each may hold some hundred bytes an object while it is.
MAX_LISTINGS = 4
#: What a closing controller gives listings to notice that they are to stop.
CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Definition:
    """A dataset as somebody asks for it. `shard_size` in bytes; `storage_options` is JSON."""

    name: str
    origin: str
    shard_size: int = shards.DEFAULT_SHARD_SIZE
    replicas: int = 1
    storage_options: str = "{}"
    is_adhoc: bool = False
    is_pinned: bool = False
    quota_bytes: int = 0
    is_direct: bool = False

    def check(self) -> None:
        """Raises InvalidRequest where no dataset can be so."""
        datasets.check_name(self.name)
        if not self.origin:
            raise InvalidRequest("a dataset needs an origin: an fsspec URL such as s3://bucket/prefix")
        if not shards.MIN_SHARD_SIZE <= self.shard_size <= shards.MAX_SHARD_SIZE or self.shard_size % 4096:
            raise InvalidRequest(
                f"a shard size of {self.shard_size} bytes cannot be: use a multiple of 4 KiB between "
                f"{sizes.format(shards.MIN_SHARD_SIZE)} and {sizes.format(shards.MAX_SHARD_SIZE)}"
            )
        check_policy(PolicyChange(replicas=self.replicas, quota_bytes=self.quota_bytes))


def check_policy(change: PolicyChange) -> None:
    """Raises InvalidRequest where no dataset can be kept so."""
    if change.replicas is not None and not 1 <= change.replicas <= MAX_REPLICAS:
        raise InvalidRequest(f"{change.replicas} replicas cannot be: use 1 to {MAX_REPLICAS}")
    if change.quota_bytes is not None and not 0 <= change.quota_bytes <= MAX_NUMBER:
        raise InvalidRequest(f"a quota of {change.quota_bytes} bytes cannot be: use 0 (none) to {MAX_NUMBER}")


@dataclass(frozen=True, slots=True)
class Listing:
    """An origin as it was found, and the file of its snapshot in the directory that was given."""

    origin: str
    endpoint: str
    snapshot: SnapshotInfo
    path: Path


#: Lists (origin URL, storage options as JSON, shard size in bytes) into a snapshot in a directory. Runs in a thread and
#: raises whatever `ShoalError` the origin deserves; gives up at the next page when the event is set.
ListOrigin = Callable[[str, str, int, Path, threading.Event], Listing]


@dataclass(frozen=True, slots=True)
class AdhocPolicy:
    """Under which origin URLs a read may make a dataset, and with which storage options (JSON).

    Each prefix becomes one dataset, whatever below it is read first: a dataset a directory would list the same origin
    again and again, and what may be read is then what the operator wrote, no more and no less.
    """

    prefixes: tuple[str, ...] = ()
    storage_options: str = "{}"

    @classmethod
    def parse(cls, prefixes: Iterable[str], storage_options: str) -> AdhocPolicy:
        """Check what an operator wrote. Raises InvalidRequest."""
        origin.parse_options(storage_options)
        return cls(tuple(str(origin.parse_url(prefix)) for prefix in prefixes), storage_options)

    def prefix_over(self, url: str) -> str | None:
        """The longest allowed prefix that `url` lies under."""
        allowed = (prefix for prefix in self.prefixes if url == prefix or url.startswith(prefix.rstrip("/") + "/"))
        return max(allowed, key=len, default=None)


def adhoc_name(prefix: str) -> str:
    """The name of the ad-hoc dataset over `prefix`; the same in every run of every controller."""
    slug = re.sub(r"[^a-z0-9]+", "-", prefix.lower().partition("://")[2] or prefix.lower()).strip("-")[:40].strip("-")
    return datasets.check_name(f"adhoc-{slug or 'root'}-{hashlib.sha256(prefix.encode()).hexdigest()[:4]}")


class Catalog:
    """Adds, refreshes and removes datasets."""

    def __init__(self, shell: Shell, list_origin: ListOrigin, adhoc: AdhocPolicy) -> None:
        self._shell = shell
        self._list_origin = list_origin
        self._adhoc = adhoc
        self._running: dict[str, asyncio.Task[Dataset]] = {}
        self._stops: set[threading.Event] = set()
        self._slots = asyncio.Semaphore(MAX_LISTINGS)

    async def close(self) -> None:
        """Give up what is being listed."""
        for stop in self._stops:
            stop.set()
        running = list(self._running.values())
        if running:
            await asyncio.wait(running, timeout=CLOSE_S)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def add(self, wanted: Definition) -> Dataset:
        """Register a dataset. Cancelling the caller stops the listing.

        Raises:
            InvalidRequest: there can be no such dataset.
            AlreadyExists: the name is taken, or somebody else is adding it.
            OriginError: the origin cannot be listed.
            StoreUnusable: the snapshot cannot be written.
        """
        wanted.check()
        core.check_is_new(self._shell.state.datasets, wanted.name)
        if wanted.name in self._running:
            raise AlreadyExists(
                f"dataset {wanted.name} is being listed for somebody else: 'shoal dataset list' shows it when done"
            )
        stop = threading.Event()
        task = self._claim(wanted.name, self._add(wanted, stop))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def refresh(self, name: str) -> Dataset:
        """List a dataset's origin again. Whoever asks while that goes on gets its result.

        Raises:
            DatasetNotFound: there is no such dataset.
            OriginError: the origin cannot be listed; the dataset keeps its snapshots.
        """
        dataset = core.find(self._shell.state.datasets, name)
        task = self._running.get(name) or self._claim(name, self._refresh(dataset))
        return await asyncio.shield(task)

    async def change(self, name: str, change: PolicyChange) -> Dataset:
        """Change a dataset's policy; its snapshots stay.

        Raises:
            DatasetNotFound: there is no such dataset.
            InvalidRequest: no dataset can be kept so.
        """
        check_policy(change)
        state = await self._shell.apply(PolicyChanged(name, change))
        return core.find(state.datasets, name)

    async def remove(self, name: str) -> None:
        """Forget a dataset. Raises DatasetNotFound."""
        await self._shell.apply(DatasetRemoved(name))

    def is_listing(self, name: str) -> bool:
        """Whether the origin of a dataset of that name is being listed."""
        return name in self._running

    def records(self) -> list[DatasetRecord]:
        """All datasets, by name."""
        known = self._shell.state.datasets
        return [known[name].to_record() for name in sorted(known)]

    async def resolve(self, url: str, endpoint: str) -> tuple[DatasetRecord, str] | None:
        """The dataset over an origin URL and the path in it; makes an ad-hoc one where that is allowed.

        Returns:
            None where no dataset lies over `url` and none may be made.

        Raises:
            DatasetNotFound: the ad-hoc dataset there is another endpoint's.
            OriginError: the ad-hoc dataset's origin cannot be listed.
        """
        url = _canonical(url)
        found = datasets.resolve(self.records(), url, endpoint)
        prefix = self._adhoc.prefix_over(url)
        if found is not None or prefix is None:
            return found
        name = adhoc_name(prefix)
        if name not in self._shell.state.datasets:
            wanted = Definition(name, prefix, storage_options=self._adhoc.storage_options, is_adhoc=True)
            # Never stopped: the next reader would only begin it again.
            task = self._running.get(name) or self._claim(name, self._add(wanted, threading.Event()))
            await asyncio.shield(task)
        record = core.find(self._shell.state.datasets, name).to_record()
        found = datasets.resolve([record], url, endpoint)
        if found is None and endpoint and record.endpoint:
            raise DatasetNotFound(
                f"dataset {name} lies over {prefix} at {record.endpoint}, not at {endpoint}: register the other one "
                f"with 'shoal dataset add NAME {prefix}'"
            )
        return found or (record, url[len(prefix) :].lstrip("/"))

    def _claim(self, name: str, work: Coroutine[Any, Any, Dataset]) -> asyncio.Task[Dataset]:
        task = self._running[name] = asyncio.create_task(work)
        task.add_done_callback(lambda done: self._release(name, done))
        return task

    def _release(self, name: str, done: asyncio.Task[Dataset]) -> None:
        del self._running[name]
        if not done.cancelled():
            done.exception()  # whoever asked may be gone; then nobody else looks

    async def _add(self, wanted: Definition, stop: threading.Event) -> Dataset:
        with self._shell.record.staging() as directory:
            listing = await self._list(wanted.origin, wanted.storage_options, wanted.shard_size, directory, stop)
            now = self._shell.now()
            dataset = Dataset(
                name=wanted.name,
                origin=listing.origin,
                endpoint=listing.endpoint,
                shard_size=wanted.shard_size,
                replicas=wanted.replicas,
                storage_options=wanted.storage_options,
                snapshots=(listing.snapshot,),
                created_utc_s=now.utc_s,
                refreshed_utc_s=now.utc_s,
                is_adhoc=wanted.is_adhoc,
                is_pinned=wanted.is_pinned,
                quota_bytes=wanted.quota_bytes,
                is_direct=wanted.is_direct,
            )
            await self._shell.apply(DatasetAdded(dataset), staged=listing.path)
            return dataset

    async def _refresh(self, dataset: Dataset) -> Dataset:
        with self._shell.record.staging() as directory:
            stop = threading.Event()
            listing = await self._list(dataset.origin, dataset.storage_options, dataset.shard_size, directory, stop)
            state = await self._shell.apply(DatasetRefreshed(dataset, listing.snapshot), staged=listing.path)
            return core.find(state.datasets, dataset.name)

    async def _list(
        self, origin: str, storage_options: str, shard_size: int, directory: Path, stop: threading.Event
    ) -> Listing:
        self._stops.add(stop)
        try:
            async with self._slots:
                return await _in_daemon_thread(
                    lambda: self._list_origin(origin, storage_options, shard_size, directory, stop)
                )
        finally:
            self._stops.discard(stop)


def _canonical(url: str) -> str:
    """The URL as records spell it (``s3a://`` is ``s3://``); as it is where no origin can be so."""
    try:
        return str(origin.parse_url(url))
    except InvalidRequest:
        return url


def _in_daemon_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run `call` in a thread that does not keep the process alive: an origin that hangs must not outlast SIGTERM."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            failure = error
        try:
            loop.call_soon_threadsafe(settle, result, failure)
        except RuntimeError:
            pass  # the loop closed meanwhile: nobody waits any more

    threading.Thread(target=run, name="list-origin", daemon=True).start()
    return future
