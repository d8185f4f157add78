"""One epoch, read by jobs of any size one after the other: every sample once, in an order that no job has a say in."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal.streaming.index import Index
from shoal.streaming.order import Order
from shoal.streaming.plan import Plan
from shoal.streaming.state import State, merged
from shoal.streaming.steps import NOWHERE, Schedule


@dataclass(frozen=True)
class Job:
    """So many ranks, which read so many steps and are interrupted.

    Attributes:
        homes: the seed of who holds what; None: nobody is at home anywhere.
    """

    world_size: int
    batch_size: int
    workers: int
    steps: int
    homes: int | None


jobs = st.builds(
    Job,
    world_size=st.integers(1, 64),
    batch_size=st.integers(1, 9),
    workers=st.integers(0, 8),
    steps=st.integers(0, 12),
    homes=st.none() | st.integers(0, 1 << 30),
)
lengths = st.lists(st.integers(1, 90), min_size=1, max_size=30)


def index_of(lengths: list[int]) -> Index:
    count = len(lengths)
    zeros = np.zeros(count, np.int64)
    columns = [np.arange(count), zeros, np.array(lengths), zeros.copy(), zeros + 100]
    return Index([column.astype(np.int64) for column in columns], b"")


def homes_of(job: Job, runs: int) -> Any:
    """Nodes that hold runs at random, and ranks on some of them."""
    if job.homes is None:
        return None
    random = np.random.default_rng(job.homes)
    holders = random.integers(NOWHERE, 9, (runs, 2))
    return SimpleNamespace(of=holders.__getitem__, ranks=random.integers(NOWHERE, 9, job.world_size), any_known=True)


def state_after(job: Job, state: State, taken: int) -> State:
    """What the checkpoint of a job says after so many steps: the loader's workers merged, or the stream itself."""
    state = State.from_dict({**state.to_dict(), "step_size": job.world_size * job.batch_size})
    workers = max(1, job.workers)
    each = [
        State.from_dict({**state.to_dict(), "worker": w, "workers": workers, "taken": len(range(w, taken, workers))})
        for w in range(workers)
    ]
    return merged(each[::-1])


@settings(max_examples=120, deadline=None)
@given(lengths, st.lists(jobs, min_size=1, max_size=6), st.integers(0, 99), st.integers(0, 3), st.integers(1, 300))
def test_every_sample_once_in_one_order(
    lengths: list[int], interrupted: list[Job], seed: int, epoch: int, window: int
) -> None:
    index = index_of(lengths)
    order = Order(index.samples, seed=seed, epoch=epoch, window=window)
    expected = order.samples(0, order.length).tolist()
    state = State("set", "d", "**", "arrow", order.length, seed, True, window, epoch, 0)
    read: list[int] = []
    for number, job in enumerate(interrupted):
        schedule = Schedule(order.length, state.position, job.batch_size, job.world_size, False)
        plan = Plan(index, order, schedule, homes_of(job, len(lengths)))
        taken = schedule.steps if number == len(interrupted) - 1 else min(job.steps, schedule.steps)
        for step in range(taken):
            samples, _ = plan.step(step)
            hands = plan.assigned(step)
            assert hands.shape == (job.world_size, schedule.share(schedule.step(step))), "ranks have unequal shares"
            positions = schedule.step(step)
            due = expected[positions.start : positions.stop]
            assert set(samples[hands.ravel()].tolist()) == set(due), "a step has other samples than the order says"
            if len(due) == schedule.step_size:
                assert sorted(samples[hands.ravel()].tolist()) == sorted(due), "a sample is repeated in a whole step"
            # A rank's samples are in the order that they have in the flat one.
            assert (np.diff(hands, axis=1) > 0).all()
            read += due
        assert read == expected[: len(read)]
        state = state_after(job, state, taken)
        assert state.position == len(read)
    assert read == expected
    assert sorted(read) == list(range(order.length))


@settings(max_examples=40, deadline=None)
@given(lengths.filter(lambda lengths: sum(lengths) > 100), st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_seeds_and_epochs_differ(lengths: list[int], seed: int, epoch: int) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        made = Order(np.array(lengths), seed=seed, epoch=epoch)
        return made.samples(0, made.length).tolist()

    assert order(seed, epoch) == order(seed, epoch)
    assert order(seed, epoch) != order(seed + 1, epoch)
    assert order(seed, epoch) != order(seed, epoch + 1)


def test_steps_that_were_not_consumed_in_turn_are_no_place() -> None:
    """As a loader with in_order=False has it: then a position would lose samples, and repeat others."""
    state = State("set", "d", "**", "arrow", 100, 0, True, 1, 0, 0)
    each = [State.from_dict({**state.to_dict(), "worker": w, "workers": 2, "taken": 3 * w}) for w in range(2)]
    with pytest.raises(InvalidRequest, match="not consumed in order"):
        merged(each)
