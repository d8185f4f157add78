"""What a file of the local tier says about itself, and how far that is believed. Pure.

The bytes of the file are the object's and nothing else, because the kernel gives them to readers as they are. The rest
is in the extended attribute ``user.shoal.tier``, which travels with the file through its rename:

    magic "SHT1" | size u64 | written u64 | boot 16 bytes | checksum 16 bytes | check 8 bytes

Little-endian. `written` is the file's time of change (mtime, ns), `boot` names the start of the machine in which the
bytes were written, or last read and found right; `checksum` is the xxh3_128 of all of them, and `check` the xxh3_64 of
the object's key and the attribute before it.

The rule: a file is believed within one start of the machine, for as long as nobody wrote to it. After that it is read
and compared with its checksum before anybody else gets it.
"""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass
from typing import Self

import xxhash

from shoal.errors import ShardCorrupt
from shoal.shards import Key

XATTR = "user.shoal.tier"
_MAGIC = b"SHT1"
_BODY = struct.Struct("<4sQQ16s16s")
_CHECK_BYTES = 8


class Trust(enum.Enum):
    """What a look at a file, without reading it, comes to."""

    WHOLE = "whole"
    UNSURE = "unsure"  #: to be compared with its checksum: the machine was started since, or somebody wrote to it
    NONE = "none"  #: torn, of another size or of another object


@dataclass(frozen=True, slots=True)
class TierHeader:
    """The attribute's content; see the module."""

    size_bytes: int
    written_ns: int
    boot: bytes
    checksum: bytes

    def encode(self, key: Key) -> bytes:
        """The attribute of the file of object `key`. Always of the same length."""
        body = _BODY.pack(_MAGIC, self.size_bytes, self.written_ns, self.boot, self.checksum)
        return body + _check(key, body)

    @classmethod
    def decode(cls, raw: bytes, key: Key) -> Self:
        """Parse what `encode` wrote for the same `key`.

        Raises:
            ShardCorrupt: `raw` is something else.
        """
        body = raw[: _BODY.size]
        if len(raw) != _BODY.size + _CHECK_BYTES or raw[_BODY.size :] != _check(key, body):
            raise ShardCorrupt("the attribute is torn, or of another object")
        magic, size_bytes, written_ns, boot, checksum = _BODY.unpack(body)
        if magic != _MAGIC:
            raise ShardCorrupt("the attribute is of another version")
        return cls(size_bytes, written_ns, boot, checksum)


def judge(raw: bytes, key: Key, size_bytes: int, found: os.stat_result, boot: bytes) -> Trust:
    """How far to believe a file.

    Args:
        raw: its attribute; b"" where it has none.
        key, size_bytes: of the object that it should be.
        boot: names this start of the machine.
    """
    try:
        header = TierHeader.decode(raw, key)
    except ShardCorrupt:
        return Trust.NONE
    if not header.size_bytes == size_bytes == found.st_size:
        return Trust.NONE
    return Trust.WHOLE if (header.boot, header.written_ns) == (boot, found.st_mtime_ns) else Trust.UNSURE


def _check(key: Key, body: bytes) -> bytes:
    return xxhash.xxh3_64_digest(key + body)
