"""The directory that a cache node owns: its lock, its identity, and how small files in it are written.

    lock          held while a node runs
    state.json    node id, generation, the boot that runs, whether the last stop was clean

`generation` counts the unclean stops of the *machine*: it goes up at a start under another boot id where no clean mark
was left. What was sealed in an earlier generation may never have reached the drive.

The rule: a small file is written aside, made durable and renamed, so that it is whole or as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.errors import StoreUnusable
from shoal_cachenode.shard_file import XATTR

log = logging.getLogger(__name__)


class DataDirectory:
    """Locks the directory and takes up its state.

    Attributes:
        node_id: the directory's own name, made once: a node keeps its id, and so its shards, over restarts.
        generation: see the module.

    Args:
        inside: directories that are made in it.

    Raises:
        StoreUnusable: it cannot be made, written or locked, has no extended attributes, or its state is damaged.
    """

    def __init__(self, directory: Path, inside: Sequence[Path]) -> None:
        self._directory = directory
        self._lock_fd = self._prepare([directory, *inside])
        try:
            self._state = self._take_state()
        except BaseException:
            os.close(self._lock_fd)
            raise
        self.node_id = str(self._state["node_id"])
        self.generation = int(self._state["generation"])

    def close(self) -> None:
        """Leave the clean mark, and unlock."""
        try:
            self._save_state(clean=True)
        except OSError as error:  # then the next start takes this stop for an unclean one
            log.error("no clean mark on %s: %s", self._directory, error)
        os.close(self._lock_fd)

    def _prepare(self, directories: Sequence[Path]) -> int:
        try:
            for directory in directories:
                directory.mkdir(parents=True, exist_ok=True)
            # Not for writing: a file system with files open for that cannot be remounted read-only.
            lock_fd = os.open(self._directory / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreUnusable(
                f"cannot use {self._directory} as data directory: {error.strerror}; give --data-dir a directory that "
                "this user can write"
            ) from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.setxattr(self._directory / "lock", XATTR, b"probe")
        except BlockingIOError as error:
            os.close(lock_fd)
            raise StoreUnusable(
                f"another cache node already uses {self._directory}: stop it or give --data-dir another directory"
            ) from error
        except OSError as error:
            os.close(lock_fd)
            raise StoreUnusable(
                f"{self._directory} lies on a file system without user extended attributes ({error.strerror}): use "
                "ext4, XFS or Btrfs"
            ) from error
        return lock_fd

    def _take_state(self) -> dict[str, Any]:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        path = self._directory / "state.json"
        try:
            state = json.loads(path.read_text())
            generation = int(state["generation"])
            if state["boot_id"] != boot_id and not state["clean"]:
                generation += 1
            node_id = str(state["node_id"])
        except FileNotFoundError:
            generation, node_id = 1, uuid.uuid4().hex[:12]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreUnusable(
                f"{path} is damaged ({error!r}): restore it, or empty {self._directory} to start cold"
            ) from error
        self._state = {"node_id": node_id, "generation": generation, "boot_id": boot_id, "clean": False}
        try:
            self._save_state(clean=False)
        except OSError as error:
            raise StoreUnusable(f"cannot write {path}: {error.strerror}; make room on its file system") from error
        return self._state

    def _save_state(self, *, clean: bool) -> None:
        self._state["clean"] = clean
        write_atomically(self._directory / "state.json", json.dumps(self._state).encode())


def sync_directory(directory: Path) -> None:
    """Make renames and unlinks in it durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a small file aside, make it durable and rename it into place. Raises OSError as the drive does."""
    aside = path.with_name(path.name + ".new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with contextlib.closing(os.fdopen(fd, "wb")) as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    aside.rename(path)
    sync_directory(path.parent)
