"""The process that serves one mount: ``python -m shoal_csi.daemon --fd N --state-fd M --dataset NAME[@SNAPSHOT] …``.

It inherits the descriptor of a connection that somebody mounted, and one of the mount's state. It may be killed at any
moment, and started again on the same two: then it serves the snapshot that the first one pinned, and the requests that
its predecessor took.

    stdout      ``ready {json}``, once, when it serves
    stderr      its log; ``error: …`` before it ends with status 1
    SIGTERM     it finishes what is under way and ends with status 0; the mount stays, for a successor
    status 0    also once the file system was unmounted

The rule: it never mounts, unmounts or decides anything about the mount; whoever started it does.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import click

from shoal import logs
from shoal.cli.output import SizeType
from shoal.cluster import Cluster
from shoal.datasets import DatasetRecord, parse_path
from shoal.errors import ShoalError
from shoal.filesystem import ShoalFileSystem
from shoal.maps import RENEW_S
from shoal.reader import TIMEOUT_S
from shoal_csi import signal_pipe
from shoal_csi.numbers import Publisher
from shoal_csi.server import Served, Server
from shoal_csi.state import State
from shoal_csi.tier import Tier
from shoal_csi.tree import Tree

log = logging.getLogger(__name__)

#: From SIGTERM on, what is under way may take so long; a successor is handed what is left.
STOP_GRACE_S = 5.0
#: Beside the numbers of signals.
_UNMOUNTED = b"\0"
#: What `prepare` found, and through whom.
_prepared: tuple[Served, Cluster] | None = None


@click.command()
@click.option("--fd", type=int, required=True, help="The connection: a descriptor of /dev/fuse that is mounted.")
@click.option("--state-fd", type=int, required=True, help="A file in memory, empty for the first server of the mount.")
@click.option("--dataset", required=True, metavar="NAME[@SNAPSHOT]", help="What is mounted.")
@click.option("--endpoint", envvar="SHOAL_ENDPOINT", help="Of the controller or any node; default the local node.")
@click.option("--socket", envvar="SHOAL_SOCKET", help="Of the node on this machine.")
@click.option("--subpath", default="", help="The directory of the dataset that is the root.")
@click.option("--timeout", type=float, default=TIMEOUT_S, help="Seconds that one read may take, second tries included.")
@click.option("--window-bytes", type=SizeType(), default="64MiB", help="What may be held that was fetched ahead.")
@click.option("--local-tier", type=Path, help="A directory in which objects are kept that other nodes have.")
@click.option("--local-tier-size", type=SizeType(), default=0, help="What that may hold.")
@click.option(
    "--renew-every", type=float, default=RENEW_S, help="Seconds between two times that nodes are told of what is open."
)
@click.option("--verbose", is_flag=True, help="Log also what is only of use to whoever looks for a fault.")
def main(
    fd: int,
    state_fd: int,
    dataset: str,
    endpoint: str | None,
    socket: str | None,
    subpath: str,
    timeout: float,
    window_bytes: int,
    local_tier: Path | None,
    local_tier_size: int,
    renew_every: float,
    verbose: bool,
) -> None:
    """Serve a mounted dataset until it is unmounted."""
    _configure_logs(verbose, dataset)
    try:
        state = State(state_fd)
        tier = open_tier(local_tier, local_tier_size, is_first=state.pinned is None)
        if _prepared is None:
            served = serve(state, file_system(endpoint, socket, timeout), dataset, subpath)
        else:
            served, cluster = _prepared
            # It may have waited for months, and the nodes of its map may be gone. No request is held up for that.
            threading.Thread(target=cluster.refresh_map, name="shoal-map", daemon=True).start()
    except (ShoalError, OSError) as error:
        logs.fail(str(error))
        sys.exit(1)
    if served.tree.left_out:
        log.warning(
            "%d objects of dataset %s are not in the mount: no file system can hold their names, or a directory has "
            "the same; they can be read as shoal://%s/…",
            *(served.tree.left_out, served.record.name, served.record.name),
        )
    # What is left undone here is handed out again to a successor, and nobody waits for threads that wait for nodes.
    os._exit(run(fd, served, state, tier, window_bytes, renew_every))


def _configure_logs(is_verbose: bool, dataset: str) -> None:
    logs.configure("debug" if is_verbose else "info", dataset=dataset.partition("@")[0])


def open_tier(directory: Path | None, limit_bytes: int, *, is_first: bool) -> Tier | None:
    """The local tier, where one is wanted.

    Raises:
        ShoalError: it cannot be used. A successor says so in its log, and serves without: a mount outlives its tier.
    """
    if directory is None:
        return None
    try:
        return Tier(directory, limit_bytes)
    except ShoalError as error:
        if is_first:
            raise
        log.warning("nothing is kept in the local tier: %s", error)
        return None


def check_state(state_fd: int) -> None:
    """Raises StoreUnusable: this daemon could not go on with what its predecessor left."""
    State.check(state_fd)


def prepare(args: list[str]) -> None:
    """Ask for what the mount is of before this daemon's turn, so that nobody has to answer then. Changes nothing.

    Raises:
        ShoalError: nobody tells now.
    """
    global _prepared
    options = main.make_context("daemon", list(args)).params
    _configure_logs(options["verbose"], options["dataset"])
    pinned = State.pinned_in(options["state_fd"])
    if pinned is not None:
        fs = file_system(options["endpoint"], options["socket"], options["timeout"])
        _prepared = _served(fs, pinned, options["subpath"]), fs.cluster


def file_system(endpoint: str | None, socket: str | None, timeout_s: float) -> ShoalFileSystem:
    """The cluster as a client. Raises ShoalError: nobody of it answers."""
    return ShoalFileSystem(endpoint=endpoint, socket=socket, timeout=timeout_s, skip_instance_cache=True)


def serve(state: State, fs: ShoalFileSystem, dataset: str, subpath: str) -> Served:
    """What this mount is of: what its first server pinned, or, for that one, what `dataset` means now.

    Raises:
        ShoalError: there is no such dataset, snapshot or directory, or nobody tells.
    """
    pinned = state.pinned
    if pinned is None:
        found, _ = fs.locate(parse_path(dataset).root)
        pinned = found.record, found.snapshot.digest
        served = _served(fs, pinned, subpath)
        state.pin(*pinned)
        return served
    return _served(fs, pinned, subpath)


def _served(fs: ShoalFileSystem, pinned: tuple[DatasetRecord, str], subpath: str) -> Served:
    """Raises ShoalError: the snapshot or the directory is gone, or nobody tells."""
    record, digest = pinned
    snapshot = fs.cluster.snapshot(digest)
    tree = Tree(snapshot.paths, snapshot.sizes, subpath, record.origin.rstrip("/").rpartition("/")[2] or "object")
    return Served(record, snapshot, tree, lambda row: fs.object_reader(record, snapshot, row))


def run(fd: int, served: Served, state: State, tier: Tier | None, window_bytes: int, renew_s: float) -> int:
    """Serve until the file system is unmounted or SIGTERM comes; the status to end with."""
    over, says = signal_pipe.open_pipe(signal.SIGTERM, signal.SIGINT)

    def unmounted() -> None:
        os.write(says, _UNMOUNTED)

    server = Server(fd, served, state, on_over=unmounted, tier=tier, window_bytes=window_bytes, renew_s=renew_s)
    publisher = Publisher(state, server.numbers)
    publisher.start()
    server.start()
    print(f"ready {json.dumps(server.report())}", flush=True)
    is_wanted = os.read(over, 1) != _UNMOUNTED
    if is_wanted and not server.stop(STOP_GRACE_S):
        log.info("requests are under way that take long: a successor will be handed them")
    log.info("served %d requests, and end: %s", server.requests, "SIGTERM" if is_wanted else "unmounted")
    server.close()
    publisher.close()
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main()
