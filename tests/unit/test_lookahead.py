"""The look-ahead: what a step needs is there, the bytes stay within the bound, failures reach the consumer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import wait

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.streaming import lookahead
from shoal.streaming.lookahead import MAX_STEPS, LookAhead
from shoal.streaming.plan import Reads
from shoal.streaming.runs import Loaded, Want
from shoal.streaming.waits import Trace, Waits

RUN_BYTES = 100


def steps_of(runs: Sequence[Sequence[int]]) -> Iterator[Reads]:
    for number, each in enumerate(runs):
        yield Reads(number, np.array(each, np.int64), np.zeros(len(each), np.int64), np.ones(len(each), np.bool_))


class Loader:
    """Loads a run as a table of its number; says how often, and may be held or made to fail."""

    def __init__(self, held_bytes: int = RUN_BYTES, *, is_batched: bool = False) -> None:
        self.held_bytes, self._is_batched = held_bytes, is_batched
        self.loaded: list[int] = []
        self.calls: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails: set[int] = set()

    def wants(self, reads: Reads) -> list[Want]:
        return [Want(run, None) for run in dict.fromkeys(reads.runs.tolist())]

    def bytes_of(self, want: Want) -> int:
        return RUN_BYTES

    def is_shared(self, want: Want) -> bool:
        return not self._is_batched

    def is_batched(self, want: Want) -> bool:
        return self._is_batched

    def load(self, wants: Sequence[Want], trace: Trace) -> list[Loaded]:
        runs = [want.run for want in wants]
        assert self.gate.wait(20)
        if self.fails & set(runs):
            raise OSError("no such run")
        self.calls.append(list(runs))
        self.loaded.extend(runs)
        return [Loaded(pa.table({"run": [run]}), self.held_bytes) for run in runs]


def look_ahead(loader: Loader, runs: Sequence[Sequence[int]], limit: int) -> LookAhead:
    return LookAhead(steps_of(runs), loader, limit, Waits())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5), max_size=30), st.integers(1, 2000))
def test_each_step_finds_its_runs_within_the_bound(steps: list[list[int]], limit: int) -> None:
    loader = Loader()
    ahead = look_ahead(loader, steps, limit)
    most = max((len(set(step)) for step in steps), default=0) * RUN_BYTES
    came = []
    for reads, tables in ahead:
        assert {want.run: table["run"].to_pylist() for want, table in tables.items()} == {
            r: [r] for r in reads.runs.tolist()
        }
        assert ahead.held_bytes <= max(limit, most)
        came.append(reads.runs.tolist())
    assert came == steps
    ahead.close()


def test_a_run_is_loaded_once_while_there_is_room() -> None:
    loader = Loader()
    list(look_ahead(loader, [[1, 2], [2, 3], [1, 3], [4], [1]], 1 << 20))
    assert sorted(loader.loaded) == [1, 2, 3, 4]


def test_the_least_recently_used_goes_first() -> None:
    loader = Loader()
    list(look_ahead(loader, [[1], [2], [1], [3], [1]], 2 * RUN_BYTES))
    assert loader.loaded.count(1) == 1 and len(loader.loaded) == 3


def test_the_first_steps_are_not_kept_waiting_by_those_that_come_long_after_them() -> None:
    loader = Loader()
    ahead = look_ahead(loader, [[n] for n in range(30)], 100 * RUN_BYTES)
    begun = []
    for _ in range(4):
        next(ahead)
        begun.append(len(ahead._begun))
    assert begun == [3, 4, 5, 6], "one more with every step that is taken"


def test_the_window_fills_while_the_consumer_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "FIRST_STEPS", 64)
    loader = Loader()
    ahead = look_ahead(loader, [[n] for n in range(30)], 10 * RUN_BYTES)
    next(ahead)
    wait([load.future for load in ahead._loads.values()])
    assert len(loader.loaded) == 11  # a window of ten, and one in the room of what was consumed
    assert ahead.held_bytes == 10 * RUN_BYTES


def test_maps_take_no_room_and_steps_are_bounded_all_the_same() -> None:
    loader = Loader(held_bytes=0)
    ahead = look_ahead(loader, [[n] for n in range(500)], 100 * RUN_BYTES)
    for _ in range(50):
        next(ahead)
    wait([load.future for load in ahead._loads.values()])
    assert ahead.held_bytes == 0
    assert len(loader.loaded) <= 50 + MAX_STEPS


def test_single_samples_are_loaded_together_and_dropped_when_consumed() -> None:
    loader = Loader(is_batched=True)
    ahead = look_ahead(loader, [[1, 2, 3], [4, 5]], 1 << 20)
    list(ahead)
    assert loader.calls == [[1, 2, 3], [4, 5]]
    assert ahead.held_bytes == 0


def test_a_failure_reaches_the_consumer_at_its_step() -> None:
    loader = Loader()
    loader.fails = {2}
    ahead = look_ahead(loader, [[1], [2], [3]], 1 << 20)
    assert next(ahead)[0].runs.tolist() == [1]
    with pytest.raises(OSError, match="no such run"):
        next(ahead)
    ahead.close()


def test_closing_leaves_no_load_waiting() -> None:
    loader = Loader()
    loader.gate.clear()
    ahead = look_ahead(loader, [[n] for n in range(40)], 1 << 20)
    ahead._begin()
    ahead.close()
    loader.gate.set()
    assert ahead._threads.join(20)
    assert len(loader.loaded) < 40
