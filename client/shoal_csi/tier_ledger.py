"""What the directory of a local tier holds, how it changes, and the lock under which that happens.

    DIR/lock                    flock(2) while the directory changes; counts the changes, and what there is
    DIR/objects/DATASET/KEY     an object, whole
    DIR/objects/DATASET/used    its time is when a mount last opened a file of the dataset
    DIR/filling/DATASET-KEY     one that comes in, with all of its space already allocated

There is no record beside the directory, so none is wrong after a crash. A process keeps in memory what it saw there,
and looks again where the count says that another one has changed something since.

Whoever uses a file, to read or to write it, has it locked (flock(2)); so one that can be locked may be removed, and
what can be locked in `filling` was left by a process that is gone.

The rule: the count goes up before the directory changes, and what is allocated is never more than the limit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal_csi import tier_room
from shoal_csi.tier_room import Kept

#: What a file may take beside its bytes while it is written (its list of extents), and its directory with it.
SLACK_BYTES = 64 << 10
#: The directory is locked for milliseconds.
_LOCK_WITHIN_S, _LOCK_AGAIN_S = 10.0, 0.005
_COUNTS = struct.Struct("<QQQ")  # changes, bytes, files
_SECTOR_BYTES = 512  # of st_blocks, whatever the file system's own unit
_USED = "used"
#: Later than any use.
_EVER_NS = 1 << 63


class NoRoom(Exception):
    """Everything in the tier is in use, or may not go yet."""


class Ledger:
    """Of the tier in `directory`, whose folders are there. `counts` and `mark` are thread-safe, the rest one thread's.

    Args:
        now_ns: wall-clock time, since the epoch of Unix.

    Raises:
        OSError: the lock cannot be opened.
    """

    def __init__(self, directory: Path, limit_bytes: int, now_ns: Callable[[], int]) -> None:
        self.objects, self.filling, self.limit_bytes = directory / "objects", directory / "filling", limit_bytes
        self._now_ns = now_ns
        self._lock_path = directory / "lock"
        # Not for writing: a file system with files open for that cannot be remounted read-only.
        self.fd = os.open(self._lock_path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._kept: dict[str, Kept] = {}
        self._other_bytes = 0  # of directories, and of what comes in
        self._seen = -1  # the count of changes up to which the two above are right
        self._is_changing = False
        self.dropped = self.dropped_bytes = 0  # objects that this process removed to make room

    def close(self) -> None:
        os.close(self.fd)

    def counts(self) -> tuple[int, int]:
        """Bytes allocated and whole objects, whichever process brought them, at the last change."""
        _, size_bytes, files = self._read()
        return size_bytes, files

    def mark(self, folder: str) -> None:
        """A dataset is used. Raises OSError: nothing of it is here, or the file system is read-only."""
        now = self._now_ns()
        os.utime(self.objects / folder / _USED, ns=(now, now))

    @property
    def total_bytes(self) -> int:
        """What the directory has allocated, as this process last saw it; what comes in counts with what it may take."""
        return self._other_bytes + sum(each.allocated_bytes for each in self._kept.values())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the directory meanwhile; what this process knows of it is right.

        Raises:
            OSError: EBUSY: somebody has it locked for long; ENOENT: it is not there any more.
        """
        deadline = time.monotonic() + _LOCK_WITHIN_S
        while not _lock(self.fd):
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "locked by another process", str(self._lock_path))
            time.sleep(_LOCK_AGAIN_S)
        try:
            if not os.path.samestat(os.fstat(self.fd), self._lock_path.stat()):
                raise FileNotFoundError(errno.ENOENT, "replaced by another one", str(self._lock_path))
            if self._seen != self._read()[0]:
                self._scan()
            yield
        except NoRoom:
            raise
        except BaseException:  # whatever ended it, what was counted may be wrong: look again next time
            self._seen = -1
            raise
        finally:
            try:
                if self._is_changing:
                    self._is_changing = False
                    self._write(self._read()[0], self.total_bytes, len(self._kept))
            finally:
                fcntl.flock(self.fd, fcntl.LOCK_UN)

    # Under the lock

    def change(self) -> None:
        """Say that the directory changes, before it does: who is killed in between has said so."""
        if not self._is_changing:
            changes, size_bytes, files = self._read()
            self._write(changes + 1, size_bytes, files)
            self._is_changing = True
            self._seen = changes + 1

    def make_home(self, folder: str) -> None:
        """The folder of a dataset that is used now."""
        home = self.objects / folder
        home.mkdir(mode=0o700, exist_ok=True)
        (home / _USED).touch(mode=0o600)
        self.mark(folder)

    def note(self, name: str, found: os.stat_result) -> None:
        """There is a whole object at ``FOLDER/KEY``."""
        folder = name.partition("/")[0]
        self._kept[name] = Kept(folder, found.st_blocks * _SECTOR_BYTES, found.st_atime_ns)

    def forget(self, name: str) -> None:
        self._kept.pop(name, None)

    def count_others(self) -> None:
        """Count directories and what comes in, which are few."""
        folders = [self.objects, self.filling, *(Path(entry.path) for entry in os.scandir(self.objects))]
        found = [path.lstat().st_blocks * _SECTOR_BYTES for path in (*folders, self._lock_path)]
        filling = [entry.stat().st_blocks * _SECTOR_BYTES + SLACK_BYTES for entry in os.scandir(self.filling)]
        self._other_bytes = sum(found) + sum(filling)

    def clean(self) -> None:
        """Remove what was being written by processes that are gone."""
        for entry in list(os.scandir(self.filling)):
            self.unlink_unused(Path(entry.path))
        self.count_others()

    def unlink_unused(self, path: Path) -> bool:
        """Remove a file that nobody has locked; whether it is gone."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not _lock(fd):
                return False
            self.change()
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(fd)

    def make_room(self, need_bytes: int) -> bool:
        """Drop what may go until there is room; whether there is. Where there would not be, nothing is dropped."""
        if self.total_bytes + need_bytes > self.limit_bytes:
            self.clean()
        missing_bytes = self.total_bytes + need_bytes - self.limit_bytes
        if missing_bytes <= 0:
            return True
        datasets = {entry.name: self._dataset_used(entry.name) for entry in os.scandir(self.objects)}
        now = self._now_ns()
        if tier_room.droppable_bytes(self._kept, datasets, now) < missing_bytes:
            return False
        chosen = []
        for name in tier_room.victims(dict(self._kept), datasets, now, self._last_use):
            chosen.append(name)
            missing_bytes -= self._kept[name].allocated_bytes
            if missing_bytes <= 0:
                break
        # One of them may have been opened since it was looked at.
        return missing_bytes <= 0 and all(self._remove(name) for name in chosen)

    def trim(self) -> None:
        """Drop what is above the limit, which may have been a higher one, but what is in use."""
        for name in tier_room.victims(dict(self._kept), {}, _EVER_NS, self._last_use):
            if self.total_bytes <= self.limit_bytes:
                return
            self._remove(name)

    def _scan(self) -> None:
        self._kept.clear()
        for folder in list(os.scandir(self.objects)):
            names = [entry for entry in os.scandir(folder) if entry.name != _USED]
            for entry in names:
                with contextlib.suppress(FileNotFoundError):  # somebody else's hand
                    self.note(f"{folder.name}/{entry.name}", entry.stat(follow_symlinks=False))
            if not names:
                self.change()
                (self.objects / folder.name / _USED).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    (self.objects / folder.name).rmdir()
        self.clean()
        self._seen = self._read()[0]

    def _remove(self, name: str) -> bool:
        is_gone = self.unlink_unused(self.objects / name)
        if is_gone:
            self.dropped += 1
            self.dropped_bytes += self._kept[name].allocated_bytes if name in self._kept else 0
            self.forget(name)
        return is_gone

    def _dataset_used(self, folder: str) -> int:
        try:
            return (self.objects / folder / _USED).stat().st_mtime_ns
        except OSError:
            return 0

    def _last_use(self, name: str) -> int | None:
        """When a file was last opened; None where it is in use, or gone."""
        try:
            fd = os.open(self.objects / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            self.forget(name)
            return None
        try:
            return os.fstat(fd).st_atime_ns if _lock(fd) else None
        finally:
            os.close(fd)

    def _read(self) -> tuple[int, int, int]:
        raw = os.pread(self.fd, _COUNTS.size, 0)
        changes, size_bytes, files = _COUNTS.unpack(raw) if len(raw) == _COUNTS.size else (0, 0, 0)
        return changes, size_bytes, files

    def _write(self, changes: int, size_bytes: int, files: int) -> None:
        fd = os.open(self._lock_path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pwrite(fd, _COUNTS.pack(changes, size_bytes, files), 0)
        finally:
            os.close(fd)


def counts(directory: Path) -> tuple[int, int]:
    """Bytes allocated and whole objects of the tier in `directory`, whoever brought them; none where it is not one."""
    try:
        raw = (directory / "lock").read_bytes()
    except OSError:
        return 0, 0
    return _COUNTS.unpack(raw)[1:] if len(raw) == _COUNTS.size else (0, 0)


def _lock(fd: int) -> bool:
    """Lock a file for oneself, for as long as it is open; whether nobody else has it locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
