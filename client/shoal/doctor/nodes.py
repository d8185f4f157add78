"""Whether the map's nodes are there, for the controller, from here, and for each other. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from shoal.cluster_map import NodeState
from shoal.doctor.facts import Facts, NodeFacts, Process, Silence, Told, ToldNode, Trouble
from shoal.doctor.findings import Finding, Kind, Outcome, counted

CHECK = "nodes"

ALL_WELL = Kind(CHECK, "ok", Outcome.OK, "{nodes} of the map (epoch {epoch}) answer from here")
NONE = Kind(
    CHECK,
    "none",
    Outcome.PROBLEM,
    "no cache node has joined: nothing can be read",
    "start 'shoal-cachenode' with --controller of the controller's gRPC port; on Kubernetes label nodes "
    "shoal.io/cache=true and see the pods of the DaemonSet shoal-cachenode",
)
NO_OWNERS = Kind(
    CHECK,
    "no-owners",
    Outcome.PROBLEM,
    "every cache node is down or drains: reads fail",
    "start one again, or 'shoal node undrain ID'",
)
DOWN = Kind(
    CHECK,
    "down",
    Outcome.PROBLEM,
    "{name} is down: it neither reports to the controller nor answers here ({reason})",
    "start it again, or do nothing if it is gone for good: it is forgotten after --forget-after, and the others fetch "
    "its shards as they are read",
)
CUT_OFF = Kind(
    CHECK,
    "cut-off",
    Outcome.PROBLEM,
    "{name} is down for the controller, and yet it answers here",
    "see its log for why its reports do not arrive: its --controller has to be the gRPC port, open from that node",
)
DRAINING = Kind(CHECK, "draining", Outcome.WARNING, "{name} drains: {waits_for}", "'shoal node undrain {id}' undoes it")
DRAINED = Kind(
    CHECK,
    "drained",
    Outcome.WARNING,
    "{name} is drained and owns nothing",
    "stop it, or let it own its share again with 'shoal node undrain {id}'",
)
UNREACHABLE = Kind(
    CHECK,
    "unreachable",
    Outcome.PROBLEM,
    "{name} reports to the controller and cannot be reached from here ({reason})",
    "open its port from here; where the address is wrong, start it with an --advertise that leads to it from "
    "everywhere",
)
SILENT = Kind(
    CHECK,
    "silent",
    Outcome.PROBLEM,
    "{name} cannot be reached from here ({reason}), and the controller, which could tell whether it runs, is away",
    "see that it runs, and that its port is open from here; and see what is found about the controller",
)
MUTE = Kind(
    CHECK,
    "mute",
    Outcome.PROBLEM,
    "{name} accepts connections and does not answer ({reason})",
    "the process is stopped, hangs or is overloaded: see its log and restart it",
)
OTHER = Kind(
    CHECK,
    "other",
    Outcome.PROBLEM,
    "at the address of {name} there is {other}",
    "give each node an address of its own with --listen and --advertise; one that moved is found again when it reports",
)
CONTESTED = Kind(
    CHECK,
    "contested",
    Outcome.PROBLEM,
    "two processes say that they are {name}: {contest}",
    "stop one of them and give it a data directory of its own: ids lie in there, so one that was copied has two owners",
)
OTHER_CLUSTER = Kind(
    CHECK,
    "other-cluster",
    Outcome.PROBLEM,
    "{name} holds on to another cluster than the controller's",
    "restart it with --controller of this controller; where the controller lost its record, nodes follow by themselves",
)
LATE = Kind(
    CHECK,
    "late",
    Outcome.WARNING,
    "{name} uses the map of epoch {epoch}, which is {newest} by now: it does not hear the controller",
    "see its log: its --controller has to be the gRPC port, open from that node",
)
DEAF = Kind(
    CHECK,
    "no-peers",
    Outcome.WARNING,
    "{name} gets no answer from {count} other processes: what they hold it fetches from the origin",
    "open the nodes' port (7450) between all nodes, and see that the map's addresses lead to them from there",
)
NOBODY = Kind(CHECK, "unknown", Outcome.SKIPPED, "nobody answers who has a map")


class Say(Protocol):
    """Makes a finding about one node, whose name and id are given already."""

    def __call__(self, kind: Kind, **named: object) -> Finding: ...


def judge(facts: Facts) -> list[Finding]:
    cluster_map = facts.cluster_map
    if cluster_map is None:
        return [NOBODY.found()]
    if not cluster_map.nodes:
        return [NONE.found()]
    told = {node.id: node for node in facts.told.nodes} if isinstance(facts.told, Told) else {}
    found = [] if cluster_map.owners() else [NO_OWNERS.found()]
    silent = sum(not isinstance(seen.asked, Process) for seen in facts.nodes)
    for seen in facts.nodes:
        found += _node(facts, seen, told.get(seen.node.id), silent)
    return found or [ALL_WELL.found(nodes=counted(len(facts.nodes), "node"), epoch=cluster_map.epoch)]


def _node(facts: Facts, seen: NodeFacts, told: ToldNode | None, silent: int) -> Iterator[Finding]:
    assert facts.cluster_map is not None
    node, asked = seen.node, seen.asked
    name = facts.name_of(node.id)

    def say(kind: Kind, **named: object) -> Finding:
        return kind.found(name, name=name, id=node.id, **named)

    is_down = node.state is NodeState.DOWN
    if told is not None and told.contest:
        yield say(CONTESTED, contest=told.contest)
    match asked:
        case Silence(Trouble.MUTE, reason) if not is_down:
            yield say(MUTE, reason=reason)
        case Silence(Trouble.STRANGER | Trouble.GRPC | Trouble.STANDBY, reason):
            yield say(OTHER, other=f"no cache node ({reason})")
        case Silence(reason=reason) if is_down:
            yield say(DOWN, reason=reason)
        case Silence(reason=reason):
            reports = isinstance(facts.controller, Process) or isinstance(facts.told, Told)
            yield say(UNREACHABLE if reports else SILENT, reason=reason)
        case Process() if asked.node_id != node.id:
            yield say(OTHER, other=f"node {asked.node_id}" if asked.node_id else "the controller")
        case Process():
            yield from _answering(facts, seen, asked, say, silent)
    if node.state is NodeState.DRAINING:
        if told is not None and told.drained:
            yield say(DRAINED)
        else:
            yield say(
                DRAINING, waits_for=told.waits_for if told is not None else "how far it is only the controller knows"
            )


def _answering(facts: Facts, seen: NodeFacts, asked: Process, say: Say, silent: int) -> Iterator[Finding]:
    assert facts.cluster_map is not None
    controller = facts.controller
    if seen.node.state is NodeState.DOWN:
        yield say(CUT_OFF)
    elif isinstance(controller, Process) and asked.cluster_id not in ("", controller.cluster_id):
        yield say(OTHER_CLUSTER)
    elif asked.cluster_map.epoch < facts.cluster_map.epoch:
        yield say(LATE, epoch=asked.cluster_map.epoch, newest=facts.cluster_map.epoch)
    deaf_to = int(seen.metrics.get("shoal_node_silent_peers", 0))
    away = silent + (not isinstance(controller, Process))
    if deaf_to > away:  # those that do not answer here either are told of by themselves
        yield say(DEAF, count=deaf_to)
