"""Snapshots: the immutable listing of a dataset as an Arrow IPC file that is mapped, never parsed.

Training pins a snapshot, so every rank and every epoch sees the same objects, and `ls`, `info` or `exists` are look-ups
in local memory. All processes of a node map one file: a million objects cost each of them next to nothing.

The rule: a snapshot is named by the digest of its content and never changes; a new listing is a new file beside it.
docs/snapshot.md has the format.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal import listing, shards, snapshot_file
from shoal.errors import NotFound, ShardCorrupt, SnapshotNotFound, StoreUnusable
from shoal.snapshot_file import write

__all__ = ["Entry", "ShardTable", "Snapshot", "write"]


T = TypeVar("T")


class _once(Generic[T]):
    """`functools.cached_property` without the lock that Python 3.11 has in it.

    That lock is one for all snapshots of the process, and a child forked while another thread holds it waits for ever.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self._name = compute.__name__

    def __get__(self, instance: object, owner: type) -> T:
        value = self._compute(instance)
        instance.__dict__[self._name] = value  # found before this object from now on
        return value


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a snapshot."""

    row: int
    path: str
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class ShardTable:
    """Shards in row-major order: by object, then by index. The arrays are read-only and share the first dimension.

    Attributes:
        keys: shape (n, 2), the shards' keys as words (see `shards.shard_keys`).
        sizes: bytes of each shard.
        rows: the object each shard belongs to.
        indexes: each shard's index inside its object.
    """

    keys: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint32]
    indexes: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.rows)


class Snapshot:
    """A mapped snapshot. Thread-safe and good after a fork: it is only ever read.

    The mapping lives as long as this object or any array taken from it. Rows are numbered in order of their paths'
    bytes. Methods that take a row raise `NotFound` where there is none of that number.

    Attributes:
        digest: its name, 32 hex digits.
        origin: URL that the paths are relative to; for people, not part of what the digest covers.
        identity: what the object keys name the origin by.
        shard_size: bytes.
    """

    def __init__(self, mapped: mmap.mmap, name: str) -> None:
        """Take over `mapped`, a whole file; `name` is for error messages. Use `open` or `from_fd`."""
        batch, metadata = snapshot_file.read(mapped, name)
        self._batch = batch
        self._paths = listing.Paths(batch["path"])
        self._count = len(self._paths)
        self._versions = listing.Text(batch["version"])
        self._sizes: npt.NDArray[np.int64] = listing.numbers(batch["size"], "<i8")
        self._keys: npt.NDArray[np.uint64] = listing.numbers(batch["key"], "<u8").reshape(-1, 2)
        self.origin, self.identity, self.digest = (metadata[name] for name in ("origin", "identity", "digest"))
        self.shard_size = int(metadata["shard_size"])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Map the snapshot at `path`. Reads its head and foot only; `verify` reads the rest.

        Raises:
            SnapshotNotFound: there is no such file.
            ShardCorrupt: it is no snapshot, or not a whole one.
            StoreUnusable: it cannot be read.
        """
        name = os.fspath(path)
        try:
            with Path(path).open("rb", buffering=0) as file:
                return cls(snapshot_file.map_whole(file.fileno(), name), name)
        except FileNotFoundError as error:
            raise SnapshotNotFound(f"{name} does not exist: open the dataset again for its newest snapshot") from error
        except OSError as error:
            raise StoreUnusable(
                f"{name} cannot be read ({error.strerror or error}): check the disk and its rights"
            ) from error

    @classmethod
    def from_fd(cls, fd: int) -> Snapshot:
        """Map the snapshot behind the descriptor `fd`. The caller keeps `fd`, and may close it at once.

        Raises:
            ShardCorrupt: it is no snapshot, or not a whole one.
            StoreUnusable: it cannot be mapped.
        """
        name = f"the file behind descriptor {fd}"
        try:
            return cls(snapshot_file.map_whole(fd, name), name)
        except OSError as error:
            raise StoreUnusable(
                f"{name} cannot be mapped ({error.strerror or error}): open the dataset again"
            ) from error

    def __len__(self) -> int:
        """Objects."""
        return self._count

    def __repr__(self) -> str:
        return f"<Snapshot {self.digest} of {self.origin}: {len(self):,} objects>"

    @property
    def paths(self) -> listing.Paths:
        """The sorted path column, for whoever walks it as a tree."""
        return self._paths

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each object, by row. A view of the mapping."""
        return self._sizes

    @_once
    def total_bytes(self) -> int:
        """Bytes of all objects."""
        return int(self._sizes.sum())

    def find(self, path: str) -> int | None:
        """The row of the object `path`; None where there is none. Bisects the mapped bytes."""
        return self._paths.find(path)

    def path(self, row: int) -> str:
        return self._paths[self._checked(row)]

    def size(self, row: int) -> int:
        """Bytes of the object."""
        return int(self._sizes[self._checked(row)])

    def version(self, row: int) -> str:
        """What the origin calls the object's content: an ETag, a version id, or the like."""
        return self._versions[self._checked(row)]

    def key(self, row: int) -> shards.Key:
        """The object's key, which is also that of its first shard."""
        return bytes(self._keys[self._checked(row)])

    def entry(self, row: int) -> Entry:
        return self._entry(self._checked(row))

    def rows_under(self, prefix: str) -> range:
        """The rows whose path starts with `prefix`, which may end within a name. "" gives all."""
        return self._paths.under(prefix)

    def is_dir(self, path: str) -> bool:
        """Whether objects lie under ``path + "/"``. "" always is; a path may be an object and a directory."""
        return self._paths.is_dir(path)

    def list_dir(self, path: str) -> tuple[list[Entry], list[str]]:
        """The direct children of directory `path`: its objects, and the full paths of its directories, in path order.

        Costs a few bisections a child, however much lies below. Two empty lists where `path` is no directory.
        """
        rows, directories = self._paths.children(path)
        return [self._entry(row) for row in rows], directories

    def glob_rows(self, regex: str, rows: range) -> npt.NDArray[np.int64]:
        """Those of `rows` whose whole path matches `regex` (Python's `re`), ascending.

        A glob's translation by ``fsspec.utils.glob_translate`` runs in RE2 over the mapped column; give the rows under
        the pattern's literal prefix, because every one of `rows` is matched.

        Raises:
            InvalidRequest: `regex` is no regular expression, or `rows` has gaps or reaches outside.
        """
        return self._paths.matching(regex, rows)

    def shard_count(self) -> int:
        """Shards of all objects."""
        return self.first_shard(len(self))

    def first_shard(self, row: int) -> int:
        """The ordinal of the object's first shard in `shard_table`; `shard_count` where `row` is the number of objects.

        An object of no bytes has no shard: its ordinal is that of the next shard.
        """
        rows, surplus = self._surplus
        return row + int(surplus[rows.searchsorted(row)]) if len(rows) else row

    def shards_at(self, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The ordinals of the shards that hold byte ``offsets[i]`` of object ``rows[i]``. Neither is checked."""
        irregular, surplus = self._surplus
        return np.asarray(rows + surplus[np.searchsorted(irregular, rows)] + offsets // self.shard_size, np.int64)

    def shard_table(self, rows: range | None = None) -> ShardTable:
        """The shards of `rows`, by default of all (kept, once asked for).

        Where every object is one shard the keys and sizes are views of the mapping.

        Raises:
            InvalidRequest: `rows` has gaps or reaches outside.
        """
        return self._whole_table if rows is None else self._table(*listing.bounds(rows, len(self)))

    def verify(self) -> None:
        """Read everything and compare it with the digest.

        Raises:
            ShardCorrupt: a byte changed, or the writer broke a rule of the format.
        """
        try:
            self._batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise self._corrupt(str(error)) from error
        if snapshot_file.first_out_of_order(self._batch["path"]) is not None:
            raise self._corrupt("its paths are not sorted")
        if (self._sizes < 0).any():
            raise self._corrupt("it has a negative size")
        if snapshot_file.content_digest(self._batch, self.identity, self.shard_size) != self.digest:
            raise self._corrupt("its content has another digest")

    def _checked(self, row: int) -> int:
        if not 0 <= row < self._count:
            raise NotFound(f"snapshot {self.digest} has no row {row}: it lists {len(self):,} objects")
        return row

    def _entry(self, row: int) -> Entry:
        return Entry(row, self._paths[row], int(self._sizes[row]), self._versions[row])

    def _corrupt(self, reason: str) -> ShardCorrupt:
        return ShardCorrupt(f"snapshot {self.digest} is damaged ({reason}): delete its file and fetch it again")

    # Threads that race to fill a cached property compute equal values, and one of them stays.

    @_once
    def _surplus(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The rows that have not exactly one shard, and how many more shards than rows lie before each (and the end).

        As large as there are such rows: nothing, in the common dataset of small files.
        """
        rows = np.flatnonzero((self._sizes > self.shard_size) | (self._sizes == 0))
        counts = _shard_counts(self._sizes[rows], self.shard_size)
        return rows, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts - 1)])

    @_once
    def _whole_table(self) -> ShardTable:
        return self._table(0, len(self))

    def _table(self, start: int, stop: int) -> ShardTable:
        sizes, keys = self._sizes[start:stop], self._keys[start:stop]
        irregular, _ = self._surplus
        first, last = np.searchsorted(irregular, (start, stop))
        if first == last:
            rows = np.arange(start, stop, dtype=np.uint32)
            return _table(keys, sizes, rows, np.zeros(len(rows), np.uint32))
        counts = _shard_counts(sizes, self.shard_size)
        places = np.repeat(np.arange(len(sizes)), counts)
        indexes = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        keys, sizes = keys[places], np.minimum(sizes[places] - indexes * self.shard_size, self.shard_size)
        later = np.flatnonzero(indexes)
        keys[later] = shards.shard_keys(keys[later], indexes[later].astype(np.uint64))
        return _table(keys, sizes, (places + start).astype(np.uint32), indexes.astype(np.uint32))


def _shard_counts(sizes: npt.NDArray[np.int64], shard_size: int) -> npt.NDArray[np.int64]:
    return -(-sizes // shard_size)  # as `shards.shard_count`


def _table(
    keys: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    rows: npt.NDArray[np.uint32],
    indexes: npt.NDArray[np.uint32],
) -> ShardTable:
    for array in (keys, sizes, rows, indexes):
        array.setflags(write=False)
    return ShardTable(keys, sizes, rows, indexes)
