"""What streams tell nodes of their future: every shard that is needed, in time, and by one teller."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.streaming.horizon import Horizon
from shoal.streaming.index import Index
from shoal.streaming.order import Order

SHARD = 100


class Shards:
    """Objects of `size_bytes` bytes each, as a snapshot has them."""

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
    every = np.concatenate([shards for shards, _ in told])
    assert len(np.unique(every)) == len(every)
    # A window's half is where a sample mostly comes; the other half is the least likely to be met: allow for it.
    later = order.samples(min(order.length, position + window // 2 + 1), order.length)
    rows = np.unique(later // samples)
    snapshot = Shards(int(index.ends.max()))
    firsts = snapshot.shards_at(index.rows[rows], index.starts[rows])
    lasts = snapshot.shards_at(index.rows[rows], index.ends[rows] - 1)
    needed = {shard for first, last in zip(firsts, lasts, strict=True) for shard in range(first, last + 1)}
    assert needed <= set(every.tolist())
    for _, ahead in told:
        assert (np.diff(ahead) >= 0).all() and (ahead >= 0).all()
    if position == order.length:
        assert not len(every)


def test_shards_come_in_the_order_of_their_first_use() -> None:
    index = index_of(3, 4, 10, 50)
    order = Order(index.samples, seed=0, epoch=0, shuffle=False)
    shards, ahead = horizon_of(index, order).at(25)
    assert shards.tolist() == [1, 2, 3, 4, 5]  # shard 0 is used up with the first 20 samples
    assert ahead.tolist() == [0, 15, 35, 55, 75]
