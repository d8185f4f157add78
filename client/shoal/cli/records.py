"""What the controller tells of datasets, jobs and nodes, as the JSON that commands print and as cells of tables.

The rule: a key of the JSON is never renamed and never left out; what is not known is null.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from shoal import sizes
from shoal.cli import output
from shoal.cluster_map import Node
from shoal.datasets import DatasetRecord

if TYPE_CHECKING:
    from shoal.wire import shoal_pb2 as pb

FINISHED = ("done", "failed", "refused", "cancelled")

DATASET_COLUMNS = ("DATASET", "OBJECTS>", "SIZE>", "CACHED>", "REPLICAS>", "ORIGIN")
NODE_COLUMNS = ("NODE", "ADDRESS", "STATE", "USED>", "CAPACITY>", "WEIGHT>", "CONDITION")
JOB_COLUMNS = ("PREFETCH", "OF", "STATE", "DONE>", "TOTAL>", "", "REASON")

Json = dict[str, Any]


def dataset(raw: pb.Dataset) -> Json:
    return {
        "name": raw.name,
        "origin": raw.origin,
        "shard_size": raw.shard_size,
        "replicas": raw.replicas,
        "snapshot": raw.snapshot,
        "snapshots": list(raw.snapshots),
        "objects": raw.objects,
        "total_bytes": raw.bytes,
        "cached_bytes": raw.cached_bytes,
        "storage_options": json.loads(raw.storage_options or "{}"),
        "adhoc": raw.adhoc,
        "pinned": raw.pinned,
        "quota_bytes": raw.quota_bytes,
        "direct": raw.direct,
        "created_at": raw.created_at,
        "refreshed_at": raw.refreshed_at,
    }


def dataset_without_controller(record: DatasetRecord) -> Json:
    """As `dataset`, of what a node knows."""
    unknown = dict.fromkeys(("cached_bytes", "storage_options", "created_at", "refreshed_at"))
    known = {key: value for key, value in record.to_dict().items() if key != "endpoint"}
    return known | {"snapshots": list(record.snapshots)} | unknown


def dataset_row(known: Json) -> list[str]:
    cached = known["cached_bytes"]
    return [
        known["name"],
        f"{known['objects']:,}",
        sizes.format(known["total_bytes"]),
        "?" if cached is None else output.percent(cached, known["total_bytes"]),
        str(known["replicas"]),
        known["origin"],
    ]


def dataset_fields(known: Json) -> list[tuple[str, str]]:
    older = known["snapshots"][1:]
    return [
        ("name", known["name"]),
        ("origin", known["origin"]),
        ("objects", f"{known['objects']:,}"),
        ("size", sizes.format(known["total_bytes"])),
        ("cached", f"{sizes.format(known['cached_bytes'])} ({percent_cached(known)})"),
        ("shard size", sizes.format(known["shard_size"])),
        ("replicas", str(known["replicas"])),
        ("pinned", "yes" if known["pinned"] else "no"),
        ("quota", _quota(known)),
        ("direct reads", "allowed" if known["direct"] else "no"),
        ("snapshot", known["snapshot"]),
        *([("older snapshots", ", ".join(older))] if older else []),
        ("storage options", json.dumps(known["storage_options"])),
        *([("made by", "a read of its origin URL (ad hoc)")] if known["adhoc"] else []),
        ("created", known["created_at"]),
        ("refreshed", known["refreshed_at"]),
    ]


def policy(known: Json) -> str:
    """How a dataset is kept, in words."""
    return ", ".join(
        (
            f"{known['replicas']} {'replica' if known['replicas'] == 1 else 'replicas'}",
            "pinned" if known["pinned"] else "not pinned",
            f"quota {_quota(known)}",
            "direct reads allowed" if known["direct"] else "no direct reads",
        )
    )


def _quota(known: Json) -> str:
    return sizes.format(known["quota_bytes"]) if known["quota_bytes"] else "none"


def percent_cached(known: Json) -> str:
    return output.percent(known["cached_bytes"], known["total_bytes"])


def job(raw: pb.PrefetchJob) -> Json:
    return {
        "id": raw.id,
        "dataset": raw.dataset,
        "snapshot": raw.snapshot,
        "prefix": raw.prefix,
        "state": raw.state,
        "bytes_total": raw.bytes_total,
        "bytes_done": raw.bytes_done,
        "reason": raw.reason,
        "created_at": raw.created_at,
        "finished_at": raw.finished_at,
    }


def job_target(known: Json) -> str:
    return f"{known['dataset']}/{known['prefix']}" if known["prefix"] else str(known["dataset"])


def job_row(known: Json) -> list[str]:
    done, total = known["bytes_done"], known["bytes_total"]
    return [
        known["id"],
        job_target(known),
        known["state"],
        sizes.format(done),
        sizes.format(total),
        output.percent(done, total),
        known["reason"],
    ]


def node(raw: pb.NodeStatus) -> Json:
    return {
        "id": raw.node.id,
        "address": raw.node.address,
        "state": raw.node.state,
        "weight": raw.node.weight,
        "topology": dict(raw.node.topology),
        "used_bytes": raw.used_bytes,
        "capacity_bytes": raw.capacity_bytes,
        "condition": raw.condition,
        "seconds_since_report": round(raw.seconds_since_report, 3),
        "version": raw.version,
        "handover_bytes": raw.handover_bytes if raw.HasField("handover_bytes") else None,
        "short_bytes": raw.short_bytes,
        "draining": raw.draining,
        "drained": raw.drained,
        "waits_for": raw.waits_for,
    }


def node_without_controller(known: Node) -> Json:
    """As `node`, of what the map says."""
    mapped = {
        "id": known.id,
        "address": known.address,
        "state": str(known.state),
        "weight": known.weight,
        "topology": dict(known.topology),
    }
    told = ("used_bytes", "capacity_bytes", "condition", "seconds_since_report", "version")
    return mapped | dict.fromkeys((*told, "handover_bytes", "short_bytes", "draining", "drained", "waits_for"))


def node_state(known: Json) -> str:
    """The node's state for people: with what it has to hand over while it drains."""
    if not known["draining"]:
        return str(known["state"])
    if known["drained"]:
        return "drained"
    if known["state"] == "down":
        return "down, draining"
    left = known["handover_bytes"]
    return "draining" if left is None else f"draining, {sizes.format(left)} left"


def node_row(known: Json) -> list[str]:
    used, capacity = known["used_bytes"], known["capacity_bytes"]
    return [
        known["id"],
        known["address"],
        node_state(known),
        "?" if used is None else sizes.format(used),
        "?" if capacity is None else sizes.format(capacity),
        sizes.format(known["weight"]),
        known["condition"] or "?",
    ]
