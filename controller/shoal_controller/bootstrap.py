"""What the controller tells over HTTP (docs/wire.md): the routes it shares with nodes, but for shard bytes.

Clients come here first, or to any node; after that they never need to again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal import origin
from shoal.datasets import DatasetRecord
from shoal.errors import SnapshotNotFound
from shoal.origin import check
from shoal.snapshot import Snapshot
from shoal.version import VERSION
from shoal_controller import core
from shoal_controller.catalog import Catalog
from shoal_controller.shell import Shell


class ControllerView:
    """A `shoal.wire.routes.ClusterView` over the controller."""

    def __init__(self, shell: Shell, catalog: Catalog) -> None:
        self._shell = shell
        self._catalog = catalog
        self._checks = check.Checks()
        self.grpc_address = ""
        self.http_address = ""

    def epoch(self) -> int:
        return self._shell.state.map.epoch

    def cluster(self) -> dict[str, Any]:
        cluster_map = self._shell.state.map
        return {
            "epoch": cluster_map.epoch,
            "map": json.loads(cluster_map.to_json()),
            "controller_grpc": self.grpc_address,
            "controller_http": self.http_address,
            "version": VERSION,
            "role": "controller",
            "node_id": "",
            "cluster_id": self._shell.cluster_id,
        }

    def datasets(self) -> list[DatasetRecord]:
        return self._catalog.records()

    async def resolve(self, url: str, endpoint: str) -> tuple[DatasetRecord, str] | None:
        return await self._catalog.resolve(url, endpoint)

    async def snapshot_path(self, digest: str, *, may_fetch: bool) -> Path:
        path = self._shell.record.snapshot_path(digest)
        served = any(digest in dataset.digests for dataset in self._shell.state.datasets.values())
        if not served or not path.exists():
            raise SnapshotNotFound(
                f"the controller has no snapshot {digest}: its dataset was refreshed or removed; open it without '@'"
            )
        return path

    async def check_origin(self, name: str) -> dict[str, Any]:
        dataset = core.find(self._shell.state.datasets, name)
        path = self._shell.record.snapshot_path(dataset.newest.digest)

        def read() -> None:
            check.check(dataset.origin, origin.parse_options(dataset.storage_options), Snapshot.open(path))

        return await self._checks.of(name, dataset.newest.digest, read)

    def close(self) -> None:
        self._checks.close()

    def stalled(self) -> str | None:
        return None

    def ready(self) -> str | None:
        return None if self.grpc_address else "the controller does not take calls yet"
