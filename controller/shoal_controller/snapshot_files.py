"""The files of a data directory: a lock, and the snapshots, which are too large for any record.

    DIR/lock              held while a controller runs
    DIR/snapshots/        <digest>.arrow
    DIR/incoming/         snapshots that are being written; emptied at the start

The rule: a snapshot's file is whole before it has its name, and goes only after no record names it.

`staging` and `path` may be used by any thread, the rest by one at a time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shoal.errors import StoreUnusable


class SnapshotFiles:
    """A data directory, locked for this process."""

    def __init__(self, directory: Path, lock: IO[str]) -> None:
        """Use `open`."""
        self.directory = directory
        self.snapshots = directory / "snapshots"
        self._incoming = directory / "incoming"
        self._lock = lock

    @classmethod
    def open(cls, directory: Path) -> SnapshotFiles:
        """Make and lock `directory`.

        Raises:
            StoreUnusable: it cannot be made or written, or another controller uses it.
        """
        try:
            for path in (directory, directory / "snapshots", directory / "incoming"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (directory / "lock").open("a")
        except OSError as error:
            raise StoreUnusable(
                f"the data directory {directory} cannot be used ({error.strerror or error}): make it a directory that "
                "this user can write, or name another with --data-dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise StoreUnusable(
                f"another controller uses the data directory {directory}: stop that one, or name another directory "
                "with --data-dir"
            ) from error
        except BaseException:  # nobody else has it yet
            lock.close()
            raise
        return cls(directory, lock)

    def close(self) -> None:
        self._lock.close()

    def path(self, digest: str) -> Path:
        """Where the file of a snapshot is, if it is kept."""
        return self.snapshots / f"{digest}.arrow"

    def keep(self, staged: Path, digest: str) -> None:
        """Put a file from `staging` into its place, durably. Raises StoreUnusable."""
        with converted(self.directory):
            staged.replace(self.path(digest))
            _sync_directory(self.snapshots)

    def drop(self, digest: str) -> None:
        with converted(self.directory):
            self.path(digest).unlink(missing_ok=True)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory of its own to write a snapshot aside in, on the same file system; gone at the end.

        Raises:
            StoreUnusable: it cannot be made.
        """
        with converted(self.directory):
            path = Path(tempfile.mkdtemp(dir=self._incoming))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def sweep(self, named: Collection[str]) -> None:
        """Delete what a crash left: whatever was on its way in, and snapshots that are not `named`."""
        with converted(self.directory):
            for path in self._incoming.iterdir():
                shutil.rmtree(path, ignore_errors=True)
            for path in self.snapshots.glob("*.arrow"):
                if path.stem not in named:
                    path.unlink()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def converted(directory: Path) -> Iterator[None]:
    """Errors of the disk as StoreUnusable."""
    try:
        yield
    except StoreUnusable:
        raise
    except OSError as error:
        raise StoreUnusable(
            f"the data directory {directory} cannot be written ({error.strerror or error}): check that the disk has "
            "room and that this user may write there"
        ) from error
