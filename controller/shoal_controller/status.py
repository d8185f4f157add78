"""What people are told of the state: how much is cached, and what they should look at. Pure.

The rule: a warning is a sentence that names the thing, and is true of this very state.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal import sizes
from shoal.cluster_map import NodeState
from shoal_controller import membership
from shoal_controller.model import FULL, OK, Dataset, Member, State


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


def handover_bytes(member: Member, state: State) -> int | None:
    """What a draining node holds and the owners of now do not; None while nobody knows, and for one not draining."""
    report = member.report
    if report is None or report.epoch != state.map.epoch or member.node.state is not NodeState.DRAINING:
        return None  # what it said of an older map was about other owners
    return report.handover_bytes


def handover_waits_for(member: Member, state: State) -> str:
    """Why a draining node holds what the owners of now lack, in words; "" where it does not, or is not draining.

    So a node has been drained when it is draining and waits for nothing.
    """
    if not member.is_draining:
        return ""
    if member.node.state is NodeState.DOWN:
        return "it is down: what it holds can be handed over when it is back"
    if not state.map.owners():
        return "no other node is up to take what it holds"
    left_bytes = handover_bytes(member, state)
    if left_bytes == 0:
        return ""
    short = _short(state)
    if short:
        lacking = sizes.format(sum(short_bytes for _, short_bytes in short))
        who = f"node {short[0][0]} lacks" if len(short) == 1 else f"{len(short)} other nodes lack"
        return f"{who} room for {lacking}: add nodes or space, or remove datasets"
    if left_bytes is None:
        return "it has not said yet what it has to hand over"
    return "the other nodes fetch what it holds"


def _short(state: State) -> list[tuple[str, int]]:
    """The owners that lack room for shards which peers hold, and for how many bytes."""
    return [
        (owner.id, report.short_bytes)
        for owner in state.map.owners()
        if (report := state.members[owner.id].report) is not None and report.short_bytes > 0
    ]


def warnings(state: State) -> list[str]:
    """What is not as it should be, the widest first."""
    return [*_cluster(state), *_nodes(state), *_datasets(state)]


def _cluster(state: State) -> Iterator[str]:
    if state.map.owners():
        return
    if any(node.state is NodeState.DRAINING for node in state.map.nodes):
        yield "every cache node that is up drains: reads fail until another one is up, or 'shoal node undrain ID'"
    else:
        yield "no cache node is up: reads fail until one is; start it with 'shoal-cachenode'"


def _nodes(state: State) -> Iterator[str]:
    short = dict(_short(state))
    for node_id, member in sorted(state.members.items()):
        where = f"node {node_id} ({member.node.address})"
        if member.node.state is NodeState.DOWN:
            yield f"{where} is down: its shards are fetched again by the others as they are read"
        elif member.report is not None and member.report.condition == FULL:
            yield f"{where} is full: it keeps what it has and passes the rest through; add space, or remove datasets"
        elif member.report is not None and member.report.condition != OK:
            yield f"{where} reports: {member.report.condition}"
        if node_id in short:
            yield (
                f"{where} lacks room for {sizes.format(short[node_id])} that it owns and other nodes hold: add space, "
                "or remove datasets"
            )
        if contest := membership.contest(member):
            yield contest


def _datasets(state: State) -> Iterator[str]:
    up = len(state.map.owners())
    draining = sum(node.state is NodeState.DRAINING for node in state.map.nodes)
    for name, dataset in sorted(state.datasets.items()):
        if 0 < up < dataset.replicas:
            nodes = "1 node is up" if up == 1 else f"{up} nodes are up"
            besides = f" and not draining ({draining} more {'is' if draining == 1 else 'are'})" if draining else ""
            yield f"dataset {name} asks for {dataset.replicas} replicas, but {nodes}{besides}: it has {up}"
