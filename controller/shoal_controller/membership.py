"""Who is in the cluster: registrations, leases, and the epochs of the map that follow from them. Pure.

The rule: an epoch never goes backwards and never names two maps. Any change of the list of nodes is a new epoch, and a
node that reports a greater one (this controller lost its disk) makes it jump past that, unless no cluster can have got
there: from an epoch near the end of its integers nobody could count on.

Two live processes may claim one node id (a copied data directory). The newer one has it, as a node that moved would;
the older one is refused while the newer lives, because taking turns would be a new epoch with every heartbeat.

Draining is people's word, so nothing that a node says of itself and no absence undoes it: only they do, or that the
node is forgotten.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.errors import InvalidRequest
from shoal_controller.model import MAX_EPOCHS_AHEAD, Member, Moment, Policy, Report

NO_DISPLACED: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True)
class Heard:
    """The member after something was heard from it, and what people should know.

    Attributes:
        refusal: why the sender is not this member, to be told to it; "" where it is.
    """

    member: Member
    warnings: tuple[str, ...] = ()
    refusal: str = ""


def restore(nodes: Iterable[Node], draining: Container[str], now: Moment, policy: Policy) -> dict[str, Member]:
    """The members as the record has them. Whoever was up gets one lease to be heard: a restart moves nothing."""
    first_s = max(policy.lease_s, policy.first_lease_s)
    return {
        node.id: Member(
            node,
            lease_ends_s=now.monotonic_s + first_s,
            heard_s=now.monotonic_s,
            down_since_s=now.monotonic_s if node.state is NodeState.DOWN else None,
            is_draining=node.id in draining,
        )
        for node in nodes
    }


def check_epoch(report: Report, cluster_map: ClusterMap) -> None:
    """Raises InvalidRequest where no controller can have given out the epoch that a node reports."""
    if report.epoch > cluster_map.epoch + MAX_EPOCHS_AHEAD:
        raise InvalidRequest(
            f"node {report.node.id} reports epoch {report.epoch} where this controller is at {cluster_map.epoch}, and "
            "no cluster gets so far ahead: stop that node, delete orders.json in its data directory, and start it again"
        )


def register(member: Member | None, node: Node, now: Moment, policy: Policy) -> Heard:
    """A node registered under its id, which `member` has so far."""
    if member is None:
        node = replace(node, state=NodeState.UP)
        return Heard(Member(node, lease_ends_s=now.monotonic_s + policy.lease_s, heard_s=now.monotonic_s))
    return _hear(member, node, now, policy)


def report(member: Member, report: Report, now: Moment, policy: Policy) -> Heard:
    """A heartbeat arrived under the id that `member` has."""
    heard = _hear(member, report.node, now, policy)
    if heard.refusal:
        return heard
    member = replace(heard.member, report=report)
    if report.is_leaving:
        member = _down(member, now)
    return replace(heard, member=member)


def _hear(member: Member, node: Node, now: Moment, policy: Policy) -> Heard:
    warnings: tuple[str, ...] = ()
    displaced = {address: until for address, until in member.displaced.items() if until > now.monotonic_s}
    if node.address != member.node.address and member.node.state is not NodeState.DOWN:
        # One lease is long enough: a process that lives is heard again within it, and then for another one.
        refused_until_s = now.monotonic_s + policy.lease_s
        if node.address in displaced:
            displaced[node.address] = refused_until_s
            sentence = _contest(member.node, node.address)
            contested = replace(member, displaced=displaced, contested_by=node.address)
            return Heard(contested, () if member.contested_by else (sentence,), sentence)
        displaced[member.node.address] = refused_until_s
        displaced.pop(node.address, None)
        warnings = (
            f"node {node.id} is now at {node.address}; it was at {member.node.address} and its lease there had not "
            "ended: if it was not restarted, two processes have one node id",
        )
    is_back = member.node.state is NodeState.DOWN
    return Heard(
        replace(
            member,
            node=replace(node, state=_state(member.is_draining)),
            lease_ends_s=now.monotonic_s + policy.lease_s,
            heard_s=now.monotonic_s,
            down_since_s=None,
            report=None if is_back else member.report,
            displaced=displaced,
            contested_by=member.contested_by if member.contested_by in displaced else "",
        ),
        warnings,
    )


def _state(is_draining: bool) -> NodeState:
    return NodeState.DRAINING if is_draining else NodeState.UP


def drain(member: Member, *, is_draining: bool) -> Member:
    """The member once people said that it is to own nothing, or its share again. One that is down stays down."""
    state = member.node.state if member.node.state is NodeState.DOWN else _state(is_draining)
    return replace(member, node=replace(member.node, state=state), is_draining=is_draining)


def draining(members: Mapping[str, Member]) -> frozenset[str]:
    """Ids of the members that are to own nothing."""
    return frozenset(node_id for node_id, member in members.items() if member.is_draining)


def _contest(node: Node, other_address: str) -> str:
    return (
        f"node id {node.id} is claimed by two processes, at {node.address} and at {other_address}: stop one of them, "
        "and give it a data directory of its own"
    )


def contest(member: Member) -> str:
    """The sentence about two processes that claim this member's id; "" where none do."""
    return _contest(member.node, member.contested_by) if member.contested_by else ""


def _down(member: Member, now: Moment) -> Member:
    return replace(
        member,
        node=replace(member.node, state=NodeState.DOWN),
        down_since_s=now.monotonic_s,
        displaced=NO_DISPLACED,
        contested_by="",
    )


def expire(members: Mapping[str, Member], now: Moment, policy: Policy) -> tuple[Mapping[str, Member], tuple[str, ...]]:
    """Take down whose lease ended, forget who was down for long. Returns `members` itself where nothing changed."""
    changed: dict[str, Member | None] = {}
    warnings = []
    for node_id, member in members.items():
        if member.down_since_s is not None:
            if now.monotonic_s - member.down_since_s >= policy.forget_after_s:
                changed[node_id] = None
                warnings.append(f"node {node_id} was down for {policy.forget_after_s:g} s: it leaves the cluster map")
        elif member.lease_ends_s <= now.monotonic_s:
            changed[node_id] = _down(member, now)
            warnings.append(
                f"node {node_id} ({member.node.address}) did not report for {policy.lease_s:g} s: it is down"
            )
        elif member.contested_by and member.displaced.get(member.contested_by, 0.0) <= now.monotonic_s:
            changed[node_id] = replace(member, contested_by="")
    if not changed:
        return members, ()
    merged = {**members, **changed}
    return {node_id: member for node_id, member in merged.items() if member is not None}, tuple(warnings)


def grant_grace(members: Mapping[str, Member], now: Moment, policy: Policy) -> Mapping[str, Member]:
    """Give every live member a whole lease: this process itself was stopped, so silence says nothing about them."""
    until_s = now.monotonic_s + policy.lease_s
    return {
        node_id: member if member.down_since_s is not None else replace(member, lease_ends_s=until_s)
        for node_id, member in members.items()
    }


def next_map(current: ClusterMap, members: Mapping[str, Member], *, reported_epoch: int = 0) -> ClusterMap:
    """The map of these members: `current` itself where it still holds, else one with a greater epoch."""
    nodes = tuple(members[node_id].node for node_id in sorted(members))
    if nodes == current.nodes and reported_epoch <= current.epoch:
        return current
    return ClusterMap(max(current.epoch, reported_epoch) + 1, nodes)


def renumbered(current: ClusterMap) -> ClusterMap:
    """The same nodes under the next epoch: owners changed although no node did."""
    return ClusterMap(current.epoch + 1, current.nodes)
