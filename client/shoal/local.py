"""The node on this machine, reached by its Unix socket: sealed shards and snapshots come as file descriptors.

Zero copies: the descriptor is mapped (`shoal.maps` has the rules of how long), and the map is wrapped as an Arrow
buffer. All processes of the machine map the same pages.

The rule: this is a faster way to what the network also gives. Whatever goes wrong here is a miss, never a failure.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from shoal.connection import Answer
from shoal.errors import ShoalError
from shoal.maps import Maps, ShardId
from shoal.snapshot import Snapshot
from shoal.transport import Transport

log = logging.getLogger(__name__)

DEFAULT_SOCKET = "/run/shoal/node.sock"
TAKES_DESCRIPTOR = {"Shoal-Descriptor": "1"}


class LocalNode:
    """The local cache node.

    Attributes:
        address: for `Transport`.
        node_id: in the cluster map.
        cluster: its ``/v1/cluster`` document.
        maps: shards of the node that this process has mapped.
    """

    def __init__(self, transport: Transport, socket_path: str, cluster: dict[str, Any]) -> None:
        self.address = f"unix:{socket_path}"
        self.cluster = cluster
        self.node_id: str = cluster["node_id"]
        self.maps = Maps()
        self._transport = transport

    @classmethod
    def find(cls, transport: Transport, socket_path: str | None) -> LocalNode | None:
        """The node behind `socket_path` (default: ``SHOAL_SOCKET``, then the usual place); None where none answers."""
        path = socket_path or os.environ.get("SHOAL_SOCKET") or DEFAULT_SOCKET
        if not Path(path).exists():
            return None
        try:
            answer = transport.get(f"unix:{path}", "/v1/cluster")
            return cls(transport, path, json.loads(answer.body))
        except (ShoalError, ValueError, KeyError) as error:
            log.info("no cache node answers on %s, reading over the network: %s", path, error)
            return None

    def adopt(self, shard: ShardId, answer: Answer) -> pa.Buffer | None:
        """Map the descriptor of an answer and keep the map; None where it cannot be mapped."""
        assert answer.descriptor is not None
        try:
            return self.maps.add(shard, answer.descriptor, int(answer.headers["shoal-length"]))
        except (OSError, ValueError, KeyError) as error:
            log.warning("a shard of the local node cannot be mapped, reading it instead: %s", error)
            return None
        finally:
            os.close(answer.descriptor)

    def snapshot(self, digest: str) -> Snapshot | None:
        """The snapshot, mapped from the node's own file; None where the node cannot give it."""
        try:
            answer = self._transport.get(self.address, f"/v1/snapshots/{digest}", TAKES_DESCRIPTOR)
        except ShoalError as error:
            log.info("the local node did not give snapshot %s: %s", digest, error)
            return None
        if answer.descriptor is None:
            return None
        try:
            return Snapshot.from_fd(answer.descriptor)
        finally:
            os.close(answer.descriptor)
