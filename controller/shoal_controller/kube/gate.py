"""The scheduling gate: a pod is not scheduled, and holds no GPU, before its data is in the cache. Pure.

    metadata.labels       shoal.io/datasets: imagenet            this pod waits for imagenet
    metadata.annotations  shoal.io/datasets: imagenet[>=95%], laion[>=50%]

A label's value cannot hold ``[>=%]``, commas or blanks, and only labels select pods for a webhook, so it is the label
that makes a pod wait, and the annotation of the same key, where there is one, that says for what. Encodings of the
percentage into the label's value (``imagenet.95``) are refused: a dataset may be named so. Pods without the label are
never sent to the webhook, so its failure is nothing to them.

It acts on pods only: whoever makes them (Job, JobSet, Kueue, Volcano) may add gates of its own.

The rule: other people's gates and affinity stay as they are; ours are added, and only the gate is removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal import datasets
from shoal.errors import InvalidRequest
from shoal_controller.kube import conditions, schedule

#: Of the label and of the annotation.
KEY = "shoal.io/datasets"
GATE = "shoal.io/dataset-warm"
#: Annotation: ``required`` makes the affinity one that must hold.
AFFINITY_KEY = "shoal.io/affinity"
#: Annotation: how long the gate may hold the pod; then it goes with cold data. Without it, for ever.
MAX_WAIT_KEY = "shoal.io/max-wait"
DEFAULT_PERCENT = 95
MAX_DATASETS = 16
HOSTNAME = "kubernetes.io/hostname"
#: Nodes that a pod is told of, those that hold most.
MAX_HOSTS = 100
#: Weights are rounded to tens, so that ten terms say all.
_STEPS = 10

_WANT = re.compile(r"([^\s\[\],]+)(?:\s*\[\s*>=\s*(\d{1,3})\s*%\s*\])?")
_SEPARATOR = re.compile(r"\s*,\s*|\s+")


@dataclass(frozen=True, slots=True)
class Want:
    """A dataset, and how much of it is to be cached, in percent."""

    dataset: str
    percent: int


@dataclass(frozen=True, slots=True)
class GatedPod:
    """A pod that the gate holds, as far as it matters here. `raw` is the object."""

    namespace: str
    name: str
    uid: str
    created_utc_s: float
    wants: tuple[Want, ...]
    max_wait_s: float | None
    is_required: bool
    raw: Mapping[str, Any]


def trimmed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What of a pod is read here; the rest is large."""
    metadata, spec = raw["metadata"], raw.get("spec") or {}
    return {
        "metadata": {key: value for key, value in metadata.items() if key != "managedFields"},
        "spec": {key: spec[key] for key in ("schedulingGates", "affinity") if key in spec},
    }


def parse(text: str) -> tuple[Want, ...]:
    """Take ``imagenet[>=95%], laion`` apart; without a percentage it is `DEFAULT_PERCENT`.

    Raises:
        InvalidRequest: it is not so, or names a dataset twice.
    """
    wants: dict[str, Want] = {}
    rest = text.strip()
    while rest:
        match = _WANT.match(rest)
        after = rest[match.end() :] if match else rest
        separator = _SEPARATOR.match(after)
        if not match or (after and not separator):
            raise InvalidRequest(
                f"{text!r} names no datasets at {rest!r}: write NAME or NAME[>=PERCENT%], with commas between several, "
                "such as 'imagenet[>=95%], laion'"
            )
        want = Want(datasets.check_name(match[1]), DEFAULT_PERCENT if match[2] is None else int(match[2]))
        if want.percent > 100:
            raise InvalidRequest(f"{want.dataset}[>={want.percent}%] can never be: write at most 100")
        if want.dataset in wants:
            raise InvalidRequest(f"{text!r} names dataset {want.dataset} twice: write it once")
        wants[want.dataset] = want
        rest = after[separator.end() :] if separator else ""
        if separator and not rest and separator[0].strip():
            raise InvalidRequest(f"{text!r} ends with a comma: write a dataset after it, or leave it out")
    if not wants:
        raise InvalidRequest(f"no dataset is named: write one as the value of {KEY}, such as imagenet[>=95%]")
    if len(wants) > MAX_DATASETS:
        raise InvalidRequest(f"{len(wants)} datasets are named: a pod can wait for {MAX_DATASETS}")
    return tuple(wants.values())


def wants_of(pod: Mapping[str, Any]) -> tuple[Want, ...]:
    """What a pod waits for; () where it has not the label.

    Raises:
        InvalidRequest: what it says cannot be understood.
    """
    metadata = pod.get("metadata") or {}
    label = (metadata.get("labels") or {}).get(KEY)
    if label is None:
        return ()
    return parse((metadata.get("annotations") or {}).get(KEY, label))


def admission_patch(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The JSON patch (RFC 6902) that puts the gate on a new pod; empty where none belongs on it.

    Raises:
        InvalidRequest: what the pod says cannot be understood. Better told now than waited for.
    """
    if not wants_of(pod):
        return []
    _max_wait_s(pod)
    _is_required(pod)
    spec = pod.get("spec") or {}
    if spec.get("nodeName"):
        return []  # a daemon's or a static pod: it is bound already, and a gate would have it refused
    gates = spec.get("schedulingGates") or []
    if any(gate.get("name") == GATE for gate in gates):
        return []
    if gates:
        return [{"op": "add", "path": "/spec/schedulingGates/-", "value": {"name": GATE}}]
    return [{"op": "add", "path": "/spec/schedulingGates", "value": [{"name": GATE}]}]


def gated(pod: Mapping[str, Any]) -> GatedPod | None:
    """The pod, if our gate holds it.

    A pod that says something that cannot be understood was changed after it was made: it waits for nothing.
    """
    spec, metadata = pod.get("spec") or {}, pod.get("metadata") or {}
    if not any(gate.get("name") == GATE for gate in spec.get("schedulingGates") or []):
        return None
    if metadata.get("deletionTimestamp"):
        return None
    try:
        wants, max_wait_s, is_required = wants_of(pod), _max_wait_s(pod), _is_required(pod)
    except InvalidRequest:
        wants, max_wait_s, is_required = (), None, False
    return GatedPod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        created_utc_s=conditions.parse_timestamp(metadata["creationTimestamp"]),
        wants=wants,
        max_wait_s=max_wait_s,
        is_required=is_required,
        raw=pod,
    )


def unmet(pod: GatedPod, percents: Mapping[str, int]) -> list[str]:
    """What a pod still waits for, one clause each; `percents` says how much of each dataset is cached."""
    return [
        f"{want.dataset} is cached to {percents[want.dataset]}% of {want.percent}%"
        if want.dataset in percents
        else f"no dataset {want.dataset} is Ready, see 'kubectl get dataset {want.dataset}'"
        for want in pod.wants
        if percents.get(want.dataset, -1) < want.percent
    ]


def has_waited_enough(pod: GatedPod, now_utc_s: float) -> bool:
    return pod.max_wait_s is not None and now_utc_s - pod.created_utc_s >= pod.max_wait_s


def preferences(held_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Preferred scheduling terms for the hosts that hold a pod's data, by the bytes that each holds.

    The host that holds most has weight 100, others their part of it in steps of ten; less than half a step is nothing.
    """
    most = max(held_bytes.values(), default=0)
    if most <= 0:
        return []
    by_step: dict[int, list[str]] = {}
    for host, held in sorted(held_bytes.items(), key=lambda item: (-item[1], item[0]))[:MAX_HOSTS]:
        if step := (2 * _STEPS * held + most) // (2 * most):
            by_step.setdefault(step, []).append(host)
    return [
        {
            "weight": 100 * step // _STEPS,
            "preference": {"matchExpressions": [_on(sorted(hosts))]},
        }
        for step, hosts in sorted(by_step.items(), reverse=True)
    ]


def release_patch(pod: GatedPod, held_bytes: Mapping[str, int]) -> dict[str, Any]:
    """The merge patch (RFC 7386) that lets a pod go to where its data is.

    It names the version of the pod that it was made from, so it cannot undo what somebody else changed meanwhile.
    """
    spec = pod.raw["spec"]
    change: dict[str, Any] = {"schedulingGates": [gate for gate in spec["schedulingGates"] if gate["name"] != GATE]}
    hosts = _most(held_bytes)
    node_affinity = ((spec.get("affinity") or {}).get("nodeAffinity")) or {}
    if pod.is_required and hosts:
        required = node_affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
        # Terms are alternatives: each gets the hosts, but for an empty one, which matches nothing.
        terms = [
            {**term, "matchExpressions": [*(term.get("matchExpressions") or []), _on(hosts)]} if term else term
            for term in required.get("nodeSelectorTerms") or []
        ] or [{"matchExpressions": [_on(hosts)]}]
        change["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        }
    elif preferred := preferences(held_bytes):
        theirs = node_affinity.get("preferredDuringSchedulingIgnoredDuringExecution") or []
        change["affinity"] = {
            "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [*theirs, *preferred]}
        }
    return {"metadata": {"resourceVersion": pod.raw["metadata"]["resourceVersion"]}, "spec": change}


def _most(held_bytes: Mapping[str, int]) -> list[str]:
    """The hosts that hold at least half of what the one with most holds."""
    most = max(held_bytes.values(), default=0)
    found = [host for host, held in held_bytes.items() if held > 0 and 2 * held >= most]
    return sorted(found, key=lambda host: (-held_bytes[host], host))[:MAX_HOSTS]


def _on(hosts: Iterable[str]) -> dict[str, Any]:
    return {"key": HOSTNAME, "operator": "In", "values": list(hosts)}


def _annotation(pod: Mapping[str, Any], key: str) -> str | None:
    found: str | None = ((pod.get("metadata") or {}).get("annotations") or {}).get(key)
    return found


def _max_wait_s(pod: Mapping[str, Any]) -> float | None:
    text = _annotation(pod, MAX_WAIT_KEY)
    return None if text is None else schedule.duration_s(text)


def _is_required(pod: Mapping[str, Any]) -> bool:
    text = _annotation(pod, AFFINITY_KEY)
    if text not in (None, "preferred", "required"):
        raise InvalidRequest(f"the annotation {AFFINITY_KEY} is {text!r}: write preferred or required")
    return text == "required"
