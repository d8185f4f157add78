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

from shoal.connection import MAX_DESCRIPTORS, Answer
from shoal.errors import ShoalError
from shoal.maps import Maps, ShardId
from shoal.shard_client import ONLY_IF_CACHED, ShardAt
from shoal.snapshot import Snapshot
from shoal.transport import Transport
from shoal.wire.places import parse_places

log = logging.getLogger(__name__)

DEFAULT_SOCKET = "/run/shoal/node.sock"
#: A request for a shard that takes its descriptor, and those of a few shards after it, which are read next or soon.
TAKES_DESCRIPTORS = {"Shoal-Descriptor": str(MAX_DESCRIPTORS)}


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
        address = f"unix:{path}"
        if not Path(path).exists() or transport.health.is_open(address):
            return None
        try:
            answer = transport.get(address, "/v1/cluster", is_hasty=True)
            return cls(transport, path, json.loads(answer.body))
        except (ShoalError, ValueError, KeyError) as error:
            log.info("no cache node answers on %s, reading over the network: %s", path, error)
            return None

    def adopt(self, shard: ShardId, answer: Answer) -> pa.Buffer | None:
        """Map the descriptors of an answer and keep the maps: of `shard`, and of others that came along.

        Returns the map of `shard`; None where it cannot be mapped.
        """
        digest, *_ = shard
        try:
            places = parse_places(answer.headers["shoal-descriptors"])
            # Near its limit of open files a process is given only the first of the descriptors.
            maps = [
                self.maps.add((digest, row, index), descriptor, length)
                for (row, index, length), descriptor in zip(places, answer.descriptors, strict=False)
            ]
            return maps[0] if places[0][:2] == shard[1:] else None
        except (OSError, ValueError, KeyError) as error:
            log.warning("a shard of the local node cannot be mapped, reading it instead: %s", error)
            return None
        finally:
            for descriptor in answer.descriptors:
                os.close(descriptor)

    def descriptor(self, shard: ShardAt) -> int | None:
        """A read-only descriptor of the sealed file of `shard`, the caller's to close; None where there is none.

        The file never changes, and stays readable through the descriptor when the node evicts it.
        """
        if self._transport.health.is_open(self.address):
            return None  # it does not answer, and would be waited for at each open
        headers = {"Shoal-Descriptor": "1", **ONLY_IF_CACHED}
        try:
            answer = self._transport.get(self.address, shard.target, headers, is_hasty=True)
        except ShoalError as error:
            log.debug("the local node gives no descriptor of %s: %s", shard, error)
            return None
        descriptor, *others = answer.descriptors or (None,)
        for other in others:
            os.close(other)
        if descriptor is not None and os.fstat(descriptor).st_size < shard.size_bytes:
            os.close(descriptor)
            return None
        return descriptor

    def snapshot(self, digest: str) -> Snapshot | None:
        """The snapshot, mapped from the node's own file; None where the node cannot give it."""
        try:
            target, headers = f"/v1/snapshots/{digest}", {"Shoal-Descriptor": "1"}
            answer = self._transport.get(self.address, target, headers, is_hasty=True)
        except ShoalError as error:
            log.info("the local node did not give snapshot %s: %s", digest, error)
            return None
        if not answer.descriptors:
            return None
        (descriptor,) = answer.descriptors
        try:
            return Snapshot.from_fd(descriptor)
        finally:
            os.close(descriptor)
