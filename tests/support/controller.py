"""A controller core with a clock that tests move, and short words for what happens to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal.cluster_map import Node, NodeState
from shoal_controller.core import Core
from shoal_controller.events import (
    Action,
    DatasetAdded,
    DeleteDataset,
    DeleteJob,
    Event,
    LogWarning,
    NodeRegistered,
    NodeReported,
    PrefetchRequested,
    RefuseNode,
    SaveDataset,
    SaveJob,
    SaveMap,
    TimePassed,
)
from shoal_controller.model import Dataset, Job, Member, Moment, Policy, Report, Share, SnapshotInfo, State

POLICY = Policy(lease_s=5.0, forget_after_s=600.0, planning_s=60.0)
#: Ticks come at least this often, as in a running controller.
TICK_S = 1.0
START = Moment(monotonic_s=1000.0, utc_s=1_700_000_000.0)
GIB = 1 << 30


def digest(number: int) -> str:
    return f"{number:032x}"


def node(node_id: str, *, port: int = 7450, weight: int = 20 * GIB, state: NodeState = NodeState.UP) -> Node:
    return Node(node_id, f"{node_id}:{port}", weight, {"host": node_id}, state)


def snapshot(number: int, *, objects: int = 10, total_bytes: int = 100 * GIB) -> SnapshotInfo:
    return SnapshotInfo(digest(number), objects, total_bytes)


def dataset(name: str = "imagenet", *, number: int = 1, replicas: int = 1, created_utc_s: float = 1.0) -> Dataset:
    return Dataset(
        name=name,
        origin=f"s3://bucket/{name}",
        endpoint="",
        shard_size=256 << 20,
        replicas=replicas,
        storage_options='{"secret": "env:SECRET"}',
        snapshots=(snapshot(number),),
        created_utc_s=created_utc_s,
        refreshed_utc_s=created_utc_s,
    )


def share(
    epoch: int, total: int = 10 * GIB, done: int = 0, *, short: int = 0, complete: bool = False, failure: str = ""
) -> Share:
    return Share(epoch, total, done, short, complete, failure)


class Cluster:
    """A core, its clock, and what a record would hold after the actions so far."""

    def __init__(self) -> None:
        self.now = START
        self.core = Core(policy=POLICY, now=self.now)
        self.warnings: list[str] = []
        self._saved_map = self.core.state.map
        self._saved_draining: frozenset[str] = frozenset()
        self._saved_datasets: dict[str, Dataset] = {}
        self._saved_jobs: dict[str, Job] = {}

    @property
    def state(self) -> State:
        return self.core.state

    @property
    def epoch(self) -> int:
        return self.core.state.map.epoch

    def member(self, node_id: str) -> Member:
        return self.core.state.members[node_id]

    def node_states(self) -> dict[str, str]:
        return {known.id: str(known.state) for known in self.state.map.nodes}

    def job(self, job_id: str = "j1") -> Job:
        return self.core.state.jobs[job_id]

    def handle(self, event: Event) -> tuple[Action, ...]:
        actions = self.core.handle(event, self.now)
        for action in actions:
            match action:
                case SaveMap(cluster_map, draining):
                    self._saved_map, self._saved_draining = cluster_map, draining
                case SaveDataset(saved):
                    self._saved_datasets[saved.name] = saved
                case DeleteDataset(name):
                    del self._saved_datasets[name]
                case SaveJob(job):
                    self._saved_jobs[job.id] = job
                case DeleteJob(job_id):
                    del self._saved_jobs[job_id]
                case LogWarning(sentence):
                    self.warnings.append(sentence)
                case _:
                    pass
        return actions

    def restart(self) -> None:
        """``kill -9`` and a new start from the record."""
        self.core = Core(
            policy=POLICY,
            now=self.now,
            cluster_map=self._saved_map,
            draining=self._saved_draining,
            datasets=self._saved_datasets.values(),
            jobs=self._saved_jobs.values(),
        )

    def sleep(self, seconds: float) -> None:
        """Move the clock without a tick, as for a process that is stopped."""
        self.now = Moment(self.now.monotonic_s + seconds, self.now.utc_s + seconds)

    def run(self, seconds: float, *, reporting: Iterable[str] = ()) -> tuple[Action, ...]:
        """Let time pass tick by tick; `reporting` nodes send heartbeats, as they last were."""
        reporting = tuple(reporting)
        actions: tuple[Action, ...] = ()
        while seconds > 0:
            step = min(seconds, TICK_S)
            self.sleep(step)
            seconds -= step
            for node_id in reporting:
                member = self.member(node_id)
                actions += self.handle(NodeReported(member.report or Report(member.node, self.epoch)))
            actions += self.handle(TimePassed())
        return actions

    def register(self, *nodes: Node) -> None:
        for registered in nodes:
            self.handle(NodeRegistered(registered))

    def report(self, reported: Node, *, epoch: int | None = None, **fields: object) -> tuple[Action, ...]:
        report = Report(reported, self.epoch if epoch is None else epoch, **fields)  # type: ignore[arg-type]
        return self.handle(NodeReported(report))

    def add(self, added: Dataset) -> None:
        self.handle(DatasetAdded(added))

    def prefetch(self, job_id: str = "j1", *, name: str = "imagenet", number: int = 1, prefix: str = "") -> None:
        self.handle(PrefetchRequested(job_id, name, digest(number), prefix))

    def answer(self, shares: Mapping[str, Share], *, job_id: str = "j1") -> None:
        """Nodes report their shares of a job, and the job is looked at."""
        for node_id, reported in shares.items():
            member = self.member(node_id)
            self.report(
                node(node_id), epoch=self.epoch, shares={job_id: reported}, capacity_bytes=20 * GIB, used_bytes=4 * GIB
            )
            assert self.member(node_id).node == member.node
        self.handle(TimePassed())


def refusals(actions: Iterable[Action]) -> list[str]:
    return [action.sentence for action in actions if isinstance(action, RefuseNode)]
