"""The node on this machine, reached by its Unix socket: sealed shards and snapshots come as file descriptors.

Zero copies: the descriptor is mapped, and the map is wrapped as an Arrow buffer. All processes of the machine map the
same pages. The map outlives the node's eviction of the file, because eviction is ``unlink``.

The rule: this is a faster way to what the network also gives. Whatever goes wrong here is a miss, never a failure.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa

from shoal.errors import ShoalError
from shoal.snapshot import Snapshot
from shoal.transport import Answer, Transport

log = logging.getLogger(__name__)

DEFAULT_SOCKET = "/run/shoal/node.sock"
#: Maps kept by a process. They cost address space, not memory.
MAX_MAPS = 1024
TAKES_DESCRIPTOR = {"Shoal-Descriptor": "1"}


class LocalNode:
    """The local cache node.

    Attributes:
        address: for `Transport`.
        node_id: in the cluster map.
        cluster: its ``/v1/cluster`` document.
    """

    def __init__(self, transport: Transport, socket_path: str, cluster: dict[str, Any]) -> None:
        self.address = f"unix:{socket_path}"
        self.cluster = cluster
        self.node_id: str = cluster["node_id"]
        self._transport = transport
        self._maps: OrderedDict[str, pa.Buffer] = OrderedDict()
        self.reset_lock()

    def reset_lock(self) -> None:
        """A new lock, for a fork's child: the thread that held the old one is not there to release it."""
        self._lock = threading.Lock()  # guards _maps

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

    def mapped(self, target: str) -> pa.Buffer | None:
        """The whole shard at `target` if this process has mapped it. The buffer stays valid as long as it is held."""
        with self._lock:
            buffer = self._maps.get(target)
            if buffer is not None:
                self._maps.move_to_end(target)
            return buffer

    def adopt(self, target: str, answer: Answer) -> pa.Buffer:
        """Map the descriptor of an answer and keep the map."""
        assert answer.descriptor is not None
        try:
            length = int(answer.headers["shoal-length"])
            buffer = pa.py_buffer(mmap.mmap(answer.descriptor, length, prot=mmap.PROT_READ))
        finally:
            os.close(answer.descriptor)
        with self._lock:
            self._maps[target] = buffer
            if len(self._maps) > MAX_MAPS:
                self._maps.popitem(last=False)
        return buffer

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
