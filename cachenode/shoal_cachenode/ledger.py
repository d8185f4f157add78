"""Who holds how many of the node's bytes: reservations and sealed shards against a capacity. Pure.

The rule: bytes are counted before a file is made and until after it is unlinked, so that what is on the disk is never
more than what the ledger says.
"""

from __future__ import annotations

from shoal.shards import Key


class Ledger:
    """Bytes by shard key. Not thread-safe: the store's lock guards it."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.sealed: dict[Key, int] = {}
        self.reserved: dict[Key, int] = {}
        self.condemned: dict[Key, int] = {}  #: sealed once, damaged, and still on the drive
        self._sealed_bytes = 0
        self._reserved_bytes = 0
        self._condemned_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._sealed_bytes + self._reserved_bytes + self._condemned_bytes

    @property
    def reserved_bytes(self) -> int:
        return self._reserved_bytes

    @property
    def free_bytes(self) -> int:
        """Below zero where the capacity was lowered under what is held."""
        return self.capacity_bytes - self.used_bytes

    def holds(self, key: Key) -> bool:
        """Whether bytes of a shard are counted, in any state."""
        return key in self.sealed or key in self.reserved or key in self.condemned

    def reserve(self, key: Key, size_bytes: int) -> bool:
        """Count `size_bytes` for a shard that begins to fill; False where there is no room. Repeats are refused."""
        assert not self.holds(key), "a shard is reserved once"
        if size_bytes > self.free_bytes:
            return False
        self.reserved[key] = size_bytes
        self._reserved_bytes += size_bytes
        return True

    def adopt_reserved(self, key: Key, size_bytes: int) -> None:
        """Count a partial shard found on the disk, fit or not."""
        self.reserved[key] = size_bytes
        self._reserved_bytes += size_bytes

    def adopt_sealed(self, key: Key, size_bytes: int) -> None:
        """Count a sealed shard found on the disk, fit or not."""
        self.sealed[key] = size_bytes
        self._sealed_bytes += size_bytes

    def seal(self, key: Key) -> None:
        """A reserved shard became a sealed one."""
        size_bytes = self.reserved.pop(key)
        self._reserved_bytes -= size_bytes
        self.adopt_sealed(key, size_bytes)

    def condemn(self, key: Key) -> bool:
        """A sealed shard is damaged: it takes its bytes until its file is gone; False where it is not sealed."""
        size_bytes = self.sealed.pop(key, None)
        if size_bytes is None:
            return False
        self._sealed_bytes -= size_bytes
        self.condemned[key] = size_bytes
        self._condemned_bytes += size_bytes
        return True

    def release(self, key: Key) -> int:
        """Give back the bytes of a shard in any state, and return them; 0 where it has none."""
        if key in self.reserved:
            size_bytes = self.reserved.pop(key)
            self._reserved_bytes -= size_bytes
            return size_bytes
        if key in self.condemned:
            size_bytes = self.condemned.pop(key)
            self._condemned_bytes -= size_bytes
            return size_bytes
        size_bytes = self.sealed.pop(key, 0)
        self._sealed_bytes -= size_bytes
        return size_bytes
