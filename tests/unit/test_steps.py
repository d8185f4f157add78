"""Steps: equal shares, nothing lost or repeated, samples at home where they can be, whatever happens in between."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal.streaming.order import Order
from shoal.streaming.steps import NOWHERE, Schedule, assign

sizes = st.integers(1, 64)


@settings(deadline=None)
@given(
    st.integers(1, 3000),
    st.lists(st.tuples(sizes, st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_any_interruption_at_any_size_gives_each_sample_once_in_one_order(
    samples: int, legs: list[tuple[int, int, int]], seed: int
) -> None:
    """Each leg is a run of the job at some world size, which ends after some steps; the last runs to the end."""
    order = Order(np.full(samples // 10 + 1, 10), seed=seed, epoch=0, window=100)
    position, seen = 0, list[int]()
    for number, (world, batch, steps) in enumerate(legs):
        schedule = Schedule(order.length, position, batch, world, drop_last=False)
        last = number == len(legs) - 1
        for step in map(schedule.step, range(schedule.steps if last else min(steps, schedule.steps))):
            here = order.samples(step.start, step.stop)
            padded = schedule.padded(step)
            chosen = assign(np.full((len(padded), 1), NOWHERE), np.full(world, NOWHERE), here[padded] // 10)
            read = here[padded[chosen]]
            assert read.shape == (world, schedule.share(step))
            assert set(read.ravel().tolist()) == set(here.tolist()), "repeats are of the step itself"
            assert read.size - len(here) < world
            seen += here.tolist()
            position = step.stop
    assert seen == order.samples(0, order.length).tolist()


@settings(deadline=None)
@given(st.integers(0, 500), sizes, st.integers(1, 30))
def test_drop_last_leaves_out_less_than_a_step(samples: int, world: int, batch: int) -> None:
    if samples < world * batch:
        with pytest.raises(InvalidRequest, match="no rank would get a batch"):
            Schedule(samples, 0, batch, world, drop_last=True)
        return
    schedule = Schedule(samples, 0, batch, world, drop_last=True)
    assert 0 <= samples - schedule.steps * world * batch < world * batch
    assert all(len(schedule.step(number)) == world * batch for number in range(schedule.steps))


def test_an_epoch_that_is_over_has_no_steps() -> None:
    assert Schedule(100, 100, 10, 2, drop_last=True).steps == 0
    assert Schedule(100, 90, 10, 2, drop_last=True).steps == 0
    assert Schedule(100, 90, 10, 2, drop_last=False).steps == 1


@pytest.mark.parametrize(("batch", "world", "position"), [(0, 1, 0), (1, 0, 0), (1, 1, -1), (1, 1, 11)])
def test_nonsense_is_refused(batch: int, world: int, position: int) -> None:
    with pytest.raises(InvalidRequest):
        Schedule(10, position, batch, world, drop_last=False)


def test_nothing_to_read_is_refused_with_another_sentence() -> None:
    with pytest.raises(InvalidRequest, match="nothing matches"):
        Schedule(0, 0, 1, 1, drop_last=False)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    nodes = draw(st.integers(1, 6))
    rank_nodes = draw(st.lists(st.integers(NOWHERE, nodes - 1), min_size=1, max_size=12))
    share, holders = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    rows = st.lists(st.integers(NOWHERE, nodes - 1), min_size=holders, max_size=holders)
    homes = draw(st.lists(rows, min_size=share * len(rank_nodes), max_size=share * len(rank_nodes)))
    return np.array(homes, np.int64).reshape(-1, holders), np.array(rank_nodes, np.int64)


@settings(deadline=None)
@given(worlds())
def test_each_sample_goes_to_one_rank_and_keeps_its_order(world: tuple[np.ndarray, np.ndarray]) -> None:
    homes, rank_nodes = world
    batches = assign(homes, rank_nodes, np.arange(len(homes)) // 5)
    assert batches.shape == (len(rank_nodes), len(homes) // len(rank_nodes))
    assert sorted(batches.ravel().tolist()) == list(range(len(homes)))
    assert (np.diff(batches, axis=1) > 0).all()


@settings(deadline=None)
@given(worlds())
def test_a_sample_is_away_from_home_only_where_its_home_is_full(world: tuple[np.ndarray, np.ndarray]) -> None:
    homes, rank_nodes = world
    batches = assign(homes, rank_nodes, np.arange(len(homes)) // 5)
    share = batches.shape[1]
    seats = Counter(rank_nodes.tolist())
    at_home = Counter[int]()
    for rank, samples in enumerate(batches):
        at_home[int(rank_nodes[rank])] += sum(rank_nodes[rank] in homes[sample] for sample in samples)
    for rank, samples in enumerate(batches):
        for sample in samples:
            if rank_nodes[rank] == NOWHERE or rank_nodes[rank] not in homes[sample]:
                for home in set(homes[sample].tolist()) - {NOWHERE}:
                    assert at_home[home] == seats[home] * share


def test_with_one_holder_each_node_reads_as_much_of_its_own_as_it_has_seats() -> None:
    rng = np.random.default_rng(1)
    nodes, ranks_each, share = 16, 8, 256
    rank_nodes = np.repeat(np.arange(nodes), ranks_each)
    homes = rng.integers(0, nodes, (len(rank_nodes) * share, 1))
    batches = assign(homes, rank_nodes, np.arange(len(homes)) // 5)
    local = np.mean(homes[batches, 0] == rank_nodes[:, None])
    most = np.minimum(np.bincount(homes[:, 0], minlength=nodes), ranks_each * share).sum() / len(homes)
    assert local == pytest.approx(most)
    assert local > 0.95


def test_a_run_is_read_by_few_ranks_where_none_is_at_home() -> None:
    """Ranks away from every cache node: without the affinity each rank would read every run."""
    world, share, run = 32, 256, 1000
    order = Order(np.full(400, run), seed=1, epoch=0, window=64_000)
    readers: dict[int, set[int]] = {}
    for start in range(0, order.length - world * share, world * share):
        runs = order.samples(start, start + world * share) // run
        for rank, batch in enumerate(assign(np.full((len(runs), 1), NOWHERE), np.full(world, NOWHERE), runs)):
            for number in np.unique(runs[batch]).tolist():
                readers.setdefault(number, set()).add(rank)
    # Each run has samples in about eight steps of 65 runs; two ranks would be the least that can read it.
    assert np.mean([len(found) for found in readers.values()]) < world / 3
