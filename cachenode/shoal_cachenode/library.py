"""What a node knows of the cluster: the map, the datasets with their credentials, the snapshots.

All of it comes from the controller's orders and is kept in the data directory, so that a node that starts while the
controller is down serves what it served before. `orders.json` holds credentials and is readable by the owner alone.

A drive that takes no more files does not keep anything from being read: orders then live in memory until `keep`
succeeds, and a snapshot that cannot be written in a memory file.

The rule: a snapshot is verified against its digest before it is used, in each process anew, so it matters neither who
sent it nor what became of it on the drive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from shoal import datasets, origin, shards
from shoal.cluster_map import ClusterMap, NodeState
from shoal.datasets import DatasetRecord
from shoal.errors import (
    DatasetNotFound,
    NotFound,
    OriginUnavailable,
    ShardCorrupt,
    ShoalError,
    SnapshotNotFound,
    StoreUnusable,
)
from shoal.origin import Origin
from shoal.placement import Placement
from shoal.shard_client import ShardAt
from shoal.snapshot import Snapshot
from shoal.transport import Transport
from shoal_cachenode.data_directory import write_atomically

log = logging.getLogger(__name__)

MAX_PLACEMENTS = 32
_FETCHING = ".fetching"


@dataclass(frozen=True, slots=True)
class KnownDataset:
    """A dataset and the options that its origin is opened with."""

    record: DatasetRecord
    storage_options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What the last orders said. A value: new orders make a new one."""

    cluster_map: ClusterMap = field(default_factory=ClusterMap)
    datasets: tuple[KnownDataset, ...] = ()
    controller_http: str = ""
    controller_grpc: str = ""
    cluster_id: str = ""

    def snapshots(self) -> set[str]:
        """Digests that any dataset still serves."""
        return {digest for known in self.datasets for digest in known.record.snapshots}

    def newest(self) -> set[str]:
        """The newest digest of each dataset."""
        return {known.record.snapshot for known in self.datasets}

    def dataset_of(self, digest: str) -> KnownDataset:
        """The dataset that a snapshot belongs to.

        Raises:
            SnapshotNotFound: none that this node knows of.
        """
        for known in self.datasets:
            if digest in known.record.snapshots:
                return known
        raise SnapshotNotFound(
            f"snapshot {digest} belongs to no dataset here: it was removed or superseded; open the dataset again"
        )

    def to_json(self) -> str:
        return json.dumps(
            {
                "map": json.loads(self.cluster_map.to_json()),
                "datasets": [
                    {"record": d.record.to_dict(), "storage_options": dict(d.storage_options)} for d in self.datasets
                ],
                "controller_http": self.controller_http,
                "controller_grpc": self.controller_grpc,
                "cluster_id": self.cluster_id,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Knowledge:
        raw = json.loads(text)
        return cls(
            ClusterMap.from_json(json.dumps(raw["map"])),
            tuple(KnownDataset(DatasetRecord.from_dict(d["record"]), d["storage_options"]) for d in raw["datasets"]),
            raw["controller_http"],
            raw["controller_grpc"],
            raw["cluster_id"],
        )


class Library:
    """Snapshots, origins and placements, opened once and shared."""

    def __init__(
        self, directory: Path, transport: Transport, on_trouble: Callable[[str, OriginUnavailable], None]
    ) -> None:
        """Read what was kept in `directory`; `on_trouble` is told of a dataset's origin that fails for now."""
        self._on_trouble = on_trouble
        self._orders = directory / "orders.json"
        self._snapshots_directory = directory / "snapshots"
        self._snapshots_directory.mkdir(exist_ok=True)
        self._transport = transport
        self._snapshots: dict[str, Snapshot] = {}
        self._paths: dict[str, Path] = {}  # of verified snapshots
        self._files_lock = threading.Lock()  # a file that becomes one of `_paths` is not removed meanwhile
        self._in_memory: dict[str, int] = {}  # descriptors of snapshots that the drive did not take
        self._fetching: dict[str, asyncio.Task[Path]] = {}
        self._origins: dict[str, tuple[Mapping[str, Any], Origin]] = {}
        self._origins_lock = threading.Lock()  # guards _origins
        self._placements: OrderedDict[tuple[str, int, int], Placement] = OrderedDict()
        self.knowledge = self._load()

    def _load(self) -> Knowledge:
        try:
            return Knowledge.from_json(self._orders.read_text())
        except FileNotFoundError:
            return Knowledge()
        except (ValueError, KeyError, TypeError) as error:
            raise StoreUnusable(
                f"{self._orders} is damaged ({error!r}): delete it; the controller sends it anew"
            ) from error

    def apply(self, knowledge: Knowledge) -> None:
        """Take new orders. `keep` writes them down."""
        self.knowledge = knowledge
        served = knowledge.snapshots()
        for digest in set(self._snapshots) - served:
            self._snapshots.pop(digest, None)
        for digest in set(self._paths) - served:
            self._paths.pop(digest, None)
            descriptor = self._in_memory.pop(digest, None)
            if descriptor is not None:
                os.close(descriptor)
        for key in [key for key in self._placements if key[0] not in served]:
            del self._placements[key]  # it keeps the snapshot's file mapped

    def keep(self) -> None:
        """Write the orders down; remove snapshots that they do not name, and left-overs. Blocks. Raises OSError."""
        write_atomically(self._orders, self.knowledge.to_json().encode())
        served = self.knowledge.snapshots()
        for path in self._snapshots_directory.iterdir():
            is_fetched = path.stem in self._fetching
            with self._files_lock:
                # What was fetched for orders that come next is not named by these; a stalled drive makes these late.
                is_wanted = path.suffix != _FETCHING and (path.stem in served or path.stem in self._paths)
                if not is_fetched and not is_wanted:
                    path.unlink(missing_ok=True)

    def record(self, name: str) -> DatasetRecord:
        """The record of a dataset. Raises DatasetNotFound."""
        for known in self.knowledge.datasets:
            if known.record.name == name:
                return known.record
        raise DatasetNotFound(f"this node knows no dataset named {name!r}")

    async def snapshot_path(self, digest: str, knowledge: Knowledge | None = None, *, may_fetch: bool = True) -> Path:
        """The verified file of a snapshot; fetched from the controller or a peer where it is not here.

        Args:
            knowledge: who to ask, where it is newer than what was applied.
            may_fetch: False where a node asks, for two that lack it would wait for each other.

        Raises:
            SnapshotNotFound: nobody has it.
        """
        found = self._paths.get(digest)
        if found is not None:
            return found
        path = self._snapshots_directory / f"{datasets.check_digest(digest)}.arrow"
        knowledge = knowledge or self.knowledge
        if not may_fetch and (digest in self._fetching or not path.exists()):
            raise SnapshotNotFound(f"snapshot {digest} is not on this node yet: ask another one")
        task = self._fetching.get(digest)
        if task is None:
            task = self._fetching[digest] = asyncio.create_task(asyncio.to_thread(self._find, digest, path, knowledge))
            task.add_done_callback(lambda _: self._fetching.pop(digest))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())  # all who asked may have left
        return await asyncio.shield(task)

    async def snapshot(self, digest: str) -> Snapshot:
        """The snapshot, mapped. Raises SnapshotNotFound."""
        known = self._snapshots.get(digest)
        if known is not None:
            return known
        path = await self.snapshot_path(digest)
        try:
            opened = await asyncio.to_thread(Snapshot.open, path)
        except SnapshotNotFound:  # somebody removed the file
            self._paths.pop(digest, None)
            opened = await asyncio.to_thread(Snapshot.open, await self.snapshot_path(digest))
        return self._snapshots.setdefault(digest, opened)

    def _find(self, digest: str, path: Path, knowledge: Knowledge) -> Path:
        """In a thread: the path, noted in `_paths`."""
        try:
            with self._files_lock:
                if path.exists():
                    _verify(path, digest)
                    self._paths[digest] = path
                    return path
        except (ShoalError, OSError) as error:
            log.error("%s is damaged and is fetched anew: %s", path, error)
        knowledge.dataset_of(digest)
        return self._fetch(digest, path, knowledge)

    def _fetch(self, digest: str, path: Path, knowledge: Knowledge) -> Path:
        peers = [n.address for n in knowledge.cluster_map.nodes if n.state is not NodeState.DOWN]
        for address in filter(None, [knowledge.controller_http, *peers]):
            try:
                answer = self._transport.get(address, f"/v1/snapshots/{digest}", {"Via": "1.1 shoal"})
                return self._put(digest, path, answer.body)
            except ShardCorrupt as error:
                log.warning("%s sent a damaged snapshot: %s", address, error)
            except ShoalError as error:
                log.info("%s did not send snapshot %s: %s", address, digest, error)
        raise SnapshotNotFound(f"nobody sent snapshot {digest}: the controller and all nodes were asked")

    def _put(self, digest: str, path: Path, body: bytes | bytearray | memoryview) -> Path:
        aside = path.with_suffix(_FETCHING)
        try:
            aside.write_bytes(body)
            _verify(aside, digest)
            with self._files_lock:
                self._paths[digest] = aside.rename(path)
            return path
        except OSError as error:
            log.error("snapshot %s is kept in memory, the drive does not take it: %s", digest, error)
        finally:
            with contextlib.suppress(OSError):  # of a drive that takes nothing there is nothing to remove
                aside.unlink(missing_ok=True)
        descriptor = os.memfd_create(f"snapshot {digest}", os.MFD_CLOEXEC)
        in_memory = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        in_memory.write_bytes(body)
        _verify(in_memory, digest)
        self._in_memory[digest] = descriptor
        self._paths[digest] = in_memory
        return in_memory

    def placement(self, opened: Snapshot, replicas: int) -> Placement:
        """Who owns the shards of a snapshot under the map of now."""
        cluster_map = self.knowledge.cluster_map
        key = opened.digest, cluster_map.epoch, replicas
        placement = self._placements.get(key)
        if placement is None:
            placement = Placement(opened.shard_table, opened.shard_count(), cluster_map, replicas)
            self._placements[key] = placement
            while len(self._placements) > MAX_PLACEMENTS:
                self._placements.popitem(last=False)
        return placement

    def has_opened_origin(self, known: KnownDataset) -> bool:
        """Whether `origin` will not block."""
        cached = self._origins.get(known.record.name)
        return cached is not None and cached[0] is known.storage_options and cached[1].url == known.record.origin

    def origin(self, known: KnownDataset) -> Origin:
        """The opened origin of a dataset; opened anew where its options changed. May block.

        Raises:
            ShoalError: the options refer to something that is not here.
        """
        name = known.record.name
        with self._origins_lock:
            cached = self._origins.get(name)
            if cached is not None and cached[0] == known.storage_options and cached[1].url == known.record.origin:
                return cached[1]
        opened = origin.open_origin(
            known.record.origin, known.storage_options, on_trouble=partial(self._on_trouble, name)
        )
        with self._origins_lock:
            self._origins[name] = known.storage_options, opened
        return opened


def _verify(path: Path, digest: str) -> None:
    """Raises ShardCorrupt where the file is not the snapshot of that digest, other ShoalErrors where it is none."""
    opened = Snapshot.open(path)
    opened.verify()
    if opened.digest != digest:
        raise ShardCorrupt(f"it is snapshot {opened.digest}")


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """One shard of one snapshot, found.

    Attributes:
        size_bytes: of the shard.
    """

    dataset: KnownDataset
    snapshot: Snapshot
    row: int
    index: int
    key: bytes
    size_bytes: int

    @property
    def offset(self) -> int:
        return self.index * self.snapshot.shard_size

    @property
    def ordinal(self) -> int:
        return self.snapshot.first_shard(self.row) + self.index

    @property
    def at(self) -> ShardAt:
        """Where it is found on any node."""
        return ShardAt(self.snapshot.digest, self.row, self.index, self.size_bytes)


def find_shard(known: KnownDataset, opened: Snapshot, row: int, index: int) -> ShardSpec:
    """Look a shard up.

    Raises:
        NotFound: the snapshot has no such row, or the row no such shard.
    """
    if not 0 <= row < len(opened):
        raise NotFound(f"snapshot {opened.digest} has rows 0 to {len(opened) - 1}, not {row}")
    size_bytes = opened.size(row)
    count = shards.shard_count(size_bytes, opened.shard_size)
    if not 0 <= index < count:
        raise NotFound(f"row {row} of snapshot {opened.digest} has {count} shards, not a number {index}")
    key = shards.shard_key(opened.key(row), index)
    return ShardSpec(known, opened, row, index, key, shards.shard_length(size_bytes, opened.shard_size, index))
