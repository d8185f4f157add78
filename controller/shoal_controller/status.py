"""What people are told of the state: how much is cached, and what they should look at. Pure.

The rule: a warning is a sentence that names the thing, and is true of this very state.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.cluster_map import NodeState
from shoal_controller import membership
from shoal_controller.model import FULL, OK, Dataset, State


def cached_bytes(dataset: Dataset, state: State) -> int:
    """Bytes of the newest snapshot that are cached on nodes that are up, each shard counted once.

    Each node counts the shards that it is the first owner of. Right after a map change two nodes may count the same
    shard, hence the bound.
    """
    digest = dataset.newest.digest
    counted = sum(
        member.report.cached_bytes.get(digest, 0)
        for member in state.members.values()
        if member.report is not None and member.node.state is NodeState.UP
    )
    return min(counted, dataset.newest.total_bytes)


def warnings(state: State) -> list[str]:
    """What is not as it should be, the widest first."""
    return [*_cluster(state), *_nodes(state), *_datasets(state)]


def _cluster(state: State) -> Iterator[str]:
    if not state.map.owners():
        yield "no cache node is up: reads fail until one is; start it with 'shoal-cachenode'"


def _nodes(state: State) -> Iterator[str]:
    for node_id, member in sorted(state.members.items()):
        where = f"node {node_id} ({member.node.address})"
        if member.node.state is NodeState.DOWN:
            yield f"{where} is down: its shards are fetched again by the others as they are read"
        elif member.report is not None and member.report.condition == FULL:
            yield f"{where} is full: it keeps what it has and passes the rest through; add space, or remove datasets"
        elif member.report is not None and member.report.condition != OK:
            yield f"{where} reports: {member.report.condition}"
        if contest := membership.contest(member):
            yield contest


def _datasets(state: State) -> Iterator[str]:
    up = len(state.map.owners())
    for name, dataset in sorted(state.datasets.items()):
        if 0 < up < dataset.replicas:
            nodes = "1 node is" if up == 1 else f"{up} nodes are"
            yield f"dataset {name} asks for {dataset.replicas} replicas, but {nodes} up: it has {up}"
