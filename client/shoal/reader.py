"""Reads of one object: cut the range into pieces, find each piece's owners, fetch the pieces at once.

    1. plan       pieces of the range, one a shard (shards.pieces)
    2. local      a shard of the node on this machine: its descriptor, mapped; nothing is copied. One that is still
                  filling is streamed in the same request, and mapped at a later read
    3. remote     each piece from its first owner, straight into the caller's buffer, its parts checked as they come
    4. failover   the next owner, then any node, for the bytes that are still missing (`shoal.failover`); then the
                  origin itself, where the dataset and the caller allow it (`shoal.direct`); at last all once more

The rule: the bytes are right or there is an error. A piece that failed half-way goes on at the byte it reached.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping

import pyarrow as pa
import tenacity

from shoal import memory, provenance, shard_client, shards
from shoal.cluster import Cluster
from shoal.cluster_map import Node
from shoal.direct import DirectOrigin
from shoal.errors import (
    ClusterUnavailable,
    DeadlineExceeded,
    NodeUnavailable,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal.failover import PieceRead, Target
from shoal.memory import Allocate
from shoal.parallel import run_parallel
from shoal.shard_client import ShardAt
from shoal.shards import PART_SIZE, Piece
from shoal.snapshot import Snapshot
from shoal.wire.stream_post import Cause

log = logging.getLogger(__name__)

#: A piece at least twice as long is received over several connections, where there are processors for them.
STREAM_BYTES = 4 * PART_SIZE
#: One connection fills one processor on either side, so fewer than one in four of them would gain nothing.
MAX_STREAMS = max(1, min(4, len(os.sched_getaffinity(0)) // 4))


_AS_USUAL: Mapping[str, str] = {}

#: Seconds that a read may take in all, unless the storage option ``timeout`` says otherwise.
TIMEOUT_S = 300.0


class ObjectReader:
    """Reads of one object of one snapshot. Never changes: threads may share it.

    Args:
        timeout_s: of one read, all failures and second tries included.
        direct: the dataset's origin, where this process may read it when no node answers.
        is_kept: nodes are to keep what they fetch for it. Else they pass on what they do not have, and just that.

    Attributes:
        row: of the object in the snapshot.
        size_bytes: of the object.
    """

    __slots__ = (
        "_cluster",
        "_direct",
        "_first_shard",
        "_headers",
        "_replicas",
        "_shard_size",
        "_snapshot",
        "_verify",
        "row",
        "size_bytes",
        "timeout_s",
    )

    def __init__(
        self,
        cluster: Cluster,
        snapshot: Snapshot,
        replicas: int,
        row: int,
        *,
        verify: bool,
        timeout_s: float = TIMEOUT_S,
        direct: DirectOrigin | None = None,
        is_kept: bool = True,
    ) -> None:
        self._headers = _AS_USUAL if is_kept else shard_client.NO_STORE
        self.timeout_s = timeout_s
        self._direct = direct
        self.row = row
        self.size_bytes = snapshot.size(row)
        self._cluster, self._snapshot, self._replicas, self._verify = cluster, snapshot, replicas, verify
        self._shard_size = snapshot.shard_size
        self._first_shard = snapshot.first_shard(row)

    def read_buffer(
        self, start: int, end: int, until: float | None = None, *, allocate: Allocate | None = None
    ) -> pa.Buffer:
        """Bytes [start, end), cut at the object's end, as an Arrow buffer.

        Where they lie in one shard of the local node, the buffer is a view of the map: no copy. Else it is a new one.
        Either way it stays valid for as long as it is held.

        Args:
            until: `time.monotonic` at which the caller's time is over, where that is not `timeout_s` from now.
            allocate: gives the memory of a new one; None: `memory.allocate`.

        Raises:
            ShoalError: see `shoal.errors`.
        """
        start, end = self._clip(start, end)
        pieces = self.pieces(start, end)
        if len(pieces) == 1:
            return self._read_piece(pieces[0], until, allocate)
        buffer = (allocate or memory.allocate)(end - start)
        self._gather(pieces, memory.view(buffer), time.monotonic() + self.timeout_s if until is None else until)
        return buffer

    def buffers(self) -> list[pa.Buffer]:
        """The whole object as one buffer a shard, each as `read_buffer` gives it. Raises as `read_buffer`."""
        until = time.monotonic() + self.timeout_s
        return run_parallel(lambda piece: self._read_piece(piece, until), self.pieces(0, self.size_bytes))

    def read_bytes(self, start: int, end: int, until: float | None = None) -> bytes:
        """Bytes [start, end), cut at the object's end, as `bytes`: received or copied once. Raises as `read_buffer`.

        Args:
            until: `time.monotonic` at which the caller's time is over, where that is not `timeout_s` from now.
        """
        start, end = self._clip(start, end)
        pieces = self.pieces(start, end)
        mapped = self.mapped(pieces[0]) if len(pieces) == 1 else None
        if mapped is not None:
            return memory.to_bytes(mapped)
        limit = time.monotonic() + self.timeout_s if until is None else until
        return memory.make_bytes(end - start, lambda view: self._gather(pieces, view, limit))

    def read_into(self, start: int, end: int, view: memoryview) -> int:
        """Receive bytes [start, end), cut at the object's end, into the beginning of `view`; return how many.

        Raises:
            ShoalError: see `shoal.errors`.
        """
        start, end = self._clip(start, min(end, start + len(view)))
        self._gather(self.pieces(start, end), view[: end - start], time.monotonic() + self.timeout_s)
        return end - start

    def pieces(self, start: int, end: int) -> list[Piece]:
        """The range, cut into one piece a shard."""
        if 0 <= start < end <= min(self.size_bytes, self._shard_size):
            return [Piece(0, start, end)]
        return list(shards.pieces(start, end, self.size_bytes, self._shard_size))

    def mapped(self, piece: Piece) -> pa.Buffer | None:
        """The bytes of `piece` where this process has mapped their shard; asks nobody. For a read: it is observed."""
        local = self._cluster.local
        whole = local.maps.get((self._snapshot.digest, self.row, piece.index)) if local is not None else None
        if whole is None or local is None:
            return None
        observation = provenance.current()
        if observation is not None:
            observation.add(Cause.LOCAL, local.node_id, time.monotonic(), piece.end - piece.start)
        return _slice(whole, piece)

    def shard(self, index: int) -> ShardAt:
        """Where shard `index` of the object is found."""
        length = shards.shard_length(self.size_bytes, self._shard_size, index)
        return ShardAt(self._snapshot.digest, self.row, index, length)

    def local_descriptor(self) -> int | None:
        """A descriptor of the sealed file that is this whole object, from the node on this machine; the caller's.

        None where the object is not just one shard, the local node is no owner of it, or does not have it now.

        Raises:
            ClusterUnavailable: no node may own the shard.
        """
        local = self._cluster.local
        return local.descriptor(self.shard(0)) if local is not None and self.is_for_local_node() else None

    def is_for_local_node(self) -> bool:
        """Whether the object is just one shard, which the node on this machine owns: it has its file, or may have it.

        Raises:
            ClusterUnavailable: no node may own the shard.
        """
        local = self._cluster.local
        if local is None or not 0 < self.size_bytes <= self._shard_size:
            return False
        return any(node.id == local.node_id for node in self.owners(0))

    def is_cached(self, index: int) -> bool:
        """Whether an owner of shard `index` has it sealed: asks them. One that does not answer has nothing."""
        shard = self.shard(index)
        for node in self.owners(index):
            try:
                self._cluster.transport.get(
                    self._cluster.address_of(node),
                    shard.target,
                    {"Range": "bytes=0-0", **shard_client.ONLY_IF_CACHED},
                    is_hasty=True,
                )
                return True
            except ShoalError as error:
                log.debug("node %s gives no byte of %s from its cache: %s", node.id, shard, error)
        return False

    def tell_of_use(self, told: set[str]) -> int:
        """Tell the owners of one of the object's shards that its dataset is in use; returns how many heard it.

        For a process whose reads reach no node. One that does not answer is passed over.

        Args:
            told: ids of nodes that need not be told. Those that are asked here come to it.

        Raises:
            ClusterUnavailable: no node may own the shard.
        """
        index = random.randrange(shards.shard_count(self.size_bytes, self._shard_size)) if self.size_bytes else 0
        shard, heard = self.shard(index), 0
        for node in self.owners(index):
            if node.id in told:
                continue
            told.add(node.id)
            try:
                self._cluster.transport.get(self._cluster.address_of(node), shard.target, method="HEAD", is_hasty=True)
                heard += 1
            except ShoalError as error:
                log.debug("node %s does not hear that %s is in use: %s", node.id, shard, error)
        return heard

    def first_owner(self, index: int, failed: Collection[str] = ()) -> Node:
        """The node that a shard is asked of first, unless another owner is nearer.

        Args:
            failed: addresses that are passed over where there are others.

        Raises:
            ClusterUnavailable: no node may own the shard.
        """
        if failed or self._cluster.transport.health.circuits:
            nodes = list(self.candidates(index))
            return next((node for node in nodes if self._cluster.address_of(node) not in failed), nodes[0])
        placement = self._cluster.placement(self._snapshot, self._replicas)
        return placement.first(self._first_shard + index, functools.partial(self._key, index))

    def _clip(self, start: int, end: int) -> tuple[int, int]:
        end = min(end, self.size_bytes)
        return min(start, end), end

    def _key(self, index: int) -> shards.Key:
        return shards.shard_key(self._snapshot.key(self.row), index)

    def _read_piece(self, piece: Piece, until: float | None = None, allocate: Allocate | None = None) -> pa.Buffer:
        mapped = self.mapped(piece)
        if mapped is not None:
            return mapped
        target = Target(piece.end - piece.start, allocate=allocate)
        whole = self._fetch(piece, target, time.monotonic() + self.timeout_s if until is None else until)
        return target.buffer if whole is None else _slice(whole, piece)

    def _gather(self, pieces: list[Piece], view: memoryview, until: float) -> None:
        jobs = []
        offset = 0
        for piece in pieces:
            length = piece.end - piece.start
            jobs.append((piece, view[offset : offset + length]))
            offset += length
        run_parallel(lambda job: self._fill(*job, until), jobs)

    def _fill(self, piece: Piece, view: memoryview, until: float) -> None:
        mapped = self.mapped(piece)
        if mapped is None:
            whole = self._fetch(piece, Target(len(view), view), until)
            if whole is None:
                return
            mapped = _slice(whole, piece)
        memory.copy(mapped, view)

    def _fetch(self, piece: Piece, target: Target, until: float) -> pa.Buffer | None:
        """Receive `piece` into `target`; or the whole shard, mapped, where the local node passed its descriptor."""
        try:
            cuts = self._cuts(piece)
        except Unavailable:
            cuts = [piece]  # nobody is up: said, or helped, below
        if len(cuts) == 1:
            return self._receive(piece, target, until)

        def fetch(cut: Piece) -> None:
            part = target.part(cut.start - piece.start, cut.end - piece.start)
            view = part.view()  # all of it: later it is what is missing
            whole = self._receive(cut, part, until)
            if whole is not None:  # the local node stood in for the owner
                memory.copy(_slice(whole, cut), view)

        target.view()  # allocated here: the threads share it
        run_parallel(fetch, cuts)
        return None

    def _receive(self, piece: Piece, target: Target, until: float) -> pa.Buffer | None:
        """As `_fetch`, over one connection at a time.

        Raises:
            ShoalError: nobody gives the bytes, or a failure that another node would repeat.
        """
        shard = self.shard(piece.index)
        read = PieceRead(self._cluster, shard, piece, target, self.candidates, until, self._verify, self._headers)
        try:
            return self._unless_overloaded(read, until)
        except DeadlineExceeded as error:
            raise self._too_late(error) from error
        except Unavailable as error:
            failure = error
        refusal: ShoalError | None = None
        if self._direct is not None:
            offset = piece.index * self._shard_size + piece.start + target.done
            since, left = time.monotonic(), target.view()
            version = self._snapshot.version(self.row)
            try:
                self._direct.read_into(self._snapshot.path(self.row), version, offset, left, failure, until)
            except DeadlineExceeded as error:
                raise self._too_late(error) from error
            except ShoalError as error:
                log.info("the origin gives no bytes either, asking all nodes once more: %s", error)
                refusal = error
            else:
                observation = provenance.current()
                if observation is not None:
                    observation.add(Cause.ORIGIN, "", since, len(left))
                return None
        try:
            return read.from_late()
        except DeadlineExceeded as error:
            raise self._too_late(error) from error
        except Unavailable as error:
            if refusal is not None:
                raise refusal from failure
            if isinstance(error, ClusterUnavailable):
                raise
            raise NodeUnavailable(
                f"no cache node gave bytes of {self._snapshot.path(self.row)!r}, {failure}; 'shoal status' says which "
                "nodes are up, and a dataset that is --direct can be read without any"
            ) from failure

    def _unless_overloaded(self, read: PieceRead, until: float) -> pa.Buffer | None:
        """As `PieceRead.from_nodes`; where all nodes say that they are overloaded, again and ever more seldom."""
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Overloaded),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
            stop=tenacity.stop_before_delay(until - time.monotonic()),
            reraise=True,
        )
        try:
            return read.from_nodes()  # mostly the end of it, and a retry loop costs more than a small read
        except Overloaded as error:
            log.info("all nodes are overloaded, asking again: %s", error)
        return attempts(read.from_nodes)

    def _too_late(self, error: DeadlineExceeded) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self._snapshot.path(self.row)!r} was not read within {self.timeout_s:g} s: {error}; raise the storage "
            "option 'timeout', or see 'shoal status' for what is slow"
        )

    def _cuts(self, piece: Piece) -> list[Piece]:
        """`piece`, cut for several connections where it is long and comes from another node."""
        streams = min(MAX_STREAMS, (piece.end - piece.start) // STREAM_BYTES)
        local = self._cluster.local
        if streams < 2 or (local is not None and any(n.id == local.node_id for n in self.owners(piece.index))):
            return [piece]
        step = -(-(piece.end - piece.start) // streams // PART_SIZE) * PART_SIZE
        edges = [piece.start, *range((piece.start // PART_SIZE) * PART_SIZE + step, piece.end, step), piece.end]
        return [Piece(piece.index, start, end) for start, end in itertools.pairwise(edges)]

    def owners(self, index: int) -> tuple[Node, ...]:
        """The owners of shard `index` under the newest map, the first one first. Raises ClusterUnavailable."""
        placement = self._cluster.placement(self._snapshot, self._replicas)
        return placement.order(self._first_shard + index, self._key(index))[: placement.replicas]

    def candidates(self, index: int) -> Iterable[Node]:
        """Whom to ask for shard `index`, in order: its owners, the local node first of them, then all others.

        Those that do not answer this process (`shoal.health`) come last. Raises ClusterUnavailable.
        """
        health = self._cluster.transport.health
        if not health.circuits:
            return self._preferred(index)
        return sorted(self._preferred(index), key=lambda node: health.is_open(self._cluster.address_of(node)))

    def _preferred(self, index: int) -> Iterator[Node]:
        placement = self._cluster.placement(self._snapshot, self._replicas)
        ordinal, key = self._first_shard + index, self._key(index)
        local = self._cluster.local
        first = placement.first(ordinal, lambda: key)
        if placement.replicas == 1 or local is None or first.id == local.node_id:
            yield first  # mostly the end of it, and the whole order costs more than a request to the local node
            yield from placement.order(ordinal, key)[1:]
            return
        order = placement.order(ordinal, key)
        yield from sorted(order[: placement.replicas], key=lambda node: node.id != local.node_id)
        yield from order[placement.replicas :]


def _slice(whole: pa.Buffer, piece: Piece) -> pa.Buffer:
    length = piece.end - piece.start
    return whole if length == whole.size else whole.slice(piece.start, length)
