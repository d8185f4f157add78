"""What a cluster's nodes hold of the dataset ``set`` and what they brought in, as they themselves say."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from shoal.cli.control import Control
from shoal.cluster_map import ClusterMap
from shoal.devcluster import DevCluster
from shoal.placement import Placement
from shoal.snapshot import Snapshot
from shoal.transport import Transport
from shoal_cachenode.whereabouts import Mask, unpack
from tests.support.readers import SANE_S


@dataclass(frozen=True, slots=True)
class Fetched:
    """Bytes of shards that a node has brought in since it started."""

    from_peers: int
    from_origin: int

    @classmethod
    def by(cls, cluster: DevCluster, node: int) -> Self:
        found = {labels["from"]: value for labels, value in _samples(cluster, node, "shoal_node_fetched_bytes_total")}
        return cls(found["peer"], found["origin"])


@dataclass(frozen=True, slots=True)
class StoodIn:
    """What a node did for readers of shards that it had not got yet: reads sent to the holder, bytes passed on."""

    referrals: int
    relayed_bytes: int

    @classmethod
    def by(cls, cluster: DevCluster, node: int) -> Self:
        names = "shoal_node_referrals_total", "shoal_node_relayed_bytes_total"
        return cls(*(value for name in names for _, value in _samples(cluster, node, name)))


def _samples(cluster: DevCluster, node: int, name: str) -> list[tuple[dict[str, str], int]]:
    """A node's metric of that name: labels and values."""
    with urllib.request.urlopen(f"{cluster.node_endpoints[node]}/metrics", timeout=SANE_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return [(s.labels, int(s.value)) for family in families for s in family.samples if s.name == name]


class Shards:
    """Who owns and who holds each shard of the dataset ``set``, asked anew at each call. Masks are of shape (n,)."""

    def __init__(self, cluster: DevCluster, replicas: int) -> None:
        with Control(cluster.controller_grpc) as control:
            self.digest = control.dataset("set").snapshot
        self._cluster, self._replicas = cluster, replicas
        self._snapshot = Snapshot.open(cluster.data_dir / "controller" / "snapshots" / f"{self.digest}.arrow")
        self._transport = Transport(read_timeout_s=SANE_S)

    def bytes_of(self, mask: Mask) -> int:
        return int(self._snapshot.shard_table().sizes[mask].sum())

    def held(self, node: int) -> Mask:
        """Which shards a running node has sealed."""
        address = str(self._cluster.nodes[node].ready["http"])
        answer = self._transport.get(address, f"/v1/snapshots/{self.digest}/held", {"Via": "1.1 test"})
        return unpack(answer.body, self._snapshot.shard_count())

    def owned(self, node: int) -> Mask:
        """Which shards the map gives to a node."""
        answer = self._transport.get(self._cluster.endpoint.removeprefix("http://"), "/v1/cluster")
        cluster_map = ClusterMap.from_json(json.dumps(json.loads(answer.body)["map"]))
        snapshot = self._snapshot
        placement = Placement(snapshot.shard_table, snapshot.shard_count(), cluster_map, self._replicas)
        return placement.owned_by(self._cluster.node_ids[node])

    def are_with_their_owners(self, nodes: Iterable[int]) -> bool:
        """Whether each of these running nodes holds all that it owns."""
        return not any((self.owned(node) & ~self.held(node)).any() for node in nodes)
