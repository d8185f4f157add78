"""The record at the API server: what it is given it holds, and a deposed controller writes nothing."""

from __future__ import annotations

import asyncio
import base64
import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cluster_map import ClusterMap, NodeState
from shoal.errors import StoreUnusable
from shoal_controller.events import (
    DeleteDataset,
    DeleteJob,
    DropSnapshot,
    KeepSnapshot,
    SaveDataset,
    SaveJob,
    SaveMap,
)
from shoal_controller.kube.api import SECRETS, ApiError
from shoal_controller.kube.record import RECORD_KEY, KubeRecord
from shoal_controller.model import Job, JobState
from shoal_controller.record import Record
from shoal_controller.sqlite_record import SqliteRecord
from tests.support.controller import dataset, digest, node
from tests.support.kube import FakeApi

JOB = Job("j1", "imagenet", digest(1), "train/", 5.0, 0.0, JobState.RUNNING, 100, 40, "waits", None)
MAP = ClusterMap(7, (node("n1", state=NodeState.DRAINING), node("n2")))


def with_api(test: Callable[[FakeApi, Callable[[Path], KubeRecord]], None]) -> None:
    """Run `test` in a thread, as the record's, beside the loop of the API."""

    async def whole() -> None:
        api, loop = FakeApi(), asyncio.get_running_loop()

        def open_record(directory: Path) -> KubeRecord:
            return KubeRecord.open(directory, api=api, loop=loop, namespace="shoal", name="record")

        async with asyncio.timeout(20):
            await asyncio.to_thread(test, api, open_record)

    asyncio.run(whole())


def fill(record: Record) -> None:
    pinned = replace(dataset("pinned", number=2), is_pinned=True, quota_bytes=5, is_direct=True, endpoint="http://s3")
    record.write([SaveMap(MAP, frozenset({"n1"})), SaveDataset(dataset()), SaveDataset(pinned)])
    record.write([SaveJob(JOB), SaveJob(replace(JOB, id="j2", state=JobState.DONE, finished_utc_s=9.0))])
    record.write([SaveDataset(replace(dataset(), replicas=3))])


def test_it_holds_what_a_database_holds(tmp_path: Path) -> None:
    def test(api: FakeApi, open_record: Callable[[Path], KubeRecord]) -> None:
        known, reference = open_record(tmp_path / "a"), SqliteRecord.open(tmp_path / "b")
        fill(known)
        fill(reference)
        known.close()
        again = open_record(tmp_path / "a")
        for deletes in ([], [DeleteDataset("pinned"), DeleteJob("j1")]):
            again.write(deletes)
            reference.write(deletes)
            found, wanted = again.load(), reference.load()
            assert replace(found, cluster_id="") == replace(wanted, cluster_id="")
            assert (found.map, found.draining) == (MAP, {"n1"})
        assert found.cluster_id == known.load().cluster_id
        again.close()
        reference.close()

    with_api(test)


def test_what_changes_nothing_is_not_written(tmp_path: Path) -> None:
    def test(api: FakeApi, open_record: Callable[[Path], KubeRecord]) -> None:
        record = open_record(tmp_path)
        record.write([SaveDataset(dataset())])
        before = len(api.calls)
        record.write([SaveDataset(dataset())])
        record.write([])
        assert len(api.calls) == before
        record.close()

    with_api(test)


def test_a_deposed_controller_is_refused(tmp_path: Path) -> None:
    def test(api: FakeApi, open_record: Callable[[Path], KubeRecord]) -> None:
        old, new = open_record(tmp_path / "old"), open_record(tmp_path / "new")
        # Also where the new one has written nothing yet: else it would go on from what the old one then changes.
        with pytest.raises(StoreUnusable, match="no longer leads"):
            old.write([SaveDataset(dataset("other"))])
        new.write([SaveDataset(dataset())])
        assert [known.name for known in new.load().datasets] == ["imagenet"]
        # What was refused is not believed either.
        assert old.load().datasets == ()
        old.close()
        new.close()

    with_api(test)


def test_snapshots_stay_files(tmp_path: Path) -> None:
    def test(api: FakeApi, open_record: Callable[[Path], KubeRecord]) -> None:
        record = open_record(tmp_path)
        with record.staging() as directory:
            staged = directory / "s"
            staged.write_bytes(b"arrow")
            record.write([KeepSnapshot(digest(1)), SaveDataset(dataset())], staged)
        assert record.snapshot_path(digest(1)).read_bytes() == b"arrow"
        record.snapshot_path(digest(8)).write_bytes(b"left by a crash")
        record.close()
        again = open_record(tmp_path)
        assert not again.snapshot_path(digest(8)).exists()
        again.write([DeleteDataset("imagenet"), DropSnapshot(digest(1))])
        assert not again.snapshot_path(digest(1)).exists()
        again.close()

    with_api(test)


def test_a_secret_that_was_made_empty_is_begun(tmp_path: Path) -> None:
    def test(api: FakeApi, open_record: Callable[[Path], KubeRecord]) -> None:
        api.put(SECRETS, {"metadata": {"name": "record", "namespace": "shoal"}, "type": "Opaque"})
        record = open_record(tmp_path)
        assert ("create", "secrets", "record") not in api.calls
        assert api.read(SECRETS, "record", "shoal")["type"] == "Opaque"
        record.close()

    with_api(test)


def test_what_the_operator_drained_is_kept_beside_it(tmp_path: Path) -> None:
    def test(api: FakeApi, open_record: Callable[[Path], KubeRecord]) -> None:
        record = open_record(tmp_path)
        assert record.drained == frozenset()
        record.write([SaveDataset(dataset())])
        record.keep_drained(frozenset({"n1"}))
        record.write([SaveJob(JOB)])
        record.close()
        again = open_record(tmp_path)
        assert again.drained == {"n1"}
        assert (len(again.load().datasets), len(again.load().jobs)) == (1, 1)
        again.close()

    with_api(test)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no gzip", "is damaged"),
        (gzip.compress(b"no json"), "is damaged"),
        (gzip.compress(b'{"format": 1}'), "is damaged"),
        (gzip.compress(b'{"format": 9}'), "another version of Shoal"),
    ],
    ids=["no gzip", "no json", "too little", "other format"],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, content: bytes, words: str) -> None:
    def test(api: FakeApi, open_record: Callable[[Path], KubeRecord]) -> None:
        data = {RECORD_KEY: base64.b64encode(content).decode()}
        api.put(SECRETS, {"metadata": {"name": "record", "namespace": "shoal"}, "data": data})
        with pytest.raises(StoreUnusable, match=words):
            open_record(tmp_path)

    with_api(test)


def test_an_api_server_that_refuses_is_said(tmp_path: Path) -> None:
    def test(api: FakeApi, open_record: Callable[[Path], KubeRecord]) -> None:
        record = open_record(tmp_path)
        api.failing = ApiError("secrets is forbidden", 403)
        with pytest.raises(StoreUnusable, match=r"cannot be used .secrets is forbidden"):
            record.write([SaveDataset(dataset())])
        record.close()
        with pytest.raises(StoreUnusable, match="needs get, create and update"):
            open_record(tmp_path)

    with_api(test)
