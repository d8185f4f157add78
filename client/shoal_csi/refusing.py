"""Errors for requests that no daemon will answer soon: better than to wait for good.

Only where the connection is set up, so INIT is not among them.

The rule: exactly one answer for each request that wants one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct

from shoal_csi import kernel

# linux/fuse.h: requests without an answer. The last one is answered by its own request's answer.
_FORGET, _BATCH_FORGET, _INTERRUPT = 2, 42, 36
_IN_HEADER = struct.Struct("<IIQ")
_OUT_HEADER = struct.Struct("<IiQ")
_MAX_REQUEST = (1 << 20) + (1 << 12)


def take_back(fd: int) -> None:
    """Have what a dead daemon took handed out again, where the kernel can."""
    with contextlib.suppress(OSError):
        kernel.resend(fd)


def refuse(fd: int) -> None:
    """Answer one request with EIO. Only while one is there to be read: else it blocks."""
    try:
        request = os.read(fd, _MAX_REQUEST)
        _, operation, unique = _IN_HEADER.unpack_from(request)
        if operation not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            os.write(fd, _OUT_HEADER.pack(_OUT_HEADER.size, -errno.EIO, unique))
    except OSError:
        pass  # interrupted meanwhile, or the connection has ended, which poll(2) tells
