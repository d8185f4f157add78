"""Reads of one object: cut the range into pieces, find each piece's owners, fetch the pieces at once.

    1. plan       pieces of the range, one a shard (shards.pieces)
    2. local      a shard of the node on this machine: its descriptor, mapped; nothing is copied. One that is still
                  filling is streamed in the same request, and mapped at a later read
    3. remote     each piece from its first owner, straight into the caller's buffer, its parts checked as they come
    4. failover   the next owner, then any node, for the bytes that are still missing

The rule: the bytes are right or there is an error. A piece that failed half-way goes on at the byte it reached.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping

import pyarrow as pa

from shoal import memory, shard_client, shards, transport
from shoal.cluster import Cluster
from shoal.cluster_map import Node
from shoal.connection import DescriptorsLost, Interrupted
from shoal.errors import NodeUnavailable, ShardCorrupt, ShoalError
from shoal.local import TAKES_DESCRIPTORS
from shoal.parallel import run_parallel
from shoal.shard_client import ShardAt
from shoal.shards import PART_SIZE, Piece
from shoal.snapshot import Snapshot

log = logging.getLogger(__name__)

#: A piece at least twice as long is received over several connections, where there are processors for them.
STREAM_BYTES = 4 * PART_SIZE
#: One connection fills one processor on either side, so fewer than one in four of them would gain nothing.
MAX_STREAMS = max(1, min(4, len(os.sched_getaffinity(0)) // 4))


class ObjectReader:
    """Reads of one object of one snapshot. Never changes: threads may share it.

    Attributes:
        row: of the object in the snapshot.
        size_bytes: of the object.
    """

    __slots__ = ("_cluster", "_first_shard", "_replicas", "_shard_size", "_snapshot", "_verify", "row", "size_bytes")

    def __init__(self, cluster: Cluster, snapshot: Snapshot, replicas: int, row: int, *, verify: bool) -> None:
        self.row = row
        self.size_bytes = snapshot.size(row)
        self._cluster, self._snapshot, self._replicas, self._verify = cluster, snapshot, replicas, verify
        self._shard_size = snapshot.shard_size
        self._first_shard = snapshot.first_shard(row)

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        """Bytes [start, end), cut at the object's end, as an Arrow buffer.

        Where they lie in one shard of the local node, the buffer is a view of the map: no copy. Else it is a new one.
        Either way it stays valid for as long as it is held.

        Raises:
            ShoalError: see `shoal.errors`.
        """
        start, end = self._clip(start, end)
        pieces = self.pieces(start, end)
        if len(pieces) == 1:
            return self._read_piece(pieces[0])
        buffer = memory.allocate(end - start)
        self._gather(pieces, memory.view(buffer))
        return buffer

    def buffers(self) -> list[pa.Buffer]:
        """The whole object as one buffer a shard, each as `read_buffer` gives it. Raises as `read_buffer`."""
        return run_parallel(self._read_piece, self.pieces(0, self.size_bytes))

    def read_bytes(self, start: int, end: int) -> bytes:
        """Bytes [start, end), cut at the object's end, as `bytes`: received or copied once. Raises as `read_buffer`."""
        start, end = self._clip(start, end)
        pieces = self.pieces(start, end)
        mapped = self.mapped(pieces[0]) if len(pieces) == 1 else None
        if mapped is not None:
            return memory.to_bytes(mapped)
        return memory.make_bytes(end - start, lambda view: self._gather(pieces, view))

    def read_into(self, start: int, end: int, view: memoryview) -> int:
        """Receive bytes [start, end), cut at the object's end, into the beginning of `view`; return how many.

        Raises:
            ShoalError: see `shoal.errors`.
        """
        start, end = self._clip(start, min(end, start + len(view)))
        self._gather(self.pieces(start, end), view[: end - start])
        return end - start

    def pieces(self, start: int, end: int) -> list[Piece]:
        """The range, cut into one piece a shard."""
        return list(shards.pieces(start, end, self.size_bytes, self._shard_size))

    def mapped(self, piece: Piece) -> pa.Buffer | None:
        """The bytes of `piece` where this process has mapped their shard; asks nobody."""
        local = self._cluster.local
        whole = local.maps.get((self._snapshot.digest, self.row, piece.index)) if local is not None else None
        return None if whole is None else _slice(whole, piece)

    def shard(self, index: int) -> ShardAt:
        """Where shard `index` of the object is found."""
        length = shards.shard_length(self.size_bytes, self._shard_size, index)
        return ShardAt(self._snapshot.digest, self.row, index, length)

    def first_owner(self, index: int) -> Node:
        """The node that a shard is asked of first, unless another owner is nearer. Raises ClusterUnavailable."""
        placement = self._cluster.placement(self._snapshot, self._replicas)
        return placement.first(self._first_shard + index, self._key(index))

    def _clip(self, start: int, end: int) -> tuple[int, int]:
        end = min(end, self.size_bytes)
        return min(start, end), end

    def _key(self, index: int) -> shards.Key:
        return shards.shard_key(self._snapshot.key(self.row), index)

    def _read_piece(self, piece: Piece) -> pa.Buffer:
        mapped = self.mapped(piece)
        if mapped is not None:
            return mapped
        target = _Target(piece.end - piece.start)
        whole = self._fetch(piece, target)
        return target.buffer if whole is None else _slice(whole, piece)

    def _gather(self, pieces: list[Piece], view: memoryview) -> None:
        jobs = []
        offset = 0
        for piece in pieces:
            length = piece.end - piece.start
            jobs.append((piece, view[offset : offset + length]))
            offset += length
        run_parallel(lambda job: self._fill(*job), jobs)

    def _fill(self, piece: Piece, view: memoryview) -> None:
        mapped = self.mapped(piece)
        if mapped is None:
            whole = self._fetch(piece, _Target(len(view), view))
            if whole is None:
                return
            mapped = _slice(whole, piece)
        memory.copy(mapped, view)

    def _fetch(self, piece: Piece, target: _Target) -> pa.Buffer | None:
        """Receive `piece` into `target`; or the whole shard, mapped, where the local node passed its descriptor."""
        cuts = self._cuts(piece)
        if len(cuts) == 1:
            return self._from_nodes(piece, target)

        def fetch(cut: Piece) -> None:
            part = target.part(cut.start - piece.start, cut.end - piece.start)
            view = part.view()  # all of it: later it is what is missing
            whole = self._from_nodes(cut, part)
            if whole is not None:  # the local node stood in for the owner
                memory.copy(_slice(whole, cut), view)

        target.view()  # allocated here: the threads share it
        run_parallel(fetch, cuts)
        return None

    def _cuts(self, piece: Piece) -> list[Piece]:
        """`piece`, cut for several connections where it is long and comes from another node."""
        streams = min(MAX_STREAMS, (piece.end - piece.start) // STREAM_BYTES)
        local = self._cluster.local
        if streams < 2 or (local is not None and any(n.id == local.node_id for n in self._owners(piece.index))):
            return [piece]
        step = -(-(piece.end - piece.start) // streams // PART_SIZE) * PART_SIZE
        edges = [piece.start, *range((piece.start // PART_SIZE) * PART_SIZE + step, piece.end, step), piece.end]
        return [Piece(piece.index, start, end) for start, end in itertools.pairwise(edges)]

    def _owners(self, index: int) -> tuple[Node, ...]:
        placement = self._cluster.placement(self._snapshot, self._replicas)
        return placement.order(self._first_shard + index, self._key(index))[: placement.replicas]

    def _candidates(self, index: int) -> Iterator[Node]:
        """Whom to ask, in order: the owners, the local node first of them, then everybody else by preference."""
        placement = self._cluster.placement(self._snapshot, self._replicas)
        ordinal, key = self._first_shard + index, self._key(index)
        local = self._cluster.local
        first = placement.first(ordinal, key)
        if placement.replicas == 1 or local is None or first.id == local.node_id:
            yield first  # mostly the end of it, and the whole order costs more than a request to the local node
            yield from placement.order(ordinal, key)[1:]
            return
        order = placement.order(ordinal, key)
        yield from sorted(order[: placement.replicas], key=lambda node: node.id != local.node_id)
        yield from order[placement.replicas :]

    def _from_nodes(self, piece: Piece, target: _Target) -> pa.Buffer | None:
        """As `_fetch`, over one connection at a time, with failover.

        Raises:
            ShoalError: nobody gives the bytes, or a failure that another node would repeat.
        """
        shard = self.shard(piece.index)
        asked, epoch = 0, -1
        failure: ShoalError | None = None
        # Everybody in the map may have failed because a newer map names others; that is worth one more round.
        while failure is None or self._cluster.newer_map(epoch):
            epoch = self._cluster.map.epoch
            for node in self._candidates(piece.index):
                asked += 1
                try:
                    return self._from_node_or_healed(node, shard, piece, target)
                except Interrupted as error:
                    target.done += error.received
                    failure = failure if isinstance(failure, ShardCorrupt) else error
                except ShoalError as error:
                    if not transport.is_worth_another_node(error):
                        raise
                    failure = failure if isinstance(failure, ShardCorrupt) else error
                log.info("node %s failed, asking the next: %s", node.id, failure)
        if not isinstance(failure, NodeUnavailable):
            raise failure
        path = self._snapshot.path(self.row)
        raise NodeUnavailable(f"no cache node gave bytes of {path!r}, {asked} were asked: {failure}") from failure

    def _from_node_or_healed(self, node: Node, shard: ShardAt, piece: Piece, target: _Target) -> pa.Buffer | None:
        """From `node`; once more where its copy is bad, which it then drops and fetches anew."""
        try:
            return self._from_node(node, shard, piece, target, {})
        except ShardCorrupt as error:
            log.warning("node %s sent damaged bytes, asking it to check its copy: %s", node.id, error)
            return self._from_node(node, shard, piece, target, shard_client.SUSPECT)

    def _from_node(
        self, node: Node, shard: ShardAt, piece: Piece, target: _Target, headers: Mapping[str, str]
    ) -> pa.Buffer | None:
        local = self._cluster.local
        if local is None or node.id != local.node_id:
            local = None
        is_mappable = local is not None
        while True:
            try:
                answer = shard_client.read(
                    self._cluster.transport,
                    node.address if local is None else local.address,
                    shard,
                    piece.start + target.done,
                    piece.end,
                    target.view,
                    verify=self._verify,
                    headers={**headers, **TAKES_DESCRIPTORS} if is_mappable else headers,
                )
            except DescriptorsLost:
                is_mappable = False
                continue
            self._cluster.note_epoch(answer.epoch)
            if not answer.descriptors or local is None:
                return None
            whole = local.adopt(shard.id, answer)
            if whole is not None:
                return whole
            is_mappable = False


class _Target:
    """Where a piece is received: `view` is what is still missing of it, allocated when bytes come."""

    __slots__ = ("_buffer", "_length", "_view", "done")

    def __init__(self, length: int, view: memoryview | None = None) -> None:
        self._length = length
        self._view = view
        self._buffer: pa.Buffer | None = None
        self.done = 0

    @property
    def buffer(self) -> pa.Buffer:
        """The buffer of all that came, where no view was given. Valid as long as it is held."""
        assert self._buffer is not None, "nothing came"
        return self._buffer

    def view(self) -> memoryview:
        if self._view is None:
            self._buffer = memory.allocate(self._length)
            self._view = memory.view(self._buffer)
        return self._view[self.done :]

    def part(self, start: int, end: int) -> _Target:
        """A target over bytes [start, end) of this one."""
        return _Target(end - start, self.view()[start:end])


def _slice(whole: pa.Buffer, piece: Piece) -> pa.Buffer:
    length = piece.end - piece.start
    return whole if length == whole.size else whole.slice(piece.start, length)
