"""What the node holds of each snapshot, and room made from it: `retention` decides, this carries it out.

The rule: holdings are in step with the store: whoever seals, drops or loses a shard tells this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.shards import Key
from shoal.snapshot import Snapshot
from shoal_cachenode import retention
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.retention import Droppable, Holding, Mask, Step
from shoal_cachenode.store import Store

#: A plan of what to drop is good for so long, unless what it depends on changes before: it costs a look at every shard.
PLAN_S = 10.0


@dataclass(frozen=True, slots=True)
class DatasetState:
    """What retention must know of one dataset. Plans are made anew where one of these changes.

    Attributes:
        newest: digest of its newest snapshot.
        needed: which of that snapshot's shards are no surplus here, in the snapshot's order. Part of `known`, so not
            compared.
        known: what `needed` follows from: the epoch of the map, and when peers were asked what they hold.
        is_live: as `retention.Holding`, as are the rest.
    """

    name: str
    newest: str
    needed: Callable[[], Mask]
    known: tuple[int, float]
    is_pinned: bool
    is_live: bool
    last_used_s: float
    guaranteed_bytes: int

    @property
    def stamp(self) -> tuple[object, ...]:
        """Equal as long as plans stay the same. Among live datasets nobody asks which was used last."""
        used = 0.0 if self.is_live else self.last_used_s
        return self.name, self.newest, self.known, self.is_pinned, self.is_live, used, self.guaranteed_bytes


@dataclass(slots=True)
class _Plan:
    """What may be dropped for one asker; the next to go is last."""

    stamp: tuple[object, ...]
    until: float
    keys: list[tuple[Key, Step]]


class Inventory:
    """Holdings by snapshot digest. `sealed` and `gone` may come from any thread; room is made by one at a time.

    Args:
        on_dropped: told of each shard that is not here any more.
    """

    def __init__(
        self, store: Store, on_dropped: Callable[[Key], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._on_dropped = on_dropped
        self._clock = clock
        self._holdings: dict[str, Holdings] = {}
        self._plans: dict[tuple[str, bool], _Plan] = {}
        #: By snapshot, the shards that a running stream will read: none of them is dropped. Whoever sets it gives a new
        #: mapping of masks that do not change.
        self.needed: Mapping[str, Mask] = {}

    def of(self, opened: Snapshot) -> Holdings:
        """The holdings of a snapshot, counted from the store at first use. Blocks: about a second a million shards."""
        known = self._holdings.get(opened.digest)
        if known is None:
            counted = Holdings(opened.shard_table())
            # Marked twice around the publication: a shard sealed in between is in one of the two views.
            counted.mark_all(self._store.sealed_sizes())
            known = self._holdings.setdefault(opened.digest, counted)  # whoever was first: only these go on
            known.mark_all(self._store.sealed_sizes())
        return known

    def known(self) -> dict[str, Holdings]:
        return dict(self._holdings)

    def forget(self, served: set[str]) -> None:
        """Drop what is known of snapshots that are served no more."""
        for digest in set(self._holdings) - served:
            del self._holdings[digest]

    def sealed(self, key: Key) -> None:
        for holdings in list(self._holdings.values()):
            holdings.mark(key, held=True)

    def gone(self, key: Key) -> None:
        for holdings in list(self._holdings.values()):
            holdings.mark(key, held=False)
        self._on_dropped(key)

    def place_of(self, key: Key) -> tuple[str, int] | None:
        """A snapshot that names a shard, and the shard's ordinal in it; None where none does."""
        for digest, holdings in list(self._holdings.items()):
            ordinal = holdings.ordinal(key)
            if ordinal is not None:
                return digest, ordinal
        return None

    def make_room(
        self, size_bytes: int, datasets: Iterable[DatasetState], *, asker: str, may_drop_idle: bool = True
    ) -> dict[Step, int] | None:
        """Drop what `retention` allows until `size_bytes` are free. Blocks.

        Args:
            datasets: all of them; the holdings of all their snapshots must be known.
            asker: the dataset that needs the room.
            may_drop_idle: without it only what no reader of any dataset misses goes: steps 1 to 3.

        Returns:
            The bytes dropped by step; None where they were not enough, and then as little as possible was dropped.

        Raises:
            OSError: as the disk does.
        """
        dropped: dict[Step, int] = {}
        if self._store.free_bytes >= size_bytes:
            return dropped
        datasets = tuple(datasets)
        plan = self._plan(datasets, asker, size_bytes)
        if plan.keys and plan.keys[-1][1] is Step.OVER_QUOTA:  # how much of that is left to claim is to be exact
            plan = self._plan(datasets, asker, size_bytes, is_kept=False)
        while plan.keys and self._store.free_bytes < size_bytes:
            key, step = plan.keys[-1]
            if step >= Step.IDLE and not may_drop_idle:
                break
            if self._needed([key])[0]:  # since the plan was made
                plan.keys.pop()
                continue
            freed = self._store.evict(key)
            if freed:
                self.gone(key)
            plan.keys.pop()
            dropped[step] = dropped.get(step, 0) + freed
        return dropped if self._store.free_bytes >= size_bytes else None

    def droppable_bytes(self, datasets: Iterable[DatasetState], *, asker: str) -> Mapping[Step, int]:
        """Bytes that `make_room` could free for a dataset, by step. Blocks."""
        found = dict.fromkeys(Step, 0)
        for drop in self._droppable(tuple(datasets), asker, 0)[1]:
            found[drop.step] += drop.size_bytes
        return found

    def unserved(self, keys: list[Key]) -> list[Key]:
        """Those of no dataset."""
        return [keys[place] for place in np.flatnonzero(~self._served(keys)).tolist()]

    def drop_unserved(self) -> int:
        """Drop all shards of no dataset, and return the bytes freed. Blocks. Raises OSError as the disk does."""
        keys, _, kept = self._shards()
        freed = 0
        for place in np.flatnonzero(~self._served(keys) & ~kept).tolist():
            freed += self._store.evict(keys[place])
            self.gone(keys[place])
        return freed

    def _plan(self, datasets: tuple[DatasetState, ...], asker: str, size_bytes: int, *, is_kept: bool = True) -> _Plan:
        guaranteed = next((d.guaranteed_bytes for d in datasets if d.name == asker), 0)
        which = asker, bool(guaranteed)
        stamp = tuple(d.stamp for d in datasets)
        plan = self._plans.get(which)
        if plan is None or not is_kept or plan.stamp != stamp or self._clock() >= plan.until:
            keys, found = self._droppable(datasets, asker, size_bytes)
            order = [(keys[drop.place], drop.step) for drop in reversed(found)]
            plan = self._plans[which] = _Plan(stamp, self._clock() + PLAN_S, order)
        return plan

    def _droppable(
        self, datasets: tuple[DatasetState, ...], asker: str, wanted_bytes: int
    ) -> tuple[list[Key], list[Droppable]]:
        keys, sizes, kept = self._shards()
        served, holdings = self._served(keys), self._states(keys, datasets)
        found = retention.droppable(sizes, kept, served, holdings, asker=asker, wanted_bytes=wanted_bytes)
        return keys, found

    def _shards(self) -> tuple[list[Key], npt.NDArray[np.int64], Mask]:
        """What is on the drive in the order of its keys: keys, sizes, and which of it is being filled or needed."""
        idle = self._store.idle_partials()
        found = sorted((self._store.sealed_sizes() | self._store.reserved_sizes() | idle).items())
        busy = self._store.reserved_sizes().keys() - idle.keys()
        keys = [key for key, _ in found]
        kept = np.fromiter((key in busy for key in keys), np.bool_, len(keys)) | self._needed(keys)
        return keys, np.array([size for _, size in found], np.int64), kept

    def _needed(self, keys: list[Key]) -> Mask:
        needed = np.zeros(len(keys), np.bool_)
        for digest, mask in self.needed.items():
            holdings = self._holdings.get(digest)
            if holdings is not None:
                ordinals, found = holdings.look_up(keys)
                needed |= found & mask[ordinals]
        return needed

    def _served(self, keys: list[Key]) -> Mask:
        served = np.zeros(len(keys), np.bool_)
        for holdings in list(self._holdings.values()):
            served |= holdings.contains(keys)
        return served

    def _states(self, keys: list[Key], datasets: tuple[DatasetState, ...]) -> list[Holding]:
        states = []
        for dataset in datasets:
            holdings = self._holdings[dataset.newest]
            ordinals, found = holdings.look_up(keys)
            surplus = np.zeros(len(keys), np.bool_)
            surplus[found] = ~dataset.needed()[ordinals[found]]
            states.append(
                Holding(
                    dataset.name,
                    found,
                    surplus,
                    dataset.is_pinned,
                    dataset.is_live,
                    dataset.last_used_s,
                    dataset.guaranteed_bytes,
                )
            )
        return states
