"""What the node holds of each snapshot, and what it may drop when room is needed.

The order of dropping: shards of no dataset, then shards that only superseded snapshots name. Shards of a dataset's
newest snapshot are never dropped for another: an epoch reads each of them once, so whatever is kept is worth the same,
and not evicting is the best that can be done (docs/cachenode.md, "Retention").
"""

from __future__ import annotations

import numpy as np

from shoal.shards import Key
from shoal.snapshot import Snapshot
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.store import Store


class Inventory:
    """Holdings by snapshot digest, kept in step with the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._holdings: dict[str, Holdings] = {}

    def of(self, opened: Snapshot) -> Holdings:
        """The holdings of a snapshot, counted from the store at first use. Blocks: about a second a million shards."""
        known = self._holdings.get(opened.digest)
        if known is None:
            known = Holdings(opened.shard_table())
            # Marked twice around the publication: a shard sealed in between is in one of the two views.
            known.mark_all(self._store.sealed_sizes())
            self._holdings[opened.digest] = known
            known.mark_all(self._store.sealed_sizes())
        return known

    def known(self) -> dict[str, Holdings]:
        return dict(self._holdings)

    def forget(self, served: set[str]) -> None:
        """Drop what is known of snapshots that are served no more."""
        for digest in set(self._holdings) - served:
            del self._holdings[digest]

    def sealed(self, key: Key) -> None:
        for holdings in self._holdings.values():
            holdings.mark(key, held=True)

    def drop(self, key: Key) -> None:
        """Drop one shard. Blocks."""
        self._evict([key])

    def _evict(self, keys: list[Key]) -> int:
        freed = 0
        for key in keys:
            freed += self._store.evict(key)
            for holdings in list(self._holdings.values()):
                holdings.mark(key, held=False)
        return freed

    def _not_in(self, digests: set[str]) -> list[Key]:
        """Keys on the drive that none of these snapshots names."""
        keys = [*self._store.sealed_sizes(), *self._store.idle_partials()]
        wanted = np.zeros(len(keys), np.bool_)
        for digest in digests & set(self._holdings):
            wanted |= self._holdings[digest].contains(keys)
        return [key for key, is_wanted in zip(keys, wanted, strict=True) if not is_wanted]

    def droppable_bytes(self, newest: set[str]) -> int:
        """Bytes that `make_room` could free."""
        sizes = self._store.sealed_sizes() | self._store.idle_partials()
        return sum(sizes.get(key, 0) for key in self._not_in(newest))

    def make_room(self, size_bytes: int, *, served: set[str], newest: set[str]) -> bool:
        """Drop what no newest snapshot names until `size_bytes` are free; whether they are. Blocks.

        Args:
            served: all snapshots of all datasets, the holdings of which must be known.
            newest: the newest one of each dataset.
        """
        for keep in (served, newest):
            if self._store.free_bytes >= size_bytes:
                return True
            for key in self._not_in(keep):
                self._evict([key])
                if self._store.free_bytes >= size_bytes:
                    return True
        return self._store.free_bytes >= size_bytes

    def drop_unserved(self, served: set[str]) -> int:
        """Drop all shards of no dataset, and return the bytes freed. Blocks."""
        return self._evict(self._not_in(served))
