"""`shoal-csi`: the CSI driver as a process."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
from pathlib import Path

# Before anything imports grpc: its fork handlers do nothing here but delay the commands that the driver runs.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import click

from shoal import logs
from shoal.cli import log_options
from shoal.cli.output import SizeType
from shoal.errors import InvalidRequest, ShoalError
from shoal.wire import addresses
from shoal_csi import signal_pipe
from shoal_csi.driver import Config, Driver, socket_path
from shoal_csi.identity import DRIVER_NAME

log = logging.getLogger("shoal_csi")

EXAMPLES = """\b
Examples:
  shoal-csi --endpoint unix:///csi/csi.sock --node-id worker-3 --shoal-endpoint http://shoal-controller:7441
  shoal-csi --endpoint unix:///csi/csi.sock --controller --shoal-endpoint http://shoal-controller:7441
Every flag is also an environment variable: SHOAL_CSI_ENDPOINT, SHOAL_CSI_NODE_ID, …
"""


@click.command(epilog=EXAMPLES, context_settings={"auto_envvar_prefix": "SHOAL_CSI", "show_default": True})
@click.option("--endpoint", required=True, metavar="URL", help="Socket to serve at: unix:///path/to/csi.sock.")
@click.option("--node-id", default="", metavar="NAME", help="What the orchestrator calls this node.")
@click.option(
    "--shoal-endpoint",
    envvar=["SHOAL_CSI_SHOAL_ENDPOINT", "SHOAL_ENDPOINT"],
    default="",
    metavar="URL",
    help="http://HOST:PORT of Shoal's controller or of any cache node.  [default: the local node's socket]",
)
@click.option("--controller", is_flag=True, help="Serve the controller service.  [default: both]")
@click.option("--node", is_flag=True, help="Serve the node service.  [default: both]")
@click.option(
    "--state-dir",
    type=Path,
    default=Path("/var/lib/kubelet/plugins") / DRIVER_NAME,
    help="Where the node's mounts and locks are. Mounts made in it must reach the host.",
)
@click.option(
    "--mount-command",
    default=shlex.join([sys.executable, "-m", "shoal.cli"]),
    metavar="WORDS",
    help="What 'mount NAME@SNAPSHOT DIR' and 'umount DIR' are given to.",
)
@click.option(
    "--probe-timeout",
    default=10.0,
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="A mount that is silent for so long does not answer.",
)
@click.option(
    "--look-after-every",
    default=10.0,
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="Between two looks at all mounts, for those that lost their server or their last pod.",
)
@click.option(
    "--local-tier",
    type=Path,
    metavar="DIR",
    help="Keep objects that other nodes have here, for all mounts: a directory of a drive.  [default: nowhere]",
)
@click.option("--local-tier-size", type=SizeType(), metavar="SIZE", help="What DIR may hold, such as 100GiB.")
@click.option("--metrics-listen", metavar="HOST:PORT", help="For Prometheus; port 0: any free one.  [default: nowhere]")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
@log_options.format_option("SHOAL_CSI")
@click.version_option(package_name="shoal")
def main(
    endpoint: str,
    node_id: str,
    shoal_endpoint: str,
    controller: bool,
    node: bool,
    state_dir: Path,
    mount_command: str,
    probe_timeout: float,
    look_after_every: float,
    local_tier: Path | None,
    local_tier_size: int | None,
    metrics_listen: str | None,
    log_level: str,
    log_format: str,
) -> None:
    """Show datasets to pods as read-only volumes. What is mounted goes on while the driver is away."""
    logs.configure(log_level, log_format)
    os.environ[logs.VARIABLE] = log_format  # for what serves the mounts
    has_node = node or not controller
    try:
        if has_node and not node_id:
            raise InvalidRequest("the node has no name: give --node-id (on Kubernetes the pod's spec.nodeName)")
        if (local_tier is None) != (local_tier_size is None):
            raise InvalidRequest("--local-tier and --local-tier-size go together: give both, or neither")
        config = Config(
            socket=socket_path(endpoint),
            node_id=node_id,
            shoal_endpoint=shoal_endpoint,
            state_dir=state_dir.absolute(),
            command=shlex.split(mount_command),
            has_controller=controller or not node,
            has_node=has_node,
            probe_timeout_s=probe_timeout,
            look_after_every_s=look_after_every,
            local_tier=None if local_tier is None else local_tier.resolve(),
            local_tier_size=local_tier_size or 0,
            metrics=None if metrics_listen is None else addresses.split(metrics_listen, "0.0.0.0:7445"),
        )
        _serve(config)
    except ShoalError as error:
        logs.fail(str(error))
        raise SystemExit(1) from None


def _serve(config: Config) -> None:
    signals, _ = signal_pipe.open_pipe(signal.SIGTERM, signal.SIGINT)
    driver = Driver(config)
    try:
        log.info("serving at %s", config.socket)
        print("ready", json.dumps({"socket": str(config.socket), "metrics": driver.metrics_port}), flush=True)
        os.read(signals, 1)
        log.info("stopping; mounts stay")
    finally:
        driver.close()


if __name__ == "__main__":
    main()
