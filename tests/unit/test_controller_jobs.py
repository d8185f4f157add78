"""Prefetch jobs, told as events: a contract about space, honest figures, and an end that every owner vouches for."""

from __future__ import annotations

import pytest

from shoal.errors import DatasetNotFound, NotFound, SnapshotNotFound, Unavailable
from shoal_controller.events import (
    DatasetRemoved,
    DeleteJob,
    PrefetchCancelled,
    PublishJobs,
    PublishOrders,
    SaveJob,
    TimePassed,
)
from shoal_controller.model import MAX_FINISHED_JOBS, JobState
from tests.support.controller import GIB, POLICY, Cluster, dataset, node, share


def ready() -> Cluster:
    """Two nodes, a dataset, and a job that just began."""
    cluster = Cluster()
    cluster.register(node("n1"), node("n2"))
    cluster.add(dataset())
    cluster.prefetch()
    return cluster


def running() -> Cluster:
    cluster = ready()
    cluster.answer({"n1": share(cluster.epoch), "n2": share(cluster.epoch)})
    assert cluster.job().state is JobState.RUNNING
    return cluster


def test_a_job_runs_when_every_owner_said_that_it_fits() -> None:
    cluster = ready()
    assert cluster.job().state is JobState.PLANNING
    assert not cluster.job().may_run
    cluster.answer({"n1": share(cluster.epoch, 10 * GIB)})
    assert cluster.job().state is JobState.PLANNING
    assert cluster.job().reason == "waits for node n2 to work out the share of map epoch 2"
    cluster.answer({"n2": share(cluster.epoch, 7 * GIB, 2 * GIB)})
    job = cluster.job()
    assert (job.state, job.may_run, job.reason) == (JobState.RUNNING, True, "")
    assert (job.bytes_total, job.bytes_done) == (17 * GIB, 2 * GIB)


def test_a_job_is_done_by_the_word_of_every_owner() -> None:
    cluster = running()
    cluster.answer({"n1": share(2, done=10 * GIB, complete=True), "n2": share(2, done=10 * GIB)})
    assert cluster.job().state is JobState.RUNNING
    assert cluster.job().bytes_done == 20 * GIB
    cluster.answer({"n2": share(2, done=10 * GIB, complete=True)})
    job = cluster.job()
    assert (job.state, job.bytes_done, job.bytes_total) == (JobState.DONE, 20 * GIB, 20 * GIB)
    assert job.finished_utc_s == cluster.now.utc_s
    assert job.reason == ""


def test_a_job_that_cannot_fit_is_refused_with_the_node_and_the_bytes() -> None:
    cluster = ready()
    cluster.answer({"n1": share(2), "n2": share(2, 30 * GIB, short=12 * GIB)})
    job = cluster.job()
    assert job.state is JobState.REFUSED
    assert job.reason == (
        "prefetch of imagenet needs 12 GiB more on node n2 (capacity 20 GiB, used 4 GiB, its share 30 GiB): free space "
        "there, add nodes, or prefetch a smaller prefix"
    )


def test_a_refusal_names_the_worst_node_and_counts_the_others() -> None:
    cluster = ready()
    cluster.answer({"n1": share(2, short=1), "n2": share(2, short=2 * GIB)})
    assert "2 GiB more on node n2 (" in cluster.job().reason
    assert "and space on 1 more node:" in cluster.job().reason


def test_a_failed_share_fails_the_job_with_the_nodes_own_sentence() -> None:
    cluster = running()
    cluster.answer({"n1": share(2), "n2": share(2, failure="s3://bucket/x was refused: fix the credentials")})
    job = cluster.job()
    assert job.state is JobState.FAILED
    assert job.reason == "prefetch of imagenet failed on node n2: s3://bucket/x was refused: fix the credentials"


def test_shares_of_an_old_map_do_not_count() -> None:
    cluster = running()
    cluster.register(node("n3"))
    cluster.answer(
        {
            "n1": share(2, done=10 * GIB, complete=True),
            "n2": share(2, failure="the peer is gone"),
            "n3": share(2, complete=True),
        }
    )
    job = cluster.job()
    assert (job.state, job.bytes_total, job.bytes_done) == (JobState.RUNNING, 20 * GIB, 0)
    assert job.reason == "waits for nodes n1, n2, n3 to work out the share of map epoch 3"
    complete = share(3, 6 * GIB, 6 * GIB, complete=True)
    cluster.answer({"n1": complete, "n2": complete, "n3": complete})
    assert cluster.job().state is JobState.DONE
    assert cluster.job().bytes_total == 18 * GIB


def test_progress_never_passes_the_total() -> None:
    cluster = running()
    cluster.answer({"n1": share(2, 5, 9), "n2": share(2, 5, 1)})
    assert (cluster.job().bytes_done, cluster.job().bytes_total) == (6, 10)


def test_a_job_that_no_longer_fits_waits_for_the_node_that_is_down() -> None:
    cluster = running()
    cluster.report(node("n2"), is_leaving=True)
    cluster.answer({"n1": share(3, 20 * GIB, short=4 * GIB)})
    job = cluster.job()
    assert job.state is JobState.RUNNING
    assert not job.may_run
    assert "4 GiB more on node n1" in job.reason
    assert job.reason.endswith("while node n2 is down: waits for it")
    cluster.register(node("n2"))
    cluster.answer({"n1": share(4), "n2": share(4)})
    assert cluster.job().may_run
    assert cluster.job().reason == ""


def test_a_job_that_no_longer_fits_fails_when_nobody_will_come_back() -> None:
    cluster = running()
    cluster.report(node("n2"), is_leaving=True)
    cluster.run(POLICY.forget_after_s, reporting=["n1"])
    assert cluster.node_states() == {"n1": "up"}
    cluster.answer({"n1": share(cluster.epoch, 20 * GIB, short=4 * GIB)})
    assert cluster.job().state is JobState.FAILED
    assert cluster.job().reason.startswith("prefetch of imagenet no longer fits: it needs 4 GiB more on node n1")


def test_a_job_whose_last_node_is_lost_waits_and_goes_on() -> None:
    cluster = running()
    cluster.report(node("n1"), is_leaving=True)
    cluster.report(node("n2"), is_leaving=True)
    cluster.handle(TimePassed())
    assert cluster.job().state is JobState.RUNNING
    assert cluster.job().reason == "waits for a cache node: none is up"
    cluster.register(node("n1"))
    cluster.answer({"n1": share(cluster.epoch, complete=True)})
    assert cluster.job().state is JobState.DONE


def test_planning_ends_by_its_deadline_and_names_who_was_silent() -> None:
    cluster = ready()
    cluster.answer({"n1": share(2)})
    cluster.run(POLICY.planning_s - 1, reporting=["n1", "n2"])
    assert cluster.job().state is JobState.PLANNING
    cluster.run(1, reporting=["n1", "n2"])
    assert cluster.job().state is JobState.FAILED
    assert cluster.job().reason == (
        "prefetch of imagenet was not started: within 60 s node n2 did not say whether the share of it fits: see the "
        "log there, and try again"
    )


def test_planning_without_any_node_ends_by_its_deadline() -> None:
    cluster = ready()
    cluster.run(POLICY.planning_s)
    assert cluster.job().state is JobState.FAILED
    assert "no cache node is up" in cluster.job().reason


def test_nothing_is_started_that_cannot_be() -> None:
    cluster = Cluster()
    with pytest.raises(DatasetNotFound, match="no dataset is named 'imagenet'"):
        cluster.prefetch()
    cluster.add(dataset())
    with pytest.raises(Unavailable, match="needs a cache node, and none is up"):
        cluster.prefetch()
    cluster.register(node("n1"))
    with pytest.raises(SnapshotNotFound, match="no longer serves snapshot"):
        cluster.prefetch(number=2)
    assert cluster.state.jobs == {}


def test_asking_twice_is_asking_once() -> None:
    cluster = ready()
    cluster.prefetch("j2")
    cluster.prefetch("j3", prefix="train/")
    assert set(cluster.state.jobs) == {"j1", "j3"}
    cluster.handle(PrefetchCancelled("j1"))
    cluster.prefetch("j4")
    assert set(cluster.state.jobs) == {"j1", "j3", "j4"}


def test_a_cancelled_job_is_over() -> None:
    cluster = running()
    assert PublishOrders() in cluster.handle(PrefetchCancelled("j1"))
    assert (cluster.job().state, cluster.job().reason) == (JobState.CANCELLED, "cancelled by request")
    assert cluster.handle(PrefetchCancelled("j1")) == ()
    cluster.answer({"n1": share(2, complete=True), "n2": share(2, complete=True)})
    assert cluster.job().state is JobState.CANCELLED
    with pytest.raises(NotFound, match="no prefetch job is named 'j9'"):
        cluster.handle(PrefetchCancelled("j9"))


def test_removing_the_dataset_cancels_its_jobs() -> None:
    cluster = running()
    cluster.handle(DatasetRemoved("imagenet"))
    assert cluster.job().state is JobState.CANCELLED
    assert cluster.job().reason == "prefetch of imagenet stopped: dataset imagenet was removed"


def test_a_job_goes_on_after_a_restart_with_the_figures_it_had() -> None:
    cluster = running()
    cluster.restart()
    job = cluster.job()
    assert (job.state, job.bytes_total, job.bytes_done) == (JobState.RUNNING, 20 * GIB, 0)
    cluster.run(1)
    assert cluster.job().reason.startswith("waits for nodes n1, n2")
    complete = share(2, done=10 * GIB, complete=True)
    cluster.answer({"n1": complete, "n2": complete})
    assert cluster.job().state is JobState.DONE


def test_a_planning_job_gets_its_time_again_after_a_restart() -> None:
    cluster = ready()
    cluster.sleep(3600)
    cluster.restart()
    cluster.run(1, reporting=["n1", "n2"])
    assert cluster.job().state is JobState.PLANNING
    cluster.answer({"n1": share(2), "n2": share(2)})
    assert cluster.job().state is JobState.RUNNING


def test_progress_is_told_but_not_written() -> None:
    cluster = running()
    cluster.report(node("n1"), shares={"j1": share(2, done=1)})
    assert cluster.handle(TimePassed()) == (PublishJobs(),)
    assert cluster.handle(TimePassed()) == ()


def test_the_last_finished_jobs_are_remembered() -> None:
    cluster = ready()
    for number in range(MAX_FINISHED_JOBS + 3):
        cluster.sleep(1)
        cluster.prefetch(f"p{number}", prefix=f"{number}/")
        actions = cluster.handle(PrefetchCancelled(f"p{number}"))
    assert DeleteJob("p2") in actions
    assert any(isinstance(action, SaveJob) and action.job.id == "p52" for action in actions)
    assert set(cluster.state.jobs) == {"j1"} | {f"p{number}" for number in range(3, MAX_FINISHED_JOBS + 3)}
    cluster.restart()
    assert len(cluster.state.jobs) == MAX_FINISHED_JOBS + 1
