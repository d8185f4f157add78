"""Many small ranges in one request: ``POST /v1/snapshots/{digest}/ranges`` (docs/wire.md). Pure.

The body is an array of ranges; the answer is their bytes, one after the other in the order asked, and then one
little-endian 64-bit word a range: the xxh3_64 of its part where the range is just one whole part, 0 where it is not.

The rule: a batch is bounded in ranges and in bytes, so neither side holds more than it agreed to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import InvalidRequest

#: Ranges of one request, and the bytes they may name together.
MAX_RANGES = 8192
MAX_BYTES = 32 << 20
#: A longer range has a request of its own: it is worth `sendfile` and checksums of its parts.
MAX_RANGE_BYTES = 256 << 10

_RANGE = np.dtype([("row", "<u4"), ("index", "<u4"), ("start", "<u4"), ("length", "<u4")])
_SUM = np.dtype("<u8")
RANGE_ITEM_BYTES = _RANGE.itemsize
MAX_REQUEST_BYTES = MAX_RANGES * RANGE_ITEM_BYTES
SUM_BYTES = _SUM.itemsize


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Bytes [start, start + length) of shard `index` of the object in `row` of a snapshot."""

    row: int
    index: int
    start: int
    length: int


def target(digest: str) -> str:
    """The path of a snapshot's batches."""
    return f"/v1/snapshots/{digest}/ranges"


def encode(ranges: Sequence[ShardRange]) -> bytes:
    """The body of a request."""
    return np.array([(r.row, r.index, r.start, r.length) for r in ranges], _RANGE).tobytes()


def decode(body: bytes) -> list[ShardRange]:
    """Parse what `encode` gave.

    Raises:
        InvalidRequest: it is something else, or more than a batch may be.
    """
    if not body or len(body) % _RANGE.itemsize:
        raise InvalidRequest(f"a batch is one or more ranges of {_RANGE.itemsize} bytes, not {len(body)} bytes")
    table = np.frombuffer(body, _RANGE)
    lengths = table["length"].astype(np.int64)
    if len(table) > MAX_RANGES or int(lengths.sum()) > MAX_BYTES:
        raise InvalidRequest(f"a batch has at most {MAX_RANGES} ranges and {MAX_BYTES} bytes: ask in several")
    if int(lengths.max()) > MAX_RANGE_BYTES or int(lengths.min()) == 0:
        raise InvalidRequest(f"a range of a batch has 1 to {MAX_RANGE_BYTES} bytes: ask for longer ones by themselves")
    rows: list[Any] = table.tolist()
    return [ShardRange(*row) for row in rows]


def encode_sums(sums: Sequence[int]) -> bytes:
    """The words after the bytes of an answer."""
    return np.array(sums, _SUM).tobytes()


def decode_sums(raw: memoryview) -> npt.NDArray[np.uint64]:
    """Parse what `encode_sums` gave. Shape (ranges,)."""
    return np.frombuffer(raw, _SUM)
