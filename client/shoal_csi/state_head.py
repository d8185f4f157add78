"""The first words of a mount's state (`shoal_csi.state`), for processes that only look: no numpy, and no map.

The rule: words keep their places for as long as `VERSION` is the same.
"""

from __future__ import annotations

import os
import struct

MAGIC = int.from_bytes(b"shoalmnt", "little")
VERSION = 1
MAGIC_AT, VERSION_AT, IS_PINNED, IS_AGREED, MINOR, FLAGS, READAHEAD, LAST_BACKING, STARTS = range(9)
#: What was counted (`shoal_csi.numbers`). The words before it are for what else the head may come to hold.
NUMBERS_AT, NUMBERS = 16, 48
_HEAD = struct.Struct(f"={NUMBERS_AT + NUMBERS}Q")


def peek(fd: int) -> tuple[int, tuple[int, ...]] | None:
    """How many servers there were, and what they counted; None where `fd` is no state of this version.

    Raises:
        OSError: it cannot be read.
    """
    head = os.pread(fd, _HEAD.size, 0)
    if len(head) < _HEAD.size:
        return None
    words = _HEAD.unpack(head)
    if (words[MAGIC_AT], words[VERSION_AT]) != (MAGIC, VERSION):
        return None
    return words[STARTS], words[NUMBERS_AT:]
