"""The Control service: what people and tools ask (``shoal dataset``, ``prefetch``, ``node``, ``status``).

The rule: an answer tells what is in the record.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any

from shoal import datasets, shards
from shoal.cluster_map import NodeState
from shoal.errors import DoesNotFit, InvalidRequest, NotFound, ShoalError, SnapshotNotFound
from shoal.snapshot import Snapshot
from shoal.version import VERSION
from shoal.wire import shoal_pb2 as pb
from shoal.wire.shoal_pb2_grpc import ControlServicer
from shoal_controller import core, messages
from shoal_controller.catalog import Catalog, Definition
from shoal_controller.events import DrainRequested, PrefetchCancelled, PrefetchRequested, UndrainRequested
from shoal_controller.model import Dataset, Job, JobState
from shoal_controller.shell import Shell

log = logging.getLogger(__name__)

#: How long a new snapshot may take to reach all nodes before the answer goes out without them.
SERVED_TIMEOUT_S = 5.0
SERVED_POLL_S = 0.02


class Control(ControlServicer):
    """See ``shoal.proto``. Methods raise `shoal.errors`; `shoal_controller.rpc.Seam` turns them into statuses."""

    def __init__(self, shell: Shell, catalog: Catalog) -> None:
        self._shell = shell
        self._catalog = catalog

    async def AddDataset(self, request: pb.AddDatasetRequest, context: Any) -> pb.Dataset:
        wanted = Definition(
            name=request.name,
            origin=request.origin,
            shard_size=request.shard_size or shards.DEFAULT_SHARD_SIZE,
            replicas=request.replicas or 1,
            storage_options=request.storage_options or "{}",
            is_pinned=request.pinned,
            quota_bytes=request.quota_bytes,
            is_direct=request.direct,
        )
        dataset = await self._catalog.add(wanted)
        await self._until_nodes_serve(dataset)
        return self._dataset(dataset)

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        known = self._shell.state.datasets
        return pb.ListDatasetsResponse(datasets=[self._dataset(known[name]) for name in sorted(known)])

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.Dataset:
        return self._dataset(core.find(self._shell.state.datasets, request.name))

    async def RefreshDataset(self, request: pb.RefreshDatasetRequest, context: Any) -> pb.Dataset:
        dataset = await self._catalog.refresh(request.name)
        await self._until_nodes_serve(dataset)
        return self._dataset(dataset)

    async def SetDataset(self, request: pb.SetDatasetRequest, context: Any) -> pb.Dataset:
        return self._dataset(await self._catalog.change(request.name, messages.policy_from_wire(request)))

    async def RemoveDataset(self, request: pb.RemoveDatasetRequest, context: Any) -> pb.RemoveDatasetResponse:
        await self._catalog.remove(request.name)
        return pb.RemoveDatasetResponse()

    async def StartPrefetch(self, request: pb.StartPrefetchRequest, context: Any) -> pb.PrefetchJob:
        dataset, digest = self._snapshot(request.dataset)
        await asyncio.to_thread(self._check_matches, dataset, digest, request.prefix)
        wanted = PrefetchRequested(f"prefetch-{secrets.token_hex(4)}", dataset.name, digest, request.prefix)
        state = await self._shell.apply(wanted)
        job_id = core.matching_jobs(state.jobs, wanted)[0].id
        await self._shell.jobs.until(
            lambda state: job_id not in state.jobs or state.jobs[job_id].state is not JobState.PLANNING
        )
        job = self._job(job_id)
        if job.state is JobState.REFUSED:
            raise DoesNotFit(job.reason)
        if job.state is JobState.FAILED:
            raise ShoalError(job.reason)
        return messages.job_to_wire(job)

    async def WatchPrefetch(self, request: pb.WatchPrefetchRequest, context: Any) -> AsyncIterator[pb.PrefetchJob]:
        job = self._job(request.job_id)
        yield messages.job_to_wire(job)
        told, version = job, 0
        while not told.is_finished:
            version, _ = await self._shell.jobs.newer_than(version)
            job = self._job(request.job_id)
            if job != told:
                told = job
                yield messages.job_to_wire(job)

    async def ListPrefetches(self, request: pb.ListPrefetchesRequest, context: Any) -> pb.ListPrefetchesResponse:
        state = self._shell.state
        jobs = messages.jobs_for_people(state, finished=len(state.jobs))
        return pb.ListPrefetchesResponse(jobs=map(messages.job_to_wire, jobs))

    async def CancelPrefetch(self, request: pb.CancelPrefetchRequest, context: Any) -> pb.PrefetchJob:
        await self._shell.apply(PrefetchCancelled(request.job_id))
        return messages.job_to_wire(self._job(request.job_id))

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.Status:
        return messages.status_to_wire(self._shell.state, self._shell.now(), version=VERSION)

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Any) -> pb.NodeStatus:
        await self._shell.apply(DrainRequested(request.id, request.force))
        return self._node(request.id)

    async def UndrainNode(self, request: pb.UndrainNodeRequest, context: Any) -> pb.NodeStatus:
        await self._shell.apply(UndrainRequested(request.id))
        return self._node(request.id)

    async def _until_nodes_serve(self, dataset: Dataset) -> None:
        """Wait, not for ever, until every node that is up has the newest snapshot.

        What one command registered the next one can then read, whichever node it asks. A node that takes longer is only
        late: readers that know of the snapshot are answered as soon as it has come.
        """
        digest = dataset.newest.digest
        try:
            async with asyncio.timeout(SERVED_TIMEOUT_S):
                while not all(
                    member.report is not None and digest in member.report.cached_bytes
                    for member in self._shell.state.members.values()
                    if member.node.state is NodeState.UP
                ):
                    await asyncio.sleep(SERVED_POLL_S)
        except TimeoutError:
            extra = {"dataset": dataset.name, "snapshot": digest}
            log.warning("not every node has snapshot %s of dataset %s yet", digest, dataset.name, extra=extra)

    def _dataset(self, dataset: Dataset) -> pb.Dataset:
        return messages.dataset_to_wire(dataset, self._shell.state)

    def _node(self, node_id: str) -> pb.NodeStatus:
        state = self._shell.state
        return messages.node_status_to_wire(core.find_member(state.members, node_id), state, self._shell.now())

    def _job(self, job_id: str) -> Job:
        job = self._shell.state.jobs.get(job_id)
        if job is None:
            raise NotFound(f"no prefetch job is named {job_id!r}: 'shoal status' lists those that are known")
        return job

    def _snapshot(self, text: str) -> tuple[Dataset, str]:
        """The dataset and the whole digest that ``NAME[@SNAPSHOT]`` means."""
        wanted = datasets.parse_path(text)
        if wanted.path:
            raise InvalidRequest(
                f"{text!r} is no dataset: write NAME or NAME@SNAPSHOT, and give the path as the prefix"
            )
        dataset = core.find(self._shell.state.datasets, wanted.dataset)
        if not wanted.snapshot:
            return dataset, dataset.newest.digest
        matches = [digest for digest in dataset.digests if digest.startswith(wanted.snapshot)]
        if not matches:
            raise SnapshotNotFound(
                f"dataset {dataset.name} has no snapshot {wanted.snapshot}: 'shoal dataset show {dataset.name}' lists "
                "those it has"
            )
        if len(matches) > 1:
            raise InvalidRequest(f"{text!r} means {len(matches)} snapshots: write more digits")
        return dataset, matches[0]

    def _check_matches(self, dataset: Dataset, digest: str, prefix: str) -> None:
        """Raises NotFound where no object lies under `prefix`. Blocks on the disk."""
        if not Snapshot.open(self._shell.record.snapshot_path(digest)).rows_under(prefix):
            raise NotFound(
                f"no object of dataset {dataset.name} has a path that begins with {prefix!r}: "
                f"'shoal ls shoal://{dataset.name}' shows what there is"
            )
