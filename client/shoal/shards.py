"""Shards: how an object is cut, how each slice is named, and which slices a byte range touches. Pure.

A shard key is 128 bits derived from (origin, path, version, size, shard size, index), so it names content: equal keys
mean equal bytes, whichever dataset or snapshot asked, and a changed object gets new keys.

    object_key = xxh3_128(identity NUL path NUL version NUL size NUL shard_size)
    shard_key  = object_key XOR (mix64(2 i), mix64(2 i + 1) XOR mix64(1))     # i: the slice; shard 0 keeps the key

`mix64` is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), here so that keys of many shards are one numpy pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

#: The unit of filling and of checksums inside a shard, in bytes.
PART_SIZE = 8 << 20
DEFAULT_SHARD_SIZE = 256 << 20
MIN_SHARD_SIZE = 4 << 10
#: The checksums of a shard's parts live in one extended attribute, for which ext4 has one block: 4 KiB.
MAX_SHARD_SIZE = 2 << 30
KEY_SIZE = 16

Key = bytes
"""A 16-byte shard (or object) key."""

U64 = np.uint64
_MIX_1, _MIX_2 = U64(0xBF58476D1CE4E5B9), U64(0x94D049BB133111EB)


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser over an array of any shape: a bijection of 64-bit words that maps 0 to 0."""
    x = x ^ (x >> U64(30))
    x *= _MIX_1
    x ^= x >> U64(27)
    x *= _MIX_2
    x ^= x >> U64(31)
    return x


def object_key(identity: str, path: str, version: str, size_bytes: int, shard_size: int) -> Key:
    """The key of an object. `identity` names the origin itself: its URL and, where that is not unique, its endpoint."""
    text = f"{identity}\0{path}\0{version}\0{size_bytes}\0{shard_size}"
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogateescape"))


def shard_keys(object_keys: npt.NDArray[np.uint64], indexes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Keys of many shards at once.

    Args:
        object_keys: shape (n, 2), the 16-byte object keys viewed as little-endian words.
        indexes: shape (n,), each shard's index inside its object.

    Returns:
        Shape (n, 2), keys as words; ``.tobytes()`` of a row is the `Key`.
    """
    low = mix64(indexes * U64(2))
    high = mix64(indexes * U64(2) + U64(1)) ^ mix64(np.ones(1, U64))
    return object_keys ^ np.stack([low, high], axis=1)


def shard_key(key: Key, index: int) -> Key:
    """The key of slice `index` of the object with `key`."""
    if index == 0:
        return key
    words = np.frombuffer(key, "<u8").reshape(1, 2)
    return shard_keys(words, np.array([index], U64)).astype("<u8").tobytes()


def shard_count(size_bytes: int, shard_size: int) -> int:
    """Shards of an object. An empty object has none: there is nothing to place or to fetch."""
    return -(-size_bytes // shard_size)


def shard_length(size_bytes: int, shard_size: int, index: int) -> int:
    """Bytes of shard `index` of an object of `size_bytes`."""
    return min(shard_size, size_bytes - index * shard_size)


@dataclass(frozen=True, slots=True)
class Piece:
    """A byte range inside one shard: bytes [start, end) of shard `index`."""

    index: int
    start: int
    end: int


def pieces(start: int, end: int, size_bytes: int, shard_size: int) -> Iterator[Piece]:
    """Cut bytes [start, end) of an object into one piece a shard, in order; what lies past the object is left out."""
    end = min(end, size_bytes)
    while start < end:
        index, offset = divmod(start, shard_size)
        length = min(end - start, shard_size - offset)
        yield Piece(index, offset, offset + length)
        start += length


def parts(start: int, end: int, part_size: int) -> range:
    """Indexes of the parts that bytes [start, end) of a shard touch."""
    return range(start // part_size, -(-end // part_size)) if end > start else range(0)
