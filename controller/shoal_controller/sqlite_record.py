"""The record in SQLite: ``DIR/controller.db``, readable by the owner alone: storage options may hold secrets."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import assert_never

from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.errors import StoreUnusable
from shoal_controller import snapshot_files
from shoal_controller.events import (
    DeleteDataset,
    DeleteJob,
    DropSnapshot,
    KeepSnapshot,
    SaveDataset,
    SaveJob,
    SaveMap,
    Write,
)
from shoal_controller.model import Dataset, Job, JobState, SnapshotInfo
from shoal_controller.record import Contents, Record
from shoal_controller.snapshot_files import SnapshotFiles

SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE cluster (
    one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL DEFAULT (lower(hex(randomblob(16)))),
    epoch INTEGER NOT NULL
) STRICT;
INSERT INTO cluster (one, epoch) VALUES (1, 0);
CREATE TABLE nodes (
    id TEXT PRIMARY KEY, address TEXT NOT NULL, weight INTEGER NOT NULL, topology TEXT NOT NULL, state TEXT NOT NULL,
    is_draining INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE datasets (
    name TEXT PRIMARY KEY, origin TEXT NOT NULL, endpoint TEXT NOT NULL, shard_size INTEGER NOT NULL,
    replicas INTEGER NOT NULL, storage_options TEXT NOT NULL, created_utc_s REAL NOT NULL,
    refreshed_utc_s REAL NOT NULL, is_adhoc INTEGER NOT NULL, is_pinned INTEGER NOT NULL DEFAULT 0,
    quota_bytes INTEGER NOT NULL DEFAULT 0, is_direct INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE snapshots (
    dataset TEXT NOT NULL REFERENCES datasets (name) ON DELETE CASCADE, age INTEGER NOT NULL, digest TEXT NOT NULL,
    objects INTEGER NOT NULL, total_bytes INTEGER NOT NULL, PRIMARY KEY (dataset, age)
) STRICT;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, dataset TEXT NOT NULL, snapshot TEXT NOT NULL, prefix TEXT NOT NULL, state TEXT NOT NULL,
    bytes_total INTEGER NOT NULL, bytes_done INTEGER NOT NULL, reason TEXT NOT NULL, created_utc_s REAL NOT NULL,
    finished_utc_s REAL
) STRICT;
"""

#: By the format that they begin with: what makes it the next one.
_MIGRATIONS = {
    1: """
ALTER TABLE datasets ADD COLUMN is_pinned INTEGER NOT NULL DEFAULT 0;
ALTER TABLE datasets ADD COLUMN quota_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE datasets ADD COLUMN is_direct INTEGER NOT NULL DEFAULT 0;
""",
    2: "ALTER TABLE nodes ADD COLUMN is_draining INTEGER NOT NULL DEFAULT 0;",
}


class SqliteRecord(Record):
    """A record in a data directory."""

    def __init__(self, files: SnapshotFiles, database: sqlite3.Connection) -> None:
        """Use `open`."""
        super().__init__(files)
        self._database = database

    @classmethod
    def open(cls, directory: Path) -> SqliteRecord:
        """Open, or begin, the record in `directory`.

        Raises:
            StoreUnusable: the directory cannot be made or written, another controller uses it, or it holds the record
                of a newer version or a damaged one.
        """
        files = SnapshotFiles.open(directory)
        try:
            record = cls(files, _connect(directory / "controller.db"))
        except BaseException:
            files.close()
            raise
        try:
            with _converted(directory):
                files.sweep({digest for (digest,) in record._database.execute("SELECT digest FROM snapshots")})
        except BaseException:
            record.close()
            raise
        return record

    def close(self) -> None:
        self._database.close()
        super().close()

    def load(self) -> Contents:
        with _converted(self.directory):
            fetch = self._database.execute
            ((cluster_id, epoch),) = fetch("SELECT id, epoch FROM cluster").fetchall()
            nodes = tuple(
                Node(node_id, address, weight, json.loads(topology), NodeState(state))
                for node_id, address, weight, topology, state in fetch(
                    "SELECT id, address, weight, topology, state FROM nodes ORDER BY id"
                )
            )
            draining = frozenset(node_id for (node_id,) in fetch("SELECT id FROM nodes WHERE is_draining"))
            snapshots: dict[str, list[SnapshotInfo]] = {}
            for name, *snapshot in fetch(
                "SELECT dataset, digest, objects, total_bytes FROM snapshots ORDER BY dataset, age"
            ):
                snapshots.setdefault(name, []).append(SnapshotInfo(*snapshot))
            datasets = tuple(
                Dataset(
                    name, origin, endpoint, shard_size, replicas, options, tuple(snapshots[name]), created, refreshed,
                    bool(adhoc), bool(pinned), quota_bytes, bool(direct),
                )
                for (
                    name, origin, endpoint, shard_size, replicas, options, created, refreshed, adhoc, pinned,
                    quota_bytes, direct,
                ) in fetch("SELECT * FROM datasets ORDER BY name")
            )  # fmt: skip
            jobs = tuple(
                Job(job_id, dataset, snapshot, prefix, created, 0.0, JobState(state), total, done, reason, finished)
                for job_id, dataset, snapshot, prefix, state, total, done, reason, created, finished in fetch(
                    "SELECT * FROM jobs ORDER BY created_utc_s, id"
                )
            )
        return Contents(cluster_id, ClusterMap(epoch, nodes), draining, datasets, jobs)

    def _commit(self, writes: tuple[Write, ...]) -> None:
        with _converted(self.directory):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                for write in writes:
                    self._write(write)
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite rolls back by itself where the disk is full
                    self._database.execute("ROLLBACK")
                raise

    def _write(self, write: Write) -> None:
        execute = self._database.execute
        match write:
            case SaveMap(cluster_map, draining):
                execute("UPDATE cluster SET epoch = ?", (cluster_map.epoch,))
                execute("DELETE FROM nodes")
                self._database.executemany(
                    "INSERT INTO nodes VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (
                            node.id,
                            node.address,
                            node.weight,
                            json.dumps(dict(node.topology)),
                            str(node.state),
                            int(node.id in draining),
                        )
                        for node in cluster_map.nodes
                    ],
                )
            case SaveDataset(dataset):
                execute("DELETE FROM datasets WHERE name = ?", (dataset.name,))
                execute(
                    "INSERT INTO datasets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        dataset.name,
                        dataset.origin,
                        dataset.endpoint,
                        dataset.shard_size,
                        dataset.replicas,
                        dataset.storage_options,
                        dataset.created_utc_s,
                        dataset.refreshed_utc_s,
                        int(dataset.is_adhoc),
                        int(dataset.is_pinned),
                        dataset.quota_bytes,
                        int(dataset.is_direct),
                    ),
                )
                self._database.executemany(
                    "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?)",
                    [(dataset.name, age, *astuple(snapshot)) for age, snapshot in enumerate(dataset.snapshots)],
                )
            case DeleteDataset(name):
                execute("DELETE FROM datasets WHERE name = ?", (name,))
            case SaveJob(job):
                execute(
                    "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        job.id,
                        job.dataset,
                        job.snapshot,
                        job.prefix,
                        str(job.state),
                        job.bytes_total,
                        job.bytes_done,
                        job.reason,
                        job.created_utc_s,
                        job.finished_utc_s,
                    ),
                )
            case DeleteJob(job_id):
                execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            case KeepSnapshot() | DropSnapshot():
                pass  # files, which are `Record.write`'s
            case _:
                assert_never(write)


def _connect(path: Path) -> sqlite3.Connection:
    with _converted(path.parent):
        # SQLite gives its journal the rights of the database, so the database must have them first.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
        # Opened in one thread and used in another, never in two at once.
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA foreign_keys = ON")
            ((version,),) = database.execute("PRAGMA user_version").fetchall()
            if version == 0:
                database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            while (upgrade := _MIGRATIONS.get(version)) is not None:
                version += 1
                database.executescript(f"BEGIN; {upgrade} PRAGMA user_version = {version}; COMMIT;")
            if version not in (0, SCHEMA_VERSION):
                raise StoreUnusable(
                    f"{path} was written by another version of Shoal (format {version}, this one reads "
                    f"{SCHEMA_VERSION}): run that version, or name another directory with --data-dir"
                )
        except BaseException:
            database.close()
            raise
        return database


@contextmanager
def _converted(directory: Path) -> Iterator[None]:
    try:
        with snapshot_files.converted(directory):
            yield
    except StoreUnusable:
        raise
    except sqlite3.OperationalError as error:
        raise StoreUnusable(
            f"the record in {directory} cannot be written ({error}): check that the disk has room and is writable"
        ) from error
    except (sqlite3.Error, ValueError, KeyError) as error:
        raise StoreUnusable(
            f"the record in {directory} is damaged ({error}): move it away and add the datasets again, or restore a "
            "copy of it"
        ) from error
