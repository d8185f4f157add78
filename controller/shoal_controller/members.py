"""The Membership service: orders go down to the nodes, reports come up.

The rule: orders are the whole state, and a node that is slow to take them gets the newest, not a queue.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from shoal.errors import AlreadyExists, Unavailable
from shoal.wire import shoal_pb2 as pb
from shoal.wire.shoal_pb2_grpc import MembershipServicer
from shoal_controller import messages
from shoal_controller.events import NodeRegistered, NodeReported
from shoal_controller.model import State
from shoal_controller.shell import Shell


class Members(MembershipServicer):
    """See ``shoal.proto``."""

    def __init__(self, shell: Shell, controller_http: str) -> None:
        """`controller_http` is the ``host:port`` at which nodes get snapshots."""
        self._shell = shell
        self._controller_http = controller_http
        self._built: tuple[int, pb.Orders] = (0, pb.Orders())

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Orders]:
        node = messages.node_from_wire(request.node)
        await self._shell.apply(NodeRegistered(node))
        version = 0
        while True:
            version, state = await self._shell.orders.newer_than(version)
            known = state.map.node(node.id)
            if known is None:
                raise Unavailable(f"node {node.id} was forgotten: watch again")
            if known.address != node.address:
                raise AlreadyExists(
                    f"node id {node.id} is now claimed by {known.address}: stop one of the two processes, and give it "
                    "a data directory of its own"
                )
            yield self._orders(version, state)

    async def Report(self, request: pb.NodeReport, context: Any) -> pb.ReportAck:
        state = await self._shell.apply(NodeReported(messages.report_from_wire(request)))
        return pb.ReportAck(epoch=state.map.epoch, unknown=request.node.id not in state.members)

    def _orders(self, version: int, state: State) -> pb.Orders:
        """The message of a version, built once for all nodes."""
        if self._built[0] != version:
            orders = messages.orders(state, controller_http=self._controller_http, cluster_id=self._shell.cluster_id)
            self._built = (version, orders)
        return self._built[1]
