"""Whether datasets can be kept as they were asked for, and their snapshots be had. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from shoal import sizes
from shoal.datasets import DatasetRecord
from shoal.doctor.facts import Facts, Told, ToldJob
from shoal.doctor.findings import Finding, Kind, Outcome, counted, listed

CHECK = "datasets"

ALL_WELL = Kind(CHECK, "ok", Outcome.OK, "{datasets}, {size} in all, with all snapshots where they are needed")
SNAPSHOT_LOST = Kind(
    CHECK,
    "snapshot-lost",
    Outcome.PROBLEM,
    "the controller has lost the snapshot of dataset {dataset}: who does not have it yet cannot open the dataset",
    "'shoal dataset refresh {dataset}' lists its origin again",
)
SNAPSHOT_MISSING = Kind(
    CHECK,
    "snapshot-missing",
    Outcome.PROBLEM,
    "{who} did not get the snapshot of dataset {dataset}, and cannot serve it",
    "nodes fetch snapshots from {controller}: that has to lead to the controller from where they run (its --advertise)",
)
FEW_NODES = Kind(
    CHECK,
    "few-nodes",
    Outcome.WARNING,
    "dataset {dataset} asks for {replicas} replicas and {nodes} up: it has no more than that",
    "start more nodes, or 'shoal dataset set {dataset} --replicas {up}'",
)
PINNED = Kind(
    CHECK,
    "pinned",
    Outcome.WARNING,
    "pinned datasets ({names}) need {wanted}, and all nodes together keep {capacity}: the rest is always fetched again",
    "add nodes or space, or take the pin of what may go: 'shoal dataset set NAME --no-pin'",
)
QUOTAS = Kind(
    CHECK,
    "quotas",
    Outcome.WARNING,
    "quotas ({names}) promise {wanted}, and all nodes together keep {capacity}",
    "add nodes or space, or lower some: 'shoal dataset set NAME --quota SIZE'",
)
PREFETCH_FAILED = Kind(
    CHECK,
    "prefetch-failed",
    Outcome.WARNING,
    "the last prefetch of {target} ({id}) {state}: {reason}",
    "do what it says, then 'shoal prefetch {target}' again",
)
PREFETCH_WAITS = Kind(
    CHECK,
    "prefetch-waits",
    Outcome.WARNING,
    "the prefetch of {target} ({id}) does not go on: {reason}",
    "do what it says, or 'shoal prefetch --cancel {id}'",
)
NOBODY = Kind(CHECK, "unknown", Outcome.SKIPPED, "nobody answers who knows the datasets")


def judge(facts: Facts) -> list[Finding]:
    if facts.datasets is None:
        return [NOBODY.found()]
    found = [*_snapshots(facts), *_room(facts, facts.datasets), *_prefetches(facts)]
    total_bytes = sum(record.total_bytes for record in facts.datasets)
    well = ALL_WELL.found(datasets=counted(len(facts.datasets), "dataset"), size=sizes.format(total_bytes))
    return found or [well]


def _snapshots(facts: Facts) -> Iterator[Finding]:
    lacking: dict[str, list[str]] = defaultdict(list)
    for fact in facts.snapshots:
        if not fact.has_it:
            lacking[fact.dataset].append(fact.who)
    for dataset, who in lacking.items():
        if "" in who:
            yield SNAPSHOT_LOST.found(dataset, dataset=dataset)
        nodes = [facts.name_of(each) for each in who if each]
        if nodes:
            where = facts.controller_address or "the controller"
            yield SNAPSHOT_MISSING.found(dataset, who=listed(nodes), dataset=dataset, controller=where)


def _room(facts: Facts, datasets: tuple[DatasetRecord, ...]) -> Iterator[Finding]:
    owners = facts.cluster_map.owners() if facts.cluster_map is not None else ()
    if not owners:
        return  # nothing is kept at all, and that is told of the nodes
    capacity_bytes = sum(node.weight for node in owners)
    for record in datasets:
        if record.replicas > len(owners):
            nodes = "1 node is" if len(owners) == 1 else f"{len(owners)} nodes are"
            named = {"dataset": record.name, "replicas": record.replicas}
            yield FEW_NODES.found(record.name, nodes=nodes, up=len(owners), **named)
    pinned = {r.name: r.total_bytes * min(r.replicas, len(owners)) for r in datasets if r.pinned}
    quotas = {r.name: r.quota_bytes for r in datasets if r.quota_bytes}
    for kind, wanted in ((PINNED, pinned), (QUOTAS, quotas)):
        if sum(wanted.values()) > capacity_bytes:
            yield kind.found(
                names=listed([*wanted]),
                wanted=sizes.format(sum(wanted.values())),
                capacity=sizes.format(capacity_bytes),
            )


def _prefetches(facts: Facts) -> Iterator[Finding]:
    """The last one of each target counts: one that failed and was done since is no news, nor is one of what is gone."""
    if not isinstance(facts.told, Told):
        return
    known = {record.name for record in facts.datasets or ()}
    last: dict[str, ToldJob] = {}
    for job in sorted(facts.told.jobs, key=lambda job: (not job.finished_at, job.finished_at)):
        last[job.target] = job
    for target, job in last.items():
        if target.partition("/")[0] not in known:
            continue
        named = {"target": target, "id": job.id, "reason": job.reason}
        if job.state in ("failed", "refused"):
            yield PREFETCH_FAILED.found(target, state="was refused" if job.state == "refused" else job.state, **named)
        elif job.state in ("planning", "running") and job.reason:
            yield PREFETCH_WAITS.found(target, **named)
