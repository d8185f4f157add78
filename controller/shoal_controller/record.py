"""The record: what a controller must not forget, behind one interface.

    `shoal_controller.sqlite_record.SqliteRecord`    a database in the data directory: the default
    `shoal_controller.kube.record.KubeRecord`        one object at a Kubernetes API server

Snapshots are files in either case (`shoal_controller.snapshot_files`).

The rule: one event is one transaction. A snapshot's file is in its place before the record names it, and goes only
after the record does not, so a crash at any point leaves at most a file that nobody names; the next start deletes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from shoal.cluster_map import ClusterMap
from shoal_controller.events import DropSnapshot, KeepSnapshot, Write
from shoal_controller.model import Dataset, Job
from shoal_controller.snapshot_files import SnapshotFiles


@dataclass(frozen=True, slots=True)
class Contents:
    """What the record holds. `cluster_id` was made with it, so another one means that the record was lost.

    `draining` are the ids of the nodes that are to own nothing, down or not.
    """

    cluster_id: str
    map: ClusterMap
    draining: frozenset[str]
    datasets: tuple[Dataset, ...]
    jobs: tuple[Job, ...]


class Record(ABC):
    """All of it blocks. It is for one thread at a time, but for `staging` and `snapshot_path`, which any may use."""

    def __init__(self, files: SnapshotFiles) -> None:
        self.files = files

    @property
    def directory(self) -> Path:
        return self.files.directory

    @property
    def snapshots(self) -> Path:
        return self.files.snapshots

    def snapshot_path(self, digest: str) -> Path:
        """Where the file of a snapshot is, if it is kept."""
        return self.files.path(digest)

    def staging(self) -> AbstractContextManager[Path]:
        """See `SnapshotFiles.staging`."""
        return self.files.staging()

    @abstractmethod
    def load(self) -> Contents:
        """Everything that is recorded.

        Raises:
            StoreUnusable: the record is damaged or cannot be reached.
        """

    def write(self, writes: Iterable[Write], staged: Path | None = None) -> None:
        """Carry out the writes of one event, durably.

        Args:
            writes: in the core's order.
            staged: the file that `KeepSnapshot` is about, as `staging` made it.

        Raises:
            StoreUnusable: the record cannot be written. It is as it was.
        """
        writes = tuple(writes)
        for write in writes:
            if isinstance(write, KeepSnapshot) and staged is not None:
                self.files.keep(staged, write.digest)
        self._commit(writes)
        for write in writes:
            if isinstance(write, DropSnapshot):
                self.files.drop(write.digest)

    @abstractmethod
    def _commit(self, writes: tuple[Write, ...]) -> None:
        """Record the writes at once or not at all; files are not its business."""

    def close(self) -> None:
        self.files.close()
