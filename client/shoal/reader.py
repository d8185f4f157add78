"""Reads of one object: cut the range into pieces, find each piece's owners, fetch the pieces at once.

    1. plan       pieces of the range, one a shard (shards.pieces)
    2. local      a shard that the node on this machine owns: its descriptor, mapped; nothing is copied
    3. remote     each piece from its first owner, straight into the caller's buffer
    4. failover   the next owner, then any node, for the bytes that are still missing

The rule: the bytes are right or there is an error. A piece that failed half-way goes on at the byte it reached.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from shoal import shards, transport
from shoal.cluster import Cluster
from shoal.cluster_map import Node
from shoal.errors import NodeUnavailable, ShoalError
from shoal.local import TAKES_DESCRIPTOR
from shoal.shards import Piece
from shoal.snapshot import Snapshot
from shoal.transport import Interrupted

log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

#: Pieces that one process fetches at a time.
MAX_PARALLEL = 16


@dataclass(frozen=True, slots=True)
class ObjectReader:
    """Reads of one object of one snapshot. A value: threads may share it.

    Attributes:
        row: of the object in the snapshot.
    """

    cluster: Cluster
    snapshot: Snapshot
    replicas: int
    row: int

    @property
    def size_bytes(self) -> int:
        return self.snapshot.size(self.row)

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        """Bytes [start, end), cut at the object's end, as an Arrow buffer.

        Where they lie in one shard that this process has mapped, the buffer is a view of the map: no copy. Else it is
        a new one. Either way it stays valid for as long as it is held.

        Raises:
            ShoalError: see `shoal.errors`.
        """
        start, end = self._clip(start, end)
        pieces = self._pieces(start, end)
        if len(pieces) == 1:
            whole = self._mapped(pieces[0])
            if whole is not None:
                return whole.slice(pieces[0].start, end - start)
        buffer = pa.allocate_buffer(end - start)
        self._fetch(pieces, memoryview(buffer).cast("B"))
        return buffer

    def read_into(self, start: int, end: int, view: memoryview) -> int:
        """Receive bytes [start, end), cut at the object's end, into the beginning of `view`; return how many.

        Raises:
            ShoalError: see `shoal.errors`.
        """
        start, end = self._clip(start, min(end, start + len(view)))
        self._fetch(self._pieces(start, end), view[: end - start])
        return end - start

    def _clip(self, start: int, end: int) -> tuple[int, int]:
        end = min(end, self.size_bytes)
        return min(start, end), end

    def _pieces(self, start: int, end: int) -> list[Piece]:
        return list(shards.pieces(start, end, self.size_bytes, self.snapshot.shard_size))

    def _fetch(self, pieces: list[Piece], view: memoryview) -> None:
        jobs = []
        offset = 0
        for piece in pieces:
            length = piece.end - piece.start
            jobs.append((piece, view[offset : offset + length]))
            offset += length
        run_parallel(lambda job: self._fetch_piece(*job), jobs)

    def _target(self, index: int) -> str:
        return f"/v1/snapshots/{self.snapshot.digest}/rows/{self.row}/shards/{index}"

    def _order(self, index: int) -> tuple[Node, ...]:
        placement = self.cluster.placement(self.snapshot, self.replicas)
        key = shards.shard_key(self.snapshot.key(self.row), index)
        return placement.order(self.snapshot.first_shard(self.row) + index, key)

    def _mapped(self, piece: Piece) -> pa.Buffer | None:
        """The whole shard of `piece`, mapped; None where the local node does not own it or has not sealed it."""
        local = self.cluster.local
        if local is None:
            return None
        target = self._target(piece.index)
        buffer = local.mapped(target)
        if buffer is not None:
            return buffer
        if all(node.id != local.node_id for node in self._order(piece.index)[: self.replicas]):
            return None
        try:
            # A byte is asked for, so that an answer without a descriptor is a byte and not the shard.
            byte = memoryview(bytearray(1))
            start = piece.start
            answer = self.cluster.transport.read_into(local.address, target, start, start + 1, byte, TAKES_DESCRIPTOR)
        except ShoalError as error:
            log.debug("the local node did not give %s: %s", target, error)
            return None
        self.cluster.note_epoch(answer.epoch)
        return local.adopt(target, answer) if answer.descriptor is not None else None

    def _fetch_piece(self, piece: Piece, view: memoryview) -> None:
        mapped = self._mapped(piece)
        if mapped is not None:
            view[:] = memoryview(mapped).cast("B")[piece.start : piece.end]
            return
        order = self._order(piece.index)
        done, failure = self._fetch_from(order, piece, view, 0)
        if failure is not None:
            # Everybody in the map failed: a newer map may name others.
            self.cluster.refresh_map()
            fresh = self._order(piece.index)
            if fresh != order:
                done, failure = self._fetch_from(fresh, piece, view, done)
        if failure is not None:
            if not isinstance(failure, NodeUnavailable):
                raise failure
            path = self.snapshot.path(self.row)
            raise NodeUnavailable(
                f"no cache node gave bytes of {path!r}, {len(order)} were asked: {failure}"
            ) from failure

    def _fetch_from(
        self, order: tuple[Node, ...], piece: Piece, view: memoryview, done: int
    ) -> tuple[int, ShoalError | None]:
        """Fetch what is missing from the first node that gives it. Returns the bytes that came, and the failure if any.

        Raises:
            ShoalError: one that another node would repeat.
        """
        failure: ShoalError | None = None
        target = self._target(piece.index)
        local = self.cluster.local
        for node in order:
            address = local.address if local is not None and node.id == local.node_id else node.address
            try:
                answer = self.cluster.transport.read_into(address, target, piece.start + done, piece.end, view[done:])
            except Interrupted as error:
                done += error.received
                failure = error
            except ShoalError as error:
                if not transport.is_worth_another_node(error):
                    raise
                failure = error
            else:
                self.cluster.note_epoch(answer.epoch)
                return len(view), None
            log.info("node %s failed, asking the next: %s", node.id, failure)
        return done, failure


_threads: ThreadPoolExecutor | None = None
_this_thread = threading.local()


def run_parallel(function: Callable[[T], U], arguments: Sequence[T]) -> list[U]:
    """Apply `function` to each argument, several at a time, and return the results in order.

    The first argument is done on the calling thread. All are over when this returns, also when it raises the first
    error, because their buffers are the caller's. Inside another such call the work is done in line: threads that wait
    for threads of their own pool would wait for ever.
    """
    global _threads
    if len(arguments) < 2 or getattr(_this_thread, "is_of_pool", False):
        return [function(argument) for argument in arguments]
    if _threads is None:
        _threads = ThreadPoolExecutor(MAX_PARALLEL, thread_name_prefix="shoal-read", initializer=_mark_thread)
    futures = [_threads.submit(function, argument) for argument in arguments[1:]]
    try:
        first = function(arguments[0])
    finally:
        concurrent.futures.wait(futures)
    return [first, *(future.result() for future in futures)]


def _mark_thread() -> None:
    _this_thread.is_of_pool = True


def _after_fork_in_child() -> None:
    global _threads
    _threads = None  # its threads stayed in the parent


os.register_at_fork(after_in_child=_after_fork_in_child)
