"""When a stream needs which part of which shard: what it tells the nodes of the future that its order is. Pure.

Runs are used in the order's sequence, and a sample moves by less than a window: the run that begins at place p is
first wanted at about position p - window / 2, and last at about window / 2 after its end.

The rule: the ranks and workers of a job share the telling, for the order is the same for all of them; all parts of a
shard are told by one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shoal.shards import PART_SIZE
from shoal.snapshot import Snapshot
from shoal.streaming.index import Index
from shoal.streaming.order import Order

Numbers = npt.NDArray[np.int64]

#: Parts that are told of at a time.
MOST = 1 << 16
#: Of a word that names a part of a shard; a shard has at most 2 GiB.
_PART_BITS = 16


class Horizon:
    """One epoch's parts of shards, by their first use.

    Args:
        part, parts: which share of the shards is this one's to tell.
    """

    def __init__(self, snapshot: Snapshot, index: Index, order: Order, part: int = 0, parts: int = 1) -> None:
        runs, begins = order.sequence
        rows, starts, lasts = index.rows[runs], index.starts[runs], index.ends[runs] - 1
        firsts = snapshot.shards_at(rows, starts)
        counts = snapshot.shards_at(rows, lasts) - firsts + 1  # an object's are neighbours
        shards = np.repeat(firsts, counts) + _count_up(counts)
        mine = shards % parts == part
        shards, places = shards[mine], np.repeat(np.arange(len(runs)), counts)[mine]  # in the sequence
        # The bytes of each shard that the run lies in, first and last, as parts.
        begin = (starts[places] // snapshot.shard_size + shards - firsts[places]) * snapshot.shard_size
        first_parts = np.maximum(starts[places] - begin, 0) // PART_SIZE
        last_parts = np.minimum(lasts[places] - begin, snapshot.shard_size - 1) // PART_SIZE
        counts = last_parts - first_parts + 1
        every = np.repeat(shards << _PART_BITS | first_parts, counts) + _count_up(counts)
        places = np.repeat(places, counts)
        # Places ascend along the sequence: the first of a part's runs has the earliest, the last one the latest.
        found, first_uses = np.unique(every, return_index=True)
        last_uses = len(every) - 1 - np.unique(every[::-1], return_index=True)[1]
        reach = order.window // 2
        by_use = np.argsort(first_uses, kind="stable")
        self._found = found[by_use]
        self._begins = begins[places[first_uses]][by_use] - reach
        ends = begins[places[last_uses]] + index.samples[runs[places[last_uses]]]
        self._ends = np.minimum(ends[by_use] + reach, order.length)

    def at(self, position: int) -> tuple[Numbers, Numbers, Numbers]:
        """What is needed after `position` samples of the epoch, the next first.

        Returns:
            Shards, which part of each, and after how many more samples. Shapes (n,), n at most `MOST`.
        """
        needed = np.flatnonzero(self._ends > position)[:MOST]
        found = self._found[needed]
        return found >> _PART_BITS, found & ((1 << _PART_BITS) - 1), np.maximum(self._begins[needed] - position, 0)


def _count_up(counts: Numbers) -> Numbers:
    """0, 1, …, counts[0] - 1, 0, 1, …, counts[1] - 1, …"""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
