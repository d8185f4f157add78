"""Adding, refreshing and removing datasets over a scripted origin and a real record."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from shoal.errors import AlreadyExists, DatasetNotFound, InvalidRequest, OriginDenied, ShoalError, StoreUnusable
from shoal_controller import catalog
from shoal_controller.catalog import AdhocPolicy, Catalog, Definition, Listing
from shoal_controller.events import NodeRegistered
from shoal_controller.model import SnapshotInfo
from shoal_controller.shell import Shell
from shoal_controller.sqlite_record import SqliteRecord
from tests.support.controller import POLICY, START, digest, node

ADHOC = AdhocPolicy.parse(["s3://team/data/", "s3://team/data/deeper"], '{"key": "env:KEY"}')


@dataclass
class ScriptedOrigin:
    """Lists what `number` says, when the test says so."""

    number: int = 1
    endpoint: str = ""
    error: ShoalError | None = None
    calls: list[tuple[str, str, int]] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    may_go_on: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_go_on.set()

    def hold(self) -> None:
        self.may_go_on.clear()
        self.started.clear()

    def __call__(self, url: str, options: str, shard_size: int, directory: Path, stop: threading.Event) -> Listing:
        self.calls.append((url, options, shard_size))
        self.started.set()
        while not self.may_go_on.wait(0.01):
            if stop.is_set():
                self.stopped.set()
                raise ShoalError("stopped")
        if self.error is not None:
            raise self.error
        path = directory / f"{digest(self.number)}.arrow"
        path.write_text(f"snapshot {self.number}")
        return Listing(url.rstrip("/"), self.endpoint, SnapshotInfo(digest(self.number), 3, 30), path)


@dataclass
class Running:
    shell: Shell
    catalog: Catalog
    origin: ScriptedOrigin

    def files(self) -> set[str]:
        return {path.stem for path in self.shell.record.snapshots.iterdir()}

    def is_clean(self) -> bool:
        return not list((self.shell.record.directory / "incoming").iterdir())


@asynccontextmanager
async def running(directory: Path, adhoc: AdhocPolicy) -> AsyncIterator[Running]:
    shell = await Shell.start(lambda: SqliteRecord.open(directory), POLICY, lambda: START)
    origin = ScriptedOrigin()
    known = Catalog(shell, origin, adhoc)
    try:
        yield Running(shell, known, origin)
    finally:
        await known.close()
        await shell.close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Runs a test's coroutine against a controller without network; again goes on from the same record."""

    def run(test: Callable[[Running], Awaitable[None]], adhoc: AdhocPolicy = ADHOC) -> None:
        async def whole() -> None:
            async with running(tmp_path / "data", adhoc) as started:
                await test(started)

        asyncio.run(whole())

    return run


def test_an_added_dataset_is_listed_recorded_and_there_after_a_restart(run: Callable[..., None]) -> None:
    async def add(it: Running) -> None:
        added = await it.catalog.add(Definition("flights", "s3://b/f/", 1 << 20, 2, '{"secret": "env:X"}'))
        assert it.origin.calls == [("s3://b/f/", '{"secret": "env:X"}', 1 << 20)]
        assert (added.origin, added.shard_size, added.replicas) == ("s3://b/f", 1 << 20, 2)
        assert added.newest == SnapshotInfo(digest(1), 3, 30)
        assert added.created_utc_s == START.utc_s
        assert it.shell.record.snapshot_path(digest(1)).read_text() == "snapshot 1"
        assert it.is_clean()
        assert it.shell.orders.value.datasets == {"flights": added}

    async def look(it: Running) -> None:
        assert [record.name for record in it.catalog.records()] == ["flights"]
        assert it.files() == {digest(1)}

    run(add)
    run(look)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (Definition("No Name", "s3://b"), "'No Name' is no dataset name"),
        (Definition("a", ""), "a dataset needs an origin"),
        (Definition("a", "s3://b", 4097), "a shard size of 4097 bytes cannot be"),
        (Definition("a", "s3://b", 2048), "multiple of 4 KiB between 4 KiB and 2 GiB"),
        (Definition("a", "s3://b", 4 << 30), "a shard size of 4294967296 bytes cannot be"),
        (Definition("a", "s3://b", replicas=17), "17 replicas cannot be: use 1 to 16"),
    ],
)
def test_an_impossible_definition_is_refused_before_anything_is_listed(
    run: Callable[..., None], wanted: Definition, sentence: str
) -> None:
    async def test(it: Running) -> None:
        with pytest.raises(InvalidRequest, match=sentence):
            await it.catalog.add(wanted)
        assert it.origin.calls == []

    run(test)


def test_an_origin_that_cannot_be_listed_leaves_nothing(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.origin.error = OriginDenied("no")
        with pytest.raises(OriginDenied):
            await it.catalog.add(Definition("a", "s3://b"))
        assert it.shell.state.datasets == {}
        assert it.is_clean()
        it.origin.error = None
        await it.catalog.add(Definition("a", "s3://b"))

    run(test)


def test_a_name_is_taken_while_its_origin_is_listed(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.origin.hold()
        first = asyncio.create_task(it.catalog.add(Definition("a", "s3://b")))
        await asyncio.to_thread(it.origin.started.wait)
        with pytest.raises(AlreadyExists, match="being listed for somebody else"):
            await it.catalog.add(Definition("a", "s3://b"))
        it.origin.may_go_on.set()
        await first
        with pytest.raises(AlreadyExists, match="'shoal dataset refresh a'"):
            await it.catalog.add(Definition("a", "s3://b"))
        assert len(it.origin.calls) == 1

    run(test)


def test_whoever_gives_up_stops_the_listing(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.origin.hold()
        asking = asyncio.create_task(it.catalog.add(Definition("a", "s3://b")))
        await asyncio.to_thread(it.origin.started.wait)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.to_thread(it.origin.stopped.wait)
        it.origin.may_go_on.set()
        await it.catalog.add(Definition("b", "s3://b"))
        assert list(it.shell.state.datasets) == ["b"]

    run(test)


def test_a_controller_that_closes_waits_for_no_origin(run: Callable[..., None]) -> None:
    asking: list[asyncio.Task[object]] = []

    async def test(it: Running) -> None:
        it.origin.hold()
        asking.append(asyncio.create_task(it.catalog.add(Definition("a", "s3://b"))))
        await asyncio.to_thread(it.origin.started.wait)

    run(test)
    assert isinstance(asking[0].exception(), ShoalError)


def test_a_refresh_serves_old_and_new_snapshot(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.catalog.add(Definition("a", "s3://b"))
        same = await it.catalog.refresh("a")
        assert same.digests == (digest(1),)
        it.origin.number = 2
        newer = await it.catalog.refresh("a")
        assert newer.digests == (digest(2), digest(1))
        assert it.files() == {digest(1), digest(2)}
        with pytest.raises(DatasetNotFound, match="the cluster has a;"):
            await it.catalog.refresh("b")

    run(test)


def test_a_failed_refresh_changes_nothing(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        before = await it.catalog.add(Definition("a", "s3://b"))
        it.origin.error = OriginDenied("no")
        with pytest.raises(OriginDenied):
            await it.catalog.refresh("a")
        assert it.shell.state.datasets == {"a": before}

    run(test)


def test_two_refreshes_at_once_list_once(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.catalog.add(Definition("a", "s3://b"))
        it.origin.number = 2
        it.origin.hold()
        first = asyncio.create_task(it.catalog.refresh("a"))
        await asyncio.to_thread(it.origin.started.wait)
        second = asyncio.create_task(it.catalog.refresh("a"))
        await asyncio.sleep(0)
        first.cancel()
        it.origin.may_go_on.set()
        assert (await second).newest.digest == digest(2)
        assert len(it.origin.calls) == 2

    run(test)


def test_a_dataset_removed_while_it_is_refreshed_stays_removed(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.catalog.add(Definition("a", "s3://b"))
        it.origin.number = 2
        it.origin.hold()
        refreshing = asyncio.create_task(it.catalog.refresh("a"))
        await asyncio.to_thread(it.origin.started.wait)
        await it.catalog.remove("a")
        it.origin.may_go_on.set()
        with pytest.raises(DatasetNotFound):
            await refreshing
        assert it.shell.state.datasets == {}
        assert it.files() == set()
        assert it.is_clean()

    run(test)


def test_a_snapshot_stays_while_one_of_its_datasets_does(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.catalog.add(Definition("a", "s3://b"))
        await it.catalog.add(Definition("b", "s3://b"))
        await it.catalog.remove("a")
        assert it.files() == {digest(1)}
        await it.catalog.remove("b")
        assert it.files() == set()

    run(test)


def test_a_lost_snapshot_file_comes_back_with_a_refresh(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.catalog.add(Definition("a", "s3://b"))
        it.shell.record.snapshot_path(digest(1)).unlink()
        await it.catalog.refresh("a")
        assert it.files() == {digest(1)}

    run(test)


def test_resolve_finds_the_longest_origin_over_a_url(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.catalog.add(Definition("wide", "s3://b"))
        await it.catalog.add(Definition("deep", "s3://b/c"))
        found = await it.catalog.resolve("s3a://b/c/x.arrow", "")
        assert found is not None
        assert (found[0].name, found[1]) == ("deep", "x.arrow")
        assert await it.catalog.resolve("s3://other/x", "") is None

    run(test)


def test_a_read_under_an_allowed_prefix_makes_one_dataset_of_the_prefix(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.origin.hold()
        asking = [asyncio.create_task(it.catalog.resolve(f"s3://team/data/{n}/x", "")) for n in range(3)]
        await asyncio.to_thread(it.origin.started.wait)
        asking.pop(0).cancel()
        it.origin.may_go_on.set()
        answers = await asyncio.gather(*asking)
        assert it.origin.calls == [("s3://team/data", '{"key": "env:KEY"}', 256 << 20)]
        assert [answer[1] for answer in answers if answer] == ["1/x", "2/x"]
        (record,) = it.catalog.records()
        assert record.adhoc
        assert record.name == catalog.adhoc_name("s3://team/data") == "adhoc-team-data-fd9c"
        assert await it.catalog.resolve("s3://team/database/x", "") is None
        assert await it.catalog.resolve("s3://team", "") is None

    async def again(it: Running) -> None:
        found = await it.catalog.resolve("s3://team/data", "")
        assert found is not None
        assert found[0].adhoc
        assert it.origin.calls == []

    run(test)
    run(again)


def test_an_adhoc_dataset_is_of_one_endpoint(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.origin.endpoint = "http://here:9000"
        assert await it.catalog.resolve("s3://team/data/x", "http://here:9000/") is not None
        with pytest.raises(DatasetNotFound, match="at http://here:9000, not at http://there:9000: register"):
            await it.catalog.resolve("s3://team/data/x", "http://there:9000")
        assert len(it.origin.calls) == 1

    run(test)


def test_adhoc_prefixes_are_checked_at_the_start() -> None:
    with pytest.raises(InvalidRequest):
        AdhocPolicy.parse(["not a url"], "{}")
    with pytest.raises(InvalidRequest, match="no JSON"):
        AdhocPolicy.parse([], "{")


def test_a_record_that_fails_ends_the_controller_and_tells_nobody(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        failing = asyncio.create_task(it.shell.failed())
        cast(SqliteRecord, it.shell.record)._database.execute("PRAGMA query_only = ON")
        with pytest.raises(StoreUnusable, match="cannot be written"):
            await it.shell.apply(NodeRegistered(node("n1")))
        assert it.shell.state.members == {}
        assert it.shell.orders.value.map.epoch == 0
        with pytest.raises(StoreUnusable, match="cannot be written"):
            await failing

    run(test)


def test_an_event_is_published_in_its_turn_and_whole(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        release = threading.Event()
        it.shell._thread.submit(release.wait)
        first = asyncio.create_task(it.shell.apply(NodeRegistered(node("n1"))))
        await asyncio.sleep(0)
        # The second changes nothing that is recorded, but its state has the first one's change.
        second = asyncio.create_task(it.shell.apply(NodeRegistered(node("n1"))))
        await asyncio.sleep(0)
        assert it.shell.state.map.epoch == 0
        first.cancel()
        release.set()
        assert (await second).map.epoch == 1
        assert it.shell.orders.value.map.epoch == 1

    run(test)
