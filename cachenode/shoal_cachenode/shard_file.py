"""What a shard file says about itself: one extended attribute beside the bytes. Pure.

The bytes of a shard file are the shard's bytes and nothing else, so that the file can be mapped, sent and passed
through as it is. What the store must know besides lives in the attribute ``user.shoal.shard``, which travels with the
file through a rename and needs no second file to agree with:

    magic "SHL1" | generation u32 | part_size u32 | reserved u32 | size u64 | checksum u64 x parts | present bitmap

Little-endian. Checksums are xxh3_64 of each part; a part counts only where its bit is set. Extended attributes hold
4 KiB on ext4, which is why a shard has at most 2 GiB (256 parts of 8 MiB, 2.1 KiB).

`generation` says which start of the machine wrote the file: after a machine went down without a clean stop the store
takes a new one, and files of older ones are verified before they are served.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from shoal.errors import ShardCorrupt

XATTR = "user.shoal.shard"
_HEAD = struct.Struct("<4sIIIQ")
_MAGIC = b"SHL1"


@dataclass(slots=True)
class ShardHeader:
    """The attribute's content.

    Attributes:
        size_bytes: of the whole shard.
        part_size: bytes of each part but the last.
        generation: see the module.
        checksums: xxh3_64 of each part; None where the part is not there yet.
    """

    size_bytes: int
    part_size: int
    generation: int
    checksums: list[int | None]

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

    def encode(self) -> bytes:
        bitmap = bytearray(-(-len(self.checksums) // 8))
        for part, checksum in enumerate(self.checksums):
            if checksum is not None:
                bitmap[part // 8] |= 1 << part % 8
        head = _HEAD.pack(_MAGIC, self.generation, self.part_size, 0, self.size_bytes)
        return head + struct.pack(f"<{len(self.checksums)}Q", *(c or 0 for c in self.checksums)) + bitmap

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Parse what `encode` wrote.

        Raises:
            ShardCorrupt: `raw` is something else.
        """
        try:
            magic, generation, part_size, _, size_bytes = _HEAD.unpack_from(raw)
            if magic != _MAGIC or part_size == 0:
                raise ShardCorrupt("the shard attribute has another format")
            parts = -(-size_bytes // part_size)
            sums = struct.unpack_from(f"<{parts}Q", raw, _HEAD.size)
            bitmap = raw[_HEAD.size + 8 * parts :]
            present = [bool(bitmap[part // 8] & 1 << part % 8) for part in range(parts)]
        except (struct.error, IndexError, MemoryError) as error:
            raise ShardCorrupt("the shard attribute is cut short") from error
        return cls(size_bytes, part_size, generation, [s if p else None for s, p in zip(sums, present, strict=True)])
