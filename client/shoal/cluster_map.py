"""The cluster map: the numbered list of cache nodes that placement, clients and nodes share.

The rule: a map is a value. A change is a new map with a larger epoch, so whoever holds an old one is late, never wrong:
shards are named by content, and any node can serve any shard.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.errors import InvalidRequest


class NodeState(enum.StrEnum):
    """What a node is good for."""

    UP = "up"  #: owns shards and serves
    DRAINING = "draining"  #: serves what it has, owns nothing
    DOWN = "down"  #: its lease ran out; owns nothing, kept in the map so that people see it


@dataclass(frozen=True, slots=True)
class Node:
    """One cache node.

    Attributes:
        id: stable over restarts (kept in the node's data directory); placement hashes it.
        address: ``host:port`` of its HTTP data plane.
        weight: its share of the data; the bytes of cache it offers.
        topology: labels from the widest to the narrowest that replicas spread over (``zone``, ``rack``, ``host``).
        state: see `NodeState`.
    """

    id: str
    address: str
    weight: int
    topology: Mapping[str, str] = field(default_factory=dict)
    state: NodeState = NodeState.UP


@dataclass(frozen=True, slots=True)
class ClusterMap:
    """All known nodes, sorted by id, under one epoch. Epoch 0 is the empty map of a cluster without nodes."""

    epoch: int = 0
    nodes: tuple[Node, ...] = ()

    def owners(self) -> tuple[Node, ...]:
        """The nodes that placement may give shards to."""
        return tuple(n for n in self.nodes if n.state is NodeState.UP and n.weight > 0)

    def node(self, node_id: str) -> Node | None:
        return next((n for n in self.nodes if n.id == node_id), None)

    def to_json(self) -> str:
        return json.dumps(
            {
                "epoch": self.epoch,
                "nodes": [
                    {
                        "id": n.id,
                        "address": n.address,
                        "weight": n.weight,
                        "topology": dict(n.topology),
                        "state": str(n.state),
                    }
                    for n in self.nodes
                ],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> ClusterMap:
        """Parse what `to_json` wrote.

        Raises:
            InvalidRequest: `text` is no cluster map.
        """
        try:
            raw = json.loads(text)
            nodes = (
                Node(n["id"], n["address"], int(n["weight"]), n.get("topology", {}), NodeState(n["state"]))
                for n in raw["nodes"]
            )
            return cls(int(raw["epoch"]), tuple(sorted(nodes, key=lambda n: n.id)))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"not a cluster map: {error!r}") from error
