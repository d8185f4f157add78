"""The plan: every sample once, in an order that no world changes; whoever is at home reads what it can."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster_map import ClusterMap, Node
from shoal.errors import InvalidRequest
from shoal.placement import Placement
from shoal.streaming import plan as plans
from shoal.streaming.forecast import forecast
from shoal.streaming.formats.source import Extent
from shoal.streaming.index import Index
from shoal.streaming.order import Order
from shoal.streaming.plan import Homes, Plan
from shoal.streaming.steps import Schedule

SHARD = 1 << 20


def index_of(lengths: list[int], per_object: int = 4) -> Index:
    """Runs of these many samples, a quarter of a shard each, a few to an object."""
    objects = [lengths[i : i + per_object] for i in range(0, len(lengths), per_object)]
    step = SHARD // 4
    extents = [[Extent(n, s, n * step, (n + 1) * step) for n, s in enumerate(each)] for each in objects]
    return Index.of_runs(range(len(objects)), extents)


def homes_of(index: Index, nodes: int, world_size: int, replicas: int = 1) -> Homes:
    """Homes of an index of one-shard objects on imagined nodes, the ranks evenly on them."""
    count = int(index.rows.max(initial=0)) + 1
    rng = np.random.default_rng(5)
    table = SimpleNamespace(keys=rng.integers(0, 1 << 63, (count, 2)).astype(np.uint64), sizes=np.full(count, SHARD))
    members = tuple(Node(f"n{number:03}", f"h:{number}", 1) for number in range(nodes))
    placement = Placement(lambda: table, count, ClusterMap(1, members), replicas)
    snapshot = SimpleNamespace(shards_at=lambda rows, offsets: rows + offsets // SHARD)
    ids = [members[rank * nodes // world_size].id for rank in range(world_size)]
    return Homes(snapshot, index, placement, ids)  # type: ignore[arg-type]


def plan_of(index: Index, world_size: int, batch_size: int, position: int = 0, **settings: object) -> Plan:
    nodes = int(settings.pop("nodes", 0))  # type: ignore[call-overload]
    drop_last = bool(settings.pop("drop_last", False))
    order = Order(index.samples, **({"seed": 1, "epoch": 0, "window": 64} | settings))  # type: ignore[arg-type]
    schedule = Schedule(index.sample_count, position, batch_size, world_size, drop_last)
    homes = homes_of(index, nodes, world_size) if nodes else None
    return Plan(index, order, schedule, homes)


def numbers(plan: Plan, index: Index, step: int, rank: int) -> list[int]:
    firsts = np.cumsum(index.samples) - index.samples
    reads = plan.reads(step, rank)
    assert (reads.places >= 0).all() and (reads.places < index.samples[reads.runs]).all()
    return (firsts[reads.runs] + reads.places).tolist()


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(deadline=None)
@given(lengths, st.integers(1, 64), st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_each_sample_once_whatever_the_world_and_the_nodes(
    samples: list[int], world_size: int, batch_size: int, nodes: int, shuffle: bool
) -> None:
    index = index_of(samples)
    plan = plan_of(index, world_size, batch_size, nodes=nodes, shuffle=shuffle)
    flat = plan_of(index, 1, 1, shuffle=shuffle)
    expected = [numbers(flat, index, step, 0)[0] for step in range(flat.schedule.steps)]
    assert sorted(expected) == list(range(index.sample_count))
    place_of = {sample: place for place, sample in enumerate(expected)}
    if not shuffle:
        assert expected == list(range(index.sample_count))
    for step in range(plan.schedule.steps):
        positions = plan.schedule.step(step)
        dealt = [numbers(plan, index, step, rank) for rank in range(world_size)]
        assert len({len(hand) for hand in dealt}) == 1, "ranks have equally many"
        together = [sample for hand in dealt for sample in hand]
        assert set(together) == set(expected[positions.start : positions.stop])
        assert len(together) == len(positions) or len(positions) < plan.schedule.step_size
        for hand in dealt:  # in the order of the flat order, but for repeats at the end
            places = [place_of[sample] for sample in hand]
            assert sorted(places) == places or len(positions) < plan.schedule.step_size


@settings(deadline=None, max_examples=40)
@given(lengths, st.data())
def test_a_resume_elsewhere_goes_on_with_the_next_sample(samples: list[int], data: st.DataObject) -> None:
    index = index_of(samples)
    total = index.sample_count
    flat = plan_of(index, 1, 1)
    expected = [numbers(flat, index, step, 0)[0] for step in range(total)]
    position, seen = 0, []
    while position < total:
        world_size, batch_size = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
        plan = plan_of(index, world_size, batch_size, position, nodes=data.draw(st.integers(0, 3)))
        taken = data.draw(st.integers(1, plan.schedule.steps))
        for step in range(taken):
            positions = plan.schedule.step(step)
            found = {s for rank in range(world_size) for s in numbers(plan, index, step, rank)}
            assert found == set(expected[positions.start : positions.stop])
            seen.extend(expected[positions.start : positions.stop])
        position = min(total, position + taken * plan.schedule.step_size)
    assert seen == expected


def test_steps_may_be_asked_for_in_any_order() -> None:
    index = index_of([17] * 40)
    plan = plan_of(index, 2, 8, nodes=2)
    forward = [numbers(plan, index, step, 1) for step in range(plan.schedule.steps)]
    again = plan_of(index, 2, 8, nodes=2)
    assert [numbers(again, index, step, 1) for step in reversed(range(plan.schedule.steps))] == forward[::-1]


def test_seeds_and_epochs_differ() -> None:
    index = index_of([20] * 20)
    orders = [
        tuple(plan_of(index, 1, 400, seed=seed, epoch=epoch).reads(0, 0).places.tolist())
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_a_window_is_as_many_samples_as_its_bytes_hold() -> None:
    assert plans.window_of(index_of([64] * 8)) == plans.WINDOW_BYTES // (SHARD // 4 // 64)
    assert plans.window_of(Index.of_runs([0], [[Extent(0, 10, 0, 1 << 40)]])) == plans.MIN_WINDOW
    assert plans.window_of(Index.of_runs([0], [[Extent(0, 1 << 30, 0, 1)]])) == plans.MAX_WINDOW


@pytest.mark.parametrize("nodes", [4, 16, 64])
def test_most_samples_are_at_home_and_all_ranks_have_equally_many(nodes: int) -> None:
    index = index_of([64] * (nodes * 64))
    world_size, replicas = nodes, 1
    homes = homes_of(index, nodes, world_size, replicas)
    order = Order(index.samples, seed=1, epoch=0, window=1 << 14)
    plan = Plan(index, order, Schedule(index.sample_count, 0, 64, world_size, False), homes)
    counted = forecast(plan, index, homes, np.zeros(len(index), np.bool_), plan.schedule.steps)
    assert len(set(counted.samples.tolist())) == 1
    assert counted.samples.sum() == index.sample_count
    assert counted.local_share > 2 / nodes, "by chance it would be one in so many"
    assert (counted.cold_bytes == counted.local_bytes + counted.peer_bytes).all()


def test_nobody_is_at_home_where_no_rank_runs_beside_a_node() -> None:
    index = index_of([8] * 8)
    homes = homes_of(index, 2, 2)
    homes.ranks[:] = -1
    plan = Plan(index, Order(index.samples, seed=0, epoch=0), Schedule(64, 0, 8, 2, False), homes)
    counted = forecast(plan, index, homes, np.ones(len(index), np.bool_), 100)
    assert counted.local_samples.tolist() == [0, 0] and counted.cold_bytes.tolist() == [0, 0]


def test_a_world_without_a_whole_step_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match=r"no rank would get a batch.*smaller batch_size"):
        plan_of(index_of([3]), 4, 1, drop_last=True)


def test_segments_are_runs_that_are_fetched_together() -> None:
    """Two objects of five runs of 3 MiB: they begin in parts 0, 0, 0, 1, 1 of their object."""
    starts = np.tile(np.arange(5) * (3 << 20), 2)
    columns = [np.repeat([0, 1], 5), np.tile(np.arange(5), 2), np.full(10, 4), starts, starts + (3 << 20)]
    index = Index([np.array(column, np.int64) for column in columns], b"")
    assert index.segments(1).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert index.segments(2).tolist() == [0] * 5 + [1] * 5
    sample_bytes = (3 << 20) // 4
    assert [plans.segment_parts(index, (parts * 32 << 20) // sample_bytes + 1) for parts in (0, 1, 3, 9)] == [
        1,
        1,
        3,
        4,
    ]
    for seed in range(20):
        order = plans.order_of(index, seed=seed, epoch=0, window=1)
        numbers = index.segments(1)[order.sequence[0]].tolist()
        assert [number for number, _ in itertools.groupby(numbers)] == list(dict.fromkeys(numbers)), (
            "none is torn apart"
        )
    orders = {tuple(plans.order_of(index, seed=s, epoch=0, window=1).sequence[0].tolist()) for s in range(20)}
    assert len(orders) > 10
