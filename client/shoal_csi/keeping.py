"""What of a mount's objects is kept in the local tier: which, when, and how it gets there.

    counted     bytes that the server answered READs with, by object
    offered     an object that nobody has open any more, and of which a quarter was read so: who looked at a head does
                not have all of it fetched
    left out    what the node of this machine owns as one shard, and so has or will have as a file by itself; what is
                small; what is larger than the tier
    brought     by one thread, one after the other, through the client as any reader, in whole parts, whose checksums it
                compares. What readers received is not put together instead: their ranges are no parts, and a wrong byte
                that no checksum covers would be kept

Before each part the thread waits while readers do, or bytes are fetched ahead of them, for `GIVE_WAY_S` at most. So a
mount that is never idle fills its tier slowly, and readers meet one request of the tier's at most.

The rule: nothing here is waited for by a reader. Whatever goes wrong is said once, and reads go on without the tier.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import xxhash

from shoal import sizes
from shoal.datasets import DatasetRecord
from shoal.errors import ShoalError
from shoal.shards import PART_SIZE
from shoal.snapshot import Snapshot
from shoal.threads import Threads
from shoal_csi import tier_place
from shoal_csi.tier import Tier
from shoal_csi.tier_file import Trust
from shoal_csi.tier_ledger import NoRoom

if TYPE_CHECKING:
    from shoal.reader import ObjectReader

log = logging.getLogger(__name__)

#: Of an object, one in so many bytes has to be read by readers for the tier to fetch all of it.
READ_ONE_IN = 4
#: A part waits for readers so long: the least pace is 8 MiB a second.
GIVE_WAY_S, _LOOK_EVERY_S = 1.0, 0.01
#: After a failure of the drive, and after the tier was found full, nothing is kept for so long.
PAUSE_S, FULL_S = 300.0, 60.0
#: Objects whose bytes are counted, and that wait to be brought. More are offered again when they are read again.
OBJECTS_KEPT, OFFERS_KEPT = 4096, 4096


class Keeping:
    """The tier as one mount uses it. Thread-safe.

    Args:
        reader_of: gives the reader of a row.
        from_bytes: smaller objects are left out.
        is_busy: whether nodes are asked for bytes on behalf of readers.

    Attributes:
        hits: opens that were answered with a file of the tier, by this server, but those that joined another one.
    """

    def __init__(
        self,
        tier: Tier,
        record: DatasetRecord,
        snapshot: Snapshot,
        reader_of: Callable[[int], ObjectReader],
        *,
        from_bytes: int,
        is_busy: Callable[[], bool],
    ) -> None:
        self._tier, self._snapshot, self._reader_of = tier, snapshot, reader_of
        self._from_bytes, self._is_busy = from_bytes, is_busy
        self._folder = xxhash.xxh3_64_hexdigest(f"{record.endpoint}\0{record.origin}".encode())
        self._threads = Threads(1, "shoal-tier")
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards _read_bytes and _offers
        self._read_bytes: OrderedDict[int, int] = OrderedDict()
        self._offers: set[int] = set()
        self._part: memoryview | None = None
        self._paused_until = self._full_until = 0.0
        self._is_off = False
        self.fault = ""
        self.hits = self.brought = self.brought_bytes = self.damaged = 0

    # Of the server's threads

    def open(self, row: int) -> int | None:
        """A descriptor of the object's file in the tier, the caller's; None where it has none to be believed."""
        if self._is_off:
            return None
        self._tier.mark_used(self._folder)
        fd, trust = self._tier.find(self._folder, self._snapshot.key(row), self._snapshot.size(row))
        if trust is Trust.UNSURE:
            self._submit(row)
        return fd

    def has_read(self, row: int, size_bytes: int) -> None:
        """A reader was given bytes of an object by the server."""
        with self._lock:
            self._read_bytes[row] = self._read_bytes.pop(row, 0) + size_bytes
            if len(self._read_bytes) > OBJECTS_KEPT:
                self._read_bytes.popitem(last=False)

    def released(self, row: int) -> None:
        """Nobody has the object open any more."""
        size_bytes = self._snapshot.size(row)
        with self._lock:
            if self._read_bytes.get(row, 0) * READ_ONE_IN < size_bytes:
                return
            self._read_bytes.pop(row, None)
        if not self._from_bytes <= size_bytes <= self._tier.largest_bytes or time.monotonic() < self._full_until:
            return
        try:
            if self._reader_of(row).is_for_local_node():
                return
        except ShoalError as error:
            log.debug("row %d is not kept: %s", row, error)
            return
        self._submit(row)

    def turn_off(self, why: str) -> None:
        """Use the tier no more."""
        if not self._is_off:
            self._is_off, self.fault = True, why
            log.warning("nothing is kept in the local tier %s: %s", self._tier.directory, why)

    def report(self) -> dict[str, object]:
        """The tier, whoever filled it, and what this server has done with it."""
        size_bytes, files = self._tier.counts()
        return {
            "directory": str(self._tier.directory),
            "limit_bytes": self._tier.limit_bytes,
            "bytes": size_bytes,
            "files": files,
            "hits": self.hits,
            "brought": self.brought,
            "brought_bytes": self.brought_bytes,
            "damaged": self.damaged,
            "waiting": len(self._offers),
            "fault": self.fault or None,
        }

    def numbers(self) -> dict[str, int]:
        """See `shoal_csi.numbers`."""
        dropped, dropped_bytes = self._tier.dropped()
        return {
            "tier_brought": self.brought,
            "tier_brought_bytes": self.brought_bytes,
            "tier_damaged": self.damaged,
            "tier_dropped": dropped,
            "tier_dropped_bytes": dropped_bytes,
        }

    def close(self) -> None:
        """Begin nothing more. What comes in is left, and tidied away by whoever uses the tier next."""
        self._closed.set()
        self._threads.close()

    def _submit(self, row: int) -> None:
        with self._lock:
            if row in self._offers or len(self._offers) >= OFFERS_KEPT or self._is_off or self._closed.is_set():
                return
            self._offers.add(row)
        self._threads.submit(self._bring, row)

    # Of the one thread

    def _bring(self, row: int) -> None:
        """Have the tier have an object."""
        try:
            if not self._is_off and time.monotonic() >= self._paused_until:
                self._ensure(row)
        except NoRoom:
            self._full_until = time.monotonic() + FULL_S
        except OSError as error:
            self._paused_until = time.monotonic() + PAUSE_S
            if not self.fault:
                log.warning("nothing more is kept for now: %s", tier_place.sentence(self._tier.directory, error))
            self.fault = tier_place.sentence(self._tier.directory, error)
        except Exception as error:  # a tier is a convenience: the mount goes on without
            log.exception("an object could not be kept")
            self.turn_off(f"a mistake in the program: {error!r}")
        finally:
            with self._lock:
                self._offers.discard(row)

    def _ensure(self, row: int) -> None:
        key, size_bytes = self._snapshot.key(row), self._snapshot.size(row)
        is_whole = self._tier.verify(self._folder, key, size_bytes, self._give_way)
        if is_whole:
            return
        self.damaged += is_whole is False
        if time.monotonic() < self._full_until:
            return
        filling = self._tier.begin(self._folder, key, size_bytes)
        if filling is None:
            return
        reader = self._reader_of(row)
        with filling:
            for start, end in steps(size_bytes, self._snapshot.shard_size):
                if not self._give_way():
                    return
                part = self._buffer()[: end - start]
                try:
                    reader.read_into(start, end, part)
                except ShoalError as error:
                    log.info("%r is not kept in the local tier: %s", self._snapshot.path(row), error)
                    return
                filling.write(part)
            filling.seal()
        if self.fault:
            self.fault = ""
            log.info("the local tier %s is used again", self._tier.directory)
        self.brought += 1
        self.brought_bytes += size_bytes
        log.debug("%r is in the local tier: %s", self._snapshot.path(row), sizes.format(size_bytes))

    def _buffer(self) -> memoryview:
        if self._part is None:
            self._part = memoryview(bytearray(PART_SIZE))
        return self._part

    def _give_way(self) -> bool:
        """Wait while readers wait, for a while; whether to go on."""
        until = time.monotonic() + GIVE_WAY_S
        while self._is_busy() and time.monotonic() < until and not self._closed.wait(_LOOK_EVERY_S):
            pass
        return not (self._closed.is_set() or self._is_off)


def steps(size_bytes: int, shard_size: int) -> Iterator[tuple[int, int]]:
    """An object, cut into ranges of at most `PART_SIZE` that are whole parts of its shards."""
    if shard_size <= PART_SIZE:
        stride = PART_SIZE // shard_size * shard_size
        yield from ((start, min(start + stride, size_bytes)) for start in range(0, size_bytes, stride))
        return
    for first in range(0, size_bytes, shard_size):
        last = min(first + shard_size, size_bytes)
        yield from ((start, min(start + PART_SIZE, last)) for start in range(first, last, PART_SIZE))
