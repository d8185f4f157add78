"""What a shard file says about itself: one extended attribute beside the bytes. Pure.

The bytes of a shard file are the shard's bytes and nothing else, so that the file can be mapped, sent and passed
through as it is. What the store must know besides lives in the attribute ``user.shoal.shard``, which travels with the
file through a rename and needs no second file to agree with:

    magic "SHL2" | generation u32 | part_size u32 | check u32 | size u64 | written u64 | checksum u64 x parts | bitmap

Little-endian. Checksums are xxh3_64 of each part; a part counts only where its bit is set. Extended attributes hold
4 KiB on ext4, which is why a shard has at most 2 GiB (256 parts of 8 MiB, 2.1 KiB).

`check` is the low half of the xxh3_64 of the shard's key and the rest of the attribute: an attribute that was torn or
changed, or that lies on a file under another shard's name, is none.

`generation` says which start of the machine wrote the file: after a machine went down without a clean stop the store
takes a new one, and files of older ones are verified before they are served.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

import xxhash

from shoal.errors import ShardCorrupt
from shoal.shards import Key

XATTR = "user.shoal.shard"
_HEAD = struct.Struct("<4sIIIQQ")
_MAGIC = b"SHL2"
_CHECK = slice(12, 16)


@dataclass(slots=True)
class ShardHeader:
    """The attribute's content.

    Attributes:
        size_bytes: of the whole shard.
        part_size: bytes of each part but the last.
        generation: see the module.
        checksums: xxh3_64 of each part; None where the part is not there yet.
        written_ns: see the module; 0 until the shard is sealed.
    """

    size_bytes: int
    part_size: int
    generation: int
    checksums: list[int | None]
    written_ns: int = 0

    @classmethod
    def empty(cls, size_bytes: int, part_size: int, generation: int) -> Self:
        return cls(size_bytes, part_size, generation, [None] * -(-size_bytes // part_size))

    @property
    def is_complete(self) -> bool:
        return None not in self.checksums

    def part_range(self, part: int) -> tuple[int, int]:
        """Bytes [start, end) of `part` in the shard."""
        start = part * self.part_size
        return start, min(start + self.part_size, self.size_bytes)

    def encode(self, key: Key) -> bytes:
        """The attribute of the file of shard `key`."""
        bitmap = bytearray(-(-len(self.checksums) // 8))
        for part, checksum in enumerate(self.checksums):
            if checksum is not None:
                bitmap[part // 8] |= 1 << part % 8
        head = _HEAD.pack(_MAGIC, self.generation, self.part_size, 0, self.size_bytes, self.written_ns)
        sums = struct.pack(f"<{len(self.checksums)}Q", *(c or 0 for c in self.checksums))
        raw = bytearray(head + sums + bitmap)
        raw[_CHECK] = _check(key, raw)
        return bytes(raw)

    @classmethod
    def decode(cls, raw: bytes, key: Key) -> Self:
        """Parse what `encode` wrote for the same `key`.

        Raises:
            ShardCorrupt: `raw` is something else.
        """
        if len(raw) < _HEAD.size:
            raise ShardCorrupt("the shard attribute is cut short")
        magic, generation, part_size, _, size_bytes, written_ns = _HEAD.unpack_from(raw)
        if magic != _MAGIC or raw[_CHECK] != _check(key, raw) or part_size == 0:
            raise ShardCorrupt("the shard attribute is torn, of another format or of another shard")
        parts = -(-size_bytes // part_size)
        if len(raw) != _HEAD.size + 8 * parts + -(-parts // 8):
            raise ShardCorrupt("the shard attribute has another length than its shard calls for")
        sums = struct.unpack_from(f"<{parts}Q", raw, _HEAD.size)
        bitmap = raw[_HEAD.size + 8 * parts :]
        known = [sums[part] if bitmap[part // 8] & 1 << part % 8 else None for part in range(parts)]
        return cls(size_bytes, part_size, generation, known, written_ns)


def _check(key: Key, raw: bytes | bytearray) -> bytes:
    hasher = xxhash.xxh3_64(key)
    hasher.update(raw[: _CHECK.start])
    hasher.update(raw[_CHECK.stop :])
    return (hasher.intdigest() & 0xFFFFFFFF).to_bytes(4, "little")
