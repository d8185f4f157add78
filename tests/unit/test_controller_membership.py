"""Registrations, leases and epochs: what happens to nodes, told as events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.errors import DoesNotFit, InvalidRequest, NotFound
from shoal_controller import membership, status
from shoal_controller.events import DrainRequested, PublishOrders, SaveMap, TimePassed, UndrainRequested
from shoal_controller.model import MAX_EPOCHS_AHEAD, JobState, Moment
from tests.support.controller import GIB, POLICY, Cluster, dataset, node, refusals, share


def test_a_node_that_registers_makes_an_epoch_and_again_none() -> None:
    cluster = Cluster()
    cluster.register(node("b"), node("a"))
    assert cluster.state.map == ClusterMap(2, (node("a"), node("b")))
    cluster.register(node("a"))
    assert cluster.epoch == 2


def test_a_new_epoch_is_recorded_before_it_is_told() -> None:
    cluster = Cluster()
    actions = cluster.report(node("a"))
    assert actions == ()
    cluster.register(node("a"))
    actions = cluster.report(Node("a", "a:7450", 1, {}))
    assert actions == (SaveMap(cluster.state.map), PublishOrders())


def test_a_heartbeat_of_an_unknown_node_registers_nobody() -> None:
    cluster = Cluster()
    assert cluster.report(node("a")) == ()
    assert cluster.state.members == {}


def test_a_silent_node_is_down_after_its_lease_and_up_when_it_is_heard() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.run(POLICY.lease_s - 1, reporting=["a"])
    assert cluster.node_states() == {"a": "up", "b": "up"}
    cluster.run(1, reporting=["a"])
    assert cluster.node_states() == {"a": "up", "b": "down"}
    assert cluster.epoch == 3
    assert cluster.warnings == ["node b (b:7450) did not report for 5 s: it is down"]
    assert "node b (b:7450) is down: its shards are fetched again by the others as they are read" in status.warnings(
        cluster.state
    )
    cluster.report(node("b"))
    assert cluster.node_states() == {"a": "up", "b": "up"}
    assert cluster.epoch == 4


def test_heartbeats_keep_the_epoch() -> None:
    cluster = Cluster()
    cluster.register(node("a"))
    cluster.run(60, reporting=["a"])
    assert cluster.epoch == 1


def test_a_node_that_leaves_is_down_at_once() -> None:
    cluster = Cluster()
    cluster.register(node("a"))
    cluster.report(node("a"), is_leaving=True)
    assert cluster.node_states() == {"a": "down"}
    assert cluster.epoch == 2
    cluster.report(node("a"), is_leaving=True)
    assert cluster.epoch == 2


def test_a_node_that_was_down_for_long_is_forgotten() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.run(POLICY.lease_s + POLICY.forget_after_s - 1, reporting=["a"])
    assert cluster.node_states() == {"a": "up", "b": "down"}
    cluster.run(1, reporting=["a"])
    assert cluster.node_states() == {"a": "up"}
    assert cluster.epoch == 4
    assert cluster.warnings[-1] == "node b was down for 600 s: it leaves the cluster map"


def test_a_changed_address_weight_or_topology_makes_an_epoch() -> None:
    cluster = Cluster()
    cluster.register(node("a"))
    for epoch, changed in enumerate(
        [
            Node("a", "a:7450", 5, {"host": "a"}),
            Node("a", "a:7450", 5, {"host": "a", "rack": "r"}),
            Node("a", "a:9", 5, {"host": "a", "rack": "r"}),
        ],
        start=2,
    ):
        cluster.report(changed)
        assert cluster.epoch == epoch
        assert cluster.state.map.nodes == (changed,)


def drained(cluster: Cluster, node_id: str) -> bool:
    member = cluster.member(node_id)
    return member.is_draining and not status.handover_waits_for(member, cluster.state)


def test_a_draining_node_owns_nothing_whatever_it_says_and_however_often_it_is_asked() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    actions = cluster.handle(DrainRequested("b"))
    assert cluster.state.map == ClusterMap(3, (node("a"), node("b", state=NodeState.DRAINING)))
    assert actions == (SaveMap(cluster.state.map, frozenset("b")), PublishOrders())
    assert cluster.state.map.owners() == (node("a"),)
    assert cluster.handle(DrainRequested("b")) == ()
    cluster.report(node("b"))
    cluster.register(node("b"))
    cluster.run(60, reporting=["a", "b"])
    assert cluster.epoch == 3
    cluster.report(node("b", port=9), handover_bytes=0)
    assert cluster.state.map.node("b") == node("b", port=9, state=NodeState.DRAINING)
    actions = cluster.handle(UndrainRequested("b"))
    assert cluster.state.map == ClusterMap(5, (node("a"), node("b", port=9)))
    assert actions == (SaveMap(cluster.state.map), PublishOrders())
    assert cluster.handle(UndrainRequested("b")) == ()


def test_a_node_is_drained_when_it_says_so_under_the_map_of_now() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.report(node("b"), handover_bytes=0)
    assert not drained(cluster, "b"), "nobody asked it to"
    cluster.handle(DrainRequested("b"))
    waits = lambda: status.handover_waits_for(cluster.member("b"), cluster.state)  # noqa: E731
    assert waits() == "it has not said yet what it has to hand over", "what it said was of another map"
    cluster.report(node("b"))
    assert waits() == "it has not said yet what it has to hand over"
    cluster.report(node("b"), handover_bytes=5 * GIB)
    assert waits() == "the other nodes fetch what it holds"
    assert status.handover_bytes(cluster.member("b"), cluster.state) == 5 * GIB
    cluster.report(node("a"), short_bytes=2 * GIB)
    assert waits() == "node a lacks room for 2 GiB: add nodes or space, or remove datasets"
    assert status.warnings(cluster.state) == [
        "node a (a:7450) lacks room for 2 GiB that it owns and other nodes hold: add space, or remove datasets"
    ]
    cluster.report(node("b"), handover_bytes=0)
    assert drained(cluster, "b")
    cluster.register(node("c"))
    assert not drained(cluster, "b"), "the map has another owner, which may lack what this node holds"
    cluster.report(node("b"), handover_bytes=0)
    assert drained(cluster, "b")
    cluster.report(node("b"), is_leaving=True, handover_bytes=0)
    assert waits() == "it is down: what it holds can be handed over when it is back"


def test_a_draining_node_that_was_down_or_whose_controller_restarted_is_still_draining() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.handle(DrainRequested("b"))
    cluster.run(POLICY.lease_s, reporting=["a"])
    assert cluster.node_states() == {"a": "up", "b": "down"}
    cluster.restart()
    assert cluster.node_states() == {"a": "up", "b": "down"}
    cluster.register(node("b"))
    assert cluster.node_states() == {"a": "up", "b": "draining"}
    before = cluster.state.map
    cluster.restart()
    cluster.report(node("a"))
    cluster.report(node("b"))
    assert cluster.state.map == before
    cluster.report(node("b"), is_leaving=True)
    cluster.run(POLICY.forget_after_s, reporting=["a"])
    cluster.register(node("b"))
    assert cluster.node_states() == {"a": "up", "b": "up"}, "a node that was forgotten is a new one"


def test_a_node_that_is_down_drains_when_it_is_back() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.report(node("b"), is_leaving=True)
    epoch = cluster.epoch
    assert cluster.handle(DrainRequested("b")) == (SaveMap(cluster.state.map, frozenset("b")),)
    assert cluster.epoch == epoch, "it owned nothing before"
    cluster.restart()
    cluster.register(node("b"))
    assert cluster.node_states() == {"a": "up", "b": "draining"}
    cluster.report(node("b"), is_leaving=True)
    assert cluster.handle(UndrainRequested("b")) == (SaveMap(cluster.state.map),)
    cluster.register(node("b"))
    assert cluster.node_states() == {"a": "up", "b": "up"}


def test_the_last_owner_drains_by_force_alone_and_a_stranger_never() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.handle(DrainRequested("b"))
    before = cluster.state
    with pytest.raises(DoesNotFit, match=r"node a is the only one that is up and owns shards.*--force"):
        cluster.handle(DrainRequested("a"))
    for event in (DrainRequested("c", force=True), UndrainRequested("c")):
        with pytest.raises(NotFound, match="no cache node has the id 'c': 'shoal node list'"):
            cluster.handle(event)
    assert cluster.state is before
    cluster.handle(DrainRequested("a", force=True))
    assert cluster.state.map.owners() == ()
    cluster.report(node("a"), handover_bytes=0)
    assert not drained(cluster, "a")
    assert status.warnings(cluster.state) == [
        "every cache node that is up drains: reads fail until another one is up, or 'shoal node undrain ID'"
    ]


def test_a_prefetch_goes_on_without_the_node_that_drains() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.add(dataset(replicas=2))
    cluster.prefetch()
    cluster.answer({"a": share(cluster.epoch), "b": share(cluster.epoch)})
    assert cluster.job().state is JobState.RUNNING
    cluster.handle(DrainRequested("b"))
    cluster.handle(TimePassed())
    assert cluster.job().reason == "waits for node a to work out the share of map epoch 3"
    assert status.warnings(cluster.state) == [
        "dataset imagenet asks for 2 replicas, but 1 node is up and not draining (1 more is): it has 1"
    ]
    cluster.answer({"a": share(cluster.epoch, 7, 7, complete=True)})
    assert (cluster.job().state, cluster.job().bytes_total) == (JobState.DONE, 7)
    cluster.prefetch("j2")
    cluster.answer({"a": share(cluster.epoch, 7, 7, complete=True)}, job_id="j2")
    assert cluster.job("j2").state is JobState.DONE


def test_a_restart_moves_nothing_while_nodes_report_within_a_lease() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    before = cluster.state.map
    cluster.sleep(3600)
    cluster.restart()
    assert cluster.state.map == before
    cluster.run(POLICY.lease_s - 1)
    cluster.register(node("a"))
    cluster.report(node("b"))
    cluster.run(60, reporting=["a", "b"])
    assert cluster.state.map == before


def test_after_a_restart_the_silent_go_down_and_the_forgotten_are_forgotten() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.report(node("b"), is_leaving=True)
    cluster.restart()
    cluster.run(POLICY.lease_s)
    assert cluster.node_states() == {"a": "down", "b": "down"}
    assert cluster.epoch == 4
    cluster.run(POLICY.forget_after_s)
    assert cluster.state.map.nodes == ()


def test_a_greater_epoch_that_a_node_reports_is_jumped_past() -> None:
    cluster = Cluster()
    cluster.register(node("a"))
    cluster.report(node("a"), epoch=57)
    assert cluster.epoch == 58
    cluster.report(node("a"), epoch=58)
    assert cluster.epoch == 58
    cluster.report(node("stranger"), epoch=100)
    assert cluster.epoch == 101
    cluster.restart()
    assert cluster.epoch == 101


@pytest.mark.parametrize("name", ["a", "stranger"])
@pytest.mark.parametrize("epoch", [2 + MAX_EPOCHS_AHEAD, 1 << 62, 1 << 63, (1 << 64) - 1])
def test_an_epoch_that_no_cluster_reaches_is_refused_and_changes_nothing(epoch: int, name: str) -> None:
    cluster = Cluster()
    cluster.register(node("a"))
    before = cluster.state
    with pytest.raises(InvalidRequest, match=f"node {name} reports epoch {epoch} where this controller is at 1"):
        cluster.report(node(name), epoch=epoch)
    assert cluster.state is before
    # The nearest one that is taken: reports of the epoch that came of it are taken too.
    cluster.report(node("a"), epoch=1 + MAX_EPOCHS_AHEAD)
    cluster.report(node("a"), epoch=cluster.epoch)
    assert cluster.epoch == 2 + MAX_EPOCHS_AHEAD


def test_of_two_processes_with_one_id_the_newer_has_it_and_epochs_stay() -> None:
    cluster = Cluster()
    older, newer = node("a", port=1), node("a", port=2)
    cluster.register(older)
    cluster.report(older)
    cluster.register(newer)
    assert cluster.state.map == ClusterMap(2, (newer,))
    assert "a:2; it was at a:1" in cluster.warnings[0]
    sentence = (
        "node id a is claimed by two processes, at a:2 and at a:1: stop one of them, and give it a data directory of "
        "its own"
    )
    for _ in range(30):
        cluster.run(1)
        assert refusals(cluster.report(newer)) == []
        assert refusals(cluster.report(older)) == [sentence]
    assert cluster.epoch == 2
    assert cluster.warnings[1:] == [sentence]
    assert sentence in status.warnings(cluster.state)
    # The older one is stopped: the warning ends.
    cluster.run(POLICY.lease_s + 1, reporting=["a"])
    assert sentence not in status.warnings(cluster.state)


def test_the_older_process_gets_the_id_back_when_the_newer_is_gone() -> None:
    cluster = Cluster()
    older, newer = node("a", port=1), node("a", port=2)
    cluster.register(older)
    cluster.register(newer)
    cluster.report(newer, is_leaving=True)
    assert refusals(cluster.report(older)) == []
    assert cluster.state.map.nodes == (older,)


def test_a_node_that_moved_there_and_back_is_welcome_after_a_lease() -> None:
    cluster = Cluster()
    there, back = node("a", port=1), node("a", port=2)
    cluster.register(there)
    cluster.register(back)
    cluster.run(POLICY.lease_s, reporting=["a"])
    assert refusals(cluster.report(there)) == []
    assert cluster.state.map.nodes == (there,)


def test_a_controller_that_was_stopped_blames_nobody() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.report(node("b"), is_leaving=True)
    cluster.run(2, reporting=["a"])
    cluster.sleep(120)
    cluster.handle(TimePassed())
    assert cluster.node_states() == {"a": "up", "b": "down"}
    cluster.run(POLICY.lease_s)
    assert cluster.node_states() == {"a": "down", "b": "down"}


def test_warnings_name_what_is_wrong() -> None:
    cluster = Cluster()
    assert status.warnings(cluster.state) == [
        "no cache node is up: reads fail until one is; start it with 'shoal-cachenode'"
    ]
    cluster.register(node("a"))
    assert status.warnings(cluster.state) == []
    cluster.report(node("a"), condition="the disk is slow")
    assert status.warnings(cluster.state) == ["node a (a:7450) reports: the disk is slow"]


def test_the_first_lease_after_a_start_may_be_longer() -> None:
    now = Moment(100.0, 0.0)
    for first_s, ends_s in ((0.0, 105.0), (20.0, 120.0)):
        policy = replace(POLICY, first_lease_s=first_s)
        assert membership.restore([node("n1")], (), now, policy)["n1"].lease_ends_s == ends_s
