"""One controller as a whole: the shell, the gRPC services and the HTTP routes, started and stopped in order.

The rule: what answers last stops last. Calls end before the record closes, so nothing is half told.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from prometheus_client.registry import Collector

from shoal.errors import StoreUnusable
from shoal.wire import addresses, routes
from shoal.wire.http_server import HttpServer
from shoal.wire.shoal_pb2_grpc import add_ControlServicer_to_server, add_MembershipServicer_to_server
from shoal_controller.bootstrap import ControllerView
from shoal_controller.catalog import AdhocPolicy, Catalog, ListOrigin
from shoal_controller.control import Control
from shoal_controller.members import Members
from shoal_controller.metrics import ControllerMetrics
from shoal_controller.model import Policy
from shoal_controller.record import Record
from shoal_controller.rpc import Seam
from shoal_controller.shell import Shell
from shoal_controller.sqlite_record import SqliteRecord

#: What calls get to end by themselves when the controller stops; streams to nodes never do.
STOP_GRACE_S = 0.5

_OPTIONS = [
    # Two controllers on one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
    # Orders carry every dataset.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", 64 << 20),
    # A peer that vanished without a word is noticed; one that asks the same of us is not taken for an attacker.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
]


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 is any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Take ``HOST:PORT`` apart. Raises InvalidRequest."""
        return cls(*addresses.split(text, "0.0.0.0:7440"))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def advertised(self) -> str:
        """The host under which others reach a process that listens here, as far as one can tell."""
        return socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a controller is told at its start.

    Attributes:
        advertise: host under which nodes and clients reach it.
        open_record: opens the record over `data_dir`; called in a thread.
    """

    data_dir: Path
    grpc: Address
    http: Address
    advertise: str
    policy: Policy
    adhoc: AdhocPolicy
    open_record: Callable[[Path], Record] = SqliteRecord.open


class Server:
    """A running controller. For what runs beside it in the process, `shell` and `catalog` are its own."""

    def __init__(
        self, shell: Shell, catalog: Catalog, grpc_address: str, http_address: str, stack: AsyncExitStack
    ) -> None:
        """Use `start`. The addresses are ``host:port`` as others reach them."""
        self.shell = shell
        self.catalog = catalog
        self.grpc_address = grpc_address
        self.http_address = http_address
        self._stack = stack

    @classmethod
    async def start(cls, config: Config, list_origin: ListOrigin, *collectors: Collector) -> Server:
        """Open the data directory and serve.

        Args:
            collectors: metrics of what runs beside it in the process.

        Raises:
            StoreUnusable: the data directory or one of the addresses cannot be used.
        """
        async with AsyncExitStack() as stack:
            shell = await Shell.start(lambda: config.open_record(config.data_dir), config.policy)
            stack.push_async_callback(shell.close)
            catalog = Catalog(shell, list_origin, config.adhoc)
            stack.push_async_callback(catalog.close)
            view = ControllerView(shell, catalog)
            stack.callback(view.close)
            metrics = ControllerMetrics(shell, *collectors)

            http = HttpServer(routes.make_handler(view, metrics.exposition), epoch=view.epoch)
            stack.push_async_callback(http.close)
            try:
                http_port = await http.listen_tcp(config.http.host, config.http.port)
            except OSError as error:
                raise _cannot_listen(config.http, "--http-listen", error) from error
            view.http_address = str(Address(config.advertise, http_port))

            services = grpc.aio.server(interceptors=[Seam(metrics.count_call)], options=_OPTIONS)
            add_ControlServicer_to_server(Control(shell, catalog), services)
            add_MembershipServicer_to_server(Members(shell, view.http_address), services)
            grpc_port = _bind(services, config.grpc)
            await services.start()
            stack.push_async_callback(services.stop, STOP_GRACE_S)
            view.grpc_address = str(Address(config.advertise, grpc_port))
            return cls(shell, catalog, view.grpc_address, view.http_address, stack.pop_all())
        raise AssertionError("the stack swallows no exception")

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set.

        Raises:
            StoreUnusable: the record can no longer be written; a new start goes on from what is recorded.
        """
        stopping, failing = asyncio.create_task(stop.wait()), asyncio.create_task(self.shell.failed())
        try:
            await asyncio.wait((stopping, failing), return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                failing.result()
        finally:
            stopping.cancel()
            failing.cancel()
            await asyncio.gather(stopping, failing, return_exceptions=True)

    async def close(self) -> None:
        await self._stack.aclose()


def _bind(services: grpc.aio.Server, address: Address) -> int:
    try:
        # gRPC says only that it failed, and prints a page about it; a plain socket says why.
        family, kind, protocol, _, name = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(name)
            probe.listen()
        return int(services.add_insecure_port(str(address)))
    except (OSError, RuntimeError) as error:
        raise _cannot_listen(address, "--grpc-listen", error) from error


def _cannot_listen(address: Address, flag: str, error: Exception) -> StoreUnusable:
    reason = str(error)
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror):
        reason = os.strerror(error.errno)
    return StoreUnusable(f"cannot listen on {address} ({reason}): name another address with {flag}")
