"""Whether the nodes' drives do what is asked of them, and have the room that was promised. Pure.

A drive that fails turns its node into a pass-through, never into an error: that is why somebody has to look here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from shoal import sizes
from shoal.cluster_map import NodeState
from shoal.doctor.facts import Facts, NodeFacts, Process, Told, ToldNode
from shoal.doctor.findings import Finding, Kind, Outcome, counted, listed

CHECK = "disks"

ALL_WELL = Kind(CHECK, "ok", Outcome.OK, "{drives} in order: {used} of {capacity} used")
FAILING = Kind(
    CHECK,
    "failing",
    Outcome.PROBLEM,
    "{name} passes reads through and keeps nothing: {fault}",
    "{remedy}; the node takes its drive up again by itself",
)
HANGS = Kind(
    CHECK,
    "hangs",
    Outcome.PROBLEM,
    "a read of the drive of {name} does not return: readers go to other nodes",
    "see 'dmesg' there and the drive's health; after --stall-after the node gives the drive up and passes reads "
    "through",
)
FULL = Kind(
    CHECK,
    "full",
    Outcome.WARNING,
    "{name} has used all of its {capacity}: it keeps what it has and passes the rest through",
    "nothing, where the datasets are larger than the cache; else a larger --capacity, more nodes, or 'shoal dataset "
    "remove'",
)
TOO_SMALL = Kind(
    CHECK,
    "too-small",
    Outcome.WARNING,
    "{name} may still take {wanted}, and its file system has room for {free}: other files have taken what was promised",
    "free space there, or start the node with a smaller --capacity, before reads pass through",
)
NO_ROOM = Kind(
    CHECK,
    "no-room",
    Outcome.WARNING,
    "{name} has no room for {short} that it owns and other nodes hold",
    "a larger --capacity there, more nodes, or 'shoal dataset remove'",
)
DAMAGED = Kind(
    CHECK,
    "damaged",
    Outcome.WARNING,
    "{name} found {count} damaged on its drive since it started ({causes}), dropped them and fetched them again",
    "look at the drive's health ('smartctl', 'dmesg'), and for programs that write into the node's --data-dir",
)
FAILED_BEFORE = Kind(
    CHECK,
    "failed-before",
    Outcome.WARNING,
    "the drive of {name} is in order now and failed {times} since the node started",
    "see the node's log for when and how, and 'dmesg'",
)
NOBODY = Kind(CHECK, "unknown", Outcome.SKIPPED, "no node says how its drive is")

_PASSES = "passing reads through: "
_FULL = "full"
_CORRUPT = "shoal_node_shards_corrupt_total{"


def judge(facts: Facts) -> list[Finding]:
    told = {node.id: node for node in facts.told.nodes} if isinstance(facts.told, Told) else {}
    found: list[Finding] = []
    used = capacity = drives = 0
    for seen in facts.nodes:
        known = told.get(seen.node.id)
        if not isinstance(seen.asked, Process) and (known is None or seen.node.state is NodeState.DOWN):
            continue
        drives += 1
        used += int(seen.metrics.get("shoal_node_used_bytes", known.used_bytes if known else 0))
        capacity += int(seen.metrics.get("shoal_node_capacity_bytes", known.capacity_bytes if known else 0))
        found += _drive(facts, seen, known)
    if not drives:
        return [NOBODY.found()]
    well = ALL_WELL.found(
        drives="1 drive is" if drives == 1 else f"{drives} drives are",
        used=sizes.format(used),
        capacity=sizes.format(capacity),
    )
    return found or [well]


def _drive(facts: Facts, seen: NodeFacts, told: ToldNode | None) -> Iterator[Finding]:
    name, metrics = facts.name_of(seen.node.id), seen.metrics
    condition = (seen.asked.condition if isinstance(seen.asked, Process) else None) or (told.condition if told else "")
    capacity_bytes = int(metrics.get("shoal_node_capacity_bytes", told.capacity_bytes if told else 0))
    if seen.drive_hangs:
        yield HANGS.found(name, name=name)
    elif condition.startswith(_PASSES):
        fault, _, remedy = condition.removeprefix(_PASSES).partition(": ")
        yield FAILING.found(name, name=name, fault=fault, remedy=remedy or "see the node's log")
    elif condition == _FULL:
        yield FULL.found(name, name=name, capacity=sizes.format(capacity_bytes))
    else:
        yield from _room(name, seen, capacity_bytes)
        failures = int(metrics.get("shoal_node_disk_failures_total", 0))
        if failures:
            yield FAILED_BEFORE.found(name, name=name, times=counted(failures, "time"))
    short_bytes = int(metrics.get("shoal_node_rebalance_short_bytes", told.short_bytes if told else 0))
    if short_bytes:
        yield NO_ROOM.found(name, name=name, short=sizes.format(short_bytes))
    causes = {
        label.removeprefix(_CORRUPT).removesuffix("}").partition("=")[2].strip('"'): int(value)
        for label, value in metrics.items()
        if label.startswith(_CORRUPT) and value
    }
    if causes:
        said = listed([f"{count} {cause}" for cause, count in causes.items()])
        yield DAMAGED.found(name, name=name, count=counted(sum(causes.values()), "shard"), causes=said)


def _room(name: str, seen: NodeFacts, capacity_bytes: int) -> Iterator[Finding]:
    """What the file system lacks of what the node may take: nothing is wrong yet."""
    free = seen.metrics.get("shoal_node_drive_free_bytes", math.nan)
    wanted_bytes = capacity_bytes - int(seen.metrics.get("shoal_node_used_bytes", 0))
    if free < wanted_bytes:  # never so of what is not known
        yield TOO_SMALL.found(name, name=name, wanted=sizes.format(wanted_bytes), free=sizes.format(int(free)))
