"""`shoal-cachenode`: one cache node as a process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
from pathlib import Path

import click

from shoal import logs, sizes
from shoal.cli import log_options
from shoal.errors import InvalidRequest, ShoalError, StoreUnusable
from shoal.wire import addresses, batch, routes
from shoal.wire.http_server import MAX_CONNECTIONS, HttpServer
from shoal_cachenode import allocator, data_routes, metrics
from shoal_cachenode.membership import Membership
from shoal_cachenode.node import CacheNode, Config
from shoal_cachenode.prefetch import Prefetches
from shoal_cachenode.view import NodeView

log = logging.getLogger("shoal_cachenode")

#: Of the file system's room, what a node takes when it is not told.
DEFAULT_SHARE = 0.8

#: One core sends some 5 GB/s. With few of them the loop sends alone: the other is the readers' or the fills'.
SENDERS = min(8, len(os.sched_getaffinity(0)) // 4)

EXAMPLES = """\b
Examples:
  shoal-cachenode --controller shoal-controller:7440 --data-dir /nvme/shoal --capacity 1.5TiB
  shoal-cachenode --controller 127.0.0.1:7440 --listen 127.0.0.1:0 --data-dir ./n1 --socket ./n1.sock
Every flag is also an environment variable: SHOAL_CACHENODE_DATA_DIR, SHOAL_CACHENODE_CONTROLLER, …
"""


@click.command(epilog=EXAMPLES, context_settings={"auto_envvar_prefix": "SHOAL_CACHENODE", "show_default": True})
@click.option("--controller", default="127.0.0.1:7440", metavar="HOST:PORT", help="The controller's gRPC address.")
@click.option("--data-dir", type=Path, default=Path("/var/lib/shoal/cachenode"), help="Where shards are kept.")
@click.option("--listen", default="0.0.0.0:7450", metavar="HOST:PORT", help="HTTP data plane; port 0: any free one.")
@click.option("--advertise", metavar="HOST", help="Name under which others reach this node.  [default: see --listen]")
@click.option("--socket", "socket_path", type=Path, default=Path("/run/shoal/node.sock"), help="For local readers.")
@click.option("--capacity", metavar="SIZE", help="Bytes of cache to offer.  [default: 80% of the file system]")
@click.option("--topology", default="", metavar="KEY=VALUE,…", help="zone, rack and host, for spreading replicas.")
@click.option("--fetches", default=16, type=click.IntRange(1, 256), help="Part fetches of one dataset at a time.")
@click.option("--origin-rate", metavar="SIZE", help="Bytes a second to ask of origins.  [default: no limit]")
@click.option("--max-connections", default=MAX_CONNECTIONS, type=click.IntRange(1), help="Data connections at a time.")
@click.option("--idle-after", default="1h", metavar="TIME", help="Unused for so long a dataset gives way.")
@click.option(
    "--unread-share",
    default=0.5,
    type=click.FloatRange(0, 1),
    help="Of the capacity: so much prefetched data that nobody read yet may take idle datasets' room.",
)
@click.option("--scrub-rate", default="16MiB", metavar="SIZE", help="Bytes a second to read and verify; 0: none.")
@click.option(
    "--rebalance-rate",
    default="200MiB",
    metavar="SIZE",
    help="Bytes a second to take over from peers after a map change; 0: none.",
)
@click.option(
    "--recent",
    default="256MiB",
    metavar="SIZE",
    help="Memory for what passed through a moment ago, so that several readers cost the origin one read; 0: none.",
)
@click.option(
    "--stall-after",
    default=5.0,
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="A drive silent so long hangs.",
)
@click.option("--congestion", default="cubic", metavar="NAME", help="TCP congestion control; '': the system's.")
@click.option("--senders", default=SENDERS, type=click.IntRange(0, 256), help="Threads that send large bodies.")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
@log_options.format_option("SHOAL_CACHENODE")
@click.version_option(package_name="shoal")
def main(
    controller: str,
    data_dir: Path,
    listen: str,
    advertise: str | None,
    socket_path: Path,
    capacity: str | None,
    topology: str,
    fetches: int,
    origin_rate: str | None,
    max_connections: int,
    idle_after: str,
    unread_share: float,
    scrub_rate: str,
    rebalance_rate: str,
    recent: str,
    stall_after: float,
    congestion: str,
    senders: int,
    log_level: str,
    log_format: str,
) -> None:
    """Serve a share of the cluster's cache from this machine's drive."""
    logs.configure(log_level, log_format)
    try:
        host, port = addresses.split(listen, "0.0.0.0:7450")
        labels = parse_topology(topology)
        labels.setdefault("host", socket.gethostname())
        config = Config(
            data_dir.absolute(),
            _capacity(data_dir, capacity),
            labels,
            fetches,
            idle_after_s=parse_time(idle_after),
            unread_share=unread_share,
            scrub_rate=sizes.parse(scrub_rate),
            rebalance_rate=sizes.parse(rebalance_rate),
            recent_bytes=sizes.parse(recent),
            stall_s=stall_after,
            origin_bytes_per_s=sizes.parse(origin_rate) if origin_rate is not None else 0,
        )
        name = advertise or (host if host not in ("0.0.0.0", "::") else socket.gethostname())
        _raise_open_files()
        allocator.share_arenas()
        limits = _Limits(congestion, senders, max_connections)
        _run(_serve(config, controller, host, port, name, socket_path.absolute(), limits))
    except ShoalError as error:
        logs.fail(str(error))
        raise SystemExit(1) from None


def _raise_open_files() -> None:
    """Take what the system allows: each shard that fills or is open has a descriptor, and so has each connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(coroutine: object) -> None:
    try:
        import uvloop
    except ImportError:  # pragma: no cover - the extra installs it
        asyncio.run(coroutine)  # type: ignore[arg-type]
    else:
        uvloop.run(coroutine)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, slots=True)
class _Limits:
    """How the data plane's server is set up; see `HttpServer`."""

    congestion: str
    senders: int
    max_connections: int


async def _serve(
    config: Config, controller: str, host: str, port: int, name: str, socket_path: Path, limits: _Limits
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    node = CacheNode(config)
    logs.note(node=node.id)
    prefetches = Prefetches(node)
    membership = Membership(node, prefetches, controller)
    view = NodeView(node, membership)
    server = HttpServer(
        routes.make_handler(view, lambda: metrics.exposition(node, server), data_routes.make_handler(node)),
        epoch=view.epoch,
        max_body=batch.MAX_REQUEST_BYTES,
        congestion=limits.congestion,
        senders=limits.senders,
        max_connections=limits.max_connections,
    )
    try:
        port = await _listen(server, host, port)
        try:
            await server.listen_unix(socket_path)
        except OSError as error:
            raise StoreUnusable(f"cannot listen on {socket_path}: {error.strerror}; give another --socket") from error
        node.address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
        membership.start()
        trimming = asyncio.create_task(allocator.keep_giving_back())
        log.info("node %s serves %s from %s", node.id, sizes.format(config.capacity_bytes), config.data_dir)
        print("ready", json.dumps({"http": node.address, "socket": str(socket_path), "id": node.id}), flush=True)
        await stop.wait()
        log.info("stopping")
        trimming.cancel()
        await membership.leave()
    finally:
        await server.close()
        view.close()
        await prefetches.close()
        await node.close()


async def _listen(server: HttpServer, host: str, port: int) -> int:
    try:
        return await server.listen_tcp(host, port)
    except OSError as error:
        raise StoreUnusable(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; give --listen another address"
        ) from error


def parse_topology(text: str) -> dict[str, str]:
    """Take ``zone=a,rack=b`` apart. A label without a value is left out: `zone=$ZONE` where no zone is known.

    Raises:
        InvalidRequest: something in it is no label.
    """
    labels = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InvalidRequest(f"{pair!r} is no topology label: write KEY=VALUE, such as zone=a")
        if value.strip():
            labels[key.strip()] = value.strip()
    return labels


def parse_time(text: str) -> float:
    """Seconds of ``30s``, ``30min``, ``1h`` or ``2d``; a bare number is seconds. Raises InvalidRequest."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)?", text.strip())
    if found is None:
        raise InvalidRequest(f"{text!r} is no time: write 30s, 30min, 1h or 2d")
    return float(found[1]) * {None: 1, "s": 1, "min": 60, "h": 3600, "d": 86400}[found[2]]


def _capacity(data_dir: Path, text: str | None) -> int:
    if text is not None:
        capacity_bytes = sizes.parse(text)
        if capacity_bytes <= 0:
            raise InvalidRequest("--capacity must be more than 0")
        return capacity_bytes
    existing = next(p for p in (data_dir.absolute(), *data_dir.absolute().parents) if p.exists())
    return int(shutil.disk_usage(existing).total * DEFAULT_SHARE)


if __name__ == "__main__":
    main()
