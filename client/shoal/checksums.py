"""Part checksums: from the fill, over the wire, to the reader's buffer. Pure.

A part's checksum is the xxh3_64 of its bytes (xxHash, XXH3, seed 0). A node that is asked for them sends the checksums
of every whole part inside the range it answers; the reader hashes those parts while they are still in the processor's
cache, a step behind the socket. Parts that a range only touches are covered by the node's own checks.

The rule: a part that does not match is `ShardCorrupt`, never bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from shoal.errors import ShardCorrupt

WORD_BYTES = 8


def checksum(data: bytes | bytearray | memoryview) -> int:
    """xxh3_64 of a part."""
    return xxhash.xxh3_64_intdigest(data)


def whole_parts(start: int, end: int, size_bytes: int, part_size: int) -> range:
    """Indexes of the parts that lie wholly inside bytes [start, end) of a shard of `size_bytes`."""
    if end >= size_bytes:
        return range(-(-start // part_size), -(-size_bytes // part_size))
    return range(-(-start // part_size), end // part_size)


def encode(sums: Iterable[int]) -> str:
    """The text of a ``Shoal-Checksums`` header."""
    return ",".join(f"{value:016x}" for value in sums)


def decode(text: str) -> list[int]:
    """Parse what `encode` gave. Raises ValueError."""
    return [int(value, 16) for value in text.split(",")] if text else []


def pack(sums: Iterable[int]) -> bytes:
    """Checksums as they follow a body whose parts were still filling when it began: little-endian words, 0: unknown."""
    return b"".join(value.to_bytes(WORD_BYTES, "little") for value in sums)


def unpack(raw: bytes | bytearray) -> list[int]:
    """Parse what `pack` gave."""
    return [int.from_bytes(raw[at : at + WORD_BYTES], "little") for at in range(0, len(raw), WORD_BYTES)]


class PartCheck:
    """Hashes the whole parts of a range as its bytes come, and compares them.

    Not thread-safe: it belongs to one receive.

    Args:
        start, end: of the range, in the shard.
        size_bytes: of the shard.
        part_size: as the node has it.
        expected: checksums of the whole parts in order; None where they are only known after the bytes.
    """

    def __init__(
        self, start: int, end: int, size_bytes: int, part_size: int, expected: Sequence[int] | None = None
    ) -> None:
        if part_size < 1:
            raise ValueError(f"{part_size} is no part size")
        self._start, self._position = start, start
        self._size_bytes, self._part_size = size_bytes, part_size
        self._parts = whole_parts(start, end, size_bytes, part_size)
        self._expected = expected
        if expected is not None and len(expected) != len(self._parts):
            raise ShardCorrupt(f"{len(expected)} checksums came for {len(self._parts)} parts")
        self._hasher = xxhash.xxh3_64()
        self._sums: list[int] = []

    @property
    def trailing_bytes(self) -> int:
        """Bytes of the checksums that follow the body; 0 where they were known before it."""
        return 0 if self._expected is not None else WORD_BYTES * len(self._parts)

    @property
    def trusted_bytes(self) -> int:
        """How many of the bytes that came need not be asked for again if the rest fails: none of a part begun."""
        if self._expected is None:
            return 0
        begun = self._position // self._part_size
        return (begun * self._part_size if begun in self._parts else self._position) - self._start

    def update(self, data: memoryview) -> None:
        """Take the next bytes. Raises ShardCorrupt at the end of a part that does not match."""
        while data:
            part = self._position // self._part_size
            room = min((part + 1) * self._part_size, self._size_bytes) - self._position
            piece, data = data[:room], data[room:]
            self._position += len(piece)
            if part not in self._parts:
                continue
            self._hasher.update(piece)
            if len(piece) == room:
                self._finish_part(part)

    def compare(self, expected: Sequence[int]) -> None:
        """Compare the parts that came with what the node knew at their end (0: nothing). Raises ShardCorrupt."""
        for part, found, known in zip(self._parts, self._sums, expected, strict=True):
            if known and known != found:
                raise ShardCorrupt(f"part {part} does not match its checksum")

    def _finish_part(self, part: int) -> None:
        found = self._hasher.intdigest()
        self._hasher.reset()
        self._sums.append(found)
        if self._expected is not None and found != self._expected[len(self._sums) - 1]:
            raise ShardCorrupt(f"part {part} does not match its checksum")
