"""What one node is asked for: bytes of a shard, with their checksums compared, and many small ranges at once.

The rule: what these return was checked as far as the node could say, or there is an error; which node is asked, and
which one next, is the caller's affair.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from shoal import checksums, memory
from shoal import watch as watches
from shoal.checksums import PartCheck
from shoal.connection import Answer, MakeView, Watch
from shoal.errors import NotCached, ShardCorrupt
from shoal.maps import ShardId
from shoal.transport import READ_TIMEOUT_S, Pending, Transport
from shoal.wire import batch
from shoal.wire.batch import ShardRange

WANT_CHECKSUMS = {"Shoal-Want-Checksums": "1"}
#: Asks the node to check its copy of the shard before it answers: a part of it did not match.
SUSPECT = {"Shoal-Suspect": "1"}
#: Answer from the cache or with 504 (RFC 9111, 5.2.1.7).
ONLY_IF_CACHED = {"Cache-Control": "only-if-cached"}
#: Answer from the cache, or past it: keep nothing for this request (RFC 9111, 5.2.1.5).
NO_STORE = {"Cache-Control": "no-store"}
#: Says that the sender takes the name of a node that has the shard (`HELD_BY`) for an answer, and asks there.
TAKES_HOLDER = {"Shoal-Takes-Holder": "1"}
#: That name, in an answer of status `SEE_HOLDER`.
HELD_BY = "Shoal-Held-By"
SEE_HOLDER = 307
#: Names nodes that do not answer the asking process: the one asked is not to wait for them either (`avoiding`).
AVOID = "Shoal-Avoid"
NOBODY: frozenset[str] = frozenset()
#: Seconds that the asking process will still wait.
TIMEOUT = "Shoal-Timeout"
#: What a node answers instead of checksums that it does not know yet: they follow the body (`checksums.pack`).
TRAILING = "trailing"


class HeldBy(NotCached):
    """The node asked does not have the shard yet, and node `node_id` of its map has it."""

    def __init__(self, node_id: str, epoch: int) -> None:
        super().__init__(f"the shard is on its way there from node {node_id}")
        self.node_id, self.epoch = node_id, epoch


@dataclass(frozen=True, slots=True)
class ShardAt:
    """Where a shard is found: its place in a snapshot, and its length.

    Attributes:
        row: of the object in the snapshot `digest`.
        index: of the shard in the object.
    """

    digest: str
    row: int
    index: int
    size_bytes: int

    @property
    def id(self) -> ShardId:
        return self.digest, self.row, self.index

    @property
    def target(self) -> str:
        """Its path on any node."""
        return f"/v1/snapshots/{self.digest}/rows/{self.row}/shards/{self.index}"


def avoiding(node_ids: Iterable[str]) -> dict[str, str]:
    """The header that names nodes to avoid; none where there are none."""
    text = ",".join(node_ids)
    return {AVOID: text} if text else {}


def avoided(headers: Mapping[str, str]) -> frozenset[str]:
    """Ids of the nodes that a request (names in lower case) names with `avoiding`."""
    text = headers.get("shoal-avoid")
    return frozenset(text.split(",")) if text else NOBODY


def directives(headers: Mapping[str, str]) -> frozenset[str]:
    """What a request (names in lower case) asks of caches: `ONLY_IF_CACHED` or `NO_STORE`; mostly nothing."""
    text = headers.get("cache-control")
    return frozenset(each.strip().lower() for each in text.split(",")) if text else NOBODY


def time_left(until: float) -> dict[str, str]:
    """The header that says how long the sender waits; none where that is longer than anybody is silent."""
    left_s = until - time.monotonic()
    return {TIMEOUT: f"{max(0.001, left_s):.3f}"} if left_s < READ_TIMEOUT_S else {}


def read(
    transport: Transport,
    address: str,
    shard: ShardAt,
    start: int,
    end: int,
    make_view: MakeView,
    *,
    verify: bool,
    headers: Mapping[str, str],
    watch: Watch,
    begun: Pending | None = None,
) -> Answer:
    """Receive bytes [start, end) of `shard` from the node at `address` into the view that `make_view` gives.

    Args:
        verify: compare the checksum of each whole part in the range.
        headers: more of the request. With `local.TAKES_DESCRIPTORS` the answer may have descriptors instead, with
            `TAKES_HOLDER` it may be `HeldBy`.
        watch: decides how long a silence is waited for.
        begun: what `begin` gave for the same range.

    Raises:
        HeldBy: another node has the shard.
        Interrupted: the connection failed in the middle; the first `received` bytes are good and need not come again.
        Superseded, DeadlineExceeded: as `watch` says.
        ShardCorrupt: a part does not match its checksum.
        NodeUnavailable: no answer.
        ShoalError: the class the node named.
    """
    asked = {"Range": f"bytes={start}-{end - 1}", **headers}
    if not verify:
        return _unless_held_elsewhere(
            transport.get(address, shard.target, asked, make_view=make_view, watch=watch, is_hasty=True, begun=begun)
        )
    asked.update(WANT_CHECKSUMS)

    def make_check(found: Mapping[str, str]) -> PartCheck | None:
        part_size, sums = found.get("shoal-part-size"), found.get("shoal-checksums")
        if part_size is None or sums is None:
            return None
        expected = None if sums == TRAILING else checksums.decode(sums)
        return PartCheck(start, end, shard.size_bytes, int(part_size), expected)

    return _unless_held_elsewhere(
        transport.get(
            address,
            shard.target,
            asked,
            make_view=make_view,
            make_check=make_check,
            watch=watch,
            is_hasty=True,
            begun=begun,
        )
    )


def _unless_held_elsewhere(answer: Answer) -> Answer:
    if answer.status == SEE_HOLDER:
        raise HeldBy(answer.headers.get(HELD_BY.lower(), ""), answer.epoch)
    return answer


def begin(transport: Transport, address: str, shard: ShardAt, start: int, end: int, *, verify: bool) -> Pending:
    """Ask for bytes [start, end) of `shard`, if the node at `address` has them cached; for `read`.

    Raises:
        NodeUnavailable: it cannot be asked.
    """
    asked = {"Range": f"bytes={start}-{end - 1}", **ONLY_IF_CACHED, **(WANT_CHECKSUMS if verify else {})}
    return transport.begin(address, shard.target, asked)


def read_batch(
    transport: Transport,
    address: str,
    digest: str,
    ranges: Sequence[ShardRange],
    *,
    verify: bool,
    headers: Mapping[str, str],
    until: float,
) -> tuple[pa.Buffer, Answer]:
    """The bytes of `ranges`, one after the other, from the node at `address` in one request; and what else it said.

    Args:
        verify, headers: as in `read`.
        until: `time.monotonic` at which the caller's time is over.

    Raises:
        DeadlineExceeded: that was before the last byte.
        ShardCorrupt: a range that is a whole part does not match its checksum.
        NodeUnavailable: no answer, or not all of it.
        ShoalError: the class the node named.
    """
    length = sum(r.length for r in ranges)
    buffer = memory.allocate(length + batch.SUM_BYTES * len(ranges))
    view = memory.view(buffer)
    answer = transport.get(
        address,
        batch.target(digest),
        headers,
        method="POST",
        content=batch.encode(ranges),
        make_view=lambda: view,
        watch=watches.Watch(transport, address, until=until, is_hasty=True),
        is_hasty=True,
    )
    if verify:
        sums = batch.decode_sums(view[length:])
        if sums.any():
            _compare_batch(view, ranges, sums.tolist())
    return buffer.slice(0, length), answer


def _compare_batch(view: memoryview, ranges: Sequence[ShardRange], sums: Sequence[int]) -> None:
    position = 0
    for wanted, expected in zip(ranges, sums, strict=True):
        piece = view[position : position + wanted.length]
        position += wanted.length
        if expected and checksums.checksum(piece) != expected:
            raise ShardCorrupt(f"row {wanted.row}, shard {wanted.index} does not match its checksum")
