"""The CSI controller service: volumes for claims whose StorageClass names a dataset.

Nothing is created: a volume is a name for a dataset that exists. So an id and a context made from the same request are
the same on any controller, and deleting a volume is saying yes. Unless the StorageClass says otherwise the snapshot is
chosen here, once, so that all pods of a claim see the same files on every node.

The rule: no state. Whatever a later call needs is in the volume's context or in its id.
"""

from __future__ import annotations

import dataclasses
import logging

import grpc

from shoal.errors import InvalidRequest, NotFound
from shoal_csi import capability, volume
from shoal_csi import csi_pb2 as pb
from shoal_csi.catalog import Catalog
from shoal_csi.csi_pb2_grpc import ControllerServicer
from shoal_csi.volume import Volume

log = logging.getLogger(__name__)

_RPC = pb.ControllerServiceCapability.RPC


class Controller(ControllerServicer):
    """Makes volumes of the datasets of `catalog`."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def ControllerGetCapabilities(
        self, request: pb.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.ControllerGetCapabilitiesResponse:
        rpc = _RPC(type=_RPC.CREATE_DELETE_VOLUME)
        return pb.ControllerGetCapabilitiesResponse(capabilities=[pb.ControllerServiceCapability(rpc=rpc)])

    def CreateVolume(self, request: pb.CreateVolumeRequest, context: grpc.ServicerContext) -> pb.CreateVolumeResponse:
        if not request.name:
            raise InvalidRequest("the volume's name is missing")
        if not request.volume_capabilities:
            raise InvalidRequest("volume_capabilities are missing")
        asked = volume.parse(request.parameters)
        if refusal := capability.first_refusal(request.volume_capabilities, asked):
            raise InvalidRequest(refusal)
        if request.HasField("volume_content_source"):
            raise InvalidRequest("a dataset cannot be cloned or restored: leave out the claim's dataSource")
        if request.mutable_parameters:
            raise InvalidRequest("a volume has no parameters that change: leave out the VolumeAttributesClass")
        _check_capacity(request.capacity_range)
        self._catalog.record(asked.dataset)  # or there is none of that name
        pinned = asked.snapshot if asked.snapshot == volume.NEWEST else self._catalog.snapshot(asked)
        chosen = dataclasses.replace(asked, snapshot=pinned)
        made = pb.Volume(volume_id=volume.volume_id(request.name, asked), volume_context=chosen.context())
        extra = {"volume": made.volume_id, "dataset": chosen.dataset, "snapshot": chosen.snapshot}
        log.info("volume %s is %s@%s", made.volume_id, chosen.dataset, chosen.snapshot, extra=extra)
        # Its size is not known (0): the origin's is the dataset's own, and a claim's is what somebody had to write.
        return pb.CreateVolumeResponse(volume=made)

    def DeleteVolume(self, request: pb.DeleteVolumeRequest, context: grpc.ServicerContext) -> pb.DeleteVolumeResponse:
        if not request.volume_id:
            raise InvalidRequest("volume_id is missing")
        return pb.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: pb.ValidateVolumeCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.ValidateVolumeCapabilitiesResponse:
        if not request.volume_id:
            raise InvalidRequest("volume_id is missing")
        if not request.volume_capabilities:
            raise InvalidRequest("volume_capabilities are missing")
        described = self._known(request)
        refusal = capability.first_refusal(request.volume_capabilities, described)
        if refusal:
            return pb.ValidateVolumeCapabilitiesResponse(message=refusal)
        confirmed = pb.ValidateVolumeCapabilitiesResponse.Confirmed(
            volume_context=request.volume_context,
            volume_capabilities=request.volume_capabilities,
            parameters=request.parameters,
        )
        return pb.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)

    def _known(self, request: pb.ValidateVolumeCapabilitiesRequest) -> Volume | None:
        """The volume of a request, if all is known of it; None where only its dataset is.

        Raises:
            NotFound: there is no such volume.
        """
        described = volume.parse(request.volume_context) if request.volume_context else None
        dataset = described.dataset if described is not None else volume.dataset_of(request.volume_id)
        if dataset is None:
            raise NotFound(
                f"there is no volume {request.volume_id!r}, and its context, which is not given, may say more"
            )
        self._catalog.record(dataset)
        return described


def _check_capacity(wanted: pb.CapacityRange) -> None:
    required, limit = wanted.required_bytes, wanted.limit_bytes
    if required < 0 or limit < 0 or (limit and limit < required):
        raise InvalidRequest(f"the capacity is {required} to {limit} bytes: any that is a range will do")
