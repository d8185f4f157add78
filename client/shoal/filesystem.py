"""`ShoalFileSystem`: the cluster's datasets as an fsspec file system, read-only.

    shoal://NAME/path               a dataset's newest snapshot
    shoal://NAME@SNAPSHOT/path      that snapshot
    shoal::s3://bucket/path         the dataset registered over that origin (fsspec's URL chaining)

A file system object pins the newest snapshot of a dataset when it first touches it and keeps it, so that a refresh
never changes a directory under a reader. fsspec keeps one object a process, thread and set of options.

The rule: names are answered from the mapped snapshot; no listing costs a request, and nothing is ever written.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import pyarrow as pa
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.utils import glob_translate

from shoal import arrow, datasets, ranges
from shoal import cluster as cluster_module
from shoal.cluster import Cluster
from shoal.datasets import DatasetRecord
from shoal.direct import DirectOrigin
from shoal.errors import InvalidRequest, NotFound, ReadOnly, ShoalError
from shoal.file import ShoalFile
from shoal.origin import urls
from shoal.ranges import Range
from shoal.reader import TIMEOUT_S, ObjectReader
from shoal.snapshot import Snapshot

_MAGIC = re.compile(r"[*?\[]")
#: Paths whose look-up is remembered, so that opening one again costs a dictionary look-up.
READERS_KEPT = 1 << 16

#: What fsspec itself takes of any file system.
_FSSPEC_OPTIONS = {
    *("skip_instance_cache", "use_listings_cache", "listings_expiry_time", "max_paths"),
    *("asynchronous", "loop", "batch_size"),
}


class Pinned:
    """A dataset as this file system sees it: one snapshot of it, for good.

    Attributes:
        root: how paths of the dataset begin, without a slash at the end.
        since: when it was pinned.
    """

    def __init__(self, root: str, record: DatasetRecord, snapshot: Snapshot) -> None:
        self.root = root
        self.record = record
        self.snapshot = snapshot
        self.since = datetime.now(UTC)


class ShoalFileSystem(ChainedFileSystem):  # type: ignore[misc] # fsspec has no type information
    """Reads datasets from a Shoal cluster.

    Args:
        endpoint: ``http://host:port`` of the controller or any cache node; default ``SHOAL_ENDPOINT``, then the local
            node's socket.
        socket: of the local node; default ``SHOAL_SOCKET``, then ``/run/shoal/node.sock`` where that exists.
        local: False reads over the network even from the node on this machine.
        timeout: seconds that one read may take, all second tries included.
        origin: storage options with which this process may read the origins of datasets that are ``direct``, when no
            cache node answers; for ``shoal::URL`` they are that URL's own. None: it never does.
        verify: False leaves it to the nodes to check parts, instead of comparing the checksum of each part that comes.
        target_protocol, target_options, fo: set by fsspec for ``shoal::URL``.

    Raises:
        shoal.errors.InvalidRequest: `timeout` or `origin` is none, or there is no such option.
        shoal.errors.ClusterUnavailable: nothing answers. At the first use, not here.
    """

    protocol = "shoal"
    root_marker = ""
    async_impl = False

    def __init__(
        self,
        endpoint: str | None = None,
        socket: str | None = None,
        local: bool = True,
        verify: bool = True,
        timeout: float = TIMEOUT_S,
        origin: Mapping[str, Any] | None = None,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        fo: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if unknown := sorted(kwargs.keys() - _FSSPEC_OPTIONS):
            # fsspec would pass over them, and a misspelt `verify` is a check that somebody believes is off, or on.
            raise InvalidRequest(f"shoal has no storage option {', '.join(map(repr, unknown))}: check the spelling")
        self._endpoint = endpoint
        self._socket = socket
        self._use_local = local
        self._verify = verify
        self._target_protocol = target_protocol
        self._target_options = dict(target_options or {})
        self._timeout_s = _check_timeout(timeout)
        if origin is not None and not isinstance(origin, Mapping):
            raise InvalidRequest(
                f"the storage option 'origin' is a {type(origin).__name__}: write a dictionary of the origin's"
            )
        self._origin_options = self._target_options if target_protocol is not None else origin
        self._directs: dict[str, DirectOrigin] = {}
        self._pins: dict[str, Pinned] = {}
        self._promised: dict[str, str] = {}  # root to digest: pins of what this was pickled from
        self._readers: dict[str, ObjectReader] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its pins, so that a spawned worker reads the snapshots that its parent and forked ones do."""
        pins = self._promised | {root: pinned.snapshot.digest for root, pinned in self._pins.items()}
        return _restored, (super().__reduce__(), pins)

    @property
    def cluster(self) -> Cluster:
        """The process's view of the cluster; the first use connects."""
        return cluster_module.connect(self._endpoint, self._socket, use_local=self._use_local)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if path is None:  # fsspec hands this to a chaining file system for the bare "shoal://"
            return cls.root_marker
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        text = os.fspath(path)
        for prefix in ("shoal://", "shoal::"):
            if text.startswith(prefix):
                text = text[len(prefix) :]
                break
        return text.rstrip("/")

    # Finding

    def locate(self, path: str) -> tuple[Pinned, str]:
        """The pinned dataset that `path` lies in, and the path inside it.

        Raises:
            DatasetNotFound, SnapshotNotFound: there is none.
            InvalidRequest: `path` names no dataset.
        """
        path = self._strip_protocol(path)
        if self._target_protocol is not None:
            return self._locate_origin(path)
        parsed = datasets.parse_path(path)
        pinned = self._pins.get(parsed.root)
        if pinned is None:
            record = self.cluster.dataset(parsed.dataset)
            digest = self._promised.get(parsed.root) or datasets.choose_snapshot(record, parsed.snapshot)
            pinned = self.pin(parsed.root, record, self.cluster.snapshot(digest))
        return pinned, parsed.path

    def pin(self, root: str, record: DatasetRecord, snapshot: Snapshot) -> Pinned:
        """Let `root` mean `snapshot` for this file system, unless it means one already; return what it means."""
        return self._pins.setdefault(root, Pinned(root, record, snapshot))

    def _locate_origin(self, path: str) -> tuple[Pinned, str]:
        for root, pinned in self._pins.items():
            if path == root or path.startswith(root + "/"):
                return pinned, path[len(root) :].lstrip("/")
        url = str(urls.parse(path if "://" in path else f"{self._target_protocol}://{path}"))
        record, inside = self.cluster.resolve(url, self._target_endpoint())
        root = path[: len(path) - len(inside)].rstrip("/") if inside else path
        digest = self._promised.get(root, record.snapshot)
        return self.pin(root, record, self.cluster.snapshot(digest)), inside

    def _target_endpoint(self) -> str:
        client = self._target_options.get("client_kwargs") or {}
        return str(self._target_options.get("endpoint_url") or client.get("endpoint_url") or "")

    def _row(self, path: str) -> tuple[Pinned, int]:
        pinned, inside = self.locate(path)
        row = pinned.snapshot.find(inside)
        if row is None:
            if pinned.snapshot.is_dir(inside):
                raise IsADirectoryError(f"{self._strip_protocol(path)} is a directory: name an object in it")
            raise self._absent(pinned, inside)
        return pinned, row

    def _absent(self, pinned: Pinned, inside: str) -> NotFound:
        return NotFound(
            f"{pinned.root}/{inside} is not in snapshot {pinned.snapshot.digest[:8]} of dataset {pinned.record.name}: "
            f"'shoal ls shoal://{pinned.record.name}' lists what is; after a change at the origin run "
            f"'shoal dataset refresh {pinned.record.name}'"
        )

    def _entry(self, pinned: Pinned, row: int) -> dict[str, Any]:
        entry = pinned.snapshot.entry(row)
        name = f"{pinned.root}/{entry.path}" if entry.path else pinned.root
        return {"name": name, "size": entry.size_bytes, "type": "file", "version": entry.version}

    @staticmethod
    def _directory(name: str) -> dict[str, Any]:
        return {"name": name, "size": 0, "type": "directory"}

    # Listing

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The entries directly under `path`, or `path` itself where it is an object. The root lists the datasets."""
        if self._is_root(path):
            entries = [self._directory(r.name) for r in self.cluster.datasets() if not r.adhoc]
        else:
            pinned, inside = self.locate(path)
            entries = self._list(pinned, inside)
        return entries if detail else [entry["name"] for entry in entries]

    def _is_root(self, path: Any) -> bool:
        return self._target_protocol is None and self._strip_protocol(path) == self.root_marker

    def _list(self, pinned: Pinned, inside: str) -> list[dict[str, Any]]:
        snapshot = pinned.snapshot
        row = snapshot.find(inside)
        if row is not None:
            return [self._entry(pinned, row)]
        if not snapshot.is_dir(inside):
            raise self._absent(pinned, inside)
        objects, names = snapshot.list_dir(inside)
        entries = [self._directory(f"{pinned.root}/{name}") for name in names]
        entries += [self._entry(pinned, entry.row) for entry in objects]
        return sorted(entries, key=lambda e: e["name"])

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size in bytes, type and, for objects, the origin's version."""
        if self._is_root(path):
            return self._directory(self.root_marker)
        pinned, inside = self.locate(path)
        row = pinned.snapshot.find(inside)
        if row is not None:
            return self._entry(pinned, row)
        if pinned.snapshot.is_dir(inside):
            return self._directory(f"{pinned.root}/{inside}" if inside else pinned.root)
        raise self._absent(pinned, inside)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether there is an object or a directory at `path`. A cluster that does not answer raises."""
        try:
            self.info(path)
        except (FileNotFoundError, InvalidRequest):
            return False
        return True

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """All objects below `path`; see fsspec."""
        if maxdepth is not None or withdirs or self._is_root(path):
            return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail, **kwargs)
        # A dataset that is not there raises: an empty answer would leave a trainer without data and without a word.
        pinned, inside = self.locate(path)
        row = pinned.snapshot.find(inside)
        rows: Iterable[int] = pinned.snapshot.rows_under(f"{inside}/" if inside else "") if row is None else [row]
        if detail:
            return {entry["name"]: entry for entry in (self._entry(pinned, r) for r in rows)}
        return [f"{pinned.root}/{pinned.snapshot.path(r)}".rstrip("/") for r in rows]

    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
        """As fsspec's, but only directories that match so far are looked into."""
        detail = kwargs.pop("detail", False)
        pattern = self._strip_protocol(path)
        plain = not _MAGIC.search(pattern) or path.endswith("/") or "//" in pattern
        if maxdepth is not None or "**" in pattern or plain:
            return super().glob(path, maxdepth=maxdepth, detail=detail, **kwargs)
        found = [""]
        *parents, last = pattern.split("/")
        for part in parents:
            found = [name for base in found for name in self._matching(base, part, directories_only=True)]
        entries = sorted({name for base in found for name in self._matching(base, last, directories_only=False)})
        return {name: self.info(name) for name in entries} if detail else entries

    def _matching(self, base: str, part: str, *, directories_only: bool) -> list[str]:
        if not _MAGIC.search(part):
            name = f"{base}/{part}" if base else part
            # A name is looked at only when it is the last: until then it is a prefix like "bucket".
            return [name] if directories_only or self.exists(name) else []
        regex = re.compile(glob_translate(part))
        try:
            entries = self.ls(base)
        except (FileNotFoundError, InvalidRequest):
            return []
        names = (e["name"] for e in entries if not directories_only or e["type"] == "directory")
        return [name for name in names if name != base and regex.match(name[len(base) + 1 if base else 0 :])]

    def ukey(self, path: str) -> str:
        """A key that changes with the object's content."""
        pinned, row = self._row(path)
        return pinned.snapshot.key(row).hex()

    def checksum(self, path: str) -> int:
        return int(self.ukey(path), 16)

    # Reading

    def _reader(self, path: str) -> ObjectReader:
        reader = self._readers.get(path)
        if reader is None:
            pinned, row = self._row(path)
            reader = self.object_reader(pinned.record, pinned.snapshot, row)
            # Good for ever, because the snapshot is pinned. Threads may race: what they make is alike.
            if len(self._readers) >= READERS_KEPT:
                self._readers.clear()
            self._readers[path] = reader
        return reader

    def object_reader(self, record: DatasetRecord, snapshot: Snapshot, row: int) -> ObjectReader:
        """A reader of one object of a snapshot, as this file system's options say."""
        return ObjectReader(
            self.cluster,
            snapshot,
            record.replicas,
            row,
            verify=self._verify,
            timeout_s=self._timeout_s,
            direct=self._direct(record),
        )

    def read_ranges(self, wanted: Sequence[Range]) -> list[bytes | ShoalError]:
        """Many ranges at once, in order, short ones as one request an owner; failures in their places."""
        return ranges.read_many(self.cluster, wanted, verify=self._verify, timeout_s=self._timeout_s)

    def _direct(self, record: DatasetRecord) -> DirectOrigin | None:
        if not record.direct or self._origin_options is None:
            return None
        known = self._directs.get(record.name)
        return known or self._directs.setdefault(record.name, DirectOrigin(record, self._origin_options))

    @property
    def direct_bytes(self) -> int:
        """Bytes that this file system read from origins itself, because no cache node answered."""
        return sum(direct.bytes_read for direct in self._directs.values())

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> ShoalFile:
        if mode not in ("rb", "r"):
            self._refuse(f"open {path!r} for writing")
        for unused in ("block_size", "cache_options", "cache_type", "autocommit", "size"):
            kwargs.pop(unused, None)
        return ShoalFile(self, path, self._reader(path), **kwargs)

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        """Open an object for reading; any other mode raises `ReadOnly`."""
        if mode.replace("t", "").replace("b", "") != "r":
            self._refuse(f"open {path!r} with mode {mode!r}")
        return super().open(path, mode, *args, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Bytes [start, end) of an object; negative positions count from its end."""
        reader = self._reader(path)
        return reader.read_bytes(*_positions(start, end, reader.size_bytes))

    def open_buffer(self, path: str) -> pa.Buffer:
        """The whole object as one Arrow buffer, which stays valid as long as it is held.

        An object of one shard that lies on this node is mapped: no byte is copied, and all processes of the machine
        share the pages. One of several shards is gathered into new memory; `open_buffers` avoids that.

        Raises:
            ShoalError: see `shoal.errors`.
        """
        reader = self._reader(path)
        return reader.read_buffer(0, reader.size_bytes)

    def open_buffers(self, path: str) -> list[pa.Buffer]:
        """The whole object as one Arrow buffer a shard, in order; each as `open_buffer` gives it."""
        return self._reader(path).buffers()

    def read_arrow(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The table of an Arrow IPC file or stream, its columns views of the cached bytes where those are mapped.

        Args:
            columns: those to read, in this order; None: all.

        Warns:
            shoal.arrow.ArrowCopyWarning: the file is compressed, so that the table is a copy.

        Raises:
            InvalidRequest: the object is no Arrow IPC data, or has no such column.
            ShoalError: see `shoal.errors`.
        """
        return arrow.read_table(path, self.open_buffers(path), columns)

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Sequence[int | None] | int | None,
        ends: Sequence[int | None] | int | None,
        max_gap: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """Many ranges at once, in order; see fsspec. Short ones become one request an owner (`shoal.ranges`)."""
        if max_gap is not None:
            raise NotImplementedError("max_gap is fsspec's own reserve: leave it out")
        first = list(starts) if isinstance(starts, Sequence) else [starts] * len(paths)
        last = list(ends) if isinstance(ends, Sequence) else [ends] * len(paths)
        if len(first) != len(paths) or len(last) != len(paths):
            raise ValueError("paths, starts and ends must be of one length")
        found: list[Any] = [None] * len(paths)
        numbers, wanted = [], []
        for number, (path, start, end) in enumerate(zip(paths, first, last, strict=True)):
            try:
                reader = self._reader(path)
            except (ShoalError, OSError) as error:
                found[number] = error
            else:
                numbers.append(number)
                wanted.append(Range(reader, *_positions(start, end, reader.size_bytes)))
        results = self.read_ranges(wanted)
        for number, result in zip(numbers, results, strict=True):
            found[number] = result
        if on_error != "return":
            for result in found:
                if isinstance(result, Exception):
                    raise result
        return found

    def modified(self, path: str) -> datetime:
        """The latest time at which the object may have changed for this file system: when it pinned the snapshot.

        Origins tell a version (``info(path)["version"]``), and not all of them a date.
        """
        pinned, _ = self._row(path)
        return pinned.since

    created = modified

    # Refusing

    def _refuse(self, what: str) -> NoReturn:
        raise ReadOnly(
            f"cannot {what}: Shoal is read-only; write to the origin itself, then run 'shoal dataset refresh NAME'"
        )

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        self._refuse(f"make directory {path!r}")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._refuse(f"make directory {path!r}")

    def rmdir(self, path: str) -> None:
        self._refuse(f"remove {path!r}")

    def _rm(self, path: str) -> None:
        self._refuse(f"remove {path!r}")

    rm_file = _rm

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._refuse(f"remove {path!r}")

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._refuse(f"copy to {path2!r}")

    def mv(self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        self._refuse(f"move {path1!r}")

    def put_file(self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **kwargs: Any) -> None:
        self._refuse(f"write {rpath!r}")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._refuse(f"write {path!r}")

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        self._refuse(f"write {path!r}")


def _restored(reduced: tuple[Any, ...], pins: dict[str, str]) -> ShoalFileSystem:
    make, arguments = reduced
    fs: ShoalFileSystem = make(*arguments)
    for root, digest in pins.items():
        fs._promised.setdefault(root, digest)  # a file system of this process may have touched the dataset before
    return fs


def _check_timeout(timeout: Any) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise InvalidRequest(f"the storage option 'timeout' is {timeout!r}: write seconds, a number above 0")
    return float(timeout)


def _positions(start: int | None, end: int | None, size_bytes: int) -> tuple[int, int]:
    """Python's slice rules over an object of `size_bytes`."""
    first, last, _ = slice(start, end).indices(size_bytes)
    return first, max(first, last)
