"""The scheduling gate: what pods say, and what is done to them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal_controller.kube import gate
from shoal_controller.kube.gate import Want
from tests.support.kube import merge_patch

NAMES = st.tuples(st.sampled_from("a0"), st.text("a0._-", max_size=6)).map(lambda ends: f"{ends[0]}{ends[1]}z")


def pod(
    text: str | None = "imagenet", *, annotation: str | None = None, gates: tuple[str, ...] = (), **spec: Any
) -> dict[str, Any]:
    annotations = {} if annotation is None else {gate.KEY: annotation}
    return {
        "metadata": {
            "name": "train-0",
            "namespace": "team",
            "uid": "u1",
            "resourceVersion": "7",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": "train"} | ({} if text is None else {gate.KEY: text}),
            "annotations": annotations,
        },
        "spec": {"containers": [{"name": "c"}], **spec}
        | ({"schedulingGates": [{"name": name} for name in gates]} if gates else {}),
    }


def held(**more: Any) -> gate.GatedPod:
    found = gate.gated(pod(gates=(gate.GATE,), **more))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "wants"),
    [
        ("imagenet", [("imagenet", 95)]),
        ("imagenet[>=80%]", [("imagenet", 80)]),
        (" imagenet [ >= 80 % ] ,laion", [("imagenet", 80), ("laion", 95)]),
        ("a b[>=0%] c.d-e_f[>=100%]", [("a", 95), ("b", 0), ("c.d-e_f", 100)]),
    ],
)
def test_what_is_waited_for(text: str, wants: list[tuple[str, int]]) -> None:
    assert list(gate.parse(text)) == [Want(*want) for want in wants]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no dataset is named"),
        ("  ", "no dataset is named"),
        ("imagenet[95%]", r"names no datasets at .*write NAME"),
        ("imagenet[>=95]", "write NAME"),
        ("imagenet[>=101%]", "can never be"),
        ("ImageNet", "is no dataset name"),
        ("a,a", "twice"),
        ("a,", "ends with a comma"),
        (",a", "write NAME"),
        ("a,,b", "write NAME"),
        ("a[>=95%]b", "write NAME"),
        (" ".join(f"d{number}" for number in range(17)), "17 datasets"),
    ],
)
def test_what_cannot_be_understood_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        gate.parse(text)


@given(st.dictionaries(NAMES, st.integers(0, 100), min_size=1, max_size=16), st.sampled_from([", ", ",", " ", " , "]))
def test_any_list_is_read_back(wants: dict[str, int], separator: str) -> None:
    text = separator.join(f"{name}[>={percent}%]" for name, percent in wants.items())
    assert gate.parse(text) == tuple(Want(name, percent) for name, percent in wants.items())


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        wants = gate.parse(text)
    except InvalidRequest:
        return
    assert wants
    assert all(0 <= want.percent <= 100 for want in wants)


def test_the_annotation_says_more_than_the_label() -> None:
    assert gate.wants_of(pod("imagenet", annotation="imagenet[>=50%], laion")) == (
        Want("imagenet", 50),
        Want("laion", 95),
    )
    assert gate.wants_of(pod("yes", annotation="laion")) == (Want("laion", 95),)
    assert gate.wants_of(pod(None, annotation="imagenet")) == ()


def test_a_new_pod_gets_the_gate_beside_others() -> None:
    assert gate.admission_patch(pod()) == [
        {"op": "add", "path": "/spec/schedulingGates", "value": [{"name": gate.GATE}]}
    ]
    assert gate.admission_patch(pod(gates=("kueue.x-k8s.io/admission",))) == [
        {"op": "add", "path": "/spec/schedulingGates/-", "value": {"name": gate.GATE}}
    ]


@pytest.mark.parametrize(
    "other", [pod(None), pod(gates=(gate.GATE,)), pod(nodeName="n1"), {"metadata": {}, "spec": {}}]
)
def test_other_pods_are_let_through(other: dict[str, Any]) -> None:
    assert gate.admission_patch(other) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [(gate.MAX_WAIT_KEY, "soon", "is no duration"), (gate.AFFINITY_KEY, "maybe", "write preferred or required")],
)
def test_a_new_pod_with_a_wrong_annotation_is_refused(key: str, value: str, words: str) -> None:
    wrong = pod()
    wrong["metadata"]["annotations"][key] = value
    with pytest.raises(InvalidRequest, match=words):
        gate.admission_patch(wrong)


def test_only_pods_with_our_gate_are_held() -> None:
    assert gate.gated(pod(gates=("other",))) is None
    assert gate.gated(pod()) is None
    going = pod(gates=(gate.GATE,))
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert gate.gated(going) is None


def test_a_held_pod_whose_text_was_spoiled_waits_for_nothing() -> None:
    assert held(annotation="[oops").wants == ()
    assert gate.unmet(held(annotation="[oops"), {}) == []


def test_what_is_not_warm_yet_is_named() -> None:
    waiting = held(annotation="imagenet[>=95%], laion[>=50%], wiki")
    assert gate.unmet(waiting, {"imagenet": 94, "laion": 50}) == [
        "imagenet is cached to 94% of 95%",
        "no dataset wiki is Ready, see 'kubectl get dataset wiki'",
    ]
    assert gate.unmet(waiting, {"imagenet": 95, "laion": 100, "wiki": 95}) == []


def test_waiting_ends_where_the_pod_says_so() -> None:
    raw = pod(gates=(gate.GATE,))
    raw["metadata"]["annotations"][gate.MAX_WAIT_KEY] = "30m"
    waiting = gate.gated(raw)
    assert waiting is not None
    assert not gate.has_waited_enough(waiting, waiting.created_utc_s + 1799)
    assert gate.has_waited_enough(waiting, waiting.created_utc_s + 1800)
    assert not gate.has_waited_enough(held(), held().created_utc_s + 1e9)


def test_weights_follow_the_bytes() -> None:
    terms = gate.preferences({"n1": 1000, "n2": 520, "n3": 480, "n4": 40, "n5": 1000})
    assert [(term["weight"], term["preference"]["matchExpressions"][0]["values"]) for term in terms] == [
        (100, ["n1", "n5"]),
        (50, ["n2", "n3"]),
    ]
    assert gate.preferences({}) == gate.preferences({"n1": 0}) == []


@given(st.dictionaries(st.text("abc", min_size=1, max_size=5), st.integers(0, 1 << 50), max_size=150))
def test_weights_are_such_as_the_api_takes(held_bytes: dict[str, int]) -> None:
    terms = gate.preferences(held_bytes)
    assert len(terms) <= 10
    weight = {host: term["weight"] for term in terms for host in term["preference"]["matchExpressions"][0]["values"]}
    assert all(1 <= each <= 100 for each in weight.values())
    assert len(weight) <= gate.MAX_HOSTS
    # A host with more is never wanted less.
    for one, other in itertools.pairwise(sorted(weight, key=held_bytes.__getitem__)):
        assert weight[one] <= weight[other]
    if any(held_bytes.values()):
        assert max(weight.values()) == 100


def test_release_removes_our_gate_and_adds_where_the_data_is() -> None:
    theirs = {"weight": 3, "preference": {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}}
    pod_affinity = {"requiredDuringSchedulingIgnoredDuringExecution": []}
    raw = pod(
        gates=("kueue.x-k8s.io/admission", gate.GATE),
        affinity={
            "podAffinity": pod_affinity,
            "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [theirs]},
        },
    )
    waiting = gate.gated(copy.deepcopy(raw))
    assert waiting is not None
    change = gate.release_patch(waiting, {"n1": 10})
    assert change["metadata"]["resourceVersion"] == "7"
    released = merge_patch(raw, change)
    assert released["spec"]["schedulingGates"] == [{"name": "kueue.x-k8s.io/admission"}]
    assert released["spec"]["affinity"]["podAffinity"] == pod_affinity
    preferred = released["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred[0] == theirs
    assert preferred[1]["preference"]["matchExpressions"] == [
        {"key": "kubernetes.io/hostname", "operator": "In", "values": ["n1"]}
    ]
    assert released["spec"]["containers"] == raw["spec"]["containers"]


def test_release_without_data_anywhere_changes_no_affinity() -> None:
    assert gate.release_patch(held(), {})["spec"] == {"schedulingGates": []}


def test_affinity_is_required_where_that_was_asked_for() -> None:
    zone = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
    raw = pod(
        gates=(gate.GATE,),
        affinity={
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [zone, {}]}}
        },
    )
    raw["metadata"]["annotations"][gate.AFFINITY_KEY] = "required"
    waiting = gate.gated(raw)
    assert waiting is not None
    change = gate.release_patch(waiting, {"n1": 100, "n2": 49, "n3": 50})
    (first, second) = change["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    ours = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["n1", "n3"]}
    assert first["matchExpressions"] == [*zone["matchExpressions"], ours]
    assert second == {}

    raw["spec"]["affinity"] = {}
    alone = gate.gated(raw)
    assert alone is not None
    change = gate.release_patch(alone, {"n1": 100})
    assert change["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] == {
        "nodeSelectorTerms": [{"matchExpressions": [{**ours, "values": ["n1"]}]}]
    }
