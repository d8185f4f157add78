"""The plan: which samples of which runs a rank reads at each step of an epoch. Pure.

    index, seed, epoch  ->  the flat order            (`shoal.streaming.order`)
    position, world     ->  steps of it               (`shoal.streaming.steps.Schedule`)
    who holds what      ->  which rank reads which    (`shoal.streaming.steps.assign`)

The rule: every rank computes the same plan from the same arguments, and asks nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.placement import Placement
from shoal.shards import PART_SIZE
from shoal.snapshot import Snapshot
from shoal.streaming.index import Index
from shoal.streaming.order import Order, Samples
from shoal.streaming.steps import NOWHERE, Indexes, Schedule, assign, reads_whole

#: Bytes that a shuffle window holds unless the caller gives its samples. The runs of two windows may be needed at a
#: time, so it is well below half of what a stream holds by default.
WINDOW_BYTES = 1 << 30
MIN_WINDOW, MAX_WINDOW = 64, 1 << 20
#: Of a segment's parts the last one's end mostly belongs to the next segment, and a cold cache fetches it too early: of
#: one part as many bytes as are needed, of four a quarter.
MAX_SEGMENT_PARTS = 4


def window_of(index: Index) -> int:
    """Samples of a shuffle window of `WINDOW_BYTES`, a function of the data alone."""
    mean = max(1, index.run_bytes // max(1, index.sample_count))
    return int(np.clip(WINDOW_BYTES // mean, MIN_WINDOW, MAX_WINDOW))


def segment_parts(index: Index, window: int) -> int:
    """Parts (8 MiB) of a segment: a quarter of what a window holds, so that each is mixed with others."""
    mean = max(1, index.run_bytes // max(1, index.sample_count))
    return int(np.clip(window * mean // (4 * PART_SIZE), 1, MAX_SEGMENT_PARTS))


def order_of(index: Index, *, seed: int, epoch: int, window: int, shuffle: bool = True) -> Order:
    """The flat order of an epoch over an index."""
    segments = index.segments(segment_parts(index, window))
    return Order(index.samples, seed=seed, epoch=epoch, window=window, shuffle=shuffle, segments=segments)


class Homes:
    """Which nodes own the shard that a run begins in, under one cluster map.

    Args:
        placement: of the snapshot's shards; None where nobody's locality is known.
        rank_nodes: ids of the nodes that the ranks run on; "" where one runs beside none.

    Attributes:
        ranks: the same as indexes of the placement's nodes. Shape (world size,).
    """

    def __init__(self, snapshot: Snapshot, index: Index, placement: Placement, rank_nodes: list[str]) -> None:
        self._placement = placement
        self._shards = snapshot.shards_at(index.rows, index.starts)
        numbers = {node.id: number for number, node in enumerate(placement.nodes)}
        self.ranks: Indexes = np.array([numbers.get(node, NOWHERE) for node in rank_nodes], np.int64)

    @property
    def any_known(self) -> bool:
        """Whether a rank runs beside a node that may own anything."""
        return bool((self.ranks != NOWHERE).any())

    def of(self, runs: Indexes) -> Indexes:
        """The owners of runs, best first. Shape (n, replicas)."""
        return self._placement.owners(self._shards[runs])


@dataclass(frozen=True, slots=True, eq=False)
class Reads:
    """What one rank reads at one step: for each sample its run and its place in the run. Shapes (n,).

    Attributes:
        step: counted from where the schedule begins.
        whole: whether the rank had better read the sample's run whole (`shoal.streaming.steps.reads_whole`).
    """

    step: int
    runs: Indexes
    places: Indexes
    whole: npt.NDArray[np.bool_]


class Plan:
    """One epoch, for a world.

    Args:
        homes: None: any rank reads any sample.
    """

    def __init__(self, index: Index, order: Order, schedule: Schedule, homes: Homes | None) -> None:
        self.schedule = schedule
        self._order = order
        self._firsts = np.cumsum(index.samples) - index.samples
        self._homes = homes if homes is not None and homes.any_known else None
        # Any stretch of the order costs a window or two to find, so it is found in stretches of that length.
        self._stretch_length = max(4 * schedule.step_size, 2 * order.window)
        self._stretch_start, self._stretch = 0, np.empty(0, np.int64)

    def reads(self, step: int, rank: int) -> Reads:
        """What `rank` reads at `step`; neither is checked. Steps that follow each other cost least."""
        samples, runs = self._step(step)
        if self.schedule.world_size == 1:
            return Reads(step, runs, samples - self._firsts[runs], np.ones(len(runs), np.bool_))
        homes, rank_nodes = self._homes_of(runs)
        mine = assign(homes, rank_nodes, runs)[rank]
        chosen = runs[mine]
        whole = reads_whole(homes[mine], rank_nodes, chosen, rank)
        return Reads(step, chosen, samples[mine] - self._firsts[chosen], whole)

    def step(self, step: int) -> tuple[Samples, Indexes]:
        """All samples of a step in their order, repeats included, and the run of each."""
        return self._step(step)

    def assigned(self, step: int) -> Indexes:
        """Who reads what of a step: as `assign`. Shape (world size, share)."""
        runs = self._step(step)[1]
        return assign(*self._homes_of(runs), runs)

    def _step(self, step: int) -> tuple[Samples, Indexes]:
        positions = self.schedule.step(step)
        samples = self._samples(positions.start, positions.stop)[self.schedule.padded(positions)]
        return samples, np.searchsorted(self._firsts, samples, side="right") - 1

    def _homes_of(self, runs: Indexes) -> tuple[Indexes, Indexes]:
        """The nodes that own runs, and those that the ranks run on, as `assign` takes them."""
        if self._homes is None:
            return np.full((len(runs), 1), NOWHERE), np.full(self.schedule.world_size, NOWHERE)
        return self._homes.of(runs), self._homes.ranks

    def _samples(self, start: int, stop: int) -> Samples:
        if not self._stretch_start <= start or stop > self._stretch_start + len(self._stretch):
            end = min(self._order.length, max(stop, start + self._stretch_length))
            self._stretch_start, self._stretch = start, self._order.samples(start, end)
        return self._stretch[start - self._stretch_start : stop - self._stretch_start]
