"""From ``SHOAL_ENDPOINT`` to the controller: one HTTP question to whoever is there, then a gRPC channel.

The rule: gRPC and protobuf are imported here, when a command needs them, and nowhere else in the command line. An image
that only reads has neither.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cluster import parse_endpoint, reachable
from shoal.cluster_map import ClusterMap
from shoal.datasets import DatasetRecord
from shoal.errors import ClusterUnavailable, InvalidRequest, NodeUnavailable, NotFound, ShoalError
from shoal.local import DEFAULT_SOCKET
from shoal.transport import Transport

if TYPE_CHECKING:
    from shoal.cli.control import Control

ANSWER_TIMEOUT_S = 10.0

endpoint_option: Callable[[Any], Any] = click.option(
    "--endpoint",
    envvar="SHOAL_ENDPOINT",
    show_envvar=True,
    metavar="URL",
    help="http://HOST:PORT of the controller or of any cache node.",
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What ``/v1/cluster`` of the endpoint said.

    Attributes:
        address: ``host:port`` or ``unix:/path`` that was asked.
        role: ``controller`` or ``cachenode``.
        controller_grpc: ``host:port``, or "" where a node does not know it yet.
    """

    address: str
    role: str
    version: str
    cluster_map: ClusterMap
    controller_grpc: str


def address_of(endpoint: str | None) -> str:
    """Where to ask: ``host:port`` of an endpoint as people write it, or the local node's socket where there is none.

    Raises:
        InvalidRequest: the endpoint is malformed, or there is neither.
    """
    if endpoint:
        return parse_endpoint(endpoint)
    socket = os.environ.get("SHOAL_SOCKET") or DEFAULT_SOCKET
    if Path(socket).is_socket():
        return f"unix:{socket}"
    raise InvalidRequest(
        "no endpoint is given: set SHOAL_ENDPOINT=http://HOST:PORT to the controller or any cache node, "
        "or start a cluster on this machine with 'shoal dev'"
    )


def cluster(endpoint: str | None) -> Cluster:
    """Ask the endpoint what cluster it belongs to.

    Raises:
        InvalidRequest: as `address_of`.
        ClusterUnavailable: nothing answers, or something that is not Shoal.
    """
    address = address_of(endpoint)
    raw = _get(address, "/v1/cluster")
    try:
        known = ClusterMap.from_json(json.dumps(raw["map"]))
        return Cluster(address, raw["role"], raw["version"], known, reachable(raw["controller_grpc"], address))
    except (InvalidRequest, KeyError, TypeError) as error:
        raise _stranger(address) from error


def datasets(address: str) -> list[DatasetRecord]:
    """The datasets that the process at `address` knows. Raises ClusterUnavailable."""
    raw = _get(address, "/v1/datasets")
    try:
        return [DatasetRecord.from_dict(record) for record in raw]
    except (InvalidRequest, TypeError) as error:
        raise _stranger(address) from error


def control(known: Cluster) -> Control:
    """The controller's gRPC service: a context manager.

    Raises:
        ShoalError: gRPC is not installed.
        ClusterUnavailable: the endpoint does not know where the controller is.
    """
    try:
        from shoal.cli.control import Control
    except ImportError as error:
        raise ShoalError("this command needs gRPC, which is not installed: pip install 'shoal[cli]'") from error
    if not known.controller_grpc:
        raise ClusterUnavailable(
            f"the node at {known.address} has not heard from its controller yet: reads work without one, "
            "but this command needs it; start it, or give its endpoint"
        )
    return Control(known.controller_grpc)


def _get(address: str, target: str) -> Any:
    transport = Transport(read_timeout_s=ANSWER_TIMEOUT_S)
    try:
        return json.loads(transport.get(address, target).body)
    except NodeUnavailable as error:
        raise ClusterUnavailable(f"{error}: check SHOAL_ENDPOINT and that the cluster runs") from error
    except (NotFound, ValueError) as error:
        raise _stranger(address) from error
    finally:
        transport.close()


def _stranger(address: str) -> ClusterUnavailable:
    return ClusterUnavailable(f"what answers at {address} is no Shoal server: check SHOAL_ENDPOINT")
