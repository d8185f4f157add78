"""The local tier: whole objects as files of a directory of this machine, shared by all mounts that are given it.

In    reserve (make room, allocate) → write aside → fsync → rename, so that what has an object's name is whole
Out   unlink, of files that nobody uses. Whoever reads one has it locked (flock(2), shared), and the lock goes with the
      open file to the kernel, which keeps it while it reads by itself: also where the server, or every process of the
      mount, was killed. So no space is ever held by a file without a name

A file is named by the dataset's origin and, as a shard is, by a key of origin, path, version and size. So a later
snapshot, or another mount, finds it again. Its last use is its access time, set when it is opened, to the minute.

The rule: a file that is handed out is whole; how much there is, is `shoal_csi.tier_ledger`'s.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import xxhash

from shoal import sizes
from shoal.errors import InvalidRequest, StoreUnusable
from shoal.shards import PART_SIZE, Key
from shoal_csi import tier_place
from shoal_csi.tier_file import XATTR, TierHeader, Trust, judge
from shoal_csi.tier_ledger import SLACK_BYTES, Ledger, NoRoom

log = logging.getLogger(__name__)

#: Bytes that are written before the drive has to have them: the rest of the machine's writes wait behind no more.
_SYNC_BYTES = 64 << 20
_MARK_EVERY_NS = 60 * 1_000_000_000
_EMPTY = TierHeader(0, 0, bytes(16), bytes(16))


class Tier:
    """The tier in `directory`. `find`, `mark_used` and `counts` are thread-safe; the rest is one thread's.

    Args:
        limit_bytes: what the directory may have allocated.
        now_ns: wall-clock time, since the epoch of Unix.
        boot: 16 bytes that name this start of the machine; None: as the kernel says.

    Raises:
        InvalidRequest: the limit is too low for anything.
        StoreUnusable: the directory is missing, another user's, full or read-only, or its file system will not do.
    """

    def __init__(
        self,
        directory: Path,
        limit_bytes: int,
        *,
        now_ns: Callable[[], int] = time.time_ns,
        boot: bytes | None = None,
    ) -> None:
        if limit_bytes < 8 * SLACK_BYTES:
            raise InvalidRequest(
                f"a local tier of {sizes.format(limit_bytes)} holds nothing: give --local-tier-size more, as 100GiB"
            )
        self.directory, self.limit_bytes = directory, limit_bytes
        self._now_ns = now_ns
        self._boot = boot or uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
        self._marks: dict[str, int] = {}  # when this process last marked a dataset
        tier_place.check(directory)
        with contextlib.ExitStack() as undo:
            try:
                for folder in (directory / "objects", directory / "filling"):
                    folder.mkdir(mode=0o700, exist_ok=True)
                    tier_place.check_folder(folder)
                self._ledger = Ledger(directory, limit_bytes, now_ns)
                undo.callback(self._ledger.close)
                self._try()
            except OSError as error:
                raise StoreUnusable(tier_place.sentence(directory, error)) from error
            undo.pop_all()

    def close(self) -> None:
        self._ledger.close()

    # For any thread

    def find(self, folder: str, key: Key, size_bytes: int) -> tuple[int | None, Trust]:
        """A descriptor of an object's file, the caller's: the file stays while that, or a duplicate, is open.

        None, and `Trust.NONE`, where the tier does not have it; `Trust.UNSURE` where `verify` is to look at it first.
        """
        try:
            fd = os.open(self._path(folder, key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None, Trust.NONE
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found = os.fstat(fd)
                trust = judge(_attribute(fd), key, size_bytes, found, self._boot)
            except OSError:  # it is being verified or dropped
                return None, Trust.NONE
            if not found.st_nlink:
                return None, Trust.NONE
            if trust is not Trust.WHOLE:
                return None, Trust.UNSURE
            now = self._now_ns()
            if abs(now - found.st_atime_ns) > _MARK_EVERY_NS:
                with contextlib.suppress(OSError):  # read-only by now: it is read all the same
                    os.utime(fd, ns=(now, found.st_mtime_ns))
            undo.pop_all()
        return fd, trust

    def mark_used(self, folder: str) -> None:
        """A mount has opened an object of that dataset, whether the tier has it or not."""
        now = self._now_ns()
        if abs(now - self._marks.get(folder, 0)) > _MARK_EVERY_NS:
            self._marks[folder] = now
            with contextlib.suppress(OSError):
                self._ledger.mark(folder)

    def counts(self) -> tuple[int, int]:
        """Bytes allocated and whole objects, whichever process brought them."""
        return self._ledger.counts()

    def dropped(self) -> tuple[int, int]:
        """Objects that this process removed to make room, and their bytes."""
        return self._ledger.dropped, self._ledger.dropped_bytes

    # For the one thread that changes it

    @property
    def largest_bytes(self) -> int:
        """No larger object fits."""
        return self.limit_bytes - 4 * SLACK_BYTES

    def verify(self, folder: str, key: Key, size_bytes: int, beat: Callable[[], bool]) -> bool | None:
        """Whether the object's file is whole; it is read where it must be. One that is not goes. None: there is none.

        Args:
            beat: called between parts; False to stop: then the file stays as it was.

        Raises:
            OSError: as the drive does.
        """
        path = self._path(folder, key)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOATIME)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_whole(fd, key, size_bytes, beat):
                return True
            log.warning("%s is damaged: it is dropped, and fetched again", path)
            with self._ledger.locked():
                self._ledger.change()
                path.unlink(missing_ok=True)
                self._ledger.forget(f"{folder}/{key.hex()}")
            return False
        except BlockingIOError:  # somebody reads it, and found it whole; nobody else gets it before this is known
            return True
        finally:
            os.close(fd)

    def begin(self, folder: str, key: Key, size_bytes: int) -> Filling | None:
        """Make room for an object, and take it. None where it is here already, or on its way by another process.

        Raises:
            NoRoom: there is none, now.
            OSError: as the drive does: ENOSPC where others have filled it.
        """
        ledger = self._ledger
        with ledger.locked():
            path = ledger.filling / f"{folder}-{key.hex()}"
            if self._path(folder, key).exists() or not ledger.unlink_unused(path):
                return None
            unit = os.fstatvfs(ledger.fd).f_frsize
            if not ledger.make_room(-(-size_bytes // unit) * unit + 2 * SLACK_BYTES):
                raise NoRoom
            ledger.change()
            ledger.make_home(folder)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.setxattr(fd, XATTR, _EMPTY.encode(key))  # all that it will take is taken now
                os.posix_fallocate(fd, 0, size_bytes)
                ledger.count_others()
                if ledger.total_bytes > self.limit_bytes:
                    raise NoRoom
            except BaseException:  # whatever ended it, what is not whole goes
                os.close(fd)
                path.unlink()
                ledger.count_others()
                raise
        return Filling(self, folder, key, size_bytes, path, fd)

    def _try(self) -> None:
        """The first look: what dead processes left goes, and what is above the limit; then whether one can write."""
        ledger = self._ledger
        os.setxattr(ledger.fd, XATTR, b"probe")
        with ledger.locked():
            ledger.change()
            ledger.clean()
            ledger.trim()
            if ledger.total_bytes + 2 * SLACK_BYTES > self.limit_bytes:
                return
            probe = ledger.filling / "probe"
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, SLACK_BYTES)
            finally:
                os.close(fd)
                probe.unlink()

    def _path(self, folder: str, key: Key) -> Path:
        return self._ledger.objects / folder / key.hex()

    def _is_whole(self, fd: int, key: Key, size_bytes: int, beat: Callable[[], bool]) -> bool:
        found, raw = os.fstat(fd), _attribute(fd)
        trust = judge(raw, key, size_bytes, found, self._boot)
        if trust is Trust.UNSURE:
            checksum = _checksum(fd, beat)
            if checksum is None:
                return True
            if checksum == TierHeader.decode(raw, key).checksum:
                header = TierHeader(size_bytes, found.st_mtime_ns, self._boot, checksum)
                os.setxattr(fd, XATTR, header.encode(key))
                return True
        return trust is Trust.WHOLE

    # Of `Filling`

    def _publish(self, filling: Filling, checksum: bytes) -> None:
        fd, name, ledger = filling.fd, f"{filling.folder}/{filling.key.hex()}", self._ledger
        written_ns = os.fstat(fd).st_mtime_ns
        os.utime(fd, ns=(self._now_ns(), written_ns))
        os.setxattr(fd, XATTR, TierHeader(filling.size_bytes, written_ns, self._boot, checksum).encode(filling.key))
        os.fsync(fd)
        with ledger.locked():
            ledger.change()
            ledger.make_home(filling.folder)  # while it was empty, another process may have tidied it away
            filling.path.rename(ledger.objects / name)
            ledger.note(name, os.fstat(fd))
            ledger.count_others()

    def _give_up(self, filling: Filling) -> None:
        with contextlib.suppress(OSError), self._ledger.locked():
            self._ledger.change()
            filling.path.unlink()
            self._ledger.count_others()


class Filling:
    """An object on its way into the tier: written in order, then sealed. A context manager; what is not sealed goes.

    Args:
        fd: of its file, which is this object's from now on.
    """

    def __init__(self, tier: Tier, folder: str, key: Key, size_bytes: int, path: Path, fd: int) -> None:
        self.folder, self.key, self.size_bytes, self.path, self.fd = folder, key, size_bytes, path, fd
        self._tier = tier
        self._hasher = xxhash.xxh3_128()
        self._written = 0
        self._is_sealed = False

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self._is_sealed:
                self._tier._give_up(self)
        finally:
            os.close(self.fd)

    def write(self, data: memoryview) -> None:
        """Append bytes. Raises OSError as the drive does."""
        self._hasher.update(data)
        while data:
            count = os.pwrite(self.fd, data, self._written)
            if self._written // _SYNC_BYTES != (self._written + count) // _SYNC_BYTES:
                os.fdatasync(self.fd)
            self._written += count
            data = data[count:]

    def seal(self) -> None:
        """Have the drive take it, and show it to everybody. Raises OSError as the drive does."""
        assert self._written == self.size_bytes, "an object is written whole"
        self._tier._publish(self, self._hasher.digest())
        self._is_sealed = True


def _attribute(fd: int) -> bytes:
    """A file's attribute; b"" where it has none."""
    try:
        return os.getxattr(fd, XATTR)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return b""


def _checksum(fd: int, beat: Callable[[], bool]) -> bytes | None:
    """Of all bytes of a file; None where `beat` says to stop."""
    hasher, position = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(1 << 20))
    while count := os.preadv(fd, [buffer], position):
        hasher.update(buffer[:count])
        position += count
        if position % PART_SIZE == 0 and not beat():
            return None
    return hasher.digest()
