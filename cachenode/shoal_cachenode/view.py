"""What a cache node tells over the routes it shares with the controller (docs/wire.md).

The rule: a node answers from its last orders, so that a reader finds its way with the controller gone.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from shoal import datasets
from shoal.datasets import DatasetRecord
from shoal.errors import DatasetNotFound, Unavailable
from shoal.origin import check
from shoal.version import VERSION
from shoal_cachenode.membership import Membership
from shoal_cachenode.node import CacheNode

#: A drive that takes so long over one read is no help to readers now: they are told so when they ask, and do better
#: elsewhere. What the node itself makes of it is up to `shoal_cachenode.disk`, which is more patient.
SLOW_READ_S = 0.3


class NodeView:
    """A `shoal.wire.routes.ClusterView` over a cache node."""

    def __init__(self, node: CacheNode, membership: Membership) -> None:
        self._node = node
        self._membership = membership
        self._checks = check.Checks()

    def epoch(self) -> int:
        return self._node.library.knowledge.cluster_map.epoch

    def cluster(self) -> dict[str, Any]:
        knowledge = self._node.library.knowledge
        return {
            "epoch": knowledge.cluster_map.epoch,
            "map": json.loads(knowledge.cluster_map.to_json()),
            "controller_grpc": knowledge.controller_grpc,
            "controller_http": knowledge.controller_http,
            "version": VERSION,
            "role": "cachenode",
            "node_id": self._node.id,
            "cluster_id": knowledge.cluster_id,
            "condition": self._node.condition,
        }

    def datasets(self) -> list[DatasetRecord]:
        return [known.record for known in self._node.library.knowledge.datasets]

    async def resolve(self, url: str, endpoint: str) -> tuple[DatasetRecord, str] | None:
        found = datasets.resolve(self.datasets(), url, endpoint)
        if found is not None:
            return found
        # The controller may allow ad-hoc datasets there; it is also the one whose refusal is final.
        controller = self._node.library.knowledge.controller_http
        if not controller:
            return None
        target = f"/v1/resolve?{urlencode({'url': url, 'endpoint': endpoint})}"
        try:
            answer = await asyncio.to_thread(self._node.transport.get, controller, target)
        except Unavailable:
            raise DatasetNotFound(
                f"no dataset lies over {url}, and the controller at {controller}, which could make one, does not answer"
            ) from None
        raw = json.loads(answer.body)
        return DatasetRecord.from_dict(raw["dataset"]), raw["path"]

    async def snapshot_path(self, digest: str, *, may_fetch: bool) -> Path:
        return await self._node.library.snapshot_path(digest, may_fetch=may_fetch)

    async def check_origin(self, name: str) -> dict[str, Any]:
        library = self._node.library
        (known,) = (known for known in library.knowledge.datasets if known.record.name == name)
        await library.snapshot_path(known.record.snapshot, may_fetch=False)  # to fetch it may take long
        opened = await library.snapshot(known.record.snapshot)
        read = partial(check.check, known.record.origin, known.storage_options, opened)
        return await self._checks.of(name, known.record.snapshot, read)

    def close(self) -> None:
        self._checks.close()

    def stalled(self) -> str | None:
        disk = self._node.disk
        if disk.is_stalling:
            return None  # it was given up: reads pass through and wait for nothing
        if disk.oldest_read_s >= SLOW_READ_S:
            return f"a read of the drive has taken {disk.oldest_read_s:.1f} s so far"
        return None

    def ready(self) -> str | None:
        if self._membership.is_connected or self._node.library.knowledge.cluster_map.epoch:
            return None
        return "the node has not heard from its controller yet"
