"""What the core is told (events, past tense) and what it asks for (actions, imperative).

The rule: an action carries everything that carrying it out needs, so the shell decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.cluster_map import ClusterMap, Node
from shoal_controller.model import Dataset, Job, PolicyChange, Report, SnapshotInfo


@dataclass(frozen=True, slots=True)
class NodeRegistered:
    """A node began to watch: it is alive at this address and knows nothing yet."""

    node: Node


@dataclass(frozen=True, slots=True)
class NodeReported:
    """A heartbeat arrived."""

    report: Report


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Leases and deadlines are to be looked at."""


@dataclass(frozen=True, slots=True)
class DatasetAdded:
    """A new dataset's origin was listed."""

    dataset: Dataset


@dataclass(frozen=True, slots=True)
class DatasetRefreshed:
    """The origin of `dataset`, as it was when listing began, was listed again."""

    dataset: Dataset
    snapshot: SnapshotInfo


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """Somebody wants a dataset kept in another way."""

    name: str
    change: PolicyChange


@dataclass(frozen=True, slots=True)
class DatasetRemoved:
    """Somebody wants the dataset forgotten."""

    name: str


@dataclass(frozen=True, slots=True)
class PrefetchRequested:
    """Somebody wants all objects under `prefix` of a snapshot cached. `job_id` names the job if it is a new one."""

    job_id: str
    dataset: str
    snapshot: str
    prefix: str


@dataclass(frozen=True, slots=True)
class PrefetchCancelled:
    """Somebody wants the job stopped."""

    job_id: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """Somebody wants the node to own nothing. `force`: also where then nobody would own anything."""

    node_id: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class UndrainRequested:
    """Somebody wants the node to own its share again."""

    node_id: str


Event = (
    NodeRegistered
    | NodeReported
    | TimePassed
    | DatasetAdded
    | DatasetRefreshed
    | PolicyChanged
    | DatasetRemoved
    | PrefetchRequested
    | PrefetchCancelled
    | DrainRequested
    | UndrainRequested
)


@dataclass(frozen=True, slots=True)
class SaveMap:
    """Record the epoch and the known nodes. `draining` are the ids of those that are to own nothing, down or not."""

    map: ClusterMap
    draining: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SaveDataset:
    dataset: Dataset


@dataclass(frozen=True, slots=True)
class DeleteDataset:
    name: str


@dataclass(frozen=True, slots=True)
class SaveJob:
    job: Job


@dataclass(frozen=True, slots=True)
class DeleteJob:
    job_id: str


@dataclass(frozen=True, slots=True)
class KeepSnapshot:
    """Put the snapshot's file, which was written aside, into its place before the rest is recorded."""

    digest: str


@dataclass(frozen=True, slots=True)
class DropSnapshot:
    """Delete the snapshot's file after the rest is recorded: no dataset refers to it any more."""

    digest: str


@dataclass(frozen=True, slots=True)
class PublishOrders:
    """Tell every node the new map, datasets and prefetch orders."""


@dataclass(frozen=True, slots=True)
class PublishJobs:
    """Tell whoever watches jobs that one changed."""


@dataclass(frozen=True, slots=True)
class RefuseNode:
    """Answer the node whose event this was with AlreadyExists: another process has its id."""

    sentence: str


@dataclass(frozen=True, slots=True)
class LogWarning:
    sentence: str


Write = SaveMap | SaveDataset | DeleteDataset | SaveJob | DeleteJob | KeepSnapshot | DropSnapshot
Action = Write | PublishOrders | PublishJobs | RefuseNode | LogWarning
