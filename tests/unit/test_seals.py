"""Seals and drives that hang: a seal never works on a file that its fill has let go of."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_cachenode.node import CacheNode
from shoal_cachenode.partial_file import PartialFile
from shoal_cachenode.scheduler import SEALERS
from tests.support.minicluster import MiniCluster
from tests.support.waiting import wait_for

OBJECTS = {f"o{n}": bytes((n * 7 + i) % 251 for i in range(300)) for n in range(SEALERS + 2)}


class HeldSeals:
    """Seals begin, and go on when the test lets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.begun: list[PartialFile] = []
        seal = PartialFile.seal

        def held(partial: PartialFile) -> None:
            self.begun.append(partial)
            assert self.go.wait(20)
            seal(partial)

        monkeypatch.setattr(PartialFile, "seal", held)


@pytest.fixture
def seals(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldSeals]:
    held = HeldSeals(monkeypatch)
    yield held
    held.go.set()


def test_fills_that_a_stall_ends_are_let_go_after_their_seals(tmp_path: Path, seals: HeldSeals) -> None:
    with MiniCluster(tmp_path, OBJECTS) as cluster:
        node, fs = cluster.nodes[0], cluster.filesystem()
        assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
        wait_for(lambda: len(seals.begun) == SEALERS)
        cluster.run(stall(node))
        with pytest.raises(TimeoutError):  # a settled fill has closed its file
            cluster.run(settled_in(node, 0.3))
        assert all(partial.has_file and partial.fd >= 0 and partial.retain() for partial in seals.begun)
        for partial in seals.begun:
            partial.close()  # what `retain` counted
        seals.go.set()
        cluster.run(node.fills.settle())
        assert len(seals.begun) == SEALERS, "a seal that waited for its turn finds that its fill is over"
        assert len(node.store.sealed_sizes()) == SEALERS
        assert not node.store.reserved_sizes()
        files = [path for name in ("shards", "filling") for path in (tmp_path / "node0" / name).rglob("*")]
        assert sum(path.is_file() for path in files) == SEALERS
        read_before = cluster.origin.bytes_read
        assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
        assert cluster.origin.bytes_read == read_before + 300 * (len(OBJECTS) - SEALERS)


async def stall(node: CacheNode) -> None:
    node._on_stall()


async def settled_in(node: CacheNode, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await node.fills.settle()
