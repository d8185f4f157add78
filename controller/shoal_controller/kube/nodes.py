"""Kubernetes nodes that are on their way out: what follows for the cache nodes on them. Pure.

A cordon, one of the taints that people named, or the removal of the Node drains the cache node there: it owns nothing
from then on, and hands over what it holds. When the reason is gone it owns its share again, warm with what is still on
its drive.

Taints are named and not guessed: GPU nodes are tainted all their lives, and ``not-ready`` or ``unreachable`` are no
news here, for the cache's own lease says sooner whether a node serves, and moving its shards because a kubelet restarts
would be the greater harm.

The rule: a drain that people asked for (``shoal node drain``) is theirs. Only what was drained here is undrained here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.cluster_map import NodeState
from shoal_controller.kube import gate
from shoal_controller.model import Member

#: Keys of taints that say that a node goes; patterns as in fnmatch(3).
DRAINING_TAINTS = (
    "ToBeDeletedByClusterAutoscaler",
    "karpenter.sh/disrupted",
    "node.kubernetes.io/out-of-service",
    "node.cloudprovider.kubernetes.io/shutdown",
)


@dataclass(frozen=True, slots=True)
class KubeNode:
    """A Node as far as it matters here. `host` is its host name label, by which pods choose it."""

    name: str
    host: str
    is_cordoned: bool
    taints: tuple[str, ...]

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> KubeNode:
        metadata, spec = raw["metadata"], raw.get("spec") or {}
        return cls(
            name=metadata["name"],
            host=(metadata.get("labels") or {}).get(gate.HOSTNAME, metadata["name"]),
            is_cordoned=bool(spec.get("unschedulable")),
            taints=tuple(taint["key"] for taint in spec.get("taints") or []),
        )


def trimmed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What of a Node is read here. The rest is large (the images it has) and changes all the time."""
    metadata, spec = raw["metadata"], raw.get("spec") or {}
    return {
        "metadata": {key: metadata[key] for key in ("name", "uid", "labels", "resourceVersion") if key in metadata},
        "spec": {key: spec[key] for key in ("unschedulable", "taints") if key in spec},
    }


@dataclass(frozen=True, slots=True)
class Drains:
    """What is to be done.

    Attributes:
        drain: ids of cache nodes that are to own nothing, with the reason.
        undrain: ids of those that are to own their share again.
        ours: ids of those that are drained on account of a Kubernetes node, once that is done.
    """

    drain: Mapping[str, str]
    undrain: tuple[str, ...]
    ours: frozenset[str]


def reason_to_drain(node: KubeNode, taints: Iterable[str] = DRAINING_TAINTS) -> str:
    """Why the cache node on `node` is to own nothing; "" where it is not."""
    if node.is_cordoned:
        return f"node {node.name} is cordoned"
    patterns = tuple(taints)
    for key in node.taints:
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
            return f"node {node.name} has the taint {key}"
    return ""


def decide(
    nodes: Mapping[str, KubeNode],
    seen: Collection[str],
    members: Mapping[str, Member],
    ours: frozenset[str],
    taints: Iterable[str] = DRAINING_TAINTS,
) -> Drains:
    """Compare Kubernetes' nodes with the cache's.

    Args:
        nodes: by name.
        seen: names of nodes that were there at some time; a cache node on one that is not any more is drained. Others
            run outside of Kubernetes, and are nobody's business here.
        members: the cache's nodes; their topology's ``host`` is the name of the Kubernetes node.
        ours: ids that were drained here.
    """
    patterns = tuple(taints)
    drain: dict[str, str] = {}
    undrain = []
    kept = set()
    for node_id, member in members.items():
        reason = _reason(member, nodes, seen, patterns)
        is_ours = node_id in ours and member.is_draining
        if reason and not member.is_draining and member.node.state is NodeState.UP:
            drain[node_id] = reason
            kept.add(node_id)
        elif is_ours and not reason:
            undrain.append(node_id)
        elif is_ours:
            kept.add(node_id)
    return Drains(drain, tuple(undrain), frozenset(kept))


def _reason(member: Member, nodes: Mapping[str, KubeNode], seen: Collection[str], patterns: tuple[str, ...]) -> str:
    name = member.node.topology.get("host", "")
    node = nodes.get(name)
    if node is not None:
        return reason_to_drain(node, patterns)
    return f"node {name} was removed from the cluster" if name in seen else ""


def held_bytes(
    members: Mapping[str, Member], nodes: Mapping[str, KubeNode], digests: Collection[str]
) -> dict[str, int]:
    """By host name label: the bytes of these snapshots on nodes that pods may go to."""
    held: dict[str, int] = {}
    for member in members.values():
        node = nodes.get(member.node.topology.get("host", ""))
        if node is None or node.is_cordoned or member.report is None or member.node.state is not NodeState.UP:
            continue
        size_bytes = sum(member.report.held_bytes.get(digest, 0) for digest in digests)
        if size_bytes:
            held[node.host] = held.get(node.host, 0) + size_bytes
    return held
