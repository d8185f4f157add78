"""The store: shard files on one drive. Reserve, write aside, verify, fsync, rename; from then on a file never changes.

    shards/ab/<key>     sealed: whole, verified, read-only
    filling/<key>       partial: sparse, with the parts it has in its attribute (shard_file.py)
    state.json          node id, generation, the boot that runs

A start-up scan trusts sealed names by their presence and size, so that a node is warm at once, and keeps partial
files: their parts are verified when the fill goes on. After a *machine* went down without a clean stop (another boot
id and no clean mark) sealed files are verified once before they are served, because their pages may never have
reached the drive.

The rule: eviction is ``unlink``, never ``truncate``, so a map, a descriptor or a running ``sendfile`` stays valid.

Every method that touches the disk blocks; the node calls them from threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.errors import ShardCorrupt, StoreUnusable
from shoal.shards import PART_SIZE, Key
from shoal_cachenode.ledger import Ledger
from shoal_cachenode.partial_file import PartialFile
from shoal_cachenode.sealed_file import SealedFile, part_is_good
from shoal_cachenode.shard_file import XATTR, ShardHeader

#: Descriptors of sealed files kept open between requests.
MAX_OPEN_FILES = 512


class StoreFull(Exception):
    """There is no room for a shard: the read passes through."""


class AlreadySealed(Exception):
    """The shard was sealed meanwhile: look again."""


class Store:
    """The shards of one data directory.

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
        self._lock = threading.Lock()  # guards _ledger, _open and _partials
        self._ledger = Ledger(capacity_bytes)
        self._open: OrderedDict[Key, SealedFile] = OrderedDict()
        self._partials: dict[Key, PartialFile | None] = {}
        self._sealed_directory = directory / "shards"
        self._filling_directory = directory / "filling"
        self._lock_fd = self._prepare()
        self._state = self._load_state()
        self.generation: int = self._state["generation"]
        self._scan()

    @property
    def node_id(self) -> str:
        """This directory's own name, made once: a node keeps its id, and so its shards, over restarts."""
        return str(self._state["node_id"])

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
        return key in self._ledger.sealed

    def open_cached(self, key: Key) -> SealedFile | None:
        """The sealed file of `key` if it is open already, counted for the caller. Does not touch the disk."""
        with self._lock:
            file = self._open.get(key)
            if file is None or not file.retain():
                return None
            self._open.move_to_end(key)
            return file

    def open_sealed(self, key: Key) -> SealedFile | None:
        """The sealed file of `key`, counted for the caller; None where it is not here or turned out bad."""
        file = self.open_cached(key)
        if file is not None:
            return file
        if not self.is_sealed(key):
            return None
        try:
            file = self._open_file(key)
        except FileNotFoundError:
            self.evict(key)
            return None
        except ShardCorrupt:
            self.evict(key)
            return None
        file.retain()
        with self._lock:
            if key not in self._ledger.sealed or key in self._open:
                file.release()  # evicted, or opened by another thread, meanwhile: this one is the caller's alone
                return file
            self._open[key] = file
            crowded = self._open.popitem(last=False)[1] if len(self._open) > MAX_OPEN_FILES else None
        if crowded is not None:
            crowded.release()
        return file

    def _open_file(self, key: Key) -> SealedFile:
        fd = os.open(self._sealed_path(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = ShardHeader.decode(os.getxattr(fd, XATTR))
            if header.size_bytes != os.fstat(fd).st_size or not header.is_complete:
                raise ShardCorrupt(f"shard {key.hex()} has another length than it was sealed with")
            if header.generation < self.generation:
                self._verify_once(key, fd, header)
            return SealedFile(fd, header)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError) and not isinstance(error, ShardCorrupt):
                raise ShardCorrupt(f"shard {key.hex()} cannot be read: {error}") from error
            raise

    def _verify_once(self, key: Key, fd: int, header: ShardHeader) -> None:
        if not all(part_is_good(fd, header, part) for part in range(len(header.checksums))):
            raise ShardCorrupt(f"shard {key.hex()} did not survive the last unclean stop of the machine")
        header.generation = self.generation
        path = self._sealed_path(key)
        path.chmod(0o644)  # setxattr wants a writable file
        os.setxattr(path, XATTR, header.encode())
        path.chmod(0o444)

    def verify(self, key: Key) -> bool:
        """Whether a sealed shard reads back as it was sealed; True where it is not here."""
        file = self.open_sealed(key)
        if file is None:
            return True
        try:
            return all(part_is_good(file.fd, file.header, part) for part in range(len(file.header.checksums)))
        finally:
            file.release()

    def has_partial(self, key: Key) -> bool:
        """Whether an earlier fill of `key` left a file."""
        return key in self._ledger.reserved

    def begin(self, key: Key, size_bytes: int) -> PartialFile:
        """Reserve room for `key` and take up the partial file that an earlier fill left, or a new one.

        Touches the disk only where `has_partial`: a new file is made when its first part is written.

        Raises:
            AlreadySealed: another fill was faster.
            StoreFull: no room.
            OSError: as the disk does; nothing is reserved then.
        """
        with self._lock:
            if key in self._ledger.sealed:
                raise AlreadySealed
            left_over = key in self._ledger.reserved
            assert self._partials.get(key) is None, "a shard has one fill at a time"
            if not left_over and not self._ledger.reserve(key, size_bytes):
                raise StoreFull(f"{size_bytes} bytes do not fit into the {self._ledger.free_bytes} that are free")
            self._partials[key] = None
        path = self._filling_directory / key.hex()
        try:
            partial = self._resume(key, path, size_bytes) if left_over else self._new(key, path, size_bytes)
        except BaseException:
            path.unlink(missing_ok=True)
            self._forget_partial(key)
            raise
        with self._lock:
            self._partials[key] = partial
        return partial

    def _new(self, key: Key, path: Path, size_bytes: int) -> PartialFile:
        return PartialFile(self, key, path, ShardHeader.empty(size_bytes, self.part_size, self.generation))

    def _resume(self, key: Key, path: Path, size_bytes: int) -> PartialFile:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                header = ShardHeader.decode(os.getxattr(fd, XATTR))
                if header.size_bytes == size_bytes == os.fstat(fd).st_size:
                    partial = PartialFile(self, key, path, header, fd)
                    for part, known in enumerate(header.checksums):
                        if known is not None:
                            partial.verify_part(part)
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
        partial.close()

    def evict(self, key: Key) -> int:
        """Unlink a sealed shard, or a partial one that nobody fills; return the bytes that became free."""
        with self._lock:
            if key in self._partials:
                return 0
            is_partial = key in self._ledger.reserved
        path = self._filling_directory / key.hex() if is_partial else self._sealed_path(key)
        path.unlink(missing_ok=True)
        with self._lock:
            # Together: until the ledger forgets the key, another thread may open the file and keep it in `_open`.
            file = self._open.pop(key, None)
            freed = self._ledger.release(key)
        if file is not None:
            file.release()
        return freed

    def idle_partials(self) -> dict[Key, int]:
        """Keys and reserved bytes of partial shards that no fill is working on."""
        with self._lock:
            return {k: n for k, n in self._ledger.reserved.items() if k not in self._partials}

    def close(self) -> None:
        """Close descriptors and leave the clean mark."""
        with self._lock:
            files = list(self._open.values())
            self._open.clear()
        for file in files:
            file.release()
        self._save_state(clean=True)
        os.close(self._lock_fd)

    def _publish(self, partial: PartialFile) -> None:
        path = self._sealed_path(partial.key)
        path.parent.mkdir(exist_ok=True)
        partial._path.rename(path)
        _sync_directory(path.parent)
        with self._lock:
            self._ledger.seal(partial.key)
            self._partials.pop(partial.key, None)
        partial.close()
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

    def _prepare(self) -> int:
        try:
            for directory in (self.directory, self._sealed_directory, self._filling_directory):
                directory.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreUnusable(
                f"cannot use {self.directory} as data directory: {error.strerror}; give --data-dir a directory that "
                "this user can write"
            ) from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.setxattr(self.directory / "lock", XATTR, b"probe")
        except BlockingIOError as error:
            os.close(lock_fd)
            raise StoreUnusable(
                f"another cache node already uses {self.directory}: stop it or give --data-dir another directory"
            ) from error
        except OSError as error:
            os.close(lock_fd)
            raise StoreUnusable(
                f"{self.directory} lies on a file system without user extended attributes ({error.strerror}): use "
                "ext4, XFS or Btrfs"
            ) from error
        return lock_fd

    def _load_state(self) -> dict[str, Any]:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        path = self.directory / "state.json"
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
                f"{path} is damaged ({error!r}): restore it, or empty {self.directory} to start cold"
            ) from error
        self._state = {"node_id": node_id, "generation": generation, "boot_id": boot_id, "clean": False}
        self._save_state(clean=False)
        return self._state

    def _save_state(self, *, clean: bool) -> None:
        self._state["clean"] = clean
        write_atomically(self.directory / "state.json", json.dumps(self._state).encode())

    def _scan(self) -> None:
        for directory in sorted(p for p in self._sealed_directory.iterdir() if p.is_dir()):
            for key, size_bytes in _keys_in(directory):
                self._ledger.adopt_sealed(key, size_bytes)
        for key, size_bytes in _keys_in(self._filling_directory):
            if self.is_sealed(key):
                (self._filling_directory / key.hex()).unlink()
            else:
                self._ledger.adopt_reserved(key, size_bytes)


def _keys_in(directory: Path) -> Iterator[tuple[Key, int]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                key = bytes.fromhex(entry.name)
            except ValueError:
                continue
            if len(key) == 16 and entry.is_file(follow_symlinks=False):
                yield key, entry.stat(follow_symlinks=False).st_size


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a small file aside, make it durable and rename it into place."""
    aside = path.with_name(path.name + ".new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with contextlib.closing(os.fdopen(fd, "wb")) as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    aside.rename(path)
    _sync_directory(path.parent)
