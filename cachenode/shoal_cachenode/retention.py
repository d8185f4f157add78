"""What a node drops when it needs room: decided from values. Pure.

Every epoch of a training job reads each shard once, so within a dataset that is read no shard is worth more than
another, and not evicting is the best that can be done: with room for half of a dataset half of all reads hit, where LRU
gets 15 %. So room is made from what nobody reads, in this order:

    1. shards that no dataset names
    2. shards that only superseded snapshots name
    3. surplus copies: shards that the map of now gives to other nodes
    4. shards of idle datasets, whole datasets, the one first that was not read for longest
    5. shards of datasets above their quota, for one that is below its own

Within one dataset shards go by key, that is in no order that means anything. A shard that several datasets share is
kept as long as one of them keeps it.

The rule: never a shard of a pinned dataset, never one within its dataset's guarantee, and never one of a live dataset
but by step 5. What then finds no room passes through: what was cached first stays.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


class Step(enum.IntEnum):
    """Which of the steps above lets a shard go."""

    UNNAMED = 1
    SUPERSEDED = 2
    SURPLUS = 3
    IDLE = 4
    OVER_QUOTA = 5


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """One dataset's part of the n shards on a node.

    Attributes:
        shards: which of them the dataset's newest snapshot names. Shape (n,).
        surplus: which of those other nodes own under the map of now. Shape (n,).
        is_live: read or claimed within the time after which a dataset is idle.
        last_used_s: when it was last used; only the order matters.
        guaranteed_bytes: its quota's share on this node; 0: it has none.
    """

    name: str
    shards: Mask
    surplus: Mask
    is_pinned: bool
    is_live: bool
    last_used_s: float
    guaranteed_bytes: int


@dataclass(frozen=True, slots=True)
class Droppable:
    """One shard that may go: its place among the n, its bytes and the step that lets it go."""

    place: int
    size_bytes: int
    step: Step


def guaranteed_bytes(quota_bytes: int, weight: int, total_weight: int) -> int:
    """A node's part of a quota, which is of the whole cluster: in proportion to the node's weight in the map."""
    return quota_bytes * weight // total_weight if total_weight else 0


def droppable(
    sizes: npt.NDArray[np.int64],
    filling: Mask,
    served: Mask,
    holdings: Sequence[Holding],
    *,
    asker: str,
    wanted_bytes: int,
) -> list[Droppable]:
    """Everything that may be dropped for a shard of the dataset `asker`, the first to go first.

    Args:
        sizes: bytes of the shards on the node, in the order of their keys. Shape (n,).
        filling: which of them are on their way in, or will be read by a stream that runs: they count, and none of them
            is dropped. Shape (n,).
        served: which of them any snapshot of any dataset names. Shape (n,).
        holdings: of every dataset.
        asker: counts as live; "" where nobody in particular asks.
        wanted_bytes: of the shard that needs room; step 5 is only for a dataset that is below its quota with it.
    """
    newest = np.zeros(len(sizes), np.bool_)
    owned = np.zeros(len(sizes), np.bool_)
    pinned = np.zeros(len(sizes), np.bool_)
    for holding in holdings:
        newest |= holding.shards
        owned |= holding.shards & ~holding.surplus
        if holding.is_pinned:
            pinned |= holding.shards
    budget = _Budget(sizes, filling, holdings)
    found = budget.take(np.flatnonzero(~served), Step.UNNAMED)
    found += budget.take(np.flatnonzero(served & ~newest), Step.SUPERSEDED)
    found += budget.take(np.flatnonzero(newest & ~owned & ~pinned), Step.SURPLUS)
    idle = [h for h in holdings if not (h.is_live or h.is_pinned or h.name == asker)]
    kept = np.zeros(len(sizes), np.bool_)
    for holding in holdings:
        if holding not in idle:
            kept |= holding.shards
    for place, holding in enumerate(sorted(idle, key=_age)):
        younger = kept.copy()
        for other in sorted(idle, key=_age)[place + 1 :]:
            younger |= other.shards
        found += budget.take(np.flatnonzero(holding.shards & ~younger), Step.IDLE)
    found += _over_quota(budget, sizes, holdings, pinned, asker, wanted_bytes)
    return found


def _over_quota(
    budget: _Budget, sizes: npt.NDArray[np.int64], holdings: Sequence[Holding], pinned: Mask, asker: str, wanted: int
) -> list[Droppable]:
    """Step 5, as long as the asker stays within its quota."""
    asking = next((h for h in holdings if h.name == asker), None)
    if asking is None:
        return []
    claim = asking.guaranteed_bytes - int(sizes[asking.shards].sum())
    if claim < wanted:
        return []
    found: list[Droppable] = []
    for holding in sorted((h for h in holdings if h.name != asker and not h.is_pinned), key=_age):
        for drop in budget.take(np.flatnonzero(holding.shards & ~pinned & ~asking.shards), Step.OVER_QUOTA):
            if claim <= 0:
                return found
            claim -= drop.size_bytes
            found.append(drop)
    return found


def _age(holding: Holding) -> tuple[float, str]:
    return holding.last_used_s, holding.name


class _Budget:
    """Lets shards go as long as every dataset that names them keeps what it is guaranteed; each at most once."""

    def __init__(self, sizes: npt.NDArray[np.int64], filling: Mask, holdings: Sequence[Holding]) -> None:
        self._sizes = sizes
        self._gone = filling.copy()
        self._guarded = [h for h in holdings if h.guaranteed_bytes > 0]
        self._spare = [int(sizes[h.shards].sum()) - h.guaranteed_bytes for h in self._guarded]

    def take(self, places: npt.NDArray[np.intp], step: Step) -> list[Droppable]:
        places = places[~self._gone[places]]
        if self._guarded:
            places = np.array([place for place in places.tolist() if self._spend(place)], np.intp)
        self._gone[places] = True
        return [Droppable(p, s, step) for p, s in zip(places.tolist(), self._sizes[places].tolist(), strict=True)]

    def _spend(self, place: int) -> bool:
        size = int(self._sizes[place])
        naming = [i for i, holding in enumerate(self._guarded) if holding.shards[place]]
        if any(self._spare[i] < size for i in naming):
            return False
        for i in naming:
            self._spare[i] -= size
        return True
