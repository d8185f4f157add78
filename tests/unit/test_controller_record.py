"""The record: what is written is there after a crash, what is not written leaves nothing behind."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.errors import StoreUnusable
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
from shoal_controller.model import Job, JobState
from shoal_controller.sqlite_record import SqliteRecord
from tests.support.controller import dataset, digest, snapshot

MAP = ClusterMap(
    7,
    (
        Node("a", "a:1", 1 << 40, {"zone": "z", "host": "a"}, NodeState.UP),
        Node("b", "b:1", 0, {}, NodeState.DOWN),
    ),
)
JOB = Job("j1", "imagenet", digest(1), "train/", 5.0, 0.0, JobState.RUNNING, 10, 3, "waits")


@pytest.fixture
def record(tmp_path: Path) -> Iterator[SqliteRecord]:
    opened = SqliteRecord.open(tmp_path / "data")
    yield opened
    opened.close()


def reopened(record: SqliteRecord) -> SqliteRecord:
    record.close()
    return SqliteRecord.open(record.directory)


def staged(record: SqliteRecord, content: bytes = b"arrow") -> Path:
    """A snapshot's file as a listing leaves it."""
    with record.staging() as directory:
        kept = directory.rename(directory.with_name("kept"))
    path = kept / "file.arrow"
    path.write_bytes(content)
    return path


def test_a_new_record_is_empty_and_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = []
    for name in ("a", "b"):
        record = SqliteRecord.open(tmp_path / name)
        contents = record.load()
        assert (contents.map, contents.datasets, contents.jobs) == (ClusterMap(), (), ())
        record = reopened(record)
        assert record.load().cluster_id == contents.cluster_id
        ids.append(contents.cluster_id)
        record.close()
    assert ids[0] != ids[1]
    assert all(len(cluster_id) == 32 for cluster_id in ids)


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    record = SqliteRecord.open(tmp_path / "data")
    added = replace(dataset(), snapshots=(snapshot(2), snapshot(1)), is_adhoc=True, endpoint="http://s3:9000")
    added = replace(added, is_pinned=True, quota_bytes=5 << 40, is_direct=True)
    done = replace(JOB, id="j0", state=JobState.DONE, finished_utc_s=9.5, created_utc_s=4.0)
    record.write([SaveMap(MAP, frozenset("b")), SaveDataset(added), SaveJob(JOB), SaveJob(done)])
    record = reopened(record)
    assert record.load().draining == {"b"}
    contents = record.load()
    assert contents.map == MAP
    assert contents.datasets == (added,)
    assert contents.jobs == (done, JOB)
    record.close()


def test_a_second_write_replaces_the_first(record: SqliteRecord) -> None:
    record.write([SaveMap(MAP), SaveDataset(replace(dataset(), snapshots=(snapshot(2), snapshot(1)))), SaveJob(JOB)])
    smaller = ClusterMap(8, MAP.nodes[:1])
    later = replace(JOB, state=JobState.CANCELLED, reason="", finished_utc_s=6.0)
    record.write([SaveMap(smaller), SaveDataset(dataset()), SaveJob(later)])
    contents = record.load()
    assert (contents.map, contents.datasets, contents.jobs) == (smaller, (dataset(),), (later,))


def test_what_is_deleted_is_gone(record: SqliteRecord) -> None:
    record.write([SaveDataset(dataset()), SaveJob(JOB)])
    record.write([DeleteDataset("imagenet"), DeleteJob("j1")])
    contents = record.load()
    assert (contents.datasets, contents.jobs) == ((), ())


def test_secrets_are_for_the_owner_alone(record: SqliteRecord) -> None:
    record.write([SaveDataset(dataset())])
    files = [path for path in record.directory.iterdir() if path.name.startswith("controller.db")]
    assert len(files) >= 2  # with SQLite's journal
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(record.directory.stat().st_mode) == 0o700


def test_writes_are_synced_to_the_disk(record: SqliteRecord) -> None:
    query = record._database.execute
    assert query("PRAGMA journal_mode").fetchone() == ("wal",)
    assert query("PRAGMA synchronous").fetchone() == (2,)


def test_a_snapshot_moves_into_its_place_and_goes_when_dropped(record: SqliteRecord) -> None:
    record.write([KeepSnapshot(digest(1)), SaveDataset(dataset())], staged(record))
    path = record.snapshot_path(digest(1))
    assert path.read_bytes() == b"arrow"
    record.write([DeleteDataset("imagenet"), DropSnapshot(digest(1))])
    assert not path.exists()


def test_one_event_is_one_transaction(record: SqliteRecord) -> None:
    record.write([SaveMap(MAP), SaveDataset(dataset())])
    record.write([KeepSnapshot(digest(1))], staged(record))
    one_id_twice = ClusterMap(8, (MAP.nodes[0], MAP.nodes[0]))
    broken: list[Write] = [DeleteDataset("imagenet"), DropSnapshot(digest(1)), SaveMap(one_id_twice)]
    with pytest.raises(StoreUnusable):
        record.write(broken)
    contents = record.load()
    assert (contents.map, contents.datasets) == (MAP, (dataset(),))
    assert record.snapshot_path(digest(1)).exists()
    record.write([SaveMap(ClusterMap(9, MAP.nodes))])
    assert record.load().map.epoch == 9


def test_what_a_crash_left_is_swept_at_the_start(record: SqliteRecord) -> None:
    record.write([KeepSnapshot(digest(1)), SaveDataset(dataset())], staged(record))
    orphan = record.snapshot_path(digest(5))
    orphan.write_bytes(b"no row names it")
    half = staged(record, b"half")
    again = reopened(record)
    assert record.snapshot_path(digest(1)).exists()
    assert not orphan.exists()
    assert not half.parent.exists()
    again.close()


def test_staging_is_gone_at_the_end(record: SqliteRecord) -> None:
    with record.staging() as directory:
        (directory / "x").write_bytes(b"1")
    assert not directory.exists()


def test_a_directory_has_one_controller(record: SqliteRecord) -> None:
    with pytest.raises(StoreUnusable, match=r"another controller uses the data directory .*--data-dir"):
        SqliteRecord.open(record.directory)
    again = reopened(record)
    again.close()


@pytest.mark.parametrize("below", ["file", "file/sub"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnusable, match=rf"the data directory {tmp_path}/{below} cannot be used .*--data-dir"):
        SqliteRecord.open(tmp_path / below)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    SqliteRecord.open(tmp_path).close()
    (tmp_path / "controller.db").write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    for leftover in ("controller.db-wal", "controller.db-shm"):
        (tmp_path / leftover).unlink(missing_ok=True)
    with pytest.raises(StoreUnusable, match=rf"the record in {tmp_path} is damaged"):
        SqliteRecord.open(tmp_path)
    # The lock was let go of, so that the repaired directory can be opened.
    (tmp_path / "controller.db").unlink()
    SqliteRecord.open(tmp_path).close()


#: What format 1 had, with a dataset in it.
FORMAT_1 = """
CREATE TABLE cluster (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, epoch INTEGER NOT NULL) STRICT;
INSERT INTO cluster VALUES (1, '0123456789abcdef0123456789abcdef', 7);
CREATE TABLE nodes (
    id TEXT PRIMARY KEY, address TEXT NOT NULL, weight INTEGER NOT NULL, topology TEXT NOT NULL, state TEXT NOT NULL
) STRICT;
INSERT INTO nodes VALUES ('a', 'a:1', 10, '{}', 'up');
CREATE TABLE datasets (
    name TEXT PRIMARY KEY, origin TEXT NOT NULL, endpoint TEXT NOT NULL, shard_size INTEGER NOT NULL,
    replicas INTEGER NOT NULL, storage_options TEXT NOT NULL, created_utc_s REAL NOT NULL,
    refreshed_utc_s REAL NOT NULL, is_adhoc INTEGER NOT NULL
) STRICT;
INSERT INTO datasets VALUES (
    'imagenet', 's3://bucket/imagenet', '', 268435456, 1, '{"secret": "env:SECRET"}', 1.0, 1.0, 0
);
CREATE TABLE snapshots (
    dataset TEXT NOT NULL REFERENCES datasets (name) ON DELETE CASCADE, age INTEGER NOT NULL, digest TEXT NOT NULL,
    objects INTEGER NOT NULL, total_bytes INTEGER NOT NULL, PRIMARY KEY (dataset, age)
) STRICT;
INSERT INTO snapshots VALUES ('imagenet', 0, '00000000000000000000000000000001', 10, 107374182400);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, dataset TEXT NOT NULL, snapshot TEXT NOT NULL, prefix TEXT NOT NULL, state TEXT NOT NULL,
    bytes_total INTEGER NOT NULL, bytes_done INTEGER NOT NULL, reason TEXT NOT NULL, created_utc_s REAL NOT NULL,
    finished_utc_s REAL
) STRICT;
PRAGMA user_version = 1;
"""


def test_the_record_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "controller.db")
    database.executescript(FORMAT_1)
    database.close()
    record = SqliteRecord.open(tmp_path)
    contents = record.load()
    assert contents.cluster_id == "0123456789abcdef0123456789abcdef"
    assert contents.map == ClusterMap(7, (Node("a", "a:1", 10, {}, NodeState.UP),))
    assert contents.datasets == (dataset(),), "with the defaults of what the first version did not know"
    changed = replace(dataset(), is_pinned=True, quota_bytes=1, is_direct=True)
    record.write([SaveMap(MAP), SaveDataset(changed)])
    record = reopened(record)
    assert (record.load().map, record.load().datasets) == (MAP, (changed,))
    record.close()


def test_the_record_of_another_version_is_left_alone(tmp_path: Path) -> None:
    SqliteRecord.open(tmp_path).close()
    database = sqlite3.connect(tmp_path / "controller.db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreUnusable, match="written by another version of Shoal"):
        SqliteRecord.open(tmp_path)
