"""The controller's decisions: `Core.handle(event, now)` changes the state and returns what is to be done. Pure.

No clock, no I/O, no asyncio: a distributed failure is a list of events, and a test replays it.

The rule: `handle` either raises a `ShoalError` and has changed nothing, or the returned actions say everything that has
to be recorded and told. The caller records them in the order in which `handle` returned them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import assert_never

from shoal.cluster_map import ClusterMap
from shoal.errors import AlreadyExists, DatasetNotFound, DoesNotFit, NotFound, SnapshotNotFound, Unavailable
from shoal.wire.routes import unknown_dataset
from shoal_controller import jobs, membership
from shoal_controller.events import (
    Action,
    DatasetAdded,
    DatasetRefreshed,
    DatasetRemoved,
    DeleteDataset,
    DeleteJob,
    DrainRequested,
    DropSnapshot,
    Event,
    KeepSnapshot,
    LogWarning,
    NodeRegistered,
    NodeReported,
    PolicyChanged,
    PrefetchCancelled,
    PrefetchRequested,
    PublishJobs,
    PublishOrders,
    RefuseNode,
    SaveDataset,
    SaveJob,
    SaveMap,
    TimePassed,
    UndrainRequested,
)
from shoal_controller.model import (
    MAX_FINISHED_JOBS,
    MAX_SNAPSHOTS,
    Dataset,
    Job,
    JobState,
    Member,
    Moment,
    Policy,
    PolicyChange,
    SnapshotInfo,
    State,
)


class Core:
    """The state and how events change it. `state` is a value: keep it for as long as you like."""

    def __init__(
        self,
        *,
        policy: Policy,
        now: Moment,
        cluster_map: ClusterMap | None = None,
        draining: Container[str] = (),
        datasets: Iterable[Dataset] = (),
        jobs: Iterable[Job] = (),
    ) -> None:
        """Start from what the record holds; the defaults are an empty one."""
        cluster_map = cluster_map or ClusterMap()
        self.state = State(
            map=cluster_map,
            members=membership.restore(cluster_map.nodes, draining, now, policy),
            datasets={dataset.name: dataset for dataset in datasets},
            jobs={job.id: replace(job, planning_since_s=now.monotonic_s) for job in jobs},
        )
        self._policy = policy
        self._ticked_s = now.monotonic_s

    def handle(self, event: Event, now: Moment) -> tuple[Action, ...]:
        """Take one event in.

        Raises:
            ShoalError: what was asked for is refused; the state is as it was.
        """
        match event:
            case NodeRegistered(node):
                member = self.state.members.get(node.id)
                return self._heard(membership.register(member, node, now, self._policy))
            case NodeReported(report):
                membership.check_epoch(report, self.state.map)
                member = self.state.members.get(report.node.id)
                if member is None:
                    return self._set_members(self.state.members, reported_epoch=report.epoch)
                heard = membership.report(member, report, now, self._policy)
                return self._heard(heard, reported_epoch=report.epoch)
            case TimePassed():
                return self._tick(now)
            case DatasetAdded(dataset):
                return self._add(dataset)
            case DatasetRefreshed(dataset, snapshot):
                return self._refresh(dataset, snapshot, now)
            case PolicyChanged(name, change):
                return self._change(name, change)
            case DatasetRemoved(name):
                return self._remove(name, now)
            case PrefetchRequested():
                return self._prefetch(event, now)
            case PrefetchCancelled(job_id):
                return self._cancel(job_id, now)
            case DrainRequested(node_id, force):
                return self._drain(node_id, force)
            case UndrainRequested(node_id):
                return self._set_draining(node_id, is_draining=False)
            case _:
                assert_never(event)

    # Nodes

    def _heard(self, heard: membership.Heard, *, reported_epoch: int = 0) -> tuple[Action, ...]:
        node = heard.member.node
        before = self.state.members.get(node.id)
        members = {**self.state.members, node.id: heard.member}
        changed: tuple[Action, ...] = ()
        if before is not None and before.node == node and reported_epoch <= self.state.map.epoch:
            # Nearly every heartbeat: nothing in the map is from it, so the map need not be compared node by node.
            self.state = replace(self.state, members=members)
        else:
            changed = self._set_members(members, reported_epoch=reported_epoch)
        refusal = (RefuseNode(heard.refusal),) if heard.refusal else ()
        return (*map(LogWarning, heard.warnings), *changed, *refusal)

    def _tick(self, now: Moment) -> tuple[Action, ...]:
        members = self.state.members
        if now.monotonic_s - self._ticked_s > self._policy.lease_s / 2:
            # Ticks come several times a lease: this process was stopped or starved, and reports may wait unread.
            members = membership.grant_grace(members, now, self._policy)
        self._ticked_s = now.monotonic_s
        members, warnings = membership.expire(members, now, self._policy)
        changed = self._set_members(members)
        # Jobs are looked at here alone: N nodes that report cost N updates and one look, not N looks at N shares.
        advanced = {
            job.id: after
            for job in self.state.jobs.values()
            if (after := jobs.advance(job, self.state.map, members, now, self._policy)) != job
        }
        return (*map(LogWarning, warnings), *changed, *self._set_jobs(advanced))

    def _set_members(self, members: Mapping[str, Member], *, reported_epoch: int = 0) -> tuple[Action, ...]:
        cluster_map = membership.next_map(self.state.map, members, reported_epoch=reported_epoch)
        is_new = cluster_map is not self.state.map
        self.state = replace(self.state, map=cluster_map, members=members)
        return (self._save_map(), PublishOrders()) if is_new else ()

    def _drain(self, node_id: str, force: bool) -> tuple[Action, ...]:
        owners = [owner.id for owner in self.state.map.owners()]
        if owners == [node_id] and not force:
            raise DoesNotFit(
                f"node {node_id} is the only one that is up and owns shards: without it nothing can be read; add or "
                "undrain a node first ('shoal node list' shows them), or give --force"
            )
        return self._set_draining(node_id, is_draining=True)

    def _set_draining(self, node_id: str, *, is_draining: bool) -> tuple[Action, ...]:
        member = find_member(self.state.members, node_id)
        if member.is_draining == is_draining:
            return ()
        members = {**self.state.members, node_id: membership.drain(member, is_draining=is_draining)}
        # A node that is down owns nothing either way, so no epoch comes of it; what it will be is recorded.
        return self._set_members(members) or (self._save_map(),)

    def _save_map(self) -> SaveMap:
        return SaveMap(self.state.map, membership.draining(self.state.members))

    # Datasets

    def _add(self, dataset: Dataset) -> tuple[Action, ...]:
        check_is_new(self.state.datasets, dataset.name)
        return self._set_dataset(dataset, dropped=())

    def _refresh(self, before: Dataset, snapshot: SnapshotInfo, now: Moment) -> tuple[Action, ...]:
        current = find(self.state.datasets, before.name)
        if (current.origin, current.created_utc_s) != (before.origin, before.created_utc_s):
            raise DatasetNotFound(
                f"dataset {before.name} was removed and added anew while its origin was listed: "
                f"run 'shoal dataset refresh {before.name}' again"
            )
        older = tuple(known for known in current.snapshots if known.digest != snapshot.digest)
        kept, dropped = (snapshot, *older)[:MAX_SNAPSHOTS], (snapshot, *older)[MAX_SNAPSHOTS:]
        dataset = replace(current, snapshots=kept, refreshed_utc_s=now.utc_s)
        gone = [known.digest for known in dropped]
        actions = self._set_dataset(dataset, dropped=gone)
        reason = f"its snapshot is no longer served: dataset {dataset.name} was refreshed {MAX_SNAPSHOTS} times since"
        return (*actions, *self._cancel_jobs(dataset.name, gone, reason, now))

    def _change(self, name: str, change: PolicyChange) -> tuple[Action, ...]:
        before = find(self.state.datasets, name)
        dataset = change.applied_to(before)
        if dataset == before:
            return ()
        self.state = replace(self.state, datasets={**self.state.datasets, name: dataset})
        saves: tuple[Action, ...] = (SaveDataset(dataset),)
        if dataset.replicas != before.replicas:
            # Owners are a function of map and replicas: whoever worked with the old ones, a prefetch's share above all,
            # works them out anew with a new epoch.
            self.state = replace(self.state, map=membership.renumbered(self.state.map))
            saves = (*saves, self._save_map())
        return (*saves, PublishOrders())

    def _remove(self, name: str, now: Moment) -> tuple[Action, ...]:
        dataset = find(self.state.datasets, name)
        datasets = {key: value for key, value in self.state.datasets.items() if key != name}
        self.state = replace(self.state, datasets=datasets)
        return (
            DeleteDataset(name),
            *self._unreferenced(dataset.digests),
            PublishOrders(),
            *self._cancel_jobs(name, dataset.digests, f"dataset {name} was removed", now),
        )

    def _set_dataset(self, dataset: Dataset, *, dropped: Iterable[str]) -> tuple[Action, ...]:
        self.state = replace(self.state, datasets={**self.state.datasets, dataset.name: dataset})
        return (
            KeepSnapshot(dataset.newest.digest),
            SaveDataset(dataset),
            *self._unreferenced(dropped),
            PublishOrders(),
        )

    def _unreferenced(self, digests: Iterable[str]) -> Iterator[DropSnapshot]:
        used = {digest for dataset in self.state.datasets.values() for digest in dataset.digests}
        return (DropSnapshot(digest) for digest in digests if digest not in used)

    # Prefetch jobs

    def _prefetch(self, event: PrefetchRequested, now: Moment) -> tuple[Action, ...]:
        dataset = find(self.state.datasets, event.dataset)
        if event.snapshot not in dataset.digests:
            raise SnapshotNotFound(
                f"dataset {dataset.name} no longer serves snapshot {event.snapshot}: "
                f"prefetch {dataset.name} without '@' for the newest"
            )
        if unfinished_job(self.state.jobs, event) is not None:
            return ()
        if not self.state.map.owners():
            raise Unavailable(
                f"prefetch of {dataset.name} needs a cache node, and none is up: "
                "start or undrain one ('shoal node list' shows them)"
            )
        job = Job(
            id=event.job_id,
            dataset=event.dataset,
            snapshot=event.snapshot,
            prefix=event.prefix,
            created_utc_s=now.utc_s,
            planning_since_s=now.monotonic_s,
        )
        job = jobs.advance(job, self.state.map, self.state.members, now, self._policy)
        return self._set_jobs({job.id: job})

    def _cancel(self, job_id: str, now: Moment) -> tuple[Action, ...]:
        job = self.state.jobs.get(job_id)
        if job is None:
            raise NotFound(f"no prefetch job is named {job_id!r}: 'shoal status' lists those that are known")
        if job.is_finished:
            return ()
        return self._set_jobs({job_id: jobs.finish(job, JobState.CANCELLED, "cancelled by request", now)})

    def _cancel_jobs(self, name: str, digests: Iterable[str], reason: str, now: Moment) -> tuple[Action, ...]:
        gone = frozenset(digests)
        return self._set_jobs(
            {
                job.id: jobs.finish(job, JobState.CANCELLED, f"{job.what} stopped: {reason}", now)
                for job in self.state.jobs.values()
                if job.dataset == name and job.snapshot in gone and not job.is_finished
            }
        )

    def _set_jobs(self, changed: Mapping[str, Job]) -> tuple[Action, ...]:
        if not changed:
            return ()
        before = self.state.jobs
        after = {**before, **changed}
        finished = sorted(
            (job for job in after.values() if job.is_finished), key=lambda job: (job.finished_utc_s or 0.0, job.id)
        )
        forgotten = [job.id for job in finished[:-MAX_FINISHED_JOBS]]
        for job_id in forgotten:
            del after[job_id]
        self.state = replace(self.state, jobs=after)
        # Progress is not worth a write: nodes report it again. What a restart must know is where the job stands.
        saves = [
            SaveJob(job)
            for job in changed.values()
            if job.id in after and (job.id not in before or before[job.id].state is not job.state)
        ]
        ordered = any(_order(before.get(job.id)) != _order(job) for job in changed.values())
        return (
            *saves,
            *(DeleteJob(job_id) for job_id in forgotten if job_id in before),
            *((PublishOrders(),) if ordered else ()),
            PublishJobs(),
        )


def _order(job: Job | None) -> tuple[bool, bool]:
    """What nodes are told of a job: whether it is theirs to look at, and whether to fetch."""
    return (job is not None and not job.is_finished, job is not None and job.may_run)


def find(datasets: Mapping[str, Dataset], name: str) -> Dataset:
    """The dataset of that name.

    Raises:
        DatasetNotFound: there is none.
    """
    dataset = datasets.get(name)
    if dataset is None:
        raise DatasetNotFound(unknown_dataset(name, [known.to_record() for known in datasets.values()]))
    return dataset


def find_member(members: Mapping[str, Member], node_id: str) -> Member:
    """The member of that id. Raises NotFound where there is none."""
    member = members.get(node_id)
    if member is None:
        raise NotFound(f"no cache node has the id {node_id!r}: 'shoal node list' shows those that are known")
    return member


def check_is_new(datasets: Mapping[str, Dataset], name: str) -> None:
    """Raises AlreadyExists where `name` is taken."""
    if name in datasets:
        raise AlreadyExists(
            f"dataset {name} exists already, over {datasets[name].origin}: 'shoal dataset refresh {name}' lists its "
            f"origin again, 'shoal dataset remove {name}' forgets it"
        )


def unfinished_job(known: Mapping[str, Job], wanted: PrefetchRequested) -> Job | None:
    """The job that already does what is wanted: a prefetch is idempotent, so asking twice is asking once."""
    return next((job for job in matching_jobs(known, wanted) if not job.is_finished), None)


def matching_jobs(known: Mapping[str, Job], wanted: PrefetchRequested) -> list[Job]:
    """The jobs that do or did what is wanted, unfinished ones first, then the newest."""
    what = (wanted.dataset, wanted.snapshot, wanted.prefix)
    found = [job for job in known.values() if (job.dataset, job.snapshot, job.prefix) == what]
    return sorted(found, key=lambda job: (job.is_finished, -job.created_utc_s, job.id))
