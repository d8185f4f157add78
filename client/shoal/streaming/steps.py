"""Steps: the flat order cut into global batches, and who reads which samples of one. Pure.

Step k takes positions [k G, (k + 1) G) of the order, G = batch size x world size. Inside a step any rank may take any
sample: the gradient is a sum over the step. So samples go to ranks on nodes that hold them, each rank gets its equal
share, and in a rank's batch samples keep the order that they had.

The rule: what a step contains is decided by the order alone; nodes and maps only say who reads it. Ranks must agree on
that, or a sample is read twice and another not at all, so all of them are given one table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.errors import InvalidRequest
from shoal.shards import U64, mix64

Indexes = npt.NDArray[np.int64]

NOWHERE = -1
#: Ranks that share a run before any other gets samples of it.
FAVOURITES = 4


@dataclass(frozen=True, slots=True)
class Schedule:
    """An epoch's steps, for a world of `world_size` ranks.

    Attributes:
        samples: in the epoch.
        position: in the flat order, where the first step begins: 0, or where an interrupted epoch goes on.
        batch_size: samples a rank and step.
        drop_last: leave out the samples at the end that make no whole step. Else the last step is a short one, in which
            samples of the step are repeated until all ranks have equally many, as torch's DistributedSampler does it.

    Raises:
        InvalidRequest: a number makes no sense, or the epoch has no step.
    """

    samples: int
    position: int
    batch_size: int
    world_size: int
    drop_last: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.world_size < 1:
            raise InvalidRequest(
                f"batch_size {self.batch_size} x world_size {self.world_size} is no step: both must be 1 or more"
            )
        if not 0 <= self.position <= self.samples:
            raise InvalidRequest(f"position {self.position} is not within an epoch of {self.samples} samples")
        if self.position == 0 and self.steps == 0:
            raise InvalidRequest(
                f"no rank would get a batch: {self.samples} samples are less than one step of {self.world_size} ranks "
                f"x {self.batch_size}, and drop_last leaves out what makes no whole step. Use a smaller batch_size, "
                "fewer ranks, drop_last=False, or more data"
                if self.samples
                else "no rank would get a batch: nothing matches, or what matches has no samples; check the path"
            )

    @property
    def step_size(self) -> int:
        """Samples a step, but for a short last one."""
        return self.batch_size * self.world_size

    @property
    def steps(self) -> int:
        """Steps that are left."""
        left = self.samples - self.position
        return left // self.step_size if self.drop_last else -(-left // self.step_size)

    def step(self, number: int) -> range:
        """Positions of step `number`, counted from `position`. Shorter than `step_size` for a short last one."""
        start = self.position + number * self.step_size
        return range(start, min(start + self.step_size, self.samples))

    def share(self, step: range) -> int:
        """Samples that each rank gets of `step`, repeats included."""
        return -(-len(step) // self.world_size)

    def padded(self, step: range) -> Indexes:
        """The step's samples as indexes into it, repeated from its beginning until they are even over the ranks.

        Shape (share x world size,).
        """
        return np.arange(self.share(step) * self.world_size) % len(step)


def assign(homes: Indexes, rank_nodes: Indexes, runs: Indexes) -> Indexes:
    """Who reads what of one step.

    A sample goes to a node that holds it and, among the ranks there, to the one that reads the rest of its run, so that
    a run is not read by every rank that gets one of its samples.

    Args:
        homes: for each sample the nodes that hold it, best first, as numbers; `NOWHERE` where there is none. Shape
            (n, holders), n a multiple of the world size.
        rank_nodes: the node that each rank runs on; `NOWHERE` where it runs beside none. Shape (world size,).
        runs: the run of each sample. Shape (n,).

    Returns:
        The samples of each rank, as indexes into the step, ascending. Shape (world size, n / world size). No sample is
        away from home while one of its homes has room.
    """
    world = len(rank_nodes)
    share, surplus = divmod(len(homes), world)
    assert surplus == 0, "a step is even over the ranks"
    places, groups = np.unique(rank_nodes, return_inverse=True)
    group_of = dict(zip(places.tolist(), range(len(places)), strict=True))
    group_of.pop(NOWHERE, None)  # the ranks beside no node are a group that nobody is at home in
    wants = np.full_like(homes, NOWHERE)
    for node, group in group_of.items():
        wants[homes == node] = group
    wants = np.concatenate([wants, _favourites(runs, len(places))], axis=1)
    batches = np.empty((world, share), np.int64)
    for group, members in enumerate(_deal(wants, np.bincount(groups) * share)):
        ranks = np.flatnonzero(groups == group)
        hands = _deal(_favourites(runs[members], len(ranks)), np.full(len(ranks), share))
        for rank, hand in zip(ranks.tolist(), hands, strict=True):
            batches[rank] = members[hand]
    return batches


def reads_whole(homes: Indexes, rank_nodes: Indexes, runs: Indexes, rank: int) -> npt.NDArray[np.bool_]:
    """Whether a rank had better read runs whole, because most of their samples come to it. Shape (n,).

    Those of its own node, where a whole run costs no more than a sample; and of those at home with no rank, the ones
    that prefer this rank to all others. Of any other run it gets a sample now and then, when a step has to be evened.

    Args:
        homes, rank_nodes, runs: as `assign` takes them.
    """
    places, groups = np.unique(rank_nodes, return_inverse=True)
    mine = rank_nodes[rank]
    is_home = (homes == mine).any(axis=1) & (mine != NOWHERE)
    is_others = np.isin(homes, places[places != NOWHERE]).any(axis=1)
    members = np.flatnonzero(groups == groups[rank])
    prefers = _favourites(runs, len(places))[:, 0] == groups[rank]
    prefers &= members[_favourites(runs, len(members))[:, 0]] == rank
    return np.asarray(is_home | (prefers & ~is_others))


def _favourites(runs: Indexes, hands: int) -> Indexes:
    """Hands that the samples of a run prefer to all others, step after step. Shape (n, FAVOURITES)."""
    salts = np.arange(1, FAVOURITES + 1, dtype=U64)
    return (mix64(mix64(runs.astype(U64))[:, None] ^ mix64(salts)) % U64(hands)).astype(np.int64)


def _deal(wants: Indexes, room: Indexes) -> list[Indexes]:
    """Cards to hands of a given size: each to the first hand that it wants and that has room, the rest to fill up.

    Args:
        wants: shape (n, k); `NOWHERE` where a card wants nothing.
        room: of each hand; together n.

    Returns:
        The cards of each hand, ascending.
    """
    room = room.copy()
    hands: list[list[Indexes]] = [[] for _ in room]
    free = np.ones(len(wants), np.bool_)
    for column in wants.T:
        for hand in range(len(room)):
            if room[hand]:
                found = np.flatnonzero(free & (column == hand))[: room[hand]]
                free[found] = False
                room[hand] -= len(found)
                hands[hand].append(found)
    left = np.flatnonzero(free)
    for hand, count in enumerate(room.tolist()):
        hands[hand].append(left[:count])
        left = left[count:]
    return [np.sort(np.concatenate(hand)) for hand in hands]
