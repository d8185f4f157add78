"""What streams tell nodes of their future: every shard that is needed, in time, and by one teller."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.streaming import horizon
from shoal.streaming.horizon import Horizon
from shoal.streaming.index import Index
from shoal.streaming.order import Order

SHARD, PART = 100, 30


@pytest.fixture(autouse=True)
def parts_of_30_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horizon, "PART_SIZE", PART)


class Shards:
    """Objects of `size_bytes` bytes each, as a snapshot has them."""

    shard_size = SHARD

    def __init__(self, size_bytes: int) -> None:
        self.per_object = -(-size_bytes // SHARD)

    def shards_at(self, rows: Any, offsets: Any) -> Any:
        return np.asarray(rows) * self.per_object + np.asarray(offsets) // SHARD


def index_of(objects: int, runs: int, samples: int, run_bytes: int) -> Index:
    columns = [np.repeat(np.arange(objects), runs), np.tile(np.arange(runs), objects)]
    starts = columns[1] * run_bytes
    columns += [np.full(objects * runs, samples), starts, starts + run_bytes]
    return Index([np.array(column, np.int64) for column in columns], b"")


def horizon_of(index: Index, order: Order, part: int = 0, parts: int = 1) -> Horizon:
    return Horizon(Shards(int(index.ends.max())), index, order, part, parts)  # type: ignore[arg-type]


def parts_of(index: Index, snapshot: Shards, run: int) -> set[tuple[int, int]]:
    """Shard and part of each byte of a run."""
    first = snapshot.shards_at(index.rows[run], 0)
    return {
        (int(first + at // SHARD), at % SHARD // PART) for at in range(int(index.starts[run]), int(index.ends[run]))
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    objects=st.integers(1, 6),
    runs=st.integers(1, 5),
    samples=st.integers(1, 7),
    run_bytes=st.integers(1, 450),
    window=st.integers(1, 40),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_all_that_is_still_to_be_read_is_told(
    objects: int, runs: int, samples: int, run_bytes: int, window: int, seed: int, shuffle: bool, data: st.DataObject
) -> None:
    index = index_of(objects, runs, samples, run_bytes)
    order = Order(index.samples, seed=seed, epoch=1, window=window, shuffle=shuffle)
    position = data.draw(st.integers(0, order.length))
    parts = data.draw(st.integers(1, 3))
    told = [horizon_of(index, order, part, parts).at(position) for part in range(parts)]
    every = [each for shards, numbers, _ in told for each in zip(shards.tolist(), numbers.tolist(), strict=True)]
    assert len(set(every)) == len(every)
    tellers = [set(shards.tolist()) for shards, _, _ in told]
    assert sum(map(len, tellers)) == len(set().union(*tellers)), "all parts of a shard are told by one"
    # A window's half is where a sample mostly comes; the other half is the least likely to be met: allow for it.
    later = order.samples(min(order.length, position + window // 2 + 1), order.length)
    snapshot = Shards(int(index.ends.max()))
    needed = set[tuple[int, int]]().union(*(parts_of(index, snapshot, run) for run in np.unique(later // samples)))
    assert needed <= set(every)
    assert set(every) <= set[tuple[int, int]]().union(*(parts_of(index, snapshot, run) for run in range(len(index))))
    for _, _, ahead in told:
        assert (np.diff(ahead) >= 0).all() and (ahead >= 0).all()
    if position == order.length:
        assert not every


def test_parts_come_in_the_order_of_their_first_use() -> None:
    index = index_of(3, 4, 10, 50)
    order = Order(index.samples, seed=0, epoch=0, shuffle=False)
    shards, parts, ahead = horizon_of(index, order).at(25)
    # Shard 0 is used up with the first 20 samples; bytes 60 to 89 of a shard are needed by its second run alone.
    assert shards.tolist() == [shard for shard in (1, 2, 3, 4, 5) for _ in range(4)]
    assert parts.tolist() == 5 * [0, 1, 2, 3]
    assert ahead.tolist() == [0, 0, 5, 5, 15, 15, 25, 25, 35, 35, 45, 45, 55, 55, 65, 65, 75, 75, 85, 85]
