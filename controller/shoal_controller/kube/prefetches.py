"""The custom resource `Prefetch`: warm-up as an object that ends. Pure.

Each of its paths is one prefetch job of the core, with an id made from the object's own, so that a new leader finds
what an old one began, and a job that was lost is only begun again: what is cached already costs nothing.

    waiting    its dataset is not there, or a Prefetch of higher priority has not ended
    running    its jobs run
    Complete   every job is done, by the word of every node that owns a share
    Failed     one is not: with the core's own reason

The rule: it works on one snapshot, the one that was newest, or named, when it began.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal import sizes
from shoal_controller.kube import conditions, prefetching
from shoal_controller.kube.conditions import Condition
from shoal_controller.model import Dataset, Job, JobState, State

FINALIZER = "shoal.io/stop-prefetch"
#: The first one is that of an object that nobody has looked at.
PHASES = ("Waiting", "Running", "Complete", "Failed")


@dataclass(frozen=True, slots=True)
class Asked:
    """A `Prefetch` object, parsed."""

    namespace: str
    name: str
    uid: str
    generation: int
    created: str
    is_deleting: bool
    has_finalizer: bool
    dataset: str
    snapshot: str  #: a digest or its first digits; "" for the newest
    paths: tuple[str, ...]
    priority: int
    ttl_s: float | None
    status: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Asked:
        """Parse an object that the schema admitted."""
        metadata, spec = raw["metadata"], raw.get("spec") or {}
        ttl = spec.get("ttlSecondsAfterFinished")
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=int(metadata.get("generation", 0)),
            created=metadata.get("creationTimestamp", ""),
            is_deleting="deletionTimestamp" in metadata,
            has_finalizer=FINALIZER in (metadata.get("finalizers") or []),
            dataset=spec.get("dataset", ""),
            snapshot=spec.get("snapshot", ""),
            paths=tuple(spec.get("paths") or [""]),
            priority=int(spec.get("priority", 0)),
            ttl_s=None if ttl is None else float(ttl),
            status=raw.get("status") or {},
        )

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def is_finished(self) -> bool:
        return self.status.get("phase") in ("Complete", "Failed")

    def job_id(self, place: int) -> str:
        """Of the job for `paths[place]`."""
        return f"kube-{self.uid}-{place}"


@dataclass(frozen=True, slots=True)
class AddFinalizer:
    pass


@dataclass(frozen=True, slots=True)
class Start:
    """Begin the jobs that are not there, of one snapshot."""

    snapshot: str
    paths: Mapping[str, str]  #: by job id


@dataclass(frozen=True, slots=True)
class Cancel:
    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RemoveFinalizer:
    pass


@dataclass(frozen=True, slots=True)
class Delete:
    """It ended so long ago that nobody is to see it any more."""


Act = AddFinalizer | Start | Cancel | RemoveFinalizer | Delete


def decide(asked: Asked, others: Iterable[Asked], state: State, *, failure: str, now_utc_s: float) -> list[Act]:
    """What is to be done now.

    Args:
        others: all of them; this one may be among them.
        failure: why its jobs could not be begun; "" while that was not tried or went well.
    """
    if asked.is_deleting:
        unfinished = _sole_jobs(asked, others, state)
        return [*([Cancel(unfinished)] if unfinished else []), *([RemoveFinalizer()] if asked.has_finalizer else [])]
    if asked.is_finished:
        if asked.has_finalizer:
            return [RemoveFinalizer()]
        ended_utc_s = _ended_utc_s(asked)
        return [Delete()] if asked.ttl_s is not None and now_utc_s - ended_utc_s >= asked.ttl_s else []
    if not asked.has_finalizer:
        return [AddFinalizer()]
    snapshot = snapshot_of(asked, state)
    if failure or not snapshot or waits_for(asked, others, state) or not state.map.owners():
        return []
    missing = {
        asked.job_id(place): path
        for place, path in enumerate(asked.paths)
        if _job(asked, place, snapshot, state) is None
    }
    return [Start(snapshot, missing)] if missing else []


def waits_for(asked: Asked, others: Iterable[Asked], state: State) -> str:
    """The key of a Prefetch that comes first; "" where none does.

    One that has begun goes on. One whose dataset is not there holds nobody up.
    """
    if asked.status.get("snapshot"):
        return ""
    first = [
        other.key
        for other in others
        if other.priority > asked.priority
        and not other.is_finished
        and not other.is_deleting
        and other.dataset in state.datasets
    ]
    return min(first, default="")


def snapshot_of(asked: Asked, state: State) -> str:
    """The digest that it works on; "" while there is none."""
    if begun := asked.status.get("snapshot"):
        return str(begun)
    dataset = state.datasets.get(asked.dataset)
    if dataset is None:
        return ""
    if not asked.snapshot:
        return dataset.newest.digest
    return next((digest for digest in dataset.digests if digest.startswith(asked.snapshot)), "")


def _job(asked: Asked, place: int, snapshot: str, state: State) -> Job | None:
    """The job for a path: its own, or one that somebody else began and that does the same."""
    own = state.jobs.get(asked.job_id(place))
    if own is not None:
        return own
    what = (asked.dataset, snapshot, asked.paths[place])
    same = (job for job in state.jobs.values() if (job.dataset, job.snapshot, job.prefix) == what)
    return next((job for job in same if not job.is_finished), None)


def _sole_jobs(asked: Asked, others: Iterable[Asked], state: State) -> tuple[str, ...]:
    """Unfinished jobs that it began and that no other Prefetch wants."""
    snapshot = snapshot_of(asked, state)
    wanted = {
        (other.dataset, snapshot_of(other, state), path)
        for other in others
        if other.uid != asked.uid and not other.is_finished and not other.is_deleting
        for path in other.paths
    }
    return tuple(
        job.id
        for place, path in enumerate(asked.paths)
        if (job := state.jobs.get(asked.job_id(place))) is not None
        and not job.is_finished
        and (asked.dataset, snapshot, path) not in wanted
    )


def _ended_utc_s(asked: Asked) -> float:
    try:
        return conditions.parse_timestamp(str(asked.status.get("finishedAt", "")))
    except ValueError:
        return 0.0


def status_of(
    asked: Asked, others: Iterable[Asked], state: State, *, failure: str, now_utc_s: float
) -> tuple[dict[str, Any], list[Condition]]:
    """The whole status, and its conditions as they are decided. Of a finished one: as it is."""
    before = asked.status.get("conditions") or []
    if asked.is_finished:
        return dict(asked.status), []
    snapshot = snapshot_of(asked, state)
    jobs = [_job(asked, place, snapshot, state) if snapshot else None for place in range(len(asked.paths))]
    begun = [job for job in jobs if job is not None]
    is_begun = bool(asked.status.get("snapshot")) or bool(begun)
    wanted = _conditions(asked, others, state, jobs, failure)
    is_complete = wanted[0].status is True
    is_failed = wanted[1].status is True
    total, done = sum(job.bytes_total for job in begun), sum(job.bytes_done for job in begun)
    status: dict[str, Any] = {
        "observedGeneration": asked.generation,
        "phase": "Complete" if is_complete else "Failed" if is_failed else "Running" if is_begun else "Waiting",
        "percent": 100 if is_complete else min(99, prefetching.percent(done, total)) if begun and total else 0,
        "bytesDone": done,
        "bytesTotal": total,
        "size": sizes.format(total),
        "jobs": [
            {"path": path, **_job_status(job)} for path, job in zip(asked.paths, jobs, strict=True) if job is not None
        ],
        "conditions": conditions.merge(before, wanted, generation=asked.generation, now_utc_s=now_utc_s),
    }
    if is_begun:
        status["snapshot"] = snapshot
        status["startedAt"] = asked.status.get("startedAt") or conditions.timestamp(now_utc_s)
    if is_complete or is_failed:
        status["finishedAt"] = conditions.timestamp(now_utc_s)
    return status, wanted


def _job_status(job: Job) -> dict[str, Any]:
    told: dict[str, Any] = {"id": job.id, "state": str(job.state), "bytesDone": job.bytes_done}
    told["bytesTotal"] = job.bytes_total
    if job.reason:
        told["reason"] = conditions.shortened(job.reason, 1024)
    return told


def _conditions(
    asked: Asked, others: Iterable[Asked], state: State, jobs: list[Job | None], failure: str
) -> list[Condition]:
    """Complete and Failed, in this order."""
    unfinished = [job for job in jobs if job is None or not job.is_finished]
    broken = [job for job in jobs if job is not None and job.is_finished and job.state is not JobState.DONE]
    if failure:
        return [
            Condition("Complete", False, "Failed", failure),
            Condition("Failed", True, "NothingToFetch", failure, is_trouble=True),
        ]
    if broken:
        reason = {JobState.REFUSED: "DoesNotFit", JobState.CANCELLED: "Cancelled"}.get(broken[0].state, "FetchFailed")
        return [
            Condition("Complete", False, "Failed", broken[0].reason),
            Condition("Failed", True, reason, broken[0].reason, is_trouble=True),
        ]
    if not unfinished:
        return [
            Condition("Complete", True, "Cached", f"all of {_what(asked)} is cached and was checked"),
            Condition("Failed", False, "Complete"),
        ]
    reason, message = _waiting(asked, others, state, jobs)
    return [Condition("Complete", False, reason, message), Condition("Failed", False, reason)]


def _waiting(asked: Asked, others: Iterable[Asked], state: State, jobs: list[Job | None]) -> tuple[str, str]:
    dataset: Dataset | None = state.datasets.get(asked.dataset)
    if dataset is None:
        return "NoDataset", (
            f"no dataset is named {asked.dataset}: 'kubectl get datasets.shoal.io' shows those there are; it begins as "
            "soon as that one is Ready"
        )
    if not snapshot_of(asked, state):
        return "NoSnapshot", (
            f"dataset {asked.dataset} serves no snapshot {asked.snapshot}: leave spec.snapshot out for the newest"
        )
    if first := waits_for(asked, others, state):
        return "Queued", f"waits for Prefetch {first}, whose priority is higher"
    if not state.map.owners():
        return "NoNodes", "no cache node is up: see the pods of the DaemonSet"
    reasons = [job.reason for job in jobs if job is not None and job.reason]
    if any(job is None or job.state is JobState.PLANNING for job in jobs):
        return "Planning", reasons[0] if reasons else "the nodes work out whether it fits"
    return "Fetching", reasons[0] if reasons else f"{_what(asked)} is being fetched"


def _what(asked: Asked) -> str:
    paths = ", ".join(path for path in asked.paths[:3] if path)
    more = f" and {len(asked.paths) - 3} more paths" if len(asked.paths) > 3 else ""
    return f"{asked.dataset} under {paths}{more}" if paths else asked.dataset
