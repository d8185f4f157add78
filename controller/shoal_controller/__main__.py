"""`shoal-controller`: the controller as a process."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import click

from shoal import logs
from shoal.cli import log_options
from shoal.errors import ShoalError
from shoal_controller.catalog import AdhocPolicy
from shoal_controller.model import Policy
from shoal_controller.origins import list_origin
from shoal_controller.server import Address, Config, Server

log = logging.getLogger("shoal_controller")

EXAMPLES = """\b
Examples:
  shoal-controller --data-dir /var/lib/shoal/controller
  shoal-controller --data-dir ./c --grpc-listen 127.0.0.1:0 --http-listen 127.0.0.1:0
  shoal-controller --allow-adhoc s3://team-data --adhoc-storage-options '{"key": "env:KEY", "secret": "env:SECRET"}'
Every flag is also an environment variable: SHOAL_CONTROLLER_DATA_DIR, SHOAL_CONTROLLER_GRPC_LISTEN, …
"""


@click.command(epilog=EXAMPLES, context_settings={"auto_envvar_prefix": "SHOAL_CONTROLLER", "show_default": True})
@click.option(
    "--data-dir", type=Path, default=Path("/var/lib/shoal/controller"), help="Where datasets and snapshots are kept."
)
@click.option(
    "--grpc-listen", default="0.0.0.0:7440", metavar="HOST:PORT", help="For nodes and tools; port 0: any free one."
)
@click.option(
    "--http-listen", default="0.0.0.0:7441", metavar="HOST:PORT", help="For clients and metrics; port 0: any free one."
)
@click.option(
    "--advertise", metavar="HOST", help="Name under which others reach it.  [default: the host name or listening host]"
)
@click.option(
    "--allow-adhoc",
    multiple=True,
    metavar="URL",
    help="Origin prefix of which a read of shoal::URL may make a dataset. May be given several times.",
)
@click.option(
    "--adhoc-storage-options",
    default="{}",
    metavar="JSON",
    help="Storage options of such datasets; env:NAME and file:PATH refer to secrets.",
)
@click.option(
    "--lease", default=5.0, type=click.FloatRange(0.1), metavar="SECONDS", help="A node silent for so long is down."
)
@click.option(
    "--forget-after",
    default=600.0,
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="A node down for so long leaves the cluster map.",
)
@click.option(
    "--planning-timeout",
    default=60.0,
    type=click.FloatRange(1),
    metavar="SECONDS",
    help="What nodes get to say whether a prefetch fits.",
)
@click.option(
    "--kubernetes",
    is_flag=True,
    help="Declare datasets as objects at the Kubernetes API server, which keeps the record; stand by until elected.",
)
@click.option("--namespace", default="", help="Kubernetes: its own namespace.  [default: the service account's]")
@click.option("--identity", default="", help="Kubernetes: this replica in the lease.  [default: the host name]")
@click.option("--pod-ip", default="", metavar="IP", help="Kubernetes: where its Service leads.  [default: nowhere]")
@click.option("--lease-name", default="shoal-controller", help="Kubernetes: of the Lease, the Service and the record.")
@click.option(
    "--gate-listen", default="0.0.0.0:7443", metavar="HOST:PORT", help="Kubernetes: for the webhook of gated pods."
)
@click.option(
    "--gate-cert-dir", type=Path, help="Kubernetes: directory with its tls.crt and tls.key.  [default: no webhook]"
)
@click.option(
    "--gate-namespace",
    multiple=True,
    metavar="NAMESPACE",
    help="Kubernetes: only here are pods gated. May be given several times.  [default: everywhere]",
)
@click.option(
    "--drain-taint",
    multiple=True,
    metavar="KEY",
    help="Kubernetes: a node with such a taint is drained; '*' matches anything. May be given several times.",
)
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
@log_options.format_option("SHOAL_CONTROLLER")
@click.version_option(package_name="shoal")
def main(
    data_dir: Path,
    grpc_listen: str,
    http_listen: str,
    advertise: str | None,
    allow_adhoc: tuple[str, ...],
    adhoc_storage_options: str,
    lease: float,
    forget_after: float,
    planning_timeout: float,
    kubernetes: bool,
    namespace: str,
    identity: str,
    pod_ip: str,
    lease_name: str,
    gate_listen: str,
    gate_cert_dir: Path | None,
    gate_namespace: tuple[str, ...],
    drain_taint: tuple[str, ...],
    log_level: str,
    log_format: str,
) -> None:
    """Own the cluster's datasets, map and prefetch jobs. Reads go on while it is away."""
    logs.configure(log_level, log_format)
    try:
        grpc_address = Address.parse(grpc_listen)
        config = Config(
            data_dir=data_dir.absolute(),
            grpc=grpc_address,
            http=Address.parse(http_listen),
            advertise=advertise or grpc_address.advertised(),
            policy=Policy(lease_s=lease, forget_after_s=forget_after, planning_s=planning_timeout),
            adhoc=AdhocPolicy.parse(allow_adhoc, adhoc_storage_options),
        )
        if not kubernetes:
            _run(_until_stopped(partial(_serve, config)))
            return
        # Not before it is wanted: the extra `kubernetes` brings its packages.
        from shoal_controller.kube import running

        kube = running.KubeConfig(
            namespace=namespace or running.own_namespace(),
            identity=identity or socket.gethostname(),
            pod_ip=pod_ip,
            lease=lease_name,
            gate=Address.parse(gate_listen),
            certificates=gate_cert_dir,
            gate_namespaces=gate_namespace,
            taints=drain_taint,
        )
        _run(_until_stopped(lambda stop: running.serve(config, kube, stop)))
    except ShoalError as error:
        logs.fail(str(error))
        raise SystemExit(1) from None


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # pragma: no cover - the extra installs it
        asyncio.run(work)
    else:
        uvloop.run(work)


async def _until_stopped(serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(stop)


async def _serve(config: Config, stop: asyncio.Event) -> None:
    server = await Server.start(config, list_origin)
    try:
        log.info("serving %s", config.data_dir)
        for dataset in server.shell.state.datasets.values():
            if not server.shell.record.snapshot_path(dataset.newest.digest).exists():
                log.warning(
                    "the snapshot of dataset %s is missing in %s: 'shoal dataset refresh %s' lists its origin again",
                    *(dataset.name, server.shell.record.snapshots, dataset.name),
                )
        print("ready", json.dumps({"grpc": server.grpc_address, "http": server.http_address}), flush=True)
        await server.serve(stop)
        log.info("stopping")
    finally:
        await server.close()


if __name__ == "__main__":
    main()
