"""The file of a snapshot: its columns and metadata, its digest, how it is mapped and how it comes into being.

Apart from `shoal.snapshot`, which answers questions about one, because this is what other versions of Shoal must agree
on. The rule: whatever bears a snapshot's final name is whole, synced and never written again.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shoal import datasets, listing, shards
from shoal.errors import InvalidRequest, ShardCorrupt, StoreUnusable
from shoal.origin import key_path

FORMAT = "1"
SUFFIX = ".arrow"
#: Of a snapshot that is being written. A crash may leave one; nothing reads it, so it may be deleted at any start.
TEMPORARY_SUFFIX = ".tmp"

_SCHEMA = pa.schema(
    [
        pa.field("path", pa.large_utf8(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("version", pa.large_utf8(), nullable=False),
        pa.field("key", pa.binary(shards.KEY_SIZE), nullable=False),
    ]
)
#: Rows that exist as Python objects at one time while a listing is written.
_ROWS_PER_BATCH = 1 << 14
_MAX_INT64 = (1 << 63) - 1
#: Ordinals and indexes of shards are 32 bits wide in `ShardTable`.
_MAX_SHARDS = (1 << 32) - 1


def write(
    directory: Path,
    *,
    origin: str,
    identity: str,
    key_prefix: str = "",
    shard_size: int,
    rows: Iterable[tuple[str, int, str]],
) -> Path:
    """Write the snapshot of a listing into `directory` and return its path, ``<digest>.arrow``.

    The file appears whole, synced, or not at all; one of the same digest is left as it is. At its peak this holds the
    columns three times (280 MB for a million objects, whose file has 92), and the rows themselves never at once.

    Args:
        directory: where snapshots lie; it exists.
        origin: URL that the paths are relative to, without credentials.
        identity: what names the origin itself in object keys (`shards.object_key`).
        key_prefix: what stands before each path inside `identity` (`origin.key_path`), so that datasets over nested
            prefixes have equal keys for equal objects.
        shard_size: bytes.
        rows: (path, size in bytes, version), in any order. "" is the path of an origin that is itself one object.

    Raises:
        InvalidRequest: a path is listed twice or cannot be one, a size is missing or negative, or there are too many
            shards. Nothing was written.
        StoreUnusable: `directory` is missing, full or not writable.
    """
    batch = _sorted_batch(rows, origin=origin, identity=identity, key_prefix=key_prefix, shard_size=shard_size)
    digest = content_digest(batch, identity, shard_size)
    path = Path(directory) / f"{digest}{SUFFIX}"
    metadata = {"format": FORMAT, "origin": origin, "identity": identity, "shard_size": str(shard_size)}
    schema = _SCHEMA.with_metadata({f"shoal.{k}": v for k, v in metadata.items()} | {"shoal.digest": digest})
    try:
        if not path.exists():
            with _published(path) as file, pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(batch)
    except OSError as error:
        raise StoreUnusable(
            f"the snapshot {path} cannot be written ({error.strerror or error}): check that the directory exists, "
            "is writable and has room"
        ) from error
    return path


def map_whole(fd: int, name: str) -> mmap.mmap:
    try:
        return mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except ValueError as error:
        raise _not_a_snapshot(name, "it is empty") from error


def read(mapped: mmap.mmap, name: str) -> tuple[Any, dict[str, str]]:
    """The one record batch of a mapped file, its buffers in place, and its metadata without the ``shoal.``.

    Checks what costs no read of the data: the frame, the schema, the lengths of the buffers.
    """
    whole = pa.py_buffer(mapped)
    try:
        with pa.ipc.open_file(whole) as reader:
            raw = reader.schema.metadata or {}
            metadata = {key.decode().removeprefix("shoal."): value.decode() for key, value in raw.items()}
            if metadata.get("format") != FORMAT:
                found = metadata.get("format", "unknown")
                raise _not_a_snapshot(name, f"its format is {found}, this version of Shoal reads {FORMAT}")
            if not reader.schema.equals(_SCHEMA):
                raise _not_a_snapshot(name, "it has other columns")
            if reader.num_record_batches != 1:
                raise _not_a_snapshot(name, "it has not exactly one record batch")
            batch = reader.get_batch(0)
        batch.validate()
        datasets.check_digest(metadata["digest"])
        if int(metadata["shard_size"]) < 1 or not {"origin", "identity"} <= metadata.keys():
            raise _not_a_snapshot(name, "its metadata is incomplete")
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _not_a_snapshot(name, str(error)) from error
    begin, end = whole.address, whole.address + whole.size
    for column in batch.columns:
        if column.null_count:
            raise _not_a_snapshot(name, "it has nulls")
        # Compressed buffers would be unpacked into this process: right, but no longer shared.
        if any(b and not begin <= b.address <= b.address + b.size <= end for b in column.buffers()):
            raise _not_a_snapshot(name, "it is compressed")
    if any(listing.text_buffers(batch[column])[0][0] for column in ("path", "version")):
        raise _not_a_snapshot(name, "its text does not begin at 0")
    return batch, metadata


def content_digest(batch: Any, identity: str, shard_size: int) -> str:
    """32 hex digits of XXH3-128 over the content, each part of a length that the parts before it imply."""
    state = xxhash.xxh3_128(f"shoal.snapshot/{FORMAT}\0{identity}\0{shard_size}\0{len(batch)}\0".encode())
    for part in (
        *listing.text_buffers(batch["path"]),
        listing.numbers(batch["size"], "<i8"),
        *listing.text_buffers(batch["version"]),
        listing.numbers(batch["key"], "<u8"),
    ):
        state.update(part.data)
    return state.hexdigest()


def first_out_of_order(paths: Any) -> int | None:
    """The first row whose path is not below the next one's; None where all ascend strictly."""
    if len(paths) < 2:
        return None
    # Not `pc.index`, which imports pandas.
    wrong = pc.indices_nonzero(pc.greater_equal(paths.slice(0, len(paths) - 1), paths.slice(1)))
    return int(listing.numbers(wrong, "<u8")[0]) if len(wrong) else None


def _not_a_snapshot(name: str, reason: str) -> ShardCorrupt:
    return ShardCorrupt(f"{name} is no snapshot, or a damaged one ({reason}): delete it and fetch it again")


def _sorted_batch(
    rows: Iterable[tuple[str, int, str]], *, origin: str, identity: str, key_prefix: str, shard_size: int
) -> Any:
    """The columns of a snapshot: checked, sorted, each in one piece."""
    if shard_size < 1 or "\0" in identity or not listing.is_text(origin + identity):
        raise InvalidRequest(f"a snapshot of {origin!r} needs a positive shard size, and Unicode text as its identity")
    batches, total_bytes, total_shards = [], 0, 0
    remaining = iter(rows)
    while group := list(itertools.islice(remaining, _ROWS_PER_BATCH)):
        for path, size, version in group:
            _check(origin, path, size, version)
        keys = b"".join(
            [
                shards.object_key(identity, key_path(key_prefix, path), version, size, shard_size)
                for path, size, version in group
            ]
        )
        paths, sizes, versions = zip(*group, strict=True)
        total_bytes += sum(sizes)
        total_shards += sum(shards.shard_count(size, shard_size) for size in sizes)
        if total_bytes > _MAX_INT64 or total_shards > _MAX_SHARDS:
            raise InvalidRequest(
                f"{origin} has more than {_MAX_SHARDS:,} shards of {shard_size:,} bytes: "
                "choose a larger shard size, or make several datasets of it"
            )
        binary = pa.FixedSizeBinaryArray.from_buffers(_SCHEMA.field("key").type, len(group), [None, pa.py_buffer(keys)])
        columns = [
            pa.array(paths, pa.large_utf8()),
            pa.array(sizes, pa.int64()),
            pa.array(versions, pa.large_utf8()),
            binary,
        ]
        batches.append(pa.record_batch(columns, schema=_SCHEMA))
    table = pa.Table.from_batches(batches, _SCHEMA)
    del batches
    if first_out_of_order(table["path"]) is not None:  # S3 lists in order: then there is nothing to move
        table = table.take(pc.sort_indices(table["path"]))
    batch = pa.record_batch([column.combine_chunks() for column in table.columns], schema=_SCHEMA)
    if (row := first_out_of_order(batch["path"])) is not None:
        raise InvalidRequest(
            f"{origin} lists {batch['path'][row].as_py()!r} twice: list it again, or register a prefix without it"
        )
    return batch


def _check(origin: str, path: str, size_bytes: int, version: str) -> None:
    """Refuse a row that could not be found again, or not be told from another one.

    Types are checked because rows come from libraries that leave a size or a version out where a server does.
    """
    if type(path) is not str or type(version) is not str:
        reason = "has no path or no version"
    elif type(size_bytes) is not int or size_bytes < 0:
        reason = f"has no size (but {size_bytes!r})"
    elif path.startswith("/") or path.endswith("/"):
        reason = "begins or ends with '/'"
    elif "\0" in path or "\0" in version:
        reason = "has a NUL in its path or version"
    elif not (listing.is_text(path) and listing.is_text(version)):
        reason = "is not Unicode text"
    else:
        return
    raise InvalidRequest(f"{origin}: the object {path!r} {reason}: correct the origin, or register a prefix without it")


@contextlib.contextmanager
def _published(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` at the end, synced with its directory; on an error nothing is left."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.stem}.", suffix=TEMPORARY_SUFFIX, delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).rename(path)
        except BaseException:
            Path(file.name).unlink()
            raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
