"""Many ranges of many objects in few requests: one a shard's first owner, as long as it stays within a batch.

    1. mapped     a range of a shard that this process has mapped is cut from the map
    2. batched    short ranges of other shards, by first owner that answers (`shoal.wire.batch`); those of a node that
                  failed are batched anew for the next owners, a few times
    3. ordinary   long ranges, those of large shards of the local node (which get a map by it), and whatever batches
                  failed to bring: a read each, with failover

The rule: a batch is only a faster way. Whatever goes wrong in one is left to ordinary reads, whose errors are told.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal import memory, provenance, shard_client
from shoal.errors import Overloaded, ShoalError, Unavailable
from shoal.maps import MAP_FROM
from shoal.parallel import run_parallel
from shoal.shards import Piece
from shoal.wire import batch
from shoal.wire.batch import ShardRange
from shoal.wire.stream_post import Cause

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


#: How often ranges are batched: once, and again where a node failed.
ROUNDS = 3


_Owner = tuple[str, str, str]
"""Id and address of a node, and a snapshot."""


@dataclass(frozen=True, slots=True)
class _Batch:
    node_id: str
    address: str
    digest: str
    numbers: list[int]
    wanted: list[ShardRange]


def read_many(cluster: Cluster, wanted: Sequence[Range], *, verify: bool, timeout_s: float) -> list[bytes | ShoalError]:
    """The bytes of each range, or the error that reading it raised; all of them within `timeout_s`."""
    until = time.monotonic() + timeout_s
    found: list[bytes | ShoalError | None] = [None] * len(wanted)
    ordinary: list[int] = []
    failed: set[str] = set()

    def read_batch(one: _Batch) -> list[int]:
        """Read one batch; returns the numbers of the ranges that may be batched again."""
        observation, since = provenance.current(), time.monotonic()
        try:
            buffer, answer = shard_client.read_batch(
                cluster.transport,
                one.address,
                one.digest,
                one.wanted,
                verify=verify,
                headers=cluster.avoiding(one.address) | shard_client.time_left(until),
                until=until,
            )
        except ShoalError as error:
            log.info("a batch of %d ranges failed: %s", len(one.wanted), error)
            if observation is not None:
                observation.add(Cause.OTHER, one.node_id, since, 0)
            if isinstance(error, Unavailable | Overloaded):
                failed.add(one.address)
                return one.numbers
            ordinary.extend(one.numbers)
            return []
        cluster.note_epoch(answer.epoch)
        if observation is not None:
            is_local = cluster.local is not None and cluster.local.node_id == one.node_id
            observation.add(provenance.cause_of(answer.headers, is_local=is_local), one.node_id, since, buffer.size)
        _take_apart(buffer, one, found)
        return []

    def read_one(number: int) -> None:
        each = wanted[number]
        try:
            found[number] = each.reader.read_bytes(each.start, each.end, until)
        except ShoalError as error:
            found[number] = error

    left: Sequence[int] = range(len(wanted))
    for _ in range(ROUNDS):
        by_owner: dict[_Owner, list[tuple[int, Piece]]] = defaultdict(list)
        for number in left:
            each = wanted[number]
            pieces = each.reader.pieces(each.start, each.end)
            mapped = each.reader.mapped(pieces[0]) if len(pieces) == 1 else None
            if mapped is not None:
                found[number] = memory.to_bytes(mapped)
                continue
            owner = _batch_owner(cluster, each, pieces, failed)
            if owner is None:
                ordinary.append(number)
            else:
                by_owner[owner].append((number, pieces[0]))
        batches = [one for owner, ranges in by_owner.items() for one in _batches(owner, ranges, wanted)]
        left = list(itertools.chain.from_iterable(run_parallel(read_batch, batches)))
        if not left:
            break
    run_parallel(read_one, [*ordinary, *left])
    return [each for each in found if each is not None]


def _batch_owner(cluster: Cluster, each: Range, pieces: Sequence[Piece], failed: Collection[str]) -> _Owner | None:
    """Where the batch goes that a range goes into; None where it is read by itself."""
    if len(pieces) != 1 or each.end - each.start > batch.MAX_RANGE_BYTES:
        return None
    try:
        node = each.reader.first_owner(pieces[0].index, failed)
    except ShoalError:
        return None  # the ordinary read has the sentence for it
    shard, local = each.reader.shard(pieces[0].index), cluster.local
    if local is None or node.id != local.node_id:
        return node.id, node.address, shard.digest
    return None if shard.size_bytes >= MAP_FROM else (node.id, local.address, shard.digest)


def _batches(owner: _Owner, ranges: Sequence[tuple[int, Piece]], wanted: Sequence[Range]) -> Iterator[_Batch]:
    """`ranges` of one owner, cut into batches within the bounds of the protocol."""
    one, size_bytes = _Batch(*owner, [], []), 0
    for number, piece in ranges:
        length = piece.end - piece.start
        if len(one.wanted) == batch.MAX_RANGES or size_bytes + length > batch.MAX_BYTES:
            yield one
            one, size_bytes = _Batch(*owner, [], []), 0
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
