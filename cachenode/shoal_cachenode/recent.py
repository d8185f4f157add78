"""What passed through a moment ago, or is passing now, for whoever else wants it.

On a node without room the ranks of a job read the same record batches, each a little after the other. So bytes that
were read of a source for one reader are kept for a moment, within a bound, and a second reader of bytes that are just
coming in takes them from the first one's read. Each byte then leaves the origin once for a node, not once for a reader.

    coming    one thread reads the block from the source; others take what is here, and wait for the rest
    kept      all of it is here; until the room is wanted, or nobody wanted it for `KEPT_S`

The rule: nobody waits for anything but a read that is under way. Where that ends early, because its reader left or the
source failed, whoever waits goes on by itself from the byte reached.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from shoal import memory
from shoal.origin import Sink
from shoal_cachenode.source import Counter, Source

#: What all blocks may hold. The ranks of a job are apart by about a shuffle's window of what they read from the node.
RECENT_BYTES = 256 << 20
#: A block that nobody has wanted for so long goes, so that a node whose readers have ended holds nothing.
KEPT_S = 30.0
#: Between two questions to a reader that waits for another one's bytes, whether it is still there.
_ASK_S = 0.5


@dataclass(eq=False, slots=True)
class _Block:
    """Bytes [start, end) of a shard.

    Attributes:
        reached: up to here they are here.
        is_coming: a thread reads the rest.
        users: threads that take from it or read it; it is not dropped meanwhile.
        changed: `reached` or `is_coming` changed. Its lock is that of all blocks.
    """

    key: Hashable
    start: int
    end: int
    data: memoryview
    changed: threading.Condition
    reached: int = 0
    is_coming: bool = True
    users: int = 1
    used_at: float = field(default_factory=time.monotonic)


class Recent:
    """The blocks of a node. Thread-safe.

    Attributes:
        held_bytes: of all blocks.
        given: bytes that were given without asking a source.
    """

    def __init__(self, limit_bytes: int = RECENT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # guards all below, and what is in the blocks
        self._blocks: dict[_Block, None] = {}  # those that were wanted longest ago first
        self._of_key: dict[Hashable, list[_Block]] = {}
        self.held_bytes = 0
        self.given = Counter()

    def source(self, key: Hashable, source: Source) -> Source:
        """`source`, which reads the shard `key`, but for the bytes that are here or on their way."""
        return _Shared(self, key, source)

    def stream(self, key: Hashable, source: Source, start: int, end: int, sink: Sink) -> None:
        """See `Source.stream`."""
        while start < end:
            block, is_mine = self._find(key, start, end)
            if block is None:
                return source.stream(start, end, sink)
            if is_mine:
                stop = block.end
                self._read(block, source, sink)
                start = stop
            else:
                start = self._take(block, start, end, sink)
        return None

    def expire(self) -> None:
        """Drop what nobody has wanted for a while. To be called every now and then."""
        with self._lock:
            before = time.monotonic() - KEPT_S
            for block in [block for block in self._blocks if block.used_at < before and not block.users]:
                self._drop(block)

    def _find(self, key: Hashable, start: int, end: int) -> tuple[_Block | None, bool]:
        """The block with byte `start`, or a new one, which is the caller's to read; None where there is no room."""
        with self._lock:
            others = self._of_key.get(key, ())
            for block in others:
                if block.start <= start < block.end:
                    block.users += 1
                    block.used_at = time.monotonic()
                    self._blocks[block] = self._blocks.pop(block)  # the last one to go
                    return block, False
            end = min([end, *(block.start for block in others if block.start > start)])
            if not self._make_room(end - start):
                return None, False
            view = memory.view(memory.allocate(end - start))
            block = _Block(key, start, end, view, threading.Condition(self._lock), reached=start)
            self._blocks[block] = None
            self._of_key.setdefault(key, []).append(block)
            self.held_bytes += end - start
            return block, True

    def _read(self, block: _Block, source: Source, sink: Sink) -> None:
        """Read a block from its source, for the caller and for whoever else wants it."""

        def take(piece: memoryview) -> None:
            if piece:
                at = block.reached - block.start
                block.data[at : at + len(piece)] = piece  # nobody looks beyond `reached`
                with self._lock:
                    block.reached += len(piece)
                    block.changed.notify_all()
            sink(piece)

        try:
            source.stream(block.start, block.end, take)
        finally:
            with self._lock:
                block.is_coming = False
                block.end = block.reached  # where it ended early another read may bring the rest
                self._leave(block)
                block.changed.notify_all()

    def _take(self, block: _Block, start: int, end: int, sink: Sink) -> int:
        """Hand over what is here of [start, end), and what comes; up to which byte that was."""
        try:
            while start < min(end, block.end):
                with self._lock:
                    if block.reached <= start and block.is_coming:
                        block.changed.wait(_ASK_S)
                    reached, is_coming = min(end, block.reached), block.is_coming
                if reached > start:
                    self.given.add(reached - start)
                    sink(block.data[start - block.start : reached - block.start])
                    start = reached
                elif not is_coming:
                    break
                else:
                    sink(memoryview(b""))  # whether its reader is still there
            return start
        finally:
            with self._lock:
                self._leave(block)

    def _make_room(self, size_bytes: int) -> bool:
        """Drop what was wanted longest ago until so much may be held; whether it may. The lock is held."""
        excess = self.held_bytes + size_bytes - self._limit_bytes
        going = []
        for block in self._blocks if excess > 0 else ():
            if not block.users:
                going.append(block)
                excess -= len(block.data)
                if excess <= 0:
                    break
        if excess > 0:
            return False  # and nothing is dropped in vain
        for block in going:
            self._drop(block)
        return True

    def _leave(self, block: _Block) -> None:
        """A thread is done with a block. The lock is held."""
        block.users -= 1
        if not block.users and block.end == block.start:
            self._drop(block)

    def _drop(self, block: _Block) -> None:
        del self._blocks[block]
        self.held_bytes -= len(block.data)
        others = self._of_key[block.key]
        others.remove(block)
        if not others:
            del self._of_key[block.key]


@dataclass(frozen=True, slots=True)
class _Shared:
    """A source whose bytes are shared."""

    recent: Recent
    key: Hashable
    behind: Source

    @property
    def needs_origin(self) -> bool:
        return self.behind.needs_origin

    def stream(self, start: int, end: int, sink: Sink) -> None:
        self.recent.stream(self.key, self.behind, start, end, sink)
