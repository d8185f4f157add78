"""Batches on a node: what they hold is bounded however many come together, and a drive that stalls costs no range."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import InvalidRequest, Overloaded
from shoal.wire import batch
from shoal.wire.batch import ShardRange
from shoal.wire.http_messages import Buffer, FileSlice, Request, Response
from shoal_cachenode import batches
from shoal_cachenode.batches import RANGE_BYTES, RUN_BYTES, Batches
from shoal_cachenode.data_plane import DataPlane
from shoal_cachenode.disk import DiskStalls
from shoal_cachenode.store import AlreadySealed
from tests.support.minicluster import MiniCluster

OBJECT = bytes(range(200))
WEIGHT = RUN_BYTES + batch.MAX_RANGE_BYTES + RANGE_BYTES


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[MiniCluster]:
    with MiniCluster(tmp_path, {"a": OBJECT}) as cluster:
        yield cluster


def request(start: int, length: int) -> Request:
    body = batch.encode([ShardRange(0, 0, start, length)])
    return Request("POST", "/v1/snapshots/d/ranges", {}, {}, is_local=False, body=body)


async def bytes_of(response: Response) -> bytes:
    body: Any = response.body
    found = b"".join([_plain(piece) async for piece in body])
    await body.aclose()
    return found


def _plain(piece: Buffer | FileSlice) -> bytes:
    return os.pread(piece.fd, piece.length, piece.offset) if isinstance(piece, FileSlice) else bytes(piece)


def test_batches_that_come_together_pass_their_bound_no_more_than_others(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCHES_BYTES", 2 * WEIGHT)
    plane = DataPlane(cluster.nodes[0])
    under_test = Batches(plane, cluster.nodes[0])
    digest, find = cluster.snapshot.digest, plane.find

    async def main() -> None:
        may_find = asyncio.Event()

        async def slow(*place: Any) -> Any:
            await may_find.wait()
            return await find(*place)

        monkeypatch.setattr(plane, "find", slow)
        asking = [asyncio.create_task(under_test(request(n, 10), digest)) for n in range(5)]
        await asyncio.sleep(0)  # each of them asks now where its shard is
        may_find.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(each) for each in answers] == [Response, Response, Overloaded, Overloaded, Overloaded]
        assert under_test.held_bytes == 2 * WEIGHT
        first, second = answers[:2]
        assert isinstance(first, Response) and isinstance(second, Response)
        await second.body.aclose()  # type: ignore[union-attr]  # its reader left before the first byte
        assert under_test.held_bytes == WEIGHT
        assert (await bytes_of(first))[:10] == OBJECT[:10]
        assert under_test.held_bytes == 0
        with pytest.raises(InvalidRequest, match="ends past them"):
            await under_test(request(195, 10), digest)
        assert under_test.held_bytes == 0

    cluster.run(main())
    cluster.run(cluster.nodes[0].fills.settle())


def test_a_range_of_a_shard_that_was_sealed_meanwhile_passes_through_when_the_drive_stalls(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = cluster.nodes[0]
    plane = DataPlane(node)

    async def sealed(*_: Any) -> Any:
        raise AlreadySealed

    async def stalls(*_: Any) -> Any:
        raise DiskStalls("the drive does not answer")

    monkeypatch.setattr(plane, "unsealed", sealed)
    monkeypatch.setattr(node.disk, "run", stalls)

    async def main() -> bytes:
        return await bytes_of(await Batches(plane, node)(request(20, 100), cluster.snapshot.digest))

    assert cluster.run(main())[:100] == OBJECT[20:120]
    cluster.run(node.fills.settle())
