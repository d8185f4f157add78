"""Errors for requests that no daemon will answer soon: better than to wait for good.

Only where the connection is set up, so INIT is not among them. A RELEASE is left to the next daemon, which counts who
has a file open: nobody waits for its answer, and without it the file would be open for good, and its backing file with
it. Where as many of them are left as the kernel has in the background at a time, reads into the page cache wait, too.

The rule: exactly one answer for each request that somebody waits for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct

from shoal_csi import kernel

# linux/fuse.h: requests without an answer. The last one is answered by its own request's answer.
_FORGET, _BATCH_FORGET, _INTERRUPT = 2, 42, 36
_RELEASE = 18
_IN_HEADER = struct.Struct("<IIQ")
_OUT_HEADER = struct.Struct("<IiQ")
_MAX_REQUEST = (1 << 20) + (1 << 12)


def take_back(fd: int) -> bool:
    """Have what a dead daemon took handed out again; whether the kernel can do that."""
    with contextlib.suppress(OSError):
        kernel.resend(fd)
        return True
    return False


def refuse(fd: int, *, comes_again: bool) -> None:
    """Answer one request with EIO. Only while one is there to be read: else it blocks.

    Args:
        comes_again: what is taken and not answered will be handed out again; else all is answered.
    """
    silent = (_FORGET, _BATCH_FORGET, _INTERRUPT, *([_RELEASE] if comes_again else []))
    try:
        request = os.read(fd, _MAX_REQUEST)
        _, operation, unique = _IN_HEADER.unpack_from(request)
        if operation not in silent:
            os.write(fd, _OUT_HEADER.pack(_OUT_HEADER.size, -errno.EIO, unique))
    except OSError:
        pass  # interrupted meanwhile, or the connection has ended, which poll(2) tells
