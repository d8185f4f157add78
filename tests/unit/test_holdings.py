"""What a node holds of a snapshot: counted once, however many ask first, and every one of them sees what is sealed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.snapshot import ShardTable
from shoal_cachenode import inventory
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.inventory import Inventory
from shoal_cachenode.prefetch import Order, Prefetches
from tests.support.minicluster import MiniCluster

OBJECTS = {f"{n}": bytes([n]) * 100 for n in range(8)}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[MiniCluster]:
    with MiniCluster(tmp_path, OBJECTS) as cluster:
        yield cluster


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Holdings]:
    """All that are made, each of which takes a moment."""
    made: list[Holdings] = []

    def slow(table: ShardTable) -> Holdings:
        time.sleep(0.1)
        made.append(Holdings(table))
        return made[-1]

    monkeypatch.setattr(inventory, "Holdings", slow)
    return made


def test_those_who_ask_first_count_once(cluster: MiniCluster, counted: list[Holdings]) -> None:
    node, digest = cluster.nodes[0], cluster.snapshot.digest
    cluster.run(asyncio.sleep(0.3))  # the node's own first look, if there is one
    node.inventory.forget(set())
    counted.clear()

    async def main() -> None:
        prefetches = Prefetches(node)
        prefetches.apply([Order("job", "set", digest, "", run=False)])
        impatient = asyncio.create_task(node.holdings_of(digest))
        asking = [asyncio.create_task(node.holdings_of(digest)) for _ in range(8)]
        for _ in range(5):
            await asyncio.sleep(0)
        impatient.cancel()
        assert [id(await each) for each in asking] == [id(counted[0])] * 8
        while not await prefetches.reports():
            await asyncio.sleep(0.01)
        await prefetches.close()

    cluster.run(main())
    assert len(counted) == 1


def test_threads_that_count_together_share_what_is_kept(cluster: MiniCluster, counted: list[Holdings]) -> None:
    under_test = Inventory(cluster.nodes[0].store, on_dropped=lambda key: None)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(under_test.of, [cluster.snapshot] * 4))
    assert len(counted) > 1, "they did come together"
    (kept,) = under_test.known().values()
    assert [each is kept for each in found] == [True] * 4
