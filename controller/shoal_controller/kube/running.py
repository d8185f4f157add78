"""`shoal-controller --kubernetes`: the process of one replica.

    standby    serves the gate and the probes, waits for the lease
    leader     serves everything, renews the lease, operates
    end        the lease is lost, the record cannot be written, or SIGTERM; the pod's next container begins as a standby

The rule: the lease is given back last, after the record is closed.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from shoal import logs
from shoal.errors import NotFound, StoreUnusable, Unavailable
from shoal.transport import Transport
from shoal.wire.http_messages import Request, Response
from shoal.wire.http_server import HttpServer
from shoal.wire.process_metrics import CONTENT_TYPE, Exposition
from shoal_controller.kube import endpoints, webhook
from shoal_controller.kube.api import Api, ApiError, HttpApi
from shoal_controller.kube.lease import Election
from shoal_controller.kube.metrics import OperatorMetrics
from shoal_controller.kube.nodes import DRAINING_TAINTS
from shoal_controller.kube.operator import Operator, Settings
from shoal_controller.kube.record import KubeRecord
from shoal_controller.metrics import PROGRAM
from shoal_controller.origins import list_origin
from shoal_controller.server import Address, Config, Server
from shoal_controller.snapshot_recovery import SnapshotRecovery

log = logging.getLogger(__name__)

RETRY_S = 2.0
#: Nodes find a new leader once the proxies of their machines know of the EndpointSlice. The price: a node that died
#: together with the leader is down that much later.
FIRST_LEASE_S = 20.0
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def own_namespace() -> str:
    """The namespace of the pod's service account; outside of a pod, ``default``."""
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


@dataclass(frozen=True, slots=True)
class KubeConfig:
    """What a replica is told about Kubernetes at its start.

    Attributes:
        identity: its name in the lease; the pod's.
        pod_ip: at which it is reached; "" where no Service leads to it.
        lease: name of the Lease, and of the Service and its EndpointSlice; the record is named so with ``-record``.
        certificates: directory with the gate's ``tls.crt`` and ``tls.key``; None: no gate.
        gate_namespaces: where pods may be gated; () for all.
        taints: keys of taints that drain a node, besides those that always do.
    """

    namespace: str
    identity: str
    pod_ip: str
    lease: str
    gate: Address
    certificates: Path | None
    gate_namespaces: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()


async def serve(config: Config, kube: KubeConfig, stop: asyncio.Event) -> None:
    """Follow, lead, and end when `stop` is set.

    Raises:
        LeaseLost: another replica may lead now.
        StoreUnusable: the record or an address cannot be used.
        ShoalError: no API server is known.
    """
    logs.note(replica=kube.identity)
    async with AsyncExitStack() as stack:
        metrics = OperatorMetrics()
        api = await HttpApi.connect(metrics.answered)
        stack.push_async_callback(api.close)
        if kube.certificates is not None:
            gate = webhook.served(kube.gate.host, kube.gate.port, kube.certificates, metrics)
            port = await stack.enter_async_context(gate)
            log.info("the gate is served on port %d", port)
        election = Election(api, namespace=kube.namespace, name=kube.lease, identity=kube.identity)
        metrics.election = election
        async with _standby(config.http, metrics) as http_port:
            print("standby", json.dumps({"http": str(Address(config.advertise, http_port))}), flush=True)
            stack.push_async_callback(election.release)
            await _first(election.acquire(), stop.wait())
        if stop.is_set():
            return
        await _lead(api, config, kube, election, metrics, stop)


async def _lead(
    api: Api, config: Config, kube: KubeConfig, election: Election, metrics: OperatorMetrics, stop: asyncio.Event
) -> None:
    async with AsyncExitStack() as stack:
        holding = asyncio.create_task(election.hold())
        stack.callback(holding.cancel)
        open_record = partial(
            KubeRecord.open,
            api=api,
            loop=asyncio.get_running_loop(),
            namespace=kube.namespace,
            name=f"{kube.lease}-record",
        )
        policy = replace(config.policy, first_lease_s=FIRST_LEASE_S)
        server = await Server.start(replace(config, open_record=open_record, policy=policy), list_origin, metrics)
        stack.push_async_callback(server.close)
        transport = Transport()
        stack.callback(transport.close)
        record = cast(KubeRecord, server.shell.record)
        gated = (kube.gate_namespaces or ("",)) if kube.certificates is not None else ()
        settings = Settings(kube.namespace, gated, (*DRAINING_TAINTS, *kube.taints))
        operator = metrics.work = Operator(api, server.shell, server.catalog, record, settings, metrics)
        print("ready", json.dumps({"grpc": server.grpc_address, "http": server.http_address}), flush=True)
        await _first(
            holding,
            server.serve(stop),
            _and_wait(_publish(api, kube, server)),
            _and_wait(SnapshotRecovery(server.shell, server.catalog, transport).run()),
            operator.run(),
        )


async def _publish(api: Api, kube: KubeConfig, server: Server) -> None:
    if not kube.pod_ip:
        return
    ports = {name: Address.parse(address).port for name, address in _addresses(server)}
    while True:
        try:
            await endpoints.publish(api, kube.namespace, kube.lease, kube.pod_ip, ports)
            return
        except ApiError as error:
            log.warning("the Service %s does not lead here yet: %s", kube.lease, error)
            await asyncio.sleep(RETRY_S)


def _addresses(server: Server) -> list[tuple[str, str]]:
    return [("grpc", server.grpc_address), ("http", server.http_address)]


async def _and_wait(work: Any) -> None:
    await work
    await asyncio.Event().wait()


async def _first(*works: Any) -> None:
    """Until the first of `works` ends; its exception is raised, and the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@asynccontextmanager
async def _standby(address: Address, metrics: OperatorMetrics) -> AsyncIterator[int]:
    """Answer probes, which find a standby ready: it does all that a standby can."""
    http = HttpServer(partial(_answer, Exposition(PROGRAM, metrics)), epoch=lambda: 0)
    try:
        port = await http.listen_tcp(address.host, address.port)
    except OSError as error:
        raise StoreUnusable(
            f"cannot listen on {address} ({error.strerror or error}): name another address with --http-listen"
        ) from error
    try:
        yield port
    finally:
        await http.close()


async def _answer(exposition: Exposition, request: Request) -> Response:
    match request.path:
        case "/healthz" | "/readyz":
            return Response(200, {"Content-Type": "text/plain; charset=utf-8"}, b"standby\n")
        case "/metrics":
            return Response(200, {"Content-Type": CONTENT_TYPE}, exposition.text())
    if request.path.startswith("/v1/"):
        raise Unavailable("this controller stands by: ask the one that leads, through the Service")
    raise NotFound(f"nothing is served at {request.path!r}")
