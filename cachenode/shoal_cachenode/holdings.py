"""Which shards of a snapshot this node holds: for cached bytes, for prefetch shares, and for what may be dropped. Pure.

Keys of a snapshot are kept sorted by their first word (16 bytes a shard in all), so that a sealed shard is found in
each snapshot by one binary search, and a start-up scan by one vectorised one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from shoal.shards import Key
from shoal.snapshot import ShardTable


class Holdings:
    """The shards of one snapshot, each held or not.

    Args:
        table: the snapshot's shards, n of them.
    """

    def __init__(self, table: ShardTable) -> None:
        self.table = table
        self.held = np.zeros(len(table), np.bool_)
        low = table.keys[:, 0]
        self._order = np.argsort(low, kind="stable").astype(np.uint32)
        self._sorted = low[self._order]

    def ordinal(self, key: Key) -> int | None:
        """The ordinal of the shard with `key`; None where it is not in the snapshot."""
        ordinals, found = self.look_up([key])
        return int(ordinals[0]) if found[0] else None

    def mark(self, key: Key, *, held: bool) -> None:
        """Note that a shard came or went; others' shards are ignored."""
        ordinal = self.ordinal(key)
        if ordinal is not None:
            self.held[ordinal] = held

    def mark_all(self, keys: Iterable[Key]) -> None:
        """Note many shards that are held."""
        ordinals, found = self.look_up(list(keys))
        self.held[ordinals[found]] = True

    def contains(self, keys: list[Key]) -> npt.NDArray[np.bool_]:
        """Which of `keys` are in the snapshot. Shape (len(keys),)."""
        return self.look_up(keys)[1]

    def look_up(self, keys: list[Key]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Ordinals of `keys`, and which of those are real: equal first words of two shards are 2**-64 a pair."""
        words = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        if not len(self._sorted):
            return np.zeros(len(words), np.uint32), np.zeros(len(words), np.bool_)
        at = np.minimum(np.searchsorted(self._sorted, words[:, 0]), len(self._sorted) - 1)
        ordinals = self._order[at]
        return ordinals, (self.table.keys[ordinals] == words).all(axis=1)

    def bytes_of(self, mask: npt.NDArray[np.bool_]) -> int:
        """Bytes of the shards that `mask` (shape (n,)) selects."""
        return int(self.table.sizes[mask].sum())
