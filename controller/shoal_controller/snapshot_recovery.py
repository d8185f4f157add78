"""Brings back the files of snapshots that a controller's record names and its disk has not.

A controller that starts on another machine, as a new leader does, has the record and no files. Nodes have them: each
keeps the snapshots that it was told of. What no node has is listed at the origin again.

The rule: a file is verified against its digest before it has its name, so it matters not who sent it.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path

from shoal.cluster_map import NodeState
from shoal.errors import ShardCorrupt, ShoalError
from shoal.snapshot import Snapshot
from shoal.transport import Transport
from shoal_controller.catalog import Catalog
from shoal_controller.model import Dataset, Member
from shoal_controller.shell import Shell

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0


class SnapshotRecovery:
    """For one event loop."""

    def __init__(self, shell: Shell, catalog: Catalog, transport: Transport) -> None:
        self._shell = shell
        self._catalog = catalog
        self._transport = transport

    async def run(self) -> None:
        """Return once every snapshot that the record names is here."""
        retry_s = FIRST_RETRY_S
        while True:
            left = [dataset for dataset in self._shell.state.datasets.values() if not await self._has_all(dataset)]
            if not left:
                return
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _has_all(self, dataset: Dataset) -> bool:
        lacking = [digest for digest in dataset.digests if not self._shell.record.snapshot_path(digest).exists()]
        for digest in list(lacking):
            if await self._fetch(digest):
                lacking.remove(digest)
        if dataset.newest.digest in lacking and self._may_list():
            try:
                await self._catalog.refresh(dataset.name)
                return False  # it is another dataset now; look again
            except ShoalError as error:
                log.warning("the snapshot of dataset %s is on no node, and its origin: %s", dataset.name, error)
        # Of older ones nobody else can have more, so they are not waited for.
        return dataset.newest.digest not in lacking

    def _may_list(self) -> bool:
        """Whether every node that is known was asked: one that was not heard yet may have it."""
        return all(member.report is not None or member.node.state is NodeState.DOWN for member in self._members())

    def _members(self) -> list[Member]:
        return list(self._shell.state.members.values())

    async def _fetch(self, digest: str) -> bool:
        for member in self._members():
            if member.node.state is NodeState.DOWN:
                continue
            try:
                with self._shell.record.staging() as directory:
                    path = directory / f"{digest}.arrow"
                    await asyncio.to_thread(self._receive, member.node.address, digest, path)
                    await self._shell.with_record(partial(self._shell.record.files.keep, path, digest))
            except (ShoalError, OSError) as error:
                extra = {"node": member.node.id, "snapshot": digest}
                log.info("node %s did not send snapshot %s: %s", member.node.id, digest, error, extra=extra)
            else:
                log.info("snapshot %s came from node %s", digest, member.node.id)
                return True
        return False

    def _receive(self, address: str, digest: str, path: Path) -> None:
        """Blocks."""
        answer = self._transport.get(address, f"/v1/snapshots/{digest}", {"Via": "1.1 shoal"})
        path.write_bytes(answer.body)
        opened = Snapshot.open(path)
        opened.verify()
        if opened.digest != digest:
            raise ShardCorrupt(f"{address} sent snapshot {opened.digest} for {digest}")
