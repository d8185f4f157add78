"""The CSI identity service: who the driver is, and whether it can work.

The rule: a driver is ready without the cluster. Restarting it would not bring the cluster back, and what is mounted
goes on.
"""

from __future__ import annotations

from pathlib import Path

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from shoal.version import VERSION
from shoal_csi import csi_pb2 as pb
from shoal_csi.capability import Unsupported
from shoal_csi.csi_pb2_grpc import IdentityServicer

DRIVER_NAME = "csi.shoal.io"
_FUSE = Path("/dev/fuse")

_Service = pb.PluginCapability.Service


class Identity(IdentityServicer):
    """Args:
    has_controller, has_node: which of the other services this process has.
    """

    def __init__(self, *, has_controller: bool, has_node: bool) -> None:
        self._has_controller = has_controller
        self._has_node = has_node

    def GetPluginInfo(
        self, request: pb.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetPluginInfoResponse:
        return pb.GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=VERSION)

    def GetPluginCapabilities(
        self, request: pb.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.GetPluginCapabilitiesResponse:
        services = [_Service.CONTROLLER_SERVICE] if self._has_controller else []
        capabilities = [pb.PluginCapability(service=_Service(type=each)) for each in services]
        return pb.GetPluginCapabilitiesResponse(capabilities=capabilities)

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        if self._has_node and not _FUSE.exists():
            raise Unsupported(
                f"{_FUSE} is missing: load the kernel's fuse module and let the container have the device"
            )
        return pb.ProbeResponse(ready=BoolValue(value=True))
