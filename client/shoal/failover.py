"""One piece's way through the nodes: the next candidate for the bytes that are missing, until they are here.

    refused, reset, cut      the next candidate, from the byte reached
    silent                   `shoal.watch` finds out why, and asks other candidates for what they have cached
    damaged                  the same node once more, which then drops its copy and fetches it anew
    on its way there         an owner that has not got the shard yet names who has it, and that one is asked; then the
                             owner again, which must see to it by itself
    everybody failed         a newer map may name others; then the origin, where that is allowed (`shoal.direct`); then
                             all once more with more patience, and at last why, where bodies were cut

A node with an open circuit is asked last, and whoever is asked instead is told to avoid it (``Shoal-Avoid``): otherwise
its relay or its fill would wait for the same node.

The rule: one receiver at a time writes into the target, and what is told as good stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from shoal import memory, provenance, shard_client, transport
from shoal.cluster_map import Node
from shoal.connection import Connection, DescriptorsLost, Interrupted
from shoal.errors import ClusterUnavailable, DeadlineExceeded, NodeUnavailable, OriginError, ShardCorrupt, ShoalError
from shoal.local import TAKES_DESCRIPTORS
from shoal.memory import Allocate
from shoal.shard_client import ShardAt
from shoal.shards import Piece
from shoal.transport import READ_TIMEOUT_S, Pending
from shoal.watch import Superseded, Watch
from shoal.wire.stream_post import Cause

if TYPE_CHECKING:
    from shoal.cluster import Cluster

log = logging.getLogger(__name__)

#: Nodes beside the one asked that are asked whether they have a silent node's bytes cached.
MAX_HEDGES = 2


class Target:
    """Where a piece is received: `view` is what is still missing of it, allocated when bytes come."""

    __slots__ = ("_allocate", "_buffer", "_length", "_view", "done")

    def __init__(self, length: int, view: memoryview | None = None, allocate: Allocate | None = None) -> None:
        self._length = length
        self._allocate = allocate
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
            self._buffer = (self._allocate or memory.allocate)(self._length)
            self._view = memory.view(self._buffer)
        return self._view[self.done :]

    def part(self, start: int, end: int) -> Target:
        """A target over bytes [start, end) of this one."""
        return Target(end - start, self.view()[start:end])


class PieceRead:
    """The read of one piece. Not thread-safe.

    Args:
        candidates_of: from a shard's index to whom to ask, in order, under the newest map.
        until: `time.monotonic` at which the caller's time is over.
        headers: further ones of each request.
    """

    __slots__ = (
        "_asked",
        "_candidates_of",
        "_cluster",
        "_cut",
        "_headers",
        "_hedged",
        "_is_hasty",
        "_piece",
        "_shard",
        "_target",
        "_verify",
        "_watch",
        "until",
    )

    def __init__(
        self,
        cluster: Cluster,
        shard: ShardAt,
        piece: Piece,
        target: Target,
        candidates_of: Callable[[int], Iterable[Node]],
        until: float,
        verify: bool,
        headers: Mapping[str, str],
    ) -> None:
        self._headers = headers
        self._cluster = cluster
        self._shard = shard
        self._piece = piece
        self._target = target
        self._candidates_of = candidates_of
        self.until = until
        self._verify = verify
        self._is_hasty = True
        self._cut: int | None = None  # the byte of the shard at which the last body ended too early
        self._watch: Watch | None = None

    def from_nodes(self) -> pa.Buffer | None:
        """Receive the piece; or the whole shard, mapped, where the local node passed its descriptor.

        Raises:
            NodeUnavailable: nobody gives the bytes.
            DeadlineExceeded: not in time.
            ShoalError: a failure that another node would repeat.
        """
        asked, epoch = 0, -1
        failure: ShoalError | None = None
        # Everybody in the map may have failed because a newer map names others; that is worth one more round.
        while failure is None or self._cluster.newer_map(epoch):
            epoch = self._cluster.map.epoch
            try:
                for node in self._candidates():
                    asked += 1
                    try:
                        return self._from_node_or_healed(node)
                    except ShoalError as error:
                        failure = self._worst(failure, error)
                    log.info("node %s failed, asking the next: %s", node.id, failure)
            except ClusterUnavailable as error:  # a map of nobody, whom no answer will tell of the next one
                failure = self._worst(failure, error)
        if not isinstance(failure, NodeUnavailable):
            raise failure
        raise NodeUnavailable(f"{asked} were asked: {failure}") from failure

    def from_late(self) -> pa.Buffer | None:
        """As `from_nodes`, once more and with more patience: on a machine short of processors all may seem silent."""
        self._is_hasty = False
        failure: ShoalError | None = None
        for node in self._candidates():
            try:
                return self._from_node_or_healed(node)
            except ShoalError as error:
                failure = self._worst(failure, error)
        self._ask_why_cut()
        raise failure or NodeUnavailable("the cluster map names nobody")

    def _ask_why_cut(self) -> None:
        """Raise the origin's failure, where it was that which cut bodies short.

        Within a body a node cannot say so. Asked for the very byte that did not come, it can.
        """
        if self._cut is None:
            return
        for node in self._candidates():
            try:
                self._cluster.transport.get(
                    self._cluster.address_of(node),
                    self._shard.target,
                    {"Range": f"bytes={self._cut}-{self._cut}", **self._headers, **shard_client.time_left(self.until)},
                    is_hasty=True,
                )
                return
            except OriginError:
                raise
            except ShoalError as error:
                log.debug("node %s does not say why it cut a body: %s", node.id, error)

    def _worst(self, before: ShoalError | None, error: ShoalError) -> ShoalError:
        """What to tell at the end, after `error` too. Raises it where it is no use to ask anybody else."""
        if isinstance(error, Interrupted):
            if error.reached:
                self._cut = min(self._piece.start + self._target.done + error.reached, self._piece.end - 1)
            self._target.done += error.received
        elif isinstance(error, DeadlineExceeded) or not transport.is_worth_another_node(error):
            raise error
        if time.monotonic() > self.until:
            raise DeadlineExceeded(str(error)) from error
        return before if isinstance(before, ShardCorrupt) else error

    def _from_node_or_healed(self, node: Node) -> pa.Buffer | None:
        """From `node`; once more where its copy is bad, which it then drops and fetches anew."""
        try:
            return self._from_node(node, {})
        except ShardCorrupt as error:
            log.warning("node %s sent damaged bytes, asking it to check its copy: %s", node.id, error)
            return self._from_node(node, shard_client.SUSPECT)

    def _from_node(self, node: Node, headers: Mapping[str, str]) -> pa.Buffer | None:
        """From `node`, or from the one that it names, which has the shard while it is on its way to `node`."""
        cluster = self._cluster
        try:
            return self._from(node, {**headers, **shard_client.TAKES_HOLDER})
        except shard_client.HeldBy as told:
            cluster.note_epoch(told.epoch)
            holder = cluster.map.node(told.node_id)
        if holder is not None and not cluster.transport.health.is_open(cluster.address_of(holder)):
            try:
                return self._from(holder, {**headers, **shard_client.ONLY_IF_CACHED})
            except ShoalError as error:
                log.info("node %s does not give what node %s says it has: %s", holder.id, node.id, error)
                self._worst(None, error)
        return self._from(node, headers)

    def _from(self, node: Node, headers: Mapping[str, str]) -> pa.Buffer | None:
        """From `node`, or from whoever was faster. Raises `shard_client.HeldBy` where `headers` ask for it."""
        cluster, piece, target = self._cluster, self._piece, self._target
        observation, since = provenance.current(), 0.0
        if self._headers:
            headers = {**self._headers, **headers}
        left_s = self.until - time.monotonic()
        if left_s < READ_TIMEOUT_S or cluster.transport.health.circuits:
            headers = {**headers, **self._hints(node, left_s)}
        begun: Pending | None = None
        local = cluster.local
        is_mappable = local is not None and node.id == local.node_id
        while True:
            self._asked = node
            if observation is not None:
                since = time.monotonic()
            try:
                answer = shard_client.read(
                    cluster.transport,
                    cluster.address_of(node),
                    self._shard,
                    piece.start + target.done,
                    piece.end,
                    target.view,
                    verify=self._verify,
                    headers={**headers, **TAKES_DESCRIPTORS} if is_mappable else headers,
                    watch=self,
                    begun=begun,
                )
            except DescriptorsLost:
                is_mappable = False
                continue
            except Superseded as faster:
                target.done += faster.received
                if observation is not None:
                    observation.add(Cause.OTHER, node.id, since, faster.received)
                node, begun, is_mappable = self._hedged, faster.pending, False
                continue
            except ShoalError as error:
                if observation is not None:
                    observation.add(Cause.OTHER, node.id, since, getattr(error, "received", 0))
                raise
            cluster.note_epoch(answer.epoch)
            whole: pa.Buffer | None = None
            if answer.descriptors and local is not None:
                whole = local.adopt(self._shard.id, answer)
                if whole is None:
                    is_mappable = False
                    continue
            if observation is not None:
                is_local = local is not None and node.id == local.node_id
                cause = provenance.cause_of(answer.headers, is_local=is_local)
                observation.add(cause, node.id, since, piece.end - piece.start - target.done)
            return whole

    # As `shoal.connection.Watch`: the real one is made when the first silence comes, which is mostly never.

    def silent(self, connection: Connection, good: int) -> None:
        self._real_watch().silent(connection, good)

    def look(self, came: int, seconds: float, good: int) -> None:
        self._real_watch().look(came, seconds, good)

    def end(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _real_watch(self) -> Watch:
        if self._watch is None:
            address = self._cluster.address_of(self._asked)
            self._watch = Watch(self._cluster.transport, address, self.until, self._hedges, self._is_hasty)
        return self._watch

    def _candidates(self) -> Iterable[Node]:
        return self._candidates_of(self._piece.index)

    def _hedges(self, received: int) -> Iterator[Pending]:
        """Ask others in turn for what they have cached of the bytes after `received`; the last asked is `_hedged`."""
        asked, start, count = self._asked, self._piece.start + self._target.done + received, 0
        wire = self._cluster.transport
        for node in self._candidates():
            address = self._cluster.address_of(node)
            if count == MAX_HEDGES:
                return
            if node.id == asked.id or wire.health.is_open(address):
                continue
            try:
                pending = shard_client.begin(wire, address, self._shard, start, self._piece.end, verify=self._verify)
            except ShoalError as error:
                log.debug("no hedge from node %s: %s", node.id, error)
                continue
            count += 1
            self._hedged = node
            yield pending

    def _hints(self, node: Node, left_s: float) -> dict[str, str]:
        """What the node asked should know: whom to avoid, and how long it is waited for."""
        if left_s <= 0:
            raise DeadlineExceeded(f"no time was left to ask node {node.id}")
        return self._cluster.avoiding(self._cluster.address_of(node)) | shard_client.time_left(self.until)
