"""Datasets in the core: what is recorded, which snapshots stay, which files go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.errors import AlreadyExists, DatasetNotFound
from shoal_controller import status
from shoal_controller.events import (
    DatasetAdded,
    DatasetRefreshed,
    DatasetRemoved,
    DeleteDataset,
    DropSnapshot,
    KeepSnapshot,
    PolicyChanged,
    PublishOrders,
    SaveDataset,
    SaveMap,
)
from shoal_controller.model import MAX_SNAPSHOTS, JobState, PolicyChange
from tests.support.controller import GIB, Cluster, dataset, digest, node, snapshot


def test_a_new_dataset_is_kept_recorded_and_told_in_this_order() -> None:
    cluster = Cluster()
    actions = cluster.handle(DatasetAdded(dataset()))
    assert actions == (KeepSnapshot(digest(1)), SaveDataset(dataset()), PublishOrders())


def test_a_taken_name_is_refused_with_what_to_do() -> None:
    cluster = Cluster()
    cluster.add(dataset())
    with pytest.raises(AlreadyExists, match=r"over s3://bucket/imagenet: 'shoal dataset refresh imagenet'"):
        cluster.add(dataset(number=2))
    assert cluster.state.datasets["imagenet"].newest == snapshot(1)


def test_a_refresh_puts_the_new_snapshot_first_and_keeps_the_old_ones() -> None:
    cluster = Cluster()
    cluster.add(dataset())
    cluster.handle(DatasetRefreshed(dataset(), snapshot(2)))
    known = cluster.state.datasets["imagenet"]
    assert known.digests == (digest(2), digest(1))
    assert known.to_record().snapshot == digest(2)
    assert known.refreshed_utc_s == cluster.now.utc_s


def test_an_unchanged_origin_gives_the_same_snapshot() -> None:
    cluster = Cluster()
    cluster.add(dataset())
    cluster.handle(DatasetRefreshed(dataset(), snapshot(1)))
    assert cluster.state.datasets["imagenet"].snapshots == (snapshot(1),)


def test_an_origin_that_was_put_back_makes_its_old_snapshot_the_newest() -> None:
    cluster = Cluster()
    cluster.add(dataset())
    cluster.handle(DatasetRefreshed(dataset(), snapshot(2)))
    cluster.handle(DatasetRefreshed(dataset(), snapshot(1)))
    assert cluster.state.datasets["imagenet"].digests == (digest(1), digest(2))


def test_only_so_many_snapshots_stay_and_jobs_of_dropped_ones_end() -> None:
    cluster = Cluster()
    cluster.register(node("n1"))
    cluster.add(dataset())
    cluster.prefetch()
    for number in range(2, MAX_SNAPSHOTS + 1):
        cluster.handle(DatasetRefreshed(dataset(), snapshot(number)))
    assert cluster.job().state is JobState.PLANNING
    actions = cluster.handle(DatasetRefreshed(dataset(), snapshot(MAX_SNAPSHOTS + 1)))
    assert DropSnapshot(digest(1)) in actions
    assert len(cluster.state.datasets["imagenet"].snapshots) == MAX_SNAPSHOTS
    assert cluster.job().state is JobState.CANCELLED
    assert "no longer served" in cluster.job().reason


def test_a_file_goes_with_the_last_dataset_that_names_it() -> None:
    cluster = Cluster()
    cluster.add(dataset("a", number=1))
    cluster.add(dataset("b", number=1))
    assert cluster.handle(DatasetRemoved("a")) == (DeleteDataset("a"), PublishOrders())
    assert cluster.handle(DatasetRemoved("b")) == (DeleteDataset("b"), DropSnapshot(digest(1)), PublishOrders())
    with pytest.raises(DatasetNotFound, match="the cluster has none yet"):
        cluster.handle(DatasetRemoved("b"))


def test_a_refresh_of_a_dataset_that_is_another_one_by_now_is_refused() -> None:
    cluster = Cluster()
    before = dataset()
    cluster.add(before)
    cluster.handle(DatasetRemoved("imagenet"))
    with pytest.raises(DatasetNotFound):
        cluster.handle(DatasetRefreshed(before, snapshot(2)))
    cluster.add(replace(before, created_utc_s=99.0))
    with pytest.raises(DatasetNotFound, match="added anew"):
        cluster.handle(DatasetRefreshed(before, snapshot(2)))
    assert cluster.state.datasets["imagenet"].newest == snapshot(1)


def test_datasets_survive_a_restart() -> None:
    cluster = Cluster()
    cluster.add(dataset())
    cluster.handle(DatasetRefreshed(dataset(), snapshot(2)))
    before = cluster.state.datasets
    cluster.restart()
    assert cluster.state.datasets == before


def test_cached_bytes_count_nodes_that_are_up_and_never_pass_the_dataset() -> None:
    cluster = Cluster()
    cluster.register(node("n1"), node("n2"))
    cluster.add(dataset())
    known = cluster.state.datasets["imagenet"]
    cluster.report(node("n1"), cached_bytes={digest(1): 30 * GIB, digest(9): 1})
    cluster.report(node("n2"), cached_bytes={digest(1): 40 * GIB})
    assert status.cached_bytes(known, cluster.state) == 70 * GIB
    cluster.report(node("n2"), cached_bytes={digest(1): 90 * GIB})
    assert status.cached_bytes(known, cluster.state) == 100 * GIB
    cluster.report(node("n2"), is_leaving=True)
    assert status.cached_bytes(known, cluster.state) == 30 * GIB


def test_replicas_above_the_nodes_are_a_warning() -> None:
    cluster = Cluster()
    cluster.register(node("n1"), node("n2"))
    cluster.add(dataset(replicas=3))
    assert status.warnings(cluster.state) == ["dataset imagenet asks for 3 replicas, but 2 nodes are up: it has 2"]
    cluster.register(node("n3"))
    assert status.warnings(cluster.state) == []


def test_a_changed_policy_is_recorded_and_told_and_keeps_the_snapshots() -> None:
    cluster = Cluster()
    cluster.add(dataset())
    cluster.handle(DatasetRefreshed(dataset(), snapshot(2)))
    epoch = cluster.epoch
    before = cluster.state.datasets["imagenet"]
    actions = cluster.handle(
        PolicyChanged("imagenet", PolicyChange(is_pinned=True, quota_bytes=5 * GIB, is_direct=True))
    )
    changed = replace(before, is_pinned=True, quota_bytes=5 * GIB, is_direct=True)
    assert actions == (SaveDataset(changed), PublishOrders())
    assert cluster.epoch == epoch, "owners are as they were"
    record = changed.to_record()
    assert (record.pinned, record.quota_bytes, record.direct) == (True, 5 * GIB, True)
    cluster.handle(PolicyChanged("imagenet", PolicyChange(is_pinned=False)))
    assert cluster.state.datasets["imagenet"] == replace(changed, is_pinned=False), "what is absent stays"
    assert cluster.handle(PolicyChanged("imagenet", PolicyChange(is_pinned=False, quota_bytes=5 * GIB))) == ()


def test_other_replicas_are_a_new_epoch_of_the_same_nodes() -> None:
    cluster = Cluster()
    cluster.register(node("a"), node("b"))
    cluster.add(dataset())
    before = cluster.state.map
    actions = cluster.handle(PolicyChanged("imagenet", PolicyChange(replicas=2)))
    after = cluster.state.map
    assert (after.epoch, after.nodes) == (before.epoch + 1, before.nodes)
    assert actions == (SaveDataset(dataset(replicas=2)), SaveMap(after), PublishOrders())
    assert cluster.handle(PolicyChanged("imagenet", PolicyChange(replicas=2))) == ()


def test_a_policy_of_an_unknown_dataset_is_refused() -> None:
    cluster = Cluster()
    with pytest.raises(DatasetNotFound, match="'nothing'"):
        cluster.handle(PolicyChanged("nothing", PolicyChange(replicas=2)))
