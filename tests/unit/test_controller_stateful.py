"""Any order of joins, losses, reports, restarts and jobs: what must hold whatever happens."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.cluster_map import ClusterMap, NodeState
from shoal.errors import DoesNotFit, NotFound, Unavailable
from shoal_controller.events import DrainRequested, PrefetchCancelled, TimePassed, UndrainRequested
from shoal_controller.model import MAX_FINISHED_JOBS, Job, JobState
from tests.support.controller import POLICY, Cluster, dataset, node, share

NODES = st.sampled_from(["n1", "n2", "n3", "n4"])
PREFIXES = st.sampled_from(["", "a/", "b/"])


class Controller(RuleBasedStateMachine):
    """The core beside what an outsider remembers of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.cluster.add(dataset())
        self.maps: dict[int, ClusterMap] = {}
        self.last_epoch = 0
        self.finished: dict[str, Job] = {}
        self.lease_ends_s: dict[str, float] = {}
        self.ids = 0
        self.draining: set[str] = set()

    def hear(self, node_id: str) -> None:
        self.lease_ends_s[node_id] = self.cluster.now.monotonic_s + POLICY.lease_s

    @rule(node_id=NODES)
    def register(self, node_id: str) -> None:
        self.cluster.register(node(node_id))
        self.hear(node_id)

    @rule(node_id=NODES, weight=st.integers(0, 3))
    def report(self, node_id: str, weight: int) -> None:
        self.cluster.report(node(node_id, weight=weight))
        if node_id in self.cluster.state.members:
            self.hear(node_id)

    @rule(node_id=NODES)
    def leave(self, node_id: str) -> None:
        self.cluster.report(node(node_id), is_leaving=True)
        self.lease_ends_s.pop(node_id, None)

    @rule(node_id=NODES, force=st.booleans())
    def drain(self, node_id: str, force: bool) -> None:
        owners = {owner.id for owner in self.cluster.state.map.owners()}
        before = self.cluster.state
        try:
            self.cluster.handle(DrainRequested(node_id, force))
        except NotFound:
            assert node_id not in before.members
        except DoesNotFit:
            assert owners == {node_id} and not force
        else:
            self.draining.add(node_id)
            return
        assert self.cluster.state is before

    @rule(node_id=NODES)
    def undrain(self, node_id: str) -> None:
        try:
            self.cluster.handle(UndrainRequested(node_id))
        except NotFound:
            assert node_id not in self.cluster.state.members
        self.draining.discard(node_id)

    @rule(ahead=st.integers(0, 5))
    def report_a_greater_epoch(self, ahead: int) -> None:
        reported = self.cluster.epoch + ahead
        self.cluster.report(node("stranger"), epoch=reported)
        assert self.cluster.epoch == (reported + 1 if ahead else reported)

    @rule(seconds=st.integers(1, 8))
    def let_time_pass(self, seconds: int) -> None:
        self.cluster.run(seconds)

    @rule()
    def let_much_time_pass(self) -> None:
        self.cluster.sleep(POLICY.forget_after_s)
        self.cluster.handle(TimePassed())

    @rule()
    def restart(self) -> None:
        before = self.cluster.state
        self.cluster.restart()
        after = self.cluster.state
        assert after.map == before.map
        assert after.datasets == before.datasets
        assert {job.id: job.state for job in after.jobs.values()} == {job.id: job.state for job in before.jobs.values()}
        for known in after.map.nodes:
            if known.state is not NodeState.DOWN:
                self.hear(known.id)

    @rule(prefix=PREFIXES)
    def prefetch(self, prefix: str) -> None:
        self.ids += 1
        try:
            self.cluster.prefetch(f"j{self.ids}", prefix=prefix)
        except Unavailable:
            assert not self.cluster.state.map.owners()

    @precondition(lambda self: self.cluster.state.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.cluster.handle(PrefetchCancelled(data.draw(st.sampled_from(sorted(self.cluster.state.jobs)))))

    @precondition(lambda self: self.cluster.state.jobs)
    @rule(data=st.data(), late=st.integers(0, 1))
    def answer(self, data: st.DataObject, late: int) -> None:
        """One node answers for every job, perhaps for a map that is no more."""
        known = [each for each in self.cluster.state.map.nodes if each.state is not NodeState.DOWN]
        if not known:
            return
        answering = data.draw(st.sampled_from(known))
        epoch = max(0, self.cluster.epoch - late)
        shares = {
            job_id: share(
                epoch,
                data.draw(st.integers(0, 9)),
                data.draw(st.integers(0, 12)),
                short=data.draw(st.sampled_from([0, 0, 0, 5])),
                complete=data.draw(st.booleans()),
                failure=data.draw(st.sampled_from(["", "", "", "", "boom"])),
            )
            for job_id in self.cluster.state.jobs
        }
        self.cluster.report(answering, shares=shares)
        self.hear(answering.id)
        self.cluster.handle(TimePassed())

    @rule()
    def everybody_completes(self) -> None:
        """When every owner vouches under the present map, no job is left unfinished."""
        owners = self.cluster.state.map.owners()
        epoch = self.cluster.epoch
        complete = {job_id: share(epoch, 5, 5, complete=True) for job_id in self.cluster.state.jobs}
        for owner in owners:
            self.cluster.report(owner, shares=complete)
            self.hear(owner.id)
        self.cluster.handle(TimePassed())
        if owners and self.cluster.epoch == epoch:
            assert all(job.is_finished for job in self.cluster.state.jobs.values())

    @invariant()
    def an_epoch_names_one_map_and_never_goes_back(self) -> None:
        cluster_map = self.cluster.state.map
        assert cluster_map.epoch >= self.last_epoch
        assert self.maps.setdefault(cluster_map.epoch, cluster_map) == cluster_map
        self.last_epoch = cluster_map.epoch

    @invariant()
    def the_map_is_the_members_sorted(self) -> None:
        cluster_map, members = self.cluster.state.map, self.cluster.state.members
        assert [known.id for known in cluster_map.nodes] == sorted(members)
        assert all(members[known.id].node == known for known in cluster_map.nodes)

    @invariant()
    def who_was_asked_to_own_nothing_does_not_until_it_is_asked_otherwise_or_forgotten(self) -> None:
        members = self.cluster.state.members
        self.draining &= set(members)
        assert {node_id for node_id, member in members.items() if member.is_draining} == self.draining
        for known in self.cluster.state.map.nodes:
            if known.state is not NodeState.DOWN:
                assert (known.state is NodeState.DRAINING) == (known.id in self.draining)

    @invariant()
    def who_was_heard_within_a_lease_and_did_not_leave_is_not_down(self) -> None:
        now = self.cluster.now.monotonic_s
        for known in self.cluster.state.map.nodes:
            if self.lease_ends_s.get(known.id, 0.0) > now:
                assert known.state is not NodeState.DOWN

    @invariant()
    def figures_are_possible_and_ends_are_final(self) -> None:
        jobs = self.cluster.state.jobs
        for job in jobs.values():
            assert 0 <= job.bytes_done <= job.bytes_total
            assert job.is_finished == (job.finished_utc_s is not None)
            assert not (job.may_run and job.is_finished)
            if job.state in (JobState.FAILED, JobState.REFUSED, JobState.CANCELLED):
                assert job.reason
            if job.state is JobState.DONE:
                assert job.bytes_done == job.bytes_total
            if job.is_finished:
                ended = replace(job, planning_since_s=0.0)
                assert self.finished.setdefault(job.id, ended) == ended
        unfinished = [(job.snapshot, job.prefix) for job in jobs.values() if not job.is_finished]
        assert len(unfinished) == len(set(unfinished))
        assert len(jobs) - len(unfinished) <= MAX_FINISHED_JOBS


TestController = Controller.TestCase
TestController.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
