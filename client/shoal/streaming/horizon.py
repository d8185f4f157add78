"""When a stream needs which shard: what it tells the nodes of the future that its order is. Pure.

Runs are used in the order's sequence, and a sample moves by less than a window: the run that begins at place p is
first wanted at about position p - window / 2, and last at about window / 2 after its end.

The rule: the ranks and workers of a job share the telling, for the order is the same for all of them; each shard is
told by one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shoal.snapshot import Snapshot
from shoal.streaming.index import Index
from shoal.streaming.order import Order

Numbers = npt.NDArray[np.int64]

#: Shards that are told of at a time.
MOST = 1 << 16


class Horizon:
    """One epoch's shards, by their first use.

    Args:
        part, parts: which share of the shards is this one's to tell.
    """

    def __init__(self, snapshot: Snapshot, index: Index, order: Order, part: int = 0, parts: int = 1) -> None:
        runs, begins = order.sequence
        firsts = snapshot.shards_at(index.rows[runs], index.starts[runs])
        counts = snapshot.shards_at(index.rows[runs], index.ends[runs] - 1) - firsts + 1  # an object's are neighbours
        every = np.repeat(firsts, counts) + _count_up(counts)
        begins, ends = np.repeat(begins, counts), np.repeat(begins + index.samples[runs], counts)
        mine = every % parts == part
        every, begins, ends = every[mine], begins[mine], ends[mine]
        # Places ascend along the sequence: the first of a shard's runs has the earliest, the last one the latest.
        self._shards, first_runs = np.unique(every, return_index=True)
        last_runs = len(every) - 1 - np.unique(every[::-1], return_index=True)[1]
        reach = order.window // 2
        by_use = np.argsort(first_runs, kind="stable")
        self._shards = self._shards[by_use]
        self._begins = begins[first_runs][by_use] - reach
        self._ends = np.minimum(ends[last_runs][by_use] + reach, order.length)

    def at(self, position: int) -> tuple[Numbers, Numbers]:
        """Shards that are needed after `position` samples of the epoch, the next first, and after how many more.

        Shapes (n,), n at most `MOST`.
        """
        needed = np.flatnonzero(self._ends > position)[:MOST]
        return self._shards[needed], np.maximum(self._begins[needed] - position, 0)


def _count_up(counts: Numbers) -> Numbers:
    """0, 1, …, counts[0] - 1, 0, 1, …, counts[1] - 1, …"""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
