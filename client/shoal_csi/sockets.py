"""Unix sockets in the run directory: where that is, names that fit, and who is at the other end.

The rule: nothing large is imported here, because what supervises mounts and what keeps their descriptors does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path


def root() -> Path:
    """The run directory: ``SHOAL_RUN_DIR``, else ``/run/shoal`` for root, ``$XDG_RUNTIME_DIR/shoal`` for others."""
    if given := os.environ.get("SHOAL_RUN_DIR"):
        return Path(given)
    own = os.environ.get("XDG_RUNTIME_DIR")
    # Root with and without a session of its own must find the same mounts.
    return Path(own, "shoal") if own and os.geteuid() != 0 else Path("/run/shoal")


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """The name of a socket, however long its directory's is: a socket's name has at most 107 bytes (unix(7))."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def listen(path: Path, backlog: int) -> socket.socket:
    """A socket for messages at `path`, in the place of one that nobody listens at; only this user may connect.

    Raises:
        OSError: it cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        with short_name(path) as name:
            sock.bind(name)
    finally:
        os.umask(before)
    sock.listen(backlog)
    return sock


def may_ask(sock: socket.socket) -> bool:
    """Whether root or this user is at the other end."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.geteuid())
