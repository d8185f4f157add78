"""Asks everybody who can be asked, and puts what they say together as `Facts`.

    1  the endpoint, the local socket, this machine
    2  the controller that they name, over HTTP and gRPC
    3  each node of the newest map
    4  each dataset's snapshot and origin, as the controller and the nodes see them

Within a step all are asked at once, each with a deadline. What hangs in spite of that (a resolver, a file system) hangs
on a thread for which nobody waits. The controller may be away in all of it: then the local node, or the node that is
the endpoint, says what it knew last.

The rule: only questions. Nothing here changes anything, anywhere.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TypeVar
from urllib.parse import quote

from shoal.cluster import parse_endpoint, reachable
from shoal.cluster_map import ClusterMap, Node
from shoal.datasets import DatasetRecord
from shoal.doctor import asking, this_machine
from shoal.doctor.asking import Answer, Unanswered
from shoal.doctor.facts import (
    Asked,
    Endpoint,
    Facts,
    MountFact,
    NodeFacts,
    OriginFact,
    Process,
    Silence,
    SnapshotFact,
    Socket,
    Told,
    Trouble,
    Untold,
)
from shoal.errors import InvalidRequest
from shoal.origin.check import CHECK_S
from shoal.threads import Threads
from shoal.version import VERSION

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

#: What a node needs to hear of a new map, before it is said to be late.
_LATE_S = 0.5
#: Questions about datasets' origins that the controller is asked, and as many that the nodes are in all.
MAX_PAIRS = 256
_MAX_AT_ONCE = 64
#: A deadline of several threads is that much later than each one's own.
_MARGIN_S = 1.0
#: That one node is asked one after the other, on a thread.
_NODE_QUESTIONS = 3
#: The status with which a process says that its drive hangs (docs/wire.md, "Probes").
_DRIVE_HANGS = 507
_METRIC = re.compile(r"^(\w+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)

Tell = Callable[[str, float], Told | Untold]
"""Asks the controller's gRPC service at ``host:port``, within so many seconds."""
ListMounts = Callable[[float], tuple[MountFact, ...] | None]
"""This machine's mounts, listed within so many seconds; None where they cannot be."""


def look(
    endpoint: str, socket_path: str, *, socket_is_given: bool, timeout_s: float, tell: Tell, list_mounts: ListMounts
) -> Facts:
    """Ask everybody. Takes some ten times `timeout_s` at most, where all that can hang does; mostly a moment.

    Args:
        endpoint: as it was given; "" where none was.
        timeout_s: that each answer is waited for.
    """
    address, malformed = "", ""
    try:
        address = parse_endpoint(endpoint) if endpoint else ""
    except InvalidRequest as error:
        malformed = str(error)
    mounts = Threads(1, "doctor").submit(list_mounts, timeout_s)
    places = {"socket": f"unix:{socket_path}"} | ({"endpoint": address} if address else {})
    asked = _ask_all(places, timeout_s)
    sources = [known for known in (asked.get("endpoint"), asked["socket"]) if isinstance(known, Process)]
    facts = Facts(
        version=VERSION,
        timeout_s=timeout_s,
        endpoint=Endpoint(endpoint, address, malformed, asked.get("endpoint")),
        socket=Socket(socket_path, socket_is_given, asked["socket"]),
        machine=this_machine.look(_result(mounts, timeout_s)),
    )
    if not sources:
        return facts
    facts = _with_controller(facts, sources[0], tell)
    return _with_datasets(_with_nodes(facts), sources[0])


def _with_controller(facts: Facts, source: Process, tell: Tell) -> Facts:
    address = source.address if source.is_controller else reachable(source.controller_http, source.address)
    controller: Asked | None = source if source.is_controller else None
    if controller is None and address:
        controller = _ask_all({"": address}, facts.timeout_s)[""]
    knows = controller if isinstance(controller, Process) else source
    grpc_address = reachable(knows.controller_grpc, knows.address)
    told: Told | Untold | None = None
    if grpc_address:
        waited = f"it did not answer within {facts.timeout_s:g} s"
        answers = together({"": partial(tell, grpc_address, facts.timeout_s)}, facts.timeout_s + _MARGIN_S)
        told = answers.get("", Untold(waited))
    processes = [known for known in (source, controller) if isinstance(known, Process)]
    maps = [process.cluster_map for process in processes if process.cluster_id == source.cluster_id]
    return replace(
        facts,
        controller_address=address,
        controller=controller,
        grpc_address=grpc_address,
        told=told,
        cluster_map=max(maps, key=lambda cluster_map: cluster_map.epoch),
    )


def _with_nodes(facts: Facts) -> Facts:
    assert facts.cluster_map is not None
    nodes = {node.id: node for node in facts.cluster_map.nodes}
    jobs = {node.id: partial(_look_at, node, facts.timeout_s) for node in nodes.values()}
    found = together(jobs, _NODE_QUESTIONS * facts.timeout_s)
    silent = {node.id: NodeFacts(node, _no_answer(facts.timeout_s), False, {}, False) for node in nodes.values()}
    found = silent | found
    late = [
        node_id
        for node_id, seen in found.items()
        if isinstance(seen.asked, Process) and seen.asked.cluster_map.epoch < facts.cluster_map.epoch
    ]
    if late:  # a map that is just being published reaches them meanwhile
        time.sleep(_LATE_S)
        again = _ask_all({node_id: nodes[node_id].address for node_id in late}, facts.timeout_s)
        found |= {node_id: replace(found[node_id], asked=asked) for node_id, asked in again.items()}
    return replace(facts, nodes=tuple(found[node_id] for node_id in nodes))


def _with_datasets(facts: Facts, source: Process) -> Facts:
    """The datasets, and for each of them and as many nodes as may be asked: is its snapshot there, and its origin?"""
    is_there = isinstance(facts.controller, Process)
    timeout_s = facts.timeout_s
    address = facts.controller_address if is_there else source.address
    listed = together({"": partial(_datasets, address, timeout_s)}, timeout_s + _MARGIN_S).get("")
    if listed is None:
        return facts
    answering = [seen for seen in facts.nodes if isinstance(seen.asked, Process)]
    by_controller = [(record, "", facts.controller_address) for record in listed if is_there]
    by_nodes = (
        (record, seen.node.id, seen.node.address)
        for turn in range(len(answering))
        for number, record in enumerate(listed)
        for seen in (answering[(number + turn) % len(answering)],)
    )
    pairs = [*by_controller[:MAX_PAIRS], *itertools.islice(by_nodes, MAX_PAIRS)]
    jobs = {(record.name, who): partial(_about, record, who, address, timeout_s) for record, who, address in pairs}
    done = together(jobs, timeout_s + max(timeout_s, CHECK_S + _MARGIN_S))
    late = "no answer in time"
    answers = [done.get(key, (None, OriginFact(*key, None, late))) for key in jobs]
    return replace(
        facts,
        datasets=tuple(listed),
        snapshots=tuple(snapshot for snapshot, _ in answers if snapshot is not None),
        origins=tuple(origin for _, origin in answers if origin is not None),
        unchecked_pairs=len(listed) * (is_there + len(answering)) - len(pairs),
    )


# One question each.


def _process(address: str, timeout_s: float) -> Asked:
    try:
        return _understood(address, asking.ask(address, "/v1/cluster", timeout_s))
    except Unanswered as error:
        return error.silence


def _understood(address: str, answer: Answer) -> Asked:
    """What an answer to ``/v1/cluster`` says. Pure."""
    if "shoal-error" in answer.headers:
        said = answer.body.decode("utf-8", "replace").strip()
        is_standby = answer.headers["shoal-error"] == "Unavailable"
        return Silence(Trouble.STANDBY if is_standby else Trouble.MUTE, f"HTTP {answer.status}: {said}")
    server = f", Server: {answer.headers['server']}" if "server" in answer.headers else ""
    stranger = Silence(Trouble.STRANGER, f"HTTP {answer.status}{server}")
    if answer.status != 200:
        return stranger
    try:
        raw = json.loads(answer.body)
        return Process(
            address=address,
            role=str(raw["role"]),
            version=str(raw["version"]),
            cluster_id=str(raw.get("cluster_id", "")),
            cluster_map=ClusterMap.from_json(json.dumps(raw["map"])),
            node_id=str(raw.get("node_id", "")),
            controller_http=str(raw["controller_http"]),
            controller_grpc=str(raw["controller_grpc"]),
            condition=raw.get("condition"),
            clock=answer.clock,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return stranger


def _look_at(node: Node, timeout_s: float) -> NodeFacts:
    asked = _process(node.address, timeout_s)
    if not isinstance(asked, Process):
        return NodeFacts(node, asked, False, {}, False)
    alive = metrics = None
    try:
        alive = asking.ask(node.address, "/v1/alive", timeout_s)
        metrics = asking.ask(node.address, "/metrics", timeout_s)
    except Unanswered:
        pass  # it answered a moment ago, and that is what is told
    return NodeFacts(
        node,
        asked,
        drive_hangs=alive is not None and alive.status == _DRIVE_HANGS,
        metrics=_numbers(metrics.body.decode("utf-8", "replace")) if metrics is not None else {},
        is_here=this_machine.is_here(node.address.rpartition(":")[0]),
    )


def _numbers(text: str) -> dict[str, float]:
    """Prometheus's text as numbers. Pure."""
    found = {}
    for name, value in _METRIC.findall(text):
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


def _datasets(address: str, timeout_s: float) -> list[DatasetRecord] | None:
    try:
        return [DatasetRecord.from_dict(raw) for raw in json.loads(asking.ask(address, "/v1/datasets", timeout_s).body)]
    except (Unanswered, ValueError, TypeError):
        return None


def _about(
    record: DatasetRecord, who: str, address: str, timeout_s: float
) -> tuple[SnapshotFact | None, OriginFact | None]:
    """Whether `who`, at `address`, has a dataset's newest snapshot, and reads its origin."""
    name = record.name
    try:
        # The header keeps a node from fetching it for this question alone.
        via = {"Via": "1.1 shoal-doctor"}
        found = asking.ask(address, f"/v1/snapshots/{record.snapshot}", timeout_s, method="HEAD", headers=via)
        if found.status == 404:
            return SnapshotFact(name, who, has_it=False), None
        answer = asking.ask(address, f"/v1/datasets/{quote(name)}/origin", max(timeout_s, CHECK_S + _MARGIN_S))
        said = answer.body.decode("utf-8", "replace").strip()
        if answer.status == 200:
            raw = json.loads(said)
            origin = OriginFact(name, who, raw["error"] or "", raw["sentence"])
        elif answer.headers.get("shoal-error") == "NotFound":
            origin = OriginFact(name, who, None, "its version does not check origins")
        else:
            origin = OriginFact(name, who, None, said)
    except Unanswered as error:
        return None, OriginFact(name, who, None, error.silence.reason)
    except (ValueError, KeyError, TypeError) as error:
        return None, OriginFact(name, who, None, f"it does not answer as Shoal does ({error!r})")
    return SnapshotFact(name, who, has_it=True), origin


# Many at once.


def together(jobs: Mapping[K, Callable[[], T]], within_s: float) -> dict[K, T]:
    """The results of all jobs that end in time. The others go on, on threads for which no exit waits for long."""
    threads = Threads(_MAX_AT_ONCE, "doctor")
    until = time.monotonic() + within_s * -(-len(jobs) // _MAX_AT_ONCE)
    futures = {key: threads.submit(job) for key, job in jobs.items()}
    done = {key: _result(future, until - time.monotonic()) for key, future in futures.items()}
    threads.close()
    return {key: result for key, result in done.items() if result is not None}


def _result(future: Future[T], within_s: float) -> T | None:
    """None where there is none in time."""
    try:
        return future.result(max(0.0, within_s))
    except TimeoutError:
        return None


def _ask_all(addresses: Mapping[K, str], timeout_s: float) -> dict[K, Asked]:
    """The processes at these addresses."""
    jobs = {key: partial(_process, address, timeout_s) for key, address in addresses.items()}
    answers = together(jobs, timeout_s + _MARGIN_S)
    return {key: answers.get(key, _no_answer(timeout_s)) for key in addresses}


def _no_answer(timeout_s: float) -> Silence:
    return Silence(Trouble.UNREACHABLE, f"no answer within {timeout_s:g} s")
