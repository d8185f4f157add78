"""Many ranges of many objects in few requests: one a shard's first owner, as long as it stays within a batch.

    1. mapped     a range of a shard that this process has mapped is cut from the map
    2. batched    short ranges of other shards, by first owner (`shoal.wire.batch`)
    3. ordinary   long ranges, those of large shards of the local node (which get a map by it), and whatever a batch
                  failed to bring: a read each, with failover

The rule: a batch is only a faster way. Whatever goes wrong in one is left to ordinary reads, whose errors are told.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal import memory, shard_client
from shoal.errors import ShoalError
from shoal.maps import MAP_FROM
from shoal.parallel import run_parallel
from shoal.shards import Piece
from shoal.wire import batch
from shoal.wire.batch import ShardRange

if TYPE_CHECKING:
    import pyarrow as pa

    from shoal.cluster import Cluster
    from shoal.reader import ObjectReader

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, end) of an object, inside it."""

    reader: ObjectReader
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Batch:
    address: str
    digest: str
    numbers: list[int]
    wanted: list[ShardRange]


def read_many(cluster: Cluster, wanted: Sequence[Range], *, verify: bool) -> list[bytes | ShoalError]:
    """The bytes of each range, or the error that reading it raised."""
    found: list[bytes | ShoalError | None] = [None] * len(wanted)
    by_owner: dict[tuple[str, str], list[tuple[int, Piece]]] = defaultdict(list)
    ordinary: list[int] = []
    for number, each in enumerate(wanted):
        pieces = each.reader.pieces(each.start, each.end)
        mapped = each.reader.mapped(pieces[0]) if len(pieces) == 1 else None
        if mapped is not None:
            found[number] = memory.to_bytes(mapped)
            continue
        owner = _batch_owner(cluster, each, pieces)
        if owner is None:
            ordinary.append(number)
        else:
            by_owner[owner].append((number, pieces[0]))

    def read_batch(one: _Batch) -> list[int]:
        """Read one batch; returns the numbers of the ranges that it left out."""
        try:
            buffer, epoch = shard_client.read_batch(
                cluster.transport, one.address, one.digest, one.wanted, verify=verify
            )
        except ShoalError as error:
            log.info("a batch of %d ranges failed, reading them one by one: %s", len(one.wanted), error)
            return one.numbers
        cluster.note_epoch(epoch)
        _take_apart(buffer, one, found)
        return []

    def read_one(number: int) -> None:
        each = wanted[number]
        try:
            found[number] = each.reader.read_bytes(each.start, each.end)
        except ShoalError as error:
            found[number] = error

    batches = [one for owner, ranges in by_owner.items() for one in _batches(owner, ranges, wanted)]
    for left_out in run_parallel(read_batch, batches):
        ordinary += left_out
    run_parallel(read_one, ordinary)
    return [each for each in found if each is not None]


def _batch_owner(cluster: Cluster, each: Range, pieces: Sequence[Piece]) -> tuple[str, str] | None:
    """Address and snapshot of the batch that a range goes into; None where it is read by itself."""
    if len(pieces) != 1 or each.end - each.start > batch.MAX_RANGE_BYTES:
        return None
    try:
        node = each.reader.first_owner(pieces[0].index)
    except ShoalError:
        return None  # the ordinary read has the sentence for it
    shard, local = each.reader.shard(pieces[0].index), cluster.local
    if local is None or node.id != local.node_id:
        return node.address, shard.digest
    return None if shard.size_bytes >= MAP_FROM else (local.address, shard.digest)


def _batches(owner: tuple[str, str], ranges: Sequence[tuple[int, Piece]], wanted: Sequence[Range]) -> Iterator[_Batch]:
    """`ranges` of one owner, cut into batches within the bounds of the protocol."""
    address, digest = owner
    one, size_bytes = _Batch(address, digest, [], []), 0
    for number, piece in ranges:
        length = piece.end - piece.start
        if len(one.wanted) == batch.MAX_RANGES or size_bytes + length > batch.MAX_BYTES:
            yield one
            one, size_bytes = _Batch(address, digest, [], []), 0
        one.numbers.append(number)
        one.wanted.append(ShardRange(wanted[number].reader.row, piece.index, piece.start, length))
        size_bytes += length
    yield one


def _take_apart(buffer: pa.Buffer, one: _Batch, found: list[bytes | ShoalError | None]) -> None:
    view = memory.view(buffer)
    position = 0
    for number, each in zip(one.numbers, one.wanted, strict=True):
        found[number] = bytes(view[position : position + each.length])
        position += each.length
