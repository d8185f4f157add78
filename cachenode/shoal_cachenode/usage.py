"""When each dataset was last used on this node, and which prefetched shards nobody has read yet.

Kept over restarts in `usage.json` and `unread` (16 bytes a shard): written at most once a minute while they change, and
when the node stops. After a crash the last minute is forgotten, which at worst makes a dataset idle a minute early.

The rule: a use is any request for a dataset's bytes that reached this node, whether it was answered from the drive,
with a descriptor or through, any shard that a prefetch asked for, and a HEAD of a shard. A process that reads through
maps sends no request; so it asks anew for a shard that it mapped `shoal.maps.RENEW_S` ago. What serves a mount, for
which the kernel reads, sends a HEAD as often.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shoal.shards import KEY_SIZE, Key
from shoal_cachenode.data_directory import write_atomically

log = logging.getLogger(__name__)

SAVE_INTERVAL_S = 60.0


class Usage:
    """Uses by dataset name. Reads and marks come from the event loop, `forget` from threads.

    Args:
        clock: seconds since 1970: last uses must outlive the process.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._times = directory / "usage.json"
        self._keys = directory / "unread"
        self._clock = clock
        self._lock = threading.Lock()  # guards _unread and unread_bytes
        self._last_used: dict[str, float] = {}
        self._unread: dict[Key, int] = {}
        self.unread_bytes = 0
        self._is_changed = False
        self._saved_at = clock()
        self._load()

    def used(self, dataset: str) -> None:
        """Note a use."""
        self._last_used[dataset] = self._clock()
        self._is_changed = True

    def read(self, dataset: str, key: Key) -> None:
        """Note that a reader asked for a shard: a use of its dataset, and the shard is not unread any more."""
        self.used(dataset)
        if key in self._unread:
            self.forget(key)

    def prefetched(self, key: Key, size_bytes: int) -> None:
        """Note that a prefetch brings a shard in that nobody has asked for."""
        with self._lock:
            self.unread_bytes += size_bytes - self._unread.get(key, 0)
            self._unread[key] = size_bytes
        self._is_changed = True

    def forget(self, key: Key) -> None:
        """A shard was read, or is gone."""
        with self._lock:
            self.unread_bytes -= self._unread.pop(key, 0)
        self._is_changed = True

    def last_used_s(self, dataset: str) -> float:
        """Seconds since 1970; 0.0: never. Never in the future, whatever became of the clock."""
        return min(self._last_used.get(dataset, 0.0), self._clock())

    def is_idle(self, dataset: str, idle_after_s: float) -> bool:
        return self._clock() - self.last_used_s(dataset) >= idle_after_s

    def keep(self, datasets: set[str]) -> None:
        """Forget the datasets that are not among these, and take those that are new as used now: as if live.

        A dataset that was just added has no reader yet, and is not to be the first to go for that.
        """
        for name in set(self._last_used) - datasets:
            del self._last_used[name]
        for name in datasets - set(self._last_used):
            self.used(name)

    def save(self, *, at_once: bool = False) -> None:
        """Write what changed, unless that was done within the last minute. Blocks. Raises OSError."""
        if not self._is_changed or (not at_once and self._clock() - self._saved_at < SAVE_INTERVAL_S):
            return
        self._is_changed, self._saved_at = False, self._clock()
        with self._lock:
            keys = b"".join(self._unread)
        try:
            write_atomically(self._times, json.dumps(self._last_used.copy()).encode())
            write_atomically(self._keys, keys)
        except OSError:
            self._is_changed = True
            raise

    def adopt(self, sizes: dict[Key, int]) -> None:
        """After a start: keep of the unread shards those that are on the drive, with their bytes."""
        with self._lock:
            self._unread = {key: sizes[key] for key in self._unread if key in sizes}
            self.unread_bytes = sum(self._unread.values())

    def _load(self) -> None:
        try:
            raw = json.loads(self._times.read_text())
            self._last_used = {str(name): float(at) for name, at in raw.items()}
            keys = self._keys.read_bytes()
            self._unread = {keys[i : i + KEY_SIZE]: 0 for i in range(0, len(keys) - KEY_SIZE + 1, KEY_SIZE)}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("the last uses of datasets are lost, all count as used now: %s", error)
            self._last_used = {}
