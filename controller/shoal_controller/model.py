"""The values that the controller's state is made of: members, datasets, prefetch jobs. Pure data.

The rule: they are frozen, and a change is a new value, so whoever holds an old state reads something consistent for as
long as they like, without a lock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from shoal.cluster_map import ClusterMap, Node
from shoal.datasets import DatasetRecord

#: Snapshots of one dataset that are served, the newest included.
MAX_SNAPSHOTS = 8
MAX_REPLICAS = 16
#: Of sizes: SQLite keeps signed 64-bit integers.
MAX_NUMBER = 1 << 62
#: Of one node: 8 PiB, so that the sum of a thousand of them is kept too.
MAX_REPORTED_BYTES = 1 << 53
#: A report may be so far ahead of the controller, which may have lost its disk: a century of a new epoch each second.
MAX_EPOCHS_AHEAD = 1 << 32
#: Finished prefetch jobs that are remembered.
MAX_FINISHED_JOBS = 50
#: What a node says of itself; anything else is a reason why it passes reads through.
OK, FULL = "ok", "full"


@dataclass(frozen=True, slots=True)
class Moment:
    """When something happens: leases count `monotonic_s`, which no clock adjustment moves; people read `utc_s`."""

    monotonic_s: float
    utc_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """The knobs of the core, all in seconds.

    Attributes:
        lease_s: a node that was silent for so long is down.
        forget_after_s: a node that was down for so long leaves the map.
        planning_s: a prefetch job that some node has not answered for so long fails.
        first_lease_s: what nodes get at least to be heard after a start: one on another machine has to be found first.
    """

    lease_s: float
    forget_after_s: float
    planning_s: float
    first_lease_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """One node's share of a prefetch job, as it reports it; `epoch` is the map it was worked out from."""

    epoch: int
    bytes_total: int
    bytes_done: int
    bytes_short: int
    is_complete: bool
    failure: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a node says of itself with each heartbeat. Its `node.state` says nothing: that is the controller's to say.

    Attributes:
        epoch: of the map that the node uses.
        condition: "ok", or why the node passes reads through.
        cached_bytes: by snapshot digest, the bytes it holds of shards that it is the first owner of.
        held_bytes: by snapshot digest, the bytes it holds of all shards.
        shares: by job id.
        is_leaving: the node stops in good order.
        handover_bytes: what it holds and its new owners do not yet; None while that is not known, and unless it drains.
        short_bytes: of shards that it owns and peers hold, and that it has no room for.
    """

    node: Node
    epoch: int
    used_bytes: int = 0
    capacity_bytes: int = 0
    condition: str = OK
    version: str = ""
    cached_bytes: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str, Share] = field(default_factory=dict)
    is_leaving: bool = False
    handover_bytes: int | None = None
    short_bytes: int = 0
    held_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Member:
    """A known node and its lease.

    Attributes:
        node: as it stands in the map.
        lease_ends_s: when silence turns it DOWN, on the monotonic clock.
        heard_s: when it last registered or reported (after a restart of the controller: when that was).
        down_since_s: when it went DOWN; None while it is not.
        report: the last one; None before the first.
        displaced: addresses at which the same id lived when a newer process claimed it, and until when they are
            refused, on the monotonic clock.
        contested_by: the displaced address that was heard again, so two processes have one id; "" while none was.
        is_draining: it was asked to own nothing, and that lasts while it is down.
    """

    node: Node
    lease_ends_s: float
    heard_s: float
    down_since_s: float | None = None
    report: Report | None = None
    displaced: Mapping[str, float] = field(default_factory=dict)
    contested_by: str = ""
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot that is served: its digest, and what it lists."""

    digest: str
    objects: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset with its policy. `storage_options` is the JSON as it was given: references stay references.

    Attributes:
        origin: fsspec URL of the prefix, without a slash at the end.
        endpoint: the service behind the URL where the protocol has several; else "".
        snapshots: newest first; never empty.
        is_pinned: its shards are never dropped to make room.
        quota_bytes: the share of the cluster's cache that is kept for it; 0: none.
        is_direct: clients may read the origin where no node answers.
    """

    name: str
    origin: str
    endpoint: str
    shard_size: int
    replicas: int
    storage_options: str
    snapshots: tuple[SnapshotInfo, ...]
    created_utc_s: float
    refreshed_utc_s: float
    is_adhoc: bool = False
    is_pinned: bool = False
    quota_bytes: int = 0
    is_direct: bool = False

    @property
    def newest(self) -> SnapshotInfo:
        return self.snapshots[0]

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(snapshot.digest for snapshot in self.snapshots)

    def to_record(self) -> DatasetRecord:
        """What every process may see of it."""
        return DatasetRecord(
            name=self.name,
            origin=self.origin,
            endpoint=self.endpoint,
            shard_size=self.shard_size,
            replicas=self.replicas,
            snapshot=self.newest.digest,
            snapshots=self.digests,
            objects=self.newest.objects,
            total_bytes=self.newest.total_bytes,
            adhoc=self.is_adhoc,
            pinned=self.is_pinned,
            quota_bytes=self.quota_bytes,
            direct=self.is_direct,
        )


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What of a dataset's policy is to be another; None leaves it as it is. The names are those of `Dataset`."""

    replicas: int | None = None
    is_pinned: bool | None = None
    quota_bytes: int | None = None
    is_direct: bool | None = None
    storage_options: str | None = None

    def applied_to(self, dataset: Dataset) -> Dataset:
        return replace(
            dataset,
            replicas=dataset.replicas if self.replicas is None else self.replicas,
            is_pinned=dataset.is_pinned if self.is_pinned is None else self.is_pinned,
            quota_bytes=dataset.quota_bytes if self.quota_bytes is None else self.quota_bytes,
            is_direct=dataset.is_direct if self.is_direct is None else self.is_direct,
            storage_options=dataset.storage_options if self.storage_options is None else self.storage_options,
        )


class JobState(enum.StrEnum):
    """Where a prefetch job is. All but the first two are final."""

    PLANNING = "planning"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    REFUSED = "refused"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Job:
    """A prefetch job.

    Attributes:
        bytes_total, bytes_done: over all owners and replicas; those of the last map that every owner had answered for.
        reason: why it failed, was refused, or waits; "" otherwise.
        planning_since_s: when planning began, on the monotonic clock of this run of the controller.
        is_paused: it runs, but the nodes of the present map cannot hold it.
    """

    id: str
    dataset: str
    snapshot: str
    prefix: str
    created_utc_s: float
    planning_since_s: float
    state: JobState = JobState.PLANNING
    bytes_total: int = 0
    bytes_done: int = 0
    reason: str = ""
    finished_utc_s: float | None = None
    is_paused: bool = False

    @property
    def is_finished(self) -> bool:
        return self.state not in (JobState.PLANNING, JobState.RUNNING)

    @property
    def may_run(self) -> bool:
        """Whether nodes are to fetch, rather than to say whether it fits."""
        return self.state is JobState.RUNNING and not self.is_paused

    @property
    def what(self) -> str:
        """The job in words: ``prefetch of imagenet/train``."""
        return f"prefetch of {self.dataset}/{self.prefix}" if self.prefix else f"prefetch of {self.dataset}"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the controller knows, at one moment."""

    map: ClusterMap = field(default_factory=ClusterMap)
    members: Mapping[str, Member] = field(default_factory=dict)
    datasets: Mapping[str, Dataset] = field(default_factory=dict)
    jobs: Mapping[str, Job] = field(default_factory=dict)
