"""One driver as a whole: its services on a Unix socket, started and stopped in order.

The rule: the driver answers at once, whatever the former one left. Locks keep calls from what is being put in order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc

from shoal.errors import InvalidRequest, StoreUnusable
from shoal.wire.process_metrics import Exposition
from shoal_csi import metrics, scrapes
from shoal_csi.catalog import Catalog
from shoal_csi.controller import Controller
from shoal_csi.csi_pb2_grpc import (
    add_ControllerServicer_to_server,
    add_IdentityServicer_to_server,
    add_NodeServicer_to_server,
)
from shoal_csi.identity import Identity
from shoal_csi.keeper import Keeper
from shoal_csi.locks import Locks
from shoal_csi.mounting import CommandMounts
from shoal_csi.node import Node
from shoal_csi.probing import Prober
from shoal_csi.refusals import Seam
from shoal_csi.shared import SharedMounts

log = logging.getLogger(__name__)

#: Calls that are answered at once; each may wait for a mount.
MAX_CALLS = 64
#: What calls get to end by themselves when the driver stops. What they mounted is found by the next one.
STOP_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a driver is told at its start.

    Attributes:
        socket: of the services.
        node_id: what the orchestrator calls this node; "" without the node service.
        shoal_endpoint: of the cluster; "" for what the environment says.
        state_dir: for the node's mounts and locks; the orchestrator sees it at the same path.
        command: the words before ``mount`` and ``umount``.
        probe_timeout_s: a mount that is silent for longer does not answer.
        look_after_every_s: between two looks at all mounts.
        local_tier, local_tier_size: what each mount is given as such; None: nothing.
        metrics: host and port to answer Prometheus at; None: nowhere.
    """

    socket: Path
    node_id: str
    shoal_endpoint: str
    state_dir: Path
    command: Sequence[str]
    has_controller: bool
    has_node: bool
    probe_timeout_s: float
    look_after_every_s: float
    local_tier: Path | None
    local_tier_size: int
    metrics: tuple[str, int] | None


class Driver:
    """A running driver.

    Attributes:
        metrics_port: at which Prometheus is answered; None: at none.
    """

    def __init__(self, config: Config) -> None:
        """Serve, and look after what is mounted.

        Raises:
            InvalidRequest: another driver serves at that socket.
            StoreUnusable: the state directory, the socket or the address for metrics cannot be used.
        """
        self._keeper: Keeper | None = None
        self.metrics_port: int | None = None
        self._end_metrics: Callable[[], None] | None = None
        exposition = Exposition(metrics.PROGRAM)
        self._services = grpc.server(
            ThreadPoolExecutor(MAX_CALLS, "call"),
            interceptors=[Seam(metrics.CallMetrics(exposition).begun)],
            options=[("grpc.so_reuseport", 0)],
        )
        catalog = Catalog(config.shoal_endpoint)
        identity = Identity(has_controller=config.has_controller, has_node=config.has_node)
        add_IdentityServicer_to_server(identity, self._services)
        if config.has_controller:
            add_ControllerServicer_to_server(Controller(catalog), self._services)
        _check_free(config.socket)
        if config.has_node:
            add_NodeServicer_to_server(self._node(config, catalog, exposition), self._services)
        _bind(self._services, config.socket)
        if config.metrics is not None:
            self.metrics_port, self._end_metrics = scrapes.serve(exposition, *config.metrics)
        self._services.start()

    def close(self) -> None:
        """End the calls, then the rounds. Mounts stay."""
        self._services.stop(STOP_GRACE_S).wait()
        if self._keeper is not None:
            self._keeper.stop()
        if self._end_metrics is not None:
            self._end_metrics()

    def _node(self, config: Config, catalog: Catalog, exposition: Exposition) -> Node:
        try:
            folder = config.state_dir / "mounts"
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            locks = Locks(config.state_dir / "locks")
        except OSError as error:
            raise StoreUnusable(
                f"cannot use {config.state_dir} ({error.strerror}): name another folder with --state-dir"
            ) from error
        prober = Prober(config.probe_timeout_s)
        tier: list[str] = []
        if config.local_tier is not None:
            tier = ["--local-tier", str(config.local_tier), "--local-tier-size", str(config.local_tier_size)]
        mounts = CommandMounts(config.command, config.shoal_endpoint, prober, tier)
        counted = metrics.MountMetrics(folder.resolve(), config.local_tier, config.local_tier_size)
        shared = SharedMounts(folder.resolve(), mounts, locks, prober, counted.before_end)
        counted.count_volumes = shared.count_volumes
        exposition.registry.register(counted)
        self._keeper = Keeper(shared, locks, every_s=config.look_after_every_s, count=counted.count_kept)
        self._keeper.start()
        return Node(config.node_id, catalog, shared, locks, prober)


def socket_path(endpoint: str) -> Path:
    """The path of ``unix:///path``, ``unix:/path`` or ``/path``. Raises InvalidRequest."""
    path = endpoint.removeprefix("unix://").removeprefix("unix:")
    if not path.startswith("/"):
        raise InvalidRequest(f"{endpoint!r} is no CSI endpoint: write unix:///path/to/csi.sock")
    return Path(path)


def _check_free(path: Path) -> None:
    """Remove the socket that a killed driver left. Raises InvalidRequest where one lives."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise InvalidRequest(f"{path} is there and no socket: name another --endpoint")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as other:
            other.settimeout(1.0)
            other.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:  # nobody listens
        path.unlink(missing_ok=True)
        return
    except OSError:
        pass  # somebody does, and is too busy to answer
    raise InvalidRequest(f"another driver serves at {path}: stop that, or name another --endpoint")


def _bind(services: grpc.Server, path: Path) -> None:
    former = os.umask(0o077)  # whoever can call the driver can mount
    try:
        services.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise StoreUnusable(f"cannot listen at {path}: name another --endpoint ({error})") from error
    finally:
        os.umask(former)
