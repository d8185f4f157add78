"""The store: shard files on one drive. Reserve, write aside, verify, fsync, rename; from then on a file never changes.

    shards/ab/<key>     sealed: whole, verified, read-only
    filling/<key>       partial: sparse, with the parts it has in its attribute (shard_file.py)

A start-up scan takes sealed files by their names and sizes, so that a node is warm at once, keeps partial files that
may go on (their parts are verified when they do), and removes everything else that lies there. What the scan took is
held against its attribute when it is first opened. It is also read and verified before it is served

- where the *machine* went down without a clean stop since it was sealed (another boot id and no clean mark), because
  its pages may never have reached the drive;
- where anybody wrote to the file: its time of modification is not that of the seal, or, while it is open here, its
  time of change moved.

It is verified once for all who come meanwhile, and not again: that it was is in its attribute from then on or, where
the drive takes no writes, remembered as long as this process runs.

A sealed file that is damaged is dropped. Where the drive does not let it go it is *condemned*: never served again,
counted until it is gone. A file that is dropped while somebody maps or reads it keeps its room on the drive until the
last of them lets go; the ledger counts that room as free.

A shard that is just being evicted is sealed no more, and a new fill of it waits until its file is gone, so that it is
never the new one's file that goes.

The rule: eviction is ``unlink``, never ``truncate``, so a map, a descriptor or a running ``sendfile`` stays valid.

Every method that touches the disk blocks, unless it says otherwise; the node calls them from threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal.errors import ShardCorrupt
from shoal.shards import KEY_SIZE, PART_SIZE, Key
from shoal_cachenode.data_directory import DataDirectory, sync_directory
from shoal_cachenode.ledger import Ledger
from shoal_cachenode.operations import Operations
from shoal_cachenode.partial_file import PartialFile
from shoal_cachenode.sealed_file import Damage, SealedFile, check, stamp
from shoal_cachenode.shard_file import XATTR, ShardHeader

log = logging.getLogger(__name__)

#: Descriptors of sealed files kept open between requests: this share of those that the process may have, within bounds.
#: To open and check one anew costs more than to read a small shard.
OPEN_FILES_SHARE = 0.25
MIN_OPEN_FILES, MAX_OPEN_FILES = 512, 1 << 15
#: Who waits for another thread to verify a shard says so often that the wait is none for the drive: that one tells.
_BEAT_INTERVAL_S = 0.5
_SENTENCES = {
    Damage.MISSING: "its file is gone",
    Damage.TORN: "its file is not as long as it was sealed, or its attribute is not its own",
    Damage.CHECKSUM: "a part does not read back as it was sealed",
    Damage.UNREADABLE: "the drive gives an error for it",
}
_HEX_DIGITS = frozenset("0123456789abcdef")


class StoreFull(Exception):
    """There is no room for a shard: the read passes through."""


class AlreadySealed(Exception):
    """The shard was sealed meanwhile: look again."""


class _Damaged(Exception):
    """A sealed shard is not to be served."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(damage)
        self.damage = damage


class Store:
    """The shards of one data directory.

    Attributes:
        node_id, generation: see `DataDirectory`.

    Args:
        directory: made if missing; locked, so that no two nodes share it.
        capacity_bytes: what sealed and filling shards may take together.
        part_size: of new shards; kept ones have their own.

    Raises:
        StoreUnusable: the directory cannot be made, written or locked, or has no extended attributes.
    """

    def __init__(self, directory: Path, capacity_bytes: int, *, part_size: int = PART_SIZE) -> None:
        self.directory = directory
        self.part_size = part_size
        self.operations = Operations()
        #: Called, in whatever thread found it, after a sealed shard was dropped because it is damaged.
        self.on_lost: Callable[[Key, Damage], None] = lambda key, damage: None
        self._lock = threading.Lock()  # guards everything down to _leaving
        self._ledger = Ledger(capacity_bytes)
        self._open: OrderedDict[Key, SealedFile] = OrderedDict()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open_files = max(MIN_OPEN_FILES, min(MAX_OPEN_FILES, int(descriptors * OPEN_FILES_SHARE)))
        self._opening: dict[Key, threading.Lock] = {}  # held by the one thread that opens the file
        self._touched: set[Key] = set()  # somebody wrote to their files since they were opened here
        self._verified: dict[Key, tuple[int, int]] = {}  # stamps of files whose attributes could not be written
        self._partials: dict[Key, PartialFile | None] = {}
        self._idle_since: dict[Key, float] = {}  # of partial shards that no fill is working on
        self._leaving: dict[Key, threading.Event] = {}  # set when the file that is being unlinked is gone, or stays
        self._sealed_directory = directory / "shards"
        self._filling_directory = directory / "filling"
        self._data = DataDirectory(directory, [self._sealed_directory, self._filling_directory])
        self.node_id = self._data.node_id
        self.generation = self._data.generation
        self._scan()

    @property
    def capacity_bytes(self) -> int:
        return self._ledger.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._ledger.used_bytes

    @property
    def reserved_bytes(self) -> int:
        return self._ledger.reserved_bytes

    @property
    def free_bytes(self) -> int:
        return self._ledger.free_bytes

    def sealed_sizes(self) -> dict[Key, int]:
        """A copy: key to bytes of every sealed shard."""
        with self._lock:
            return dict(self._ledger.sealed)

    def reserved_sizes(self) -> dict[Key, int]:
        """A copy: key to bytes of every partial shard."""
        with self._lock:
            return dict(self._ledger.reserved)

    def is_sealed(self, key: Key) -> bool:
        return key in self._ledger.sealed and key not in self._leaving

    def open_cached(self, key: Key) -> SealedFile | None:
        """The sealed file of `key` if it is open already and untouched, counted for the caller. Does not block."""
        with self._lock:
            file = self._open.get(key)
            if file is None or not file.retain():
                return None
            self._open.move_to_end(key)
        if file.is_untouched:
            return file
        with self._lock:
            kept = self._open.get(key) is file
            if kept:
                del self._open[key]
            if key not in self._open:  # else it was verified and opened anew since
                self._touched.add(key)
        for _ in range(1 + kept):
            file.release()
        return None

    def open_sealed(self, key: Key) -> SealedFile | None:
        """The sealed file of `key`, counted for the caller; None where it is not here or turned out bad.

        Raises:
            OSError: it cannot be opened now, which is not its fault: this process has no descriptors left, say.
        """
        while True:
            file = self.open_cached(key)
            if file is not None or not self.is_sealed(key):
                return file
            with self._lock:
                opened = self._opening.get(key)
                if opened is None:
                    opened = self._opening[key] = threading.Lock()
                    opened.acquire()
                    break
            while not opened.acquire(timeout=_BEAT_INTERVAL_S):
                self.operations.beat()
            opened.release()
        try:
            return self._open_first(key)
        finally:
            with self._lock:
                del self._opening[key]
            opened.release()

    def _open_first(self, key: Key) -> SealedFile | None:
        """Open a file that nobody else opens meanwhile, and keep it open for those who come."""
        try:
            file = self._open_file(key)
        except _Damaged as error:
            self.lose(key, error.damage)
            return None
        file.retain()
        with self._lock:
            self._touched.discard(key)
            if not self.is_sealed(key):
                file.release()  # evicted meanwhile: this one is the caller's alone
                return file
            self._open[key] = file
            crowded = self._open.popitem(last=False)[1] if len(self._open) > self._open_files else None
        if crowded is not None:
            crowded.release()
        return file

    def _open_file(self, key: Key) -> SealedFile:
        try:
            name = key.hex()  # put together as text, which costs a tenth of a Path
            fd = os.open(f"{self._sealed_directory}/{name[:2]}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise _damaged(error) from error
        try:
            try:
                header = ShardHeader.decode(os.getxattr(fd, XATTR), key)
            except OSError as error:
                raise _damaged(error) from error
            except ShardCorrupt as error:
                raise _Damaged(Damage.TORN) from error
            found = os.fstat(fd)
            if header.size_bytes != found.st_size or not header.is_complete:
                raise _Damaged(Damage.TORN)
            is_touched = header.written_ns != found.st_mtime_ns or key in self._touched
            if (header.generation < self.generation or is_touched) and self._verified.get(key) != stamp(fd):
                self._verify(key, fd, header)
            return SealedFile(fd, header)
        except BaseException:
            os.close(fd)
            raise

    def _verify(self, key: Key, fd: int, header: ShardHeader) -> None:
        damage = check(fd, header, self.operations.beat)
        if damage is not None:
            raise _Damaged(damage)
        header.generation = self.generation
        header.written_ns = os.fstat(fd).st_mtime_ns
        is_noted = False
        with contextlib.suppress(OSError):
            os.fchmod(fd, 0o644)  # an attribute can be set on a file that may be written, however it was opened
            try:
                os.setxattr(fd, XATTR, header.encode(key))
                is_noted = True
            finally:
                os.fchmod(fd, 0o444)
        with self._lock:
            if is_noted:
                self._verified.pop(key, None)
            elif key in self._ledger.sealed:
                self._verified[key] = stamp(fd)

    def verify(self, key: Key) -> Damage | None:
        """Read a sealed shard; drop it where it does not read back as it was sealed, and say what was wrong.

        Raises OSError as `open_sealed`.
        """
        file = self.open_sealed(key)
        if file is None:
            return None
        try:
            damage = check(file.fd, file.header, self.operations.beat)
        finally:
            file.release()
        if damage is not None:
            self.lose(key, damage)
        return damage

    def lose(self, key: Key, damage: Damage) -> None:
        """Drop a sealed shard that is damaged. Where the drive keeps the file it is never served again all the same."""
        with self._lock:
            if key in self._leaving or not self._ledger.condemn(key):
                return  # somebody else was faster
            self._touched.discard(key)
            self._verified.pop(key, None)
            file = self._open.pop(key, None)
        if file is not None:
            file.release()
        log.error("shard %s is dropped: %s", key.hex(), _SENTENCES[damage], extra={"shard": key.hex()})
        self._bury(key)
        self.on_lost(key, damage)

    def bury(self) -> None:
        """Remove the files of condemned shards that the drive kept, where it lets them go now."""
        with self._lock:
            condemned = list(self._ledger.condemned)
        for key in condemned:
            self._bury(key)

    def _bury(self, key: Key) -> None:
        try:
            self._sealed_path(key).unlink(missing_ok=True)
        except OSError as error:
            log.error("the file of shard %s stays on the drive, and counts: %s", key.hex(), error)
            return
        with self._lock:
            if key in self._ledger.condemned:
                self._ledger.release(key)

    def has_partial(self, key: Key) -> bool:
        """Whether an earlier fill of `key` left a file."""
        return key in self._ledger.reserved and key not in self._leaving

    def begin_blocks(self, key: Key) -> bool:
        """Whether `begin` touches the disk: an earlier fill left a file, or a file of `key` is just being removed."""
        return key in self._ledger.reserved or key in self._leaving

    def begin(self, key: Key, size_bytes: int, *, waits: bool = True) -> PartialFile:
        """Reserve room for `key` and take up the partial file that an earlier fill left, or a new one.

        Touches the disk only where `begin_blocks`: a new file is made when its first part is written.

        Args:
            waits: until a file of `key` that is just being removed is gone. Without it, `AlreadySealed` is raised: the
                shard was when `begin_blocks` said no.

        Raises:
            AlreadySealed: another fill was faster.
            StoreFull: no room, or a damaged file of the shard is in the way.
            OSError: as the disk does; nothing is reserved then, but for a file that the drive keeps.
        """
        path = self._filling_directory / key.hex()
        if self._ledger.reserved.get(key, size_bytes) != size_bytes:
            self.evict(key)  # of another size than its shard has: nothing of it is of use
        while True:
            with self._lock:
                leaving = self._leaving.get(key)
                if leaving is None:
                    left_over = self._claim(key, size_bytes)
                    break
            if not waits:
                raise AlreadySealed
            leaving.wait()
        try:
            if left_over:
                with self.operations.timed:
                    partial = self._resume(key, path, size_bytes)
            else:
                partial = self._new(key, path, size_bytes)
        except BaseException:
            self.give_up(key, path, is_there=left_over)
            raise
        with self._lock:
            self._partials[key] = partial
        return partial

    def _claim(self, key: Key, size_bytes: int) -> bool:
        """Under the lock: take `key` for a fill; whether its room was reserved by an earlier one. Raises as `begin`."""
        if key in self._ledger.sealed:
            raise AlreadySealed
        if key in self._ledger.condemned:
            raise StoreFull(f"the damaged file of shard {key.hex()} is still on the drive")
        left_over = key in self._ledger.reserved
        assert self._partials.get(key) is None, "a shard has one fill at a time"
        if not left_over and not self._ledger.reserve(key, size_bytes):
            raise StoreFull(f"{size_bytes} bytes do not fit into the {self._ledger.free_bytes} that are free")
        self._partials[key] = None
        self._idle_since.pop(key, None)
        return left_over

    def _new(self, key: Key, path: Path, size_bytes: int) -> PartialFile:
        return PartialFile(self, key, path, ShardHeader.empty(size_bytes, self.part_size, self.generation))

    def _resume(self, key: Key, path: Path, size_bytes: int) -> PartialFile:
        try:
            path.chmod(0o644)  # a process that was killed while it sealed left it read-only
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                header = ShardHeader.decode(os.getxattr(fd, XATTR), key)
                if header.size_bytes == size_bytes == os.fstat(fd).st_size:
                    partial = PartialFile(self, key, path, header, fd)
                    for part, known in enumerate(header.checksums):
                        if known is not None:
                            partial.verify_part(part)
                            self.operations.beat()
                    return partial
                raise ShardCorrupt("the partial file is of another shard size")
            except BaseException:
                os.close(fd)
                raise
        except (OSError, ShardCorrupt):
            path.unlink(missing_ok=True)  # never truncated: readers of the earlier fill may still send from it
            return self._new(key, path, size_bytes)

    def suspend(self, partial: PartialFile) -> None:
        """End a fill that failed but may go on later: its file, where it has one, and its reservation stay."""
        if not partial.has_file:
            self._forget_partial(partial.key)
            return
        with self._lock:
            self._partials.pop(partial.key, None)
            self._idle_since[partial.key] = time.monotonic()
        partial.close()

    def give_up(self, key: Key, path: Path, *, is_there: bool) -> None:
        """End a fill for good: remove its file and its reservation.

        Raises OSError as the disk does. The reservation stays then where a file `is_there`, because it takes its room.
        """
        try:
            path.unlink(missing_ok=True)
        except OSError:
            if not is_there:
                self._forget_partial(key)
            with self._lock:
                self._partials.pop(key, None)
                self._idle_since[key] = time.monotonic()
            raise
        self._forget_partial(key)

    def evict(self, key: Key) -> int:
        """Unlink a sealed shard, or a partial one that nobody fills; return the bytes that became free.

        Raises OSError as the disk does; the shard is here as before then.
        """
        with self._lock:
            if key in self._partials or key in self._leaving or not self._ledger.holds(key):
                return 0
            is_partial = key in self._ledger.reserved
            gone = self._leaving[key] = threading.Event()
            file = self._open.pop(key, None)
        if file is not None:
            file.release()
        path = self._filling_directory / key.hex() if is_partial else self._sealed_path(key)
        freed = 0
        is_gone = False
        try:
            with self.operations.timed:
                path.unlink(missing_ok=True)
            is_gone = True
            self.operations.beat()
        finally:
            with self._lock:
                if is_gone:
                    self._touched.discard(key)
                    self._verified.pop(key, None)
                    self._idle_since.pop(key, None)
                    freed = self._ledger.release(key)
                del self._leaving[key]
            gone.set()
        return freed

    def idle_partials(self, for_s: float = 0.0) -> dict[Key, int]:
        """Keys and reserved bytes of partial shards that no fill has been working on for so long."""
        now = time.monotonic()
        with self._lock:
            return {
                key: size_bytes
                for key, size_bytes in self._ledger.reserved.items()
                if key not in self._partials and now - self._idle_since.get(key, now) >= for_s
            }

    def close(self) -> None:
        """Close descriptors and leave the clean mark."""
        with self._lock:
            files = list(self._open.values())
            self._open.clear()
        for file in files:
            file.release()
        self._data.close()

    def _publish(self, partial: PartialFile) -> None:
        path = self._sealed_path(partial.key)
        path.parent.mkdir(exist_ok=True)
        partial._path.rename(path)
        sync_directory(path.parent)
        with self._lock:
            self._ledger.seal(partial.key)
            self._partials.pop(partial.key, None)
        partial.close()
        with contextlib.suppress(OSError):
            file = self.open_sealed(partial.key)  # the first reader then finds it open
            if file is not None:
                file.release()

    def _forget_partial(self, key: Key) -> None:
        with self._lock:
            self._partials.pop(key, None)
            self._ledger.release(key)

    def _sealed_path(self, key: Key) -> Path:
        name = key.hex()
        return self._sealed_directory / name[:2] / name

    def _scan(self) -> None:
        for directory in sorted(p for p in self._sealed_directory.iterdir() if not p.is_symlink()):
            if not directory.is_dir():
                _remove_stray(directory)
                continue
            for key, size_bytes in _keys_in(directory, prefix=directory.name):
                self._ledger.adopt_sealed(key, size_bytes)
        for key, size_bytes in _keys_in(self._filling_directory, prefix=""):
            path = self._filling_directory / key.hex()
            if not self.is_sealed(key) and _may_go_on(path, key, size_bytes):
                self._ledger.adopt_reserved(key, size_bytes)
                self._idle_since[key] = time.monotonic()
            else:
                _remove_stray(path)


def _damaged(error: OSError) -> _Damaged | OSError:
    """What a failure to open a sealed file or to read its attribute says about the shard, if anything."""
    match error.errno:
        case errno.ENOENT | errno.ELOOP:
            return _Damaged(Damage.MISSING)
        case errno.ENODATA | errno.ERANGE:
            return _Damaged(Damage.TORN)
        case errno.EIO | errno.EUCLEAN:
            return _Damaged(Damage.UNREADABLE)
        case _:
            return error


def _may_go_on(path: Path, key: Key, size_bytes: int) -> bool:
    """Whether a fill can take up this partial file."""
    try:
        return ShardHeader.decode(os.getxattr(path, XATTR, follow_symlinks=False), key).size_bytes == size_bytes
    except (OSError, ShardCorrupt):
        return False


def _keys_in(directory: Path, prefix: str) -> Iterator[tuple[Key, int]]:
    """Shards by the names of the files in `directory`, with the files' sizes; removes what has no such name."""
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            is_key = len(name) == 2 * KEY_SIZE and set(name) <= _HEX_DIGITS and name.startswith(prefix)
            if is_key and entry.is_file(follow_symlinks=False):
                yield bytes.fromhex(name), entry.stat(follow_symlinks=False).st_size
            else:
                _remove_stray(directory / name)


def _remove_stray(path: Path) -> None:
    """Remove what no shard is from a directory of the store's, so that all that lies there is counted."""
    log.warning("%s is no shard of this node and is removed", path)
    try:
        path.unlink()
    except OSError as error:  # a directory, say: nobody will ever look into it
        log.warning("%s stays: %s", path, error)
