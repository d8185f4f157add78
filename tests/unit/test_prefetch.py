"""A node's share of a prefetch: what it does when a shard cannot be fetched now."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal_cachenode import prefetch
from shoal_cachenode.prefetch import Order, Prefetches, ShareReport
from tests.support.minicluster import MiniCluster
from tests.support.waiting import wait_for

OBJECTS = {f"{n}": bytes([n]) * 300 for n in range(12)}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[MiniCluster]:
    with MiniCluster(tmp_path, OBJECTS, retry_s=0.1) as cluster:
        yield cluster


class Job:
    """A prefetch of everything, on the first node."""

    def __init__(self, cluster: MiniCluster) -> None:
        self._cluster = cluster
        cluster.run(self._begin())

    async def _begin(self) -> None:
        self._prefetches = Prefetches(self._cluster.nodes[0])
        self._prefetches.apply([Order("job", "set", self._cluster.snapshot.digest, "", True)])

    def report(self) -> ShareReport | None:
        return next(iter(self._cluster.run(self._prefetches.reports())), None)

    def end(self) -> ShareReport:
        """The last report: complete, or failed."""
        wait_for(lambda: (report := self.report()) is not None and (report.complete or bool(report.failure)))
        report = self.report()
        assert report is not None
        return report

    def close(self) -> None:
        self._cluster.run(asyncio.wait_for(self._prefetches.close(), 20))


def test_failed_attempts_wait_for_what_failed_to_come_back(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "PAUSES_S", (0.1,) * 100)
    node = cluster.nodes[0]
    node.disk.failed(OSError(28, "No space left on device"))  # until the drive is tried again
    job = Job(cluster)
    report = job.end()
    job.close()
    assert (report.complete, report.failure, report.bytes_done) == (True, "", 12 * 300)


def test_a_job_that_is_cancelled_ends_within_a_pause(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PAUSES_S", (3600.0,))
    cluster.origin.is_down = True
    failures: list[str] = []
    node, fill = cluster.nodes[0], cluster.nodes[0].fill

    async def watched(*args: object, **options: object) -> object:
        try:
            began = await fill(*args, **options)  # type: ignore[arg-type]
            await asyncio.shield(began.sealed)
        except Exception as error:
            failures.append(str(error))
            raise
        return began

    monkeypatch.setattr(node, "fill", watched)
    job = Job(cluster)
    wait_for(lambda: len(failures) == 2 * node.config.fetches)
    job.close()
    assert set(failures) == {"the origin is down"}
    assert len(failures) == 2 * node.config.fetches, "one attempt each, and a pause after it"


def test_what_is_on_its_way_ends_with_its_dataset(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would ever drop what came in after the dataset was removed."""
    may_read, stream = threading.Event(), cluster.origin.stream

    def slow(*args: Any) -> None:
        assert may_read.wait(20)
        stream(*args)

    monkeypatch.setattr(cluster.origin, "stream", slow)
    node = cluster.nodes[0]
    job = Job(cluster)
    wait_for(lambda: node.fills.count == 2 * node.config.fetches)
    known = node.library.knowledge
    cluster.run(node.apply(dataclasses.replace(known, datasets=())))
    job.close()
    may_read.set()
    wait_for(lambda: node.fills.count == 0)
    assert node.store.used_bytes == node.store.reserved_bytes == 0


def test_what_fails_for_good_is_told_in_one_line(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefetch, "PAUSES_S", ())
    cluster.origin.is_down = True
    job = Job(cluster)
    report = job.end()
    job.close()
    assert report.failure.endswith(": the origin is down") and report.failure.partition(":")[0] in OBJECTS
    told = [each for each in caplog.records if each.name == prefetch.__name__]
    assert [(each.levelno, each.exc_info) for each in told] == [(logging.WARNING, None)]
    assert told[0].getMessage() == f"prefetch job stopped: {report.failure}"


def test_orders_that_come_while_a_report_is_made_do_not_break_it(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(cluster)
    job.end()
    prefetches = job._prefetches
    report = Prefetches._report

    def slow(self: Prefetches, share: prefetch._Share) -> ShareReport:
        async def order() -> None:
            orders = [Order(f"job {n}", "set", cluster.snapshot.digest, "", True) for n in range(3)]
            prefetches.apply(orders)

        cluster.run(order())
        return report(self, share)

    monkeypatch.setattr(Prefetches, "_report", slow)
    reports = cluster.run(prefetches.reports())
    job.close()
    assert [each.job_id for each in reports] == ["job"]
