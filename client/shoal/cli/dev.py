"""``shoal dev``: a whole cluster on this machine, to try Shoal and its failures.

The rule: stdout has only what a shell may evaluate; everything for people goes to stderr. A server that somebody kills
is reported, and the others go on: seeing that is what a local cluster is for.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from shoal import sizes
from shoal.cli import output
from shoal.cli.output import SizeType
from shoal.devcluster import DevCluster

EXAMPLES = """\b
Examples:
  shoal dev
  shoal dev --nodes 5 --capacity 2GiB --data-dir ./cluster
  shoal dev --allow-adhoc s3://bucket/ --ready-file /tmp/shoal.env &
"""


@click.command(epilog=EXAMPLES)
@click.option("--nodes", type=click.IntRange(1, 64), default=3, help="Cache nodes.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Keeps everything: started again over it, the cluster is warm.  [default: temporary, removed at the end]",
)
@click.option("--capacity", type=SizeType(), default="20GiB", help="Bytes of cache of each node.")
@click.option(
    "--allow-adhoc", multiple=True, metavar="PREFIX", help="Origins below PREFIX may be read without 'dataset add'."
)
@click.option(
    "--ready-file", type=click.Path(path_type=Path), help="Write the export lines here, too, when the cluster serves."
)
@output.json_option
def dev(
    nodes: int,
    data_dir: Path | None,
    capacity: int,
    allow_adhoc: tuple[str, ...],
    ready_file: Path | None,
    as_json: bool,
) -> None:
    """Run a controller and cache nodes on this machine until Ctrl-C.

    Prints the variables with which other shells find the cluster.
    """
    cluster = DevCluster(nodes=nodes, data_dir=data_dir, capacity=str(capacity), allow_adhoc=allow_adhoc)
    with _interrupted_by_signals(), contextlib.suppress(KeyboardInterrupt), cluster:
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in cluster.environment().items())
        if as_json:
            output.document(_document(cluster))
        else:
            click.echo(exports, nl=False)
        size = sizes.format(capacity)
        output.remark(
            f"a controller and {nodes} cache nodes of {size} each run over {cluster.data_dir}; Ctrl-C stops them"
        )
        for server in cluster.processes.values():
            output.remark(f"  {server.name}: process {server.pid}, {server.ready['http']}, log {server.log_path}")
        if ready_file is not None:
            _publish(ready_file, exports)
        try:
            while True:
                output.remark(f"{cluster.deaths.get().sentence}; the others go on")
        finally:
            output.remark("stopping")


def _document(cluster: DevCluster) -> dict[str, object]:
    return {
        "endpoint": cluster.endpoint,
        "controller_grpc": cluster.controller_grpc,
        "data_dir": str(cluster.data_dir),
        "controller": {"pid": cluster.controller.pid, "log": str(cluster.controller.log_path)},
        "nodes": [
            {
                "id": node.ready["id"],
                "endpoint": endpoint,
                "socket": str(socket),
                "pid": node.pid,
                "log": str(node.log_path),
            }
            for node, endpoint, socket in zip(cluster.nodes, cluster.node_endpoints, cluster.sockets, strict=True)
        ],
    }


def _publish(path: Path, text: str) -> None:
    """Whoever waits for the file finds all of it."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
