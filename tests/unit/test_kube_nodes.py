"""Kubernetes nodes that go: which cache nodes are drained, and which come back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shoal.cluster_map import NodeState
from shoal_controller.kube import nodes
from shoal_controller.kube.nodes import KubeNode
from shoal_controller.model import Member, Report
from tests.support.controller import digest, node

NOBODY: frozenset[str] = frozenset()


def kube_node(name: str, *, cordoned: bool = False, taints: tuple[str, ...] = ()) -> KubeNode:
    return KubeNode(name, f"{name}.host", cordoned, taints)


def member(name: str, *, state: NodeState = NodeState.UP, draining: bool = False, **report: Any) -> Member:
    known = node(name, state=NodeState.DRAINING if draining and state is NodeState.UP else state)
    return Member(known, 0.0, 0.0, report=Report(known, 1, **report), is_draining=draining)


def test_a_node_as_the_api_describes_it() -> None:
    raw = {
        "metadata": {"name": "n1", "labels": {"kubernetes.io/hostname": "ip-10-0-0-1"}},
        "spec": {"unschedulable": True, "taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
    }
    assert KubeNode.parse(raw) == KubeNode("n1", "ip-10-0-0-1", True, ("nvidia.com/gpu",))
    large = {**raw, "status": {"images": ["x"] * 50}}
    assert KubeNode.parse(nodes.trimmed(large)) == KubeNode.parse(raw)
    assert "status" not in nodes.trimmed(large)
    assert KubeNode.parse({"metadata": {"name": "n1"}}) == KubeNode("n1", "n1", False, ())


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (kube_node("n1"), ""),
        (kube_node("n1", cordoned=True), "node n1 is cordoned"),
        (kube_node("n1", taints=("nvidia.com/gpu", "node.kubernetes.io/not-ready")), ""),
        (kube_node("n1", taints=("karpenter.sh/disrupted",)), "node n1 has the taint karpenter.sh/disrupted"),
        (kube_node("n1", taints=("gpu-health/xid-79",)), "node n1 has the taint gpu-health/xid-79"),
    ],
)
def test_what_drains(known: KubeNode, reason: str) -> None:
    assert nodes.reason_to_drain(known, (*nodes.DRAINING_TAINTS, "gpu-health/*")) == reason


def test_a_cordon_drains_and_its_end_brings_back() -> None:
    cordoned, open_ = {"n1": kube_node("n1", cordoned=True)}, {"n1": kube_node("n1")}
    first = nodes.decide(cordoned, {"n1"}, {"n1": member("n1")}, NOBODY)
    assert (dict(first.drain), first.undrain, first.ours) == ({"n1": "node n1 is cordoned"}, (), {"n1"})
    drained = {"n1": member("n1", draining=True)}
    second = nodes.decide(cordoned, {"n1"}, drained, first.ours)
    assert (dict(second.drain), second.undrain, second.ours) == ({}, (), {"n1"})
    third = nodes.decide(open_, {"n1"}, drained, second.ours)
    assert (dict(third.drain), third.undrain, third.ours) == ({}, ("n1",), NOBODY)


def test_what_people_drained_is_theirs() -> None:
    drained = {"n1": member("n1", draining=True)}
    for known in (kube_node("n1"), kube_node("n1", cordoned=True)):
        decided = nodes.decide({"n1": known}, {"n1"}, drained, NOBODY)
        assert (dict(decided.drain), decided.undrain, decided.ours) == ({}, (), NOBODY)


def test_a_removed_node_is_drained_and_one_outside_of_kubernetes_is_not() -> None:
    members = {name: member(name) for name in ("n1", "elsewhere")}
    decided = nodes.decide({}, {"n1"}, members, NOBODY)
    assert dict(decided.drain) == {"n1": "node n1 was removed from the cluster"}


def test_a_node_that_is_down_is_left_to_its_lease() -> None:
    decided = nodes.decide({}, {"n1"}, {"n1": member("n1", state=NodeState.DOWN)}, NOBODY)
    assert not decided.drain


def test_a_drain_of_ours_outlasts_that_the_node_is_down() -> None:
    drained = member("n1", draining=True)
    down = replace(drained, node=replace(drained.node, state=NodeState.DOWN))
    decided = nodes.decide({"n1": kube_node("n1", cordoned=True)}, {"n1"}, {"n1": down}, frozenset({"n1"}))
    assert decided.ours == {"n1"}
    assert nodes.decide({"n1": kube_node("n1")}, {"n1"}, {"n1": down}, frozenset({"n1"})).undrain == ("n1",)


def test_a_node_that_was_forgotten_is_no_longer_ours() -> None:
    assert nodes.decide({"n1": kube_node("n1")}, {"n1"}, {}, frozenset({"n1"})).ours == NOBODY


def test_bytes_are_counted_where_pods_may_go() -> None:
    one, two = digest(1), digest(2)
    members = {
        "a": member("n1", held_bytes={one: 10, two: 5, digest(3): 1000}),
        "b": member("n1", held_bytes={one: 1}),
        "c": member("n2", held_bytes={one: 100}),
        "d": member("n3", state=NodeState.DOWN, held_bytes={one: 100}),
        "e": member("elsewhere", held_bytes={one: 100}),
        "f": member("n4", held_bytes={}),
    }
    known = {name: kube_node(name, cordoned=name == "n2") for name in ("n1", "n2", "n3", "n4")}
    assert nodes.held_bytes(members, known, [one, two]) == {"n1.host": 16}
