"""The custom resource `Dataset`: what was declared, what is to be done about it, and what its status says. Pure.

    declared    registered    then
    yes         no            list its origin and add it (with its finalizer first)
    yes         yes           make its policy and credentials those declared; refresh when due; prefetch where eager
    deleted     yes           remove it
    deleted     no            let the object go, once every live node has let go of the data

The rule: what was registered by hand under the same name over another origin is not touched, and the object says so.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from shoal import origin, sizes
from shoal.cluster_map import NodeState
from shoal.errors import AlreadyExists, InvalidRequest, OriginError, ShoalError, StoreUnusable
from shoal_controller import status as cluster_status
from shoal_controller.catalog import Definition
from shoal_controller.kube import conditions, prefetching, quantities
from shoal_controller.kube.conditions import Condition
from shoal_controller.kube.schedule import Schedule
from shoal_controller.model import Dataset, JobState, PolicyChange, State

T = TypeVar("T")

FINALIZER = "shoal.io/free-space"
#: Annotation: any new value has the origin listed again.
REFRESH_KEY = "shoal.io/refresh"
#: Key of a Secret whose value is a whole JSON object of storage options; every other key is an option by itself.
OPTIONS_KEY = "options.json"
#: Nodes that a status lists, those that hold most.
MAX_NODES = 100
FIRST_RETRY_S, LAST_RETRY_S = 5.0, 300.0
DEFAULT_SHARD_SIZE = "256Mi"
NO_NODES = "no cache node is up: see the pods of the DaemonSet"


@dataclass(frozen=True, slots=True)
class Declared:
    """A `Dataset` object, parsed. `status` is the present one, and only `conditions` and echoes are read from it."""

    name: str
    uid: str
    generation: int
    is_deleting: bool
    has_finalizer: bool
    definition: Definition
    secret: str  #: name of a Secret; "" for none
    schedule: Schedule | None
    is_eager: bool
    refresh_request: str
    #: What the schema could not check and is wrong, for people; "" where nothing is.
    problem: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Declared:
        """Parse an object that the schema admitted. Whatever it says, it can be deleted, so nothing is raised."""
        metadata, spec = raw["metadata"], raw.get("spec") or {}
        options = {name: _option(text) for name, text in (spec.get("options") or {}).items()}
        problem, times = "", None
        definition = Definition(
            name=metadata["name"],
            origin=spec.get("origin", ""),
            replicas=int(spec.get("replicas", 1)),
            storage_options=json.dumps(options, sort_keys=True),
            is_pinned=bool(spec.get("pin", False)),
            is_direct=bool(spec.get("direct", False)),
        )
        try:
            definition = replace(
                definition,
                shard_size=quantities.parse(str(spec.get("shardSize", DEFAULT_SHARD_SIZE))),
                quota_bytes=quantities.parse(str(spec.get("quota", "0"))),
            )
            definition.check()
            times = Schedule.parse(spec.get("refresh") or {})
        except InvalidRequest as error:
            problem = str(error)
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            generation=int(metadata.get("generation", 0)),
            is_deleting=is_deleting(raw),
            has_finalizer=has_finalizer(raw),
            definition=definition,
            secret=(spec.get("secretRef") or {}).get("name", ""),
            schedule=times,
            is_eager=spec.get("prefetch", "OnDemand") == "Eager",
            refresh_request=(metadata.get("annotations") or {}).get(REFRESH_KEY, ""),
            problem=problem,
            status=raw.get("status") or {},
        )

    def with_secret(self, data: Mapping[str, str]) -> Declared:
        """With the data of its Secret (base64, as the API gives it) among the storage options.

        Raises:
            InvalidRequest: a value is no text, or `OPTIONS_KEY` no JSON object.
        """
        options = json.loads(self.definition.storage_options)
        for key, encoded in sorted(data.items()):
            try:
                text = base64.b64decode(encoded, validate=True).decode().removesuffix("\n")
            except (binascii.Error, UnicodeDecodeError) as error:
                raise InvalidRequest(
                    f"the value of {key} in Secret {self.secret} is no text: store it as it is, as kubectl create "
                    "secret does"
                ) from error
            options.update(origin.parse_options(text) if key == OPTIONS_KEY else {key: text})
        definition = replace(self.definition, storage_options=json.dumps(options, sort_keys=True))
        return replace(self, definition=definition)


def is_deleting(raw: Mapping[str, Any]) -> bool:
    return "deletionTimestamp" in raw["metadata"]


def has_finalizer(raw: Mapping[str, Any]) -> bool:
    return FINALIZER in (raw["metadata"].get("finalizers") or [])


def _option(text: str) -> Any:
    """An option's value: JSON where it is written as an object, a list, true or false; else the text."""
    if text in ("true", "false") or text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the last attempt to list an origin failed, and when the next one is due."""

    reason: str
    message: str
    generation: int
    tries: int
    retry_utc_s: float

    @classmethod
    def of(cls, error: ShoalError, generation: int, before: Failure | None, now_utc_s: float) -> Failure:
        tries = before.tries + 1 if before is not None and before.generation == generation else 1
        wait_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(tries - 1, 10))
        return cls(_reason(error), str(error), generation, tries, now_utc_s + wait_s)


def _reason(error: ShoalError) -> str:
    match error:
        case OriginError():
            return type(error).__name__
        case AlreadyExists():
            return "NameTaken"
        case InvalidRequest():
            return "Invalid"
        case StoreUnusable():
            return "ControllerUnusable"
    return "Failed"


@dataclass(frozen=True, slots=True)
class Work:
    """What the operator knows of its own doing for one object; all of it may be lost."""

    is_listing: bool = False
    failure: Failure | None = None
    #: The refresh that was asked for by annotation and is done.
    done_request: str | None = None


@dataclass(frozen=True, slots=True)
class AddFinalizer:
    """Before anything else, so that nothing is cached for an object that can go unnoticed."""


@dataclass(frozen=True, slots=True)
class Add:
    definition: Definition


@dataclass(frozen=True, slots=True)
class Change:
    change: PolicyChange


@dataclass(frozen=True, slots=True)
class Refresh:
    request: str


@dataclass(frozen=True, slots=True)
class Prefetch:
    snapshot: str


@dataclass(frozen=True, slots=True)
class Remove:
    pass


@dataclass(frozen=True, slots=True)
class RemoveFinalizer:
    pass


Act = AddFinalizer | Add | Change | Refresh | Prefetch | Remove | RemoveFinalizer


def decide(
    declared: Declared, dataset: Dataset | None, state: State, work: Work, *, is_waited_for: bool, now_utc_s: float
) -> list[Act]:
    """What is to be done now.

    Args:
        dataset: the registered one of that name.
        is_waited_for: a pod's gate waits for it.
    """
    if declared.is_deleting:
        return decide_deletion(declared, dataset, state)
    if not declared.has_finalizer:
        return [AddFinalizer()]
    if work.is_listing or declared.problem:
        return []
    may_try = (
        work.failure is None
        or work.failure.generation != declared.generation
        or (now_utc_s >= work.failure.retry_utc_s)
    )
    if dataset is None:
        return [Add(declared.definition)] if may_try else []
    if not is_ours(declared, dataset):
        return []
    acts: list[Act] = []
    if change := _change(declared.definition, dataset):
        acts.append(Change(change))
    if may_try and now_utc_s >= refresh_due_utc_s(declared, dataset, work):
        acts.append(Refresh(declared.refresh_request))
    if (declared.is_eager or is_waited_for) and prefetching.is_due(dataset, state, now_utc_s):
        acts.append(Prefetch(dataset.newest.digest))
    return acts


def decide_deletion(declared: Declared, dataset: Dataset | None, state: State) -> list[Act]:
    """What is to be done about an object that was deleted."""
    if not declared.has_finalizer:
        return []
    if dataset is not None and is_ours(declared, dataset):
        return [Remove()]
    return [] if holders(declared, state) else [RemoveFinalizer()]


def holders(declared: Declared, state: State) -> list[str]:
    """Ids of the live nodes that have not let go of a removed dataset's data yet.

    A node that is down lets go when it is back, because orders are the whole state; nobody waits for that. Data that
    another dataset names too stays.
    """
    digest = declared.status.get("snapshot", "")
    if not digest or any(digest in dataset.digests for dataset in state.datasets.values()):
        return []
    return [
        node_id
        for node_id, member in sorted(state.members.items())
        if member.node.state is not NodeState.DOWN and (member.report is None or digest in member.report.cached_bytes)
    ]


def is_ours(declared: Declared, dataset: Dataset) -> bool:
    """Whether the registered dataset is the declared one, and not another that was added by hand."""
    return dataset.origin in (declared.status.get("origin"), canonical(declared.definition.origin)) and (
        dataset.shard_size == declared.definition.shard_size
    )


def canonical(url: str) -> str:
    """An origin's one spelling; `url` itself where it is none."""
    try:
        return str(origin.parse_url(url))
    except InvalidRequest:
        return url


def _change(wanted: Definition, dataset: Dataset) -> PolicyChange | None:
    change = PolicyChange(
        replicas=_if_other(wanted.replicas, dataset.replicas),
        is_pinned=_if_other(wanted.is_pinned, dataset.is_pinned),
        quota_bytes=_if_other(wanted.quota_bytes, dataset.quota_bytes),
        is_direct=_if_other(wanted.is_direct, dataset.is_direct),
        storage_options=_if_other(wanted.storage_options, dataset.storage_options),
    )
    return None if change == PolicyChange() else change


def _if_other(wanted: T, present: T) -> T | None:
    return None if wanted == present else wanted


def refresh_due_utc_s(declared: Declared, dataset: Dataset, work: Work) -> float:
    """When the origin is to be listed again; infinity where it is not."""
    done = work.done_request if work.done_request is not None else declared.status.get("observedRefresh", "")
    if declared.refresh_request != done and declared.refresh_request:
        return 0.0
    return declared.schedule.next_utc_s(dataset.refreshed_utc_s) if declared.schedule else float("inf")


def status_of(
    declared: Declared, dataset: Dataset | None, state: State, work: Work, *, missing_secret: str, now_utc_s: float
) -> tuple[dict[str, Any], list[Condition]]:
    """The whole status, and its conditions as they are decided.

    Args:
        missing_secret: a sentence where the Secret cannot be read; "" where it can.
    """
    found = dataset if dataset is not None and is_ours(declared, dataset) else None
    ready = _ready(declared, dataset, work, missing_secret, state)
    wanted = [ready]
    if found is not None:
        wanted += [_refreshed(declared, found, work), _warm(declared, found, state), _replicated(found, state)]
    before = declared.status.get("conditions") or []
    status: dict[str, Any] = {
        "observedGeneration": declared.generation,
        "phase": _phase(declared, found, work, ready),
        "conditions": conditions.merge(before, wanted, generation=declared.generation, now_utc_s=now_utc_s),
    }
    done = work.done_request if work.done_request is not None else declared.status.get("observedRefresh")
    if done:
        status["observedRefresh"] = done
    if declared.is_deleting and "snapshot" in declared.status:
        status["snapshot"] = declared.status["snapshot"]  # says which data is to go
    if found is not None:
        status |= _figures(declared, found, state, work)
    return status, wanted


def _figures(declared: Declared, dataset: Dataset, state: State, work: Work) -> dict[str, Any]:
    cached = cluster_status.cached_bytes(dataset, state)
    figures: dict[str, Any] = {
        "origin": dataset.origin,
        "snapshot": dataset.newest.digest,
        "objects": dataset.newest.objects,
        "bytes": dataset.newest.total_bytes,
        "size": sizes.format(dataset.newest.total_bytes),
        "cachedBytes": cached,
        "cachedPercent": prefetching.percent(cached, dataset.newest.total_bytes),
        "refreshedAt": conditions.timestamp(dataset.refreshed_utc_s),
        "nodes": _spread(dataset, state),
    }
    due_utc_s = refresh_due_utc_s(declared, dataset, work)
    if 0 < due_utc_s < float("inf"):
        figures["nextRefreshAt"] = conditions.timestamp(due_utc_s)
    return figures


def _spread(dataset: Dataset, state: State) -> list[dict[str, Any]]:
    held = [
        (size_bytes, node_id, member.node.topology.get("host", ""))
        for node_id, member in state.members.items()
        if member.report is not None
        and member.node.state is not NodeState.DOWN
        and (size_bytes := member.report.held_bytes.get(dataset.newest.digest, 0))
    ]
    most = sorted(held, key=lambda node: (-node[0], node[1]))[:MAX_NODES]
    return [{"id": node_id, "host": host, "bytes": size_bytes} for size_bytes, node_id, host in most]


#: The first one is that of an object that nobody has looked at.
PHASES = ("Pending", "Listing", "Ready", "Failed", "Deleting")


def _phase(declared: Declared, found: Dataset | None, work: Work, ready: Condition) -> str:
    if declared.is_deleting:
        return "Deleting"
    if found is not None:
        return "Ready"
    if work.is_listing:
        return "Listing"
    return "Failed" if ready.is_trouble else "Pending"


def _ready(declared: Declared, dataset: Dataset | None, work: Work, missing_secret: str, state: State) -> Condition:
    if declared.is_deleting:
        left = holders(declared, state) if dataset is None else []
        waits = f"waits for {', '.join(left[:5])} to let go of the data" if left else "its space is being freed"
        return Condition("Ready", False, "Deleting", waits)
    if dataset is not None and not is_ours(declared, dataset):
        return Condition(
            "Ready",
            False,
            "NameTaken",
            f"dataset {declared.name} was added by hand over {dataset.origin} with shards of "
            f"{sizes.format(dataset.shard_size)}: 'shoal dataset remove {declared.name}' gives this one the name, or "
            "name this one otherwise",
            is_trouble=True,
        )
    if declared.problem:
        return Condition("Ready", dataset is not None, "Invalid", declared.problem, is_trouble=True)
    if missing_secret:
        return Condition("Ready", dataset is not None, "SecretMissing", missing_secret, is_trouble=True)
    if dataset is not None:
        return Condition("Ready", True, "Serving", f"open shoal://{declared.name}")
    if work.failure is not None and work.failure.generation == declared.generation:
        again = conditions.timestamp(work.failure.retry_utc_s)
        return Condition(
            "Ready", False, work.failure.reason, f"{work.failure.message} (tried again at {again})", is_trouble=True
        )
    return Condition("Ready", False, "Listing", "its origin is being listed")


def _refreshed(declared: Declared, dataset: Dataset, work: Work) -> Condition:
    if work.failure is not None and work.failure.generation == declared.generation:
        again = conditions.timestamp(work.failure.retry_utc_s)
        return Condition(
            "Refreshed",
            False,
            work.failure.reason,
            f"{work.failure.message} (tried again at {again}; the snapshot of "
            f"{conditions.timestamp(dataset.refreshed_utc_s)} is served meanwhile)",
            is_trouble=True,
        )
    if work.is_listing:
        return Condition("Refreshed", None, "Listing", "its origin is being listed again")
    return Condition("Refreshed", True, "Listed", f"listed at {conditions.timestamp(dataset.refreshed_utc_s)}")


def _warm(declared: Declared, dataset: Dataset, state: State) -> Condition:
    cached = cluster_status.cached_bytes(dataset, state)
    total = dataset.newest.total_bytes
    if cached >= total:
        return Condition("Warm", True, "Cached", "all of it is cached")
    share = f"{sizes.format(cached)} of {sizes.format(total)} cached"
    job = prefetching.latest_job(dataset, state)
    if job is not None and not job.is_finished:
        return Condition("Warm", False, "Prefetching", f"{share}; {job.reason}" if job.reason else share)
    if job is not None and job.state in (JobState.FAILED, JobState.REFUSED):
        return Condition("Warm", False, f"Prefetch{job.state.capitalize()}", f"{share}; {job.reason}", is_trouble=True)
    if not declared.is_eager:
        return Condition("Warm", False, "OnDemand", f"{share}; a read or a Prefetch brings in the rest")
    if not state.map.owners():
        return Condition("Warm", False, "NoNodes", NO_NODES, is_trouble=True)
    return Condition("Warm", False, "Partly", share)


def _replicated(dataset: Dataset, state: State) -> Condition:
    up = len(state.map.owners())
    if up >= dataset.replicas:
        return Condition("Replicated", True, "EnoughNodes")
    return Condition(
        "Replicated",
        False,
        "TooFewNodes",
        f"it asks for {dataset.replicas} replicas and {up} nodes are up: label more nodes for the cache, or lower "
        "spec.replicas",
        is_trouble=True,
    )
