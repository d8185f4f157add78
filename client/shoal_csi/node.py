"""The CSI node service: a dataset, or a folder of it, shown to a pod.

    publish   lock the target → what is there already? → which snapshot → the node's mount of it → bind → ask it → done
    unpublish lock the target → detach, remove → the node's mount of it goes with its last volume

There is no staging call (``STAGE_UNSTAGE_VOLUME``): it comes once a volume, while the mount here is one for all volumes
of a dataset, and it does not come at all for a pod's inline volumes.

The rule: success means that the mount answered at the target; after a failure the call left nothing there.
"""

from __future__ import annotations

import logging

import grpc

from shoal.errors import InvalidRequest, NotFound, ShoalError
from shoal_csi import bind, capability, targets, volume
from shoal_csi import csi_pb2 as pb
from shoal_csi.catalog import Catalog
from shoal_csi.csi_pb2_grpc import NodeServicer
from shoal_csi.locks import Locks
from shoal_csi.mount_table import Mount, MountTable
from shoal_csi.probing import Finding, Prober, State
from shoal_csi.refusals import NotAnswering
from shoal_csi.shared import SharedMount, SharedMounts
from shoal_csi.volume import Volume

log = logging.getLogger(__name__)

#: Of a call without a deadline.
CALL_S = 60.0
#: How long the last volume waits to take its mount away; the keeper does it later otherwise.
RELEASE_WAIT_S = 5.0

_CAPABILITIES = (
    pb.NodeServiceCapability.RPC.GET_VOLUME_STATS,
    pb.NodeServiceCapability.RPC.VOLUME_CONDITION,
)


class Node(NodeServicer):
    """Args:
    node_id: what the orchestrator calls this node.
    """

    def __init__(self, node_id: str, catalog: Catalog, shared: SharedMounts, locks: Locks, prober: Prober) -> None:
        self._node_id = node_id
        self._catalog = catalog
        self._shared = shared
        self._locks = locks
        self._prober = prober

    def NodeGetInfo(self, request: pb.NodeGetInfoRequest, context: grpc.ServicerContext) -> pb.NodeGetInfoResponse:
        return pb.NodeGetInfoResponse(node_id=self._node_id)

    def NodeGetCapabilities(
        self, request: pb.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.NodeGetCapabilitiesResponse:
        capabilities = [pb.NodeServiceCapability(rpc=pb.NodeServiceCapability.RPC(type=each)) for each in _CAPABILITIES]
        return pb.NodeGetCapabilitiesResponse(capabilities=capabilities)

    def NodePublishVolume(
        self, request: pb.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> pb.NodePublishVolumeResponse:
        _check_id(request.volume_id)
        target = targets.checked(request.target_path, "target_path")
        if not request.HasField("volume_capability"):
            raise InvalidRequest("volume_capability is missing")
        wanted = request.volume_capability
        capability.check(wanted)
        described = volume.parse(request.volume_context)
        if refusal := capability.refusal(wanted, described, is_readonly=request.readonly):
            raise capability.Unsupported(refusal)
        targets.check_parent(target)
        left_s = context.time_remaining()
        with targets.target_lock(self._locks, target):
            self._publish(described, target, capability.mount_flags(wanted), CALL_S if left_s is None else left_s)
        return pb.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: pb.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> pb.NodeUnpublishVolumeResponse:
        _check_id(request.volume_id)
        target = targets.checked(request.target_path, "target_path")
        with targets.target_lock(self._locks, target):
            table = MountTable.now()
            seen = table.at(target)
            shared = self._shared.of(seen, table) if seen is not None else None
            if targets.remove(target):
                log.info("unpublished %s", target, extra={"volume": target})
        if shared is not None:
            self._release(shared)
        return pb.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: pb.NodeGetVolumeStatsRequest, context: grpc.ServicerContext
    ) -> pb.NodeGetVolumeStatsResponse:
        _check_id(request.volume_id)
        if not request.volume_path:
            raise InvalidRequest("volume_path is missing")
        table = MountTable.now()
        path = request.volume_path
        seen = table.at(targets.checked(path, "volume_path")) if path.startswith("/") else None
        if seen is None:
            raise NotFound(f"no volume is published at {path}")
        return _stats(seen, self._prober.probe(seen.mountpoint))

    def _publish(self, described: Volume, target: str, flags: int, wait_s: float) -> None:
        table = MountTable.now()
        seen = table.at(target)
        if seen is not None:
            state = self._prober.probe(target).state
            if state is State.SILENT:
                raise NotAnswering(f"the volume at {target} does not answer: its server is being replaced, or is stuck")
            if state is State.ALIVE:
                targets.settle(seen, self._shared.of(seen, table), described, flags)
                return
            log.warning("what is mounted at %s %s: detaching it", target, state.value, extra={"volume": target})
            bind.detach(target)
        snapshot = self._catalog.snapshot(described)
        with self._shared.lock(f"{described.dataset}@{snapshot}", wait_s=wait_s):
            shared = self._shared.ensure(described.dataset, snapshot)
            try:
                bind.bind(shared.mountpoint, described.subpath, target, flags)
                state = self._prober.probe(target).state
                if state is not State.ALIVE:
                    raise NotAnswering(f"{shared.name} was published at {target} and {state.value}")
            except ShoalError:
                targets.remove(target)
                self._shared.release(shared)
                raise
        subpath = f"/{described.subpath}" if described.subpath else ""
        extra = {"dataset": shared.dataset, "snapshot": shared.snapshot, "volume": target}
        log.info("published %s%s at %s", shared.name, subpath, target, extra=extra)

    def _release(self, shared: SharedMount) -> None:
        """The volume is gone whether this succeeds or not: what fails is the keeper's."""
        extra = {"dataset": shared.dataset, "mount": shared.mountpoint}
        try:
            with self._shared.lock(shared.name, wait_s=RELEASE_WAIT_S):
                if self._shared.release(shared):
                    log.info("unmounted %s: no volume uses it", shared.mountpoint, extra=extra)
        except ShoalError as error:
            log.warning("%s stays mounted for now: %s", shared.mountpoint, error, extra=extra)


def _check_id(volume_id: str) -> None:
    if not volume_id:
        raise InvalidRequest("volume_id is missing")


def _stats(seen: Mount, finding: Finding) -> pb.NodeGetVolumeStatsResponse:
    usage = finding.usage
    if usage is None:
        condition = pb.VolumeCondition(abnormal=True, message=f"the mount at {seen.mountpoint} {finding.state.value}")
        return pb.NodeGetVolumeStatsResponse(volume_condition=condition)
    return pb.NodeGetVolumeStatsResponse(
        usage=[
            pb.VolumeUsage(
                unit=pb.VolumeUsage.BYTES,
                total=usage.total_bytes,
                used=usage.used_bytes,
                available=usage.available_bytes,
            ),
            pb.VolumeUsage(
                unit=pb.VolumeUsage.INODES,
                total=usage.total_inodes,
                used=usage.used_inodes,
                available=usage.available_inodes,
            ),
        ],
        volume_condition=pb.VolumeCondition(abnormal=False, message="the mount answers"),
    )
