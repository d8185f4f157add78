"""The node's side of the control plane: orders come down a stream, reports go up once a second and renew the lease.

The rule: without the controller everything goes on that needs no change. Both loops try again for ever, and the last
orders stay in force.
"""

from __future__ import annotations

import asyncio
import json
import logging

import grpc

from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.datasets import DatasetRecord
from shoal.version import VERSION
from shoal.wire import shoal_pb2 as pb
from shoal.wire.shoal_pb2_grpc import MembershipStub
from shoal_cachenode.library import Knowledge, KnownDataset
from shoal_cachenode.node import CacheNode
from shoal_cachenode.prefetch import Order, Prefetches

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 0.5
RPC_TIMEOUT_S = 5.0
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A controller that died without a word is noticed, and one that came back is found, within seconds.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # The time limit of one attempt to connect; gRPC's own is 20 s. What was sent to a Service before the machine had
    # its rules is lost, however often TCP repeats it.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.enable_http_proxy", 0),  # the controller is inside the cluster, a proxy leads out of it
]


class Membership:
    """Keeps a node in the cluster. `start` returns at once; the node serves while the controller is away."""

    def __init__(self, node: CacheNode, prefetches: Prefetches, controller: str) -> None:
        self._node = node
        self._prefetches = prefetches
        self._controller = controller
        self._channel = grpc.aio.insecure_channel(controller, options=_OPTIONS)
        self._stub = MembershipStub(self._channel)
        self._tasks: list[asyncio.Task[None]] = []
        self._poke = asyncio.Event()
        self.is_connected = False

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._report_for_ever())]

    async def leave(self) -> None:
        """Say goodbye, so that placement gives this node's shards to others at once, and stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._stub.Report(await self._report(leaving=True), timeout=2.0)
        except grpc.RpcError as error:
            log.info("the controller did not hear the goodbye: %s", _reason(error))
        await self._channel.close(None)

    async def _watch(self) -> None:
        while True:
            try:
                async for orders in self._stub.Watch(pb.WatchRequest(node=_to_wire(self._node.describe()))):
                    if not self.is_connected:
                        log.info("connected to the controller at %s", self._controller)
                    self.is_connected = True
                    await self._node.apply(knowledge_of(orders, self._controller))
                    self._prefetches.apply([_order(p) for p in orders.prefetches])
                    self._poke.set()
            except grpc.RpcError as error:
                if self.is_connected:
                    log.warning("lost the controller at %s: %s", self._controller, _reason(error))
            except Exception:
                # Orders that cannot be applied now (a full disk, say) come again with the next connection.
                log.exception("orders could not be applied")
            self.is_connected = False
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _report_for_ever(self) -> None:
        refusal = ""
        while True:
            try:
                ack = await self._stub.Report(await self._report(leaving=False), timeout=RPC_TIMEOUT_S)
                refusal = ""
                if ack.unknown:
                    log.info("the controller does not know this node yet")
            except grpc.aio.AioRpcError as error:
                is_news = error.code() is grpc.StatusCode.INVALID_ARGUMENT and _reason(error) != refusal
                log.log(logging.WARNING if is_news else logging.DEBUG, "report failed: %s", _reason(error))
                refusal = _reason(error)
            except Exception:
                log.exception("report failed")
            self._poke.clear()
            try:
                # A prefetch that was just ordered is answered at once, not a second later.
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._poke.wait()
                await asyncio.sleep(0.05)
            except TimeoutError:
                pass

    async def _report(self, *, leaving: bool) -> pb.NodeReport:
        node = self._node
        knowledge = node.library.knowledge
        report = pb.NodeReport(
            node=_to_wire(node.describe()),
            epoch=knowledge.cluster_map.epoch,
            used_bytes=node.store.used_bytes,
            capacity_bytes=node.store.capacity_bytes,
            condition=node.condition,
            leaving=leaving,
            version=VERSION,
            handover_bytes=node.rebalance.handover_bytes,
            short_bytes=node.rebalance.short_bytes,
        )
        for known in knowledge.datasets:
            digest = known.record.snapshot
            holdings = await node.holdings_of(digest)
            if holdings is not None:
                opened = await node.library.snapshot(digest)
                placement = node.library.placement(opened, known.record.replicas)
                held = holdings.held.copy()
                first = held & await asyncio.to_thread(placement.primary_of, node.id)
                report.cached.add(
                    snapshot=digest, bytes_primary=holdings.bytes_of(first), bytes_held=holdings.bytes_of(held)
                )
        for share in await self._prefetches.reports():
            report.prefetches.add(
                job_id=share.job_id,
                epoch=share.epoch,
                bytes_total=share.bytes_total,
                bytes_done=share.bytes_done,
                bytes_short=share.bytes_short,
                complete=share.complete,
                failure=share.failure,
            )
        return report


def knowledge_of(orders: pb.Orders, controller_grpc: str) -> Knowledge:
    """The orders as the node keeps them."""
    nodes = (Node(n.id, n.address, n.weight, dict(n.topology), NodeState(n.state)) for n in orders.map.nodes)
    return Knowledge(
        ClusterMap(orders.map.epoch, tuple(sorted(nodes, key=lambda n: n.id))),
        tuple(
            KnownDataset(
                DatasetRecord(
                    name=d.name,
                    origin=d.origin,
                    endpoint=d.endpoint,
                    shard_size=d.shard_size,
                    replicas=d.replicas,
                    snapshot=d.snapshot,
                    snapshots=tuple(d.snapshots),
                    objects=d.objects,
                    total_bytes=d.bytes,
                    adhoc=d.adhoc,
                    pinned=d.pinned,
                    quota_bytes=d.quota_bytes,
                    direct=d.direct,
                ),
                json.loads(d.storage_options or "{}"),
            )
            for d in orders.datasets
        ),
        orders.controller_http,
        controller_grpc,
        orders.cluster_id,
    )


def _order(order: pb.PrefetchOrder) -> Order:
    return Order(order.job_id, order.dataset, order.snapshot, order.prefix, order.run)


def _to_wire(node: Node) -> pb.Node:
    return pb.Node(
        id=node.id, address=node.address, weight=node.weight, topology=dict(node.topology), state=str(node.state)
    )


def _reason(error: grpc.RpcError) -> str:
    return str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
