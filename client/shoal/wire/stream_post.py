"""What a stream tells a node: ``POST /v1/snapshots/{digest}/streams/{stream_id}`` (docs/wire.md). Pure.

    head     version u16 | flags u16 (1: leaving) | number of needs u32 | number of waits u32
    needs    row u32 | index of the shard u32 | part u32 | needed in milliseconds u32     ascending in time, none twice
    waits    cause u32 | microseconds u32 | node id, 16 bytes, zeros behind it    each pair of cause and node once

All little-endian, one after the other; a part is 8 MiB of a shard (`shoal.shards.PART_SIZE`). The answer is one bit a
need, in their order, the first in the highest bit of the first byte: whether that shard is sealed at the node.

The rule: a post is bounded and says one thing in one way; what says anything else is refused whole.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.errors import InvalidRequest

VERSION = 1
#: Parts of shards that one post may name, and how far ahead. A stream names those that it needs first.
MAX_NEEDS = 4096
MAX_AHEAD_MS = 24 * 3600 * 1000
MAX_WAITS = 1024
#: The longest wait that fits one entry; what is longer goes into the next post.
MAX_WAIT_US = (1 << 32) - 1

_LEAVING = 1
_HEAD = np.dtype([("version", "<u2"), ("flags", "<u2"), ("needs", "<u4"), ("waits", "<u4")])
_NEED = np.dtype([("row", "<u4"), ("index", "<u4"), ("part", "<u4"), ("in_ms", "<u4")])
_WAIT = np.dtype([("cause", "<u4"), ("us", "<u4"), ("node", "S16")])
_STREAM_ID = re.compile(r"[0-9a-f]{32}")
_NODE_ID = re.compile(rb"[A-Za-z0-9._-]{0,16}")

Numbers = npt.NDArray[np.uint32]


class Cause(enum.IntEnum):
    """What a consumer waited for."""

    ORIGIN = 0  #: bytes that a node was fetching from the origin
    PEER = 1  #: bytes that came from another node's cache
    LOCAL = 2  #: bytes of the node on its own machine
    DECODE = 3  #: decompressing, parsing
    OTHER = 4  #: nodes that did not give what they were asked for
    STREAM = 5  #: the stream itself: the plan, putting batches together, threads that were busy


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds that a consumer waited, and for which node ("": none)."""

    cause: Cause
    node_id: str
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class StreamPost:
    """One post. The arrays share their length.

    Attributes:
        rows, indexes, parts: of the shards that are needed, and which part of each.
        in_ms: when each is needed, from now on.
        waits: since the last post.
        is_leaving: the stream is over, and needs nothing.
    """

    rows: Numbers
    indexes: Numbers
    parts: Numbers
    in_ms: Numbers
    waits: tuple[Wait, ...] = ()
    is_leaving: bool = False


def target(digest: str, stream_id: str) -> str:
    """The path of a stream over a snapshot."""
    return f"/v1/snapshots/{digest}/streams/{stream_id}"


def check_stream_id(text: str) -> str:
    """`text`, if it names a stream. Raises InvalidRequest."""
    if not _STREAM_ID.fullmatch(text):
        raise InvalidRequest(f"{text[:40]!r} names no stream: that takes 32 hex digits in lower case")
    return text


def node_id_or_none(text: str) -> str:
    """`text` if a wait can name that node, else ""."""
    return text if _NODE_ID.fullmatch(text.encode()) else ""


def encode(post: StreamPost) -> bytes:
    """The body of a request."""
    needs = np.empty(len(post.rows), _NEED)
    needs["row"], needs["index"], needs["part"], needs["in_ms"] = post.rows, post.indexes, post.parts, post.in_ms
    waits = [(wait.cause, round(wait.seconds * 1e6), wait.node_id.encode()) for wait in post.waits]
    head = np.array([(VERSION, _LEAVING if post.is_leaving else 0, len(needs), len(waits))], _HEAD)
    return head.tobytes() + needs.tobytes() + np.array(waits, _WAIT).tobytes()


def decode(body: bytes) -> StreamPost:
    """Parse what `encode` gave.

    Raises:
        InvalidRequest: it is something else, or more than a post may say.
    """
    if len(body) < _HEAD.itemsize:
        raise InvalidRequest(f"a post of a stream begins with {_HEAD.itemsize} bytes, and has only {len(body)}")
    version, flags, need_count, wait_count = np.frombuffer(body, _HEAD, 1)[0].tolist()
    if version != VERSION or flags & ~_LEAVING:
        raise InvalidRequest(f"posts of streams are of version {VERSION} here, not {version} with flags {flags:#x}")
    if need_count > MAX_NEEDS or wait_count > MAX_WAITS:
        raise InvalidRequest(f"a post has at most {MAX_NEEDS} needs and {MAX_WAITS} waits: name the nearest ones")
    middle = _HEAD.itemsize + need_count * _NEED.itemsize
    if len(body) != middle + wait_count * _WAIT.itemsize:
        raise InvalidRequest(f"{len(body)} bytes are not {need_count} needs and {wait_count} waits")
    needs = np.frombuffer(body, _NEED, need_count, _HEAD.itemsize)
    return StreamPost(
        *_needs(needs, is_leaving=bool(flags & _LEAVING)),
        _waits(np.frombuffer(body, _WAIT, wait_count, middle)),
        bool(flags & _LEAVING),
    )


def _needs(table: npt.NDArray[np.void], *, is_leaving: bool) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    rows, indexes, parts, in_ms = (table[name].astype(np.uint32) for name in ("row", "index", "part", "in_ms"))
    if is_leaving and len(rows):
        raise InvalidRequest("a stream that leaves needs nothing more")
    if (in_ms[1:] < in_ms[:-1]).any() or (len(in_ms) and in_ms[-1] > MAX_AHEAD_MS):
        raise InvalidRequest(f"needs are sorted by their time, which is at most {MAX_AHEAD_MS} ms ahead")
    if len(np.unique(table[["row", "index", "part"]])) != len(rows):
        raise InvalidRequest("a part of a shard is needed twice: name it once, with the earlier time")
    return rows, indexes, parts, in_ms


def _waits(table: npt.NDArray[np.void]) -> tuple[Wait, ...]:
    known = {int(cause) for cause in Cause}
    seen: set[tuple[int, bytes]] = set()
    for cause, _, node in table.tolist():
        if cause not in known or not _NODE_ID.fullmatch(node) or (cause, node) in seen:
            raise InvalidRequest("a wait has one of the causes of docs/wire.md and a node's id, each pair once")
        seen.add((cause, node))
    return tuple(Wait(Cause(cause), node.decode(), us / 1e6) for cause, us, node in table.tolist())


def sealed(answer: bytes, count: int) -> npt.NDArray[np.bool_]:
    """Which of `count` needs the answer says are sealed. Shape (count,).

    Raises:
        ValueError: it is the answer to something else.
    """
    if len(answer) != -(-count // 8):
        raise ValueError(f"{len(answer)} bytes do not hold a bit for each of {count} needs")
    return np.unpackbits(np.frombuffer(answer, np.uint8), count=count).astype(np.bool_)


def clip_waits(waits: Sequence[Wait]) -> tuple[list[Wait], list[Wait]]:
    """What of `waits`, one a pair of cause and node, fits one post, and what is left for the next."""
    now: list[Wait] = []
    later: list[Wait] = []
    for wait in waits:
        fits_s = min(wait.seconds, MAX_WAIT_US / 1e6) if len(now) < MAX_WAITS else 0.0
        if fits_s > 0:
            now.append(Wait(wait.cause, wait.node_id, fits_s))
        if wait.seconds > fits_s:
            later.append(Wait(wait.cause, wait.node_id, wait.seconds - fits_s))
    return now, later
