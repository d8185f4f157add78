"""What a mount's descriptors are to `shoal_csi.fdstore`: deposited by its supervisor, found there by the next one.

Without a store nothing here does anything, and a mount ends with its processes.

The rule: the store is a spare wheel. Whatever becomes of it, no supervisor waits for it but at its own end, for a
moment, so that what it lets go of ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from shoal_csi import fdstore, sockets
from shoal_csi.handover import Held

#: Of a store that is there, for one message.
ANSWER_S = 2.0


class Deposit:
    """One mount's, kept up by its supervisor for as long as that lives.

    Args:
        say: takes a line for the log.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._key = ""
        self._held: Held | None = None
        self._sock: socket.socket | None = None
        self._is_missed = False  # its absence is worth a line only once there was one

    def put(self, key: str, held: Held) -> None:
        """Deposit, in the place of what was deposited before. `held` stays the caller's, and open until the next."""
        self._key, self._held = key, held
        if self._sock is None or not self._send():
            self._connect()

    def renew(self) -> None:
        """Deposit again, where the store is another one by now."""
        if self._held is not None and not self._is_connected():
            self._connect()

    def withdraw(self) -> None:
        """Have the store close what it has. Returns when it did, or does not answer."""
        sock, self._sock, self._held = self._sock, None, None
        if sock is not None:
            with sock, contextlib.suppress(OSError):
                sock.settimeout(ANSWER_S)
                sock.send(f"withdraw {self._key}".encode())
                sock.recv(fdstore.MAX_MESSAGE)

    def _connect(self) -> None:
        self._forget()
        try:
            self._sock = _connected()
        except OSError:
            if self._is_missed:
                self._say("the descriptor store is gone: the mount ends with supervisor and daemon until there is one")
            self._is_missed = False
            return
        if self._send():
            self._say("the descriptor store keeps the mount")
            self._is_missed = True

    def _send(self) -> bool:
        assert self._sock is not None and self._held is not None
        held = self._held
        fds = [held.fuse_fd, held.state_fd, *([] if held.ready_fd is None else [held.ready_fd])]
        try:
            socket.send_fds(self._sock, [f"deposit {self._key}".encode()], fds)
        except OSError:  # it is gone, or has not listened for long
            self._forget()
            return False
        return True

    def _is_connected(self) -> bool:
        if self._sock is None:
            return False
        try:
            return bool(self._sock.recv(1))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _forget(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def fetch(key: str) -> Held | None:
    """Duplicates of what the store has of a mount, the caller's; None where it has nothing, or there is no store.

    `Held.ready_fd` is None where the daemon has ended. One that lives may be where it cannot be seen from here.
    """
    try:
        with _connected() as sock:
            sock.settimeout(ANSWER_S)
            sock.send(f"fetch {key}".encode())
            text, fds, _, _ = socket.recv_fds(sock, fdstore.MAX_MESSAGE, fdstore.MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    if text != fdstore.HERE or len(fds) < 2:
        for fd in fds:
            os.close(fd)
        return None
    if len(fds) > 2 and not fdstore.has_writer(fds[2]):
        os.close(fds.pop())
    return Held(fds[0], fds[1], fds[2] if len(fds) > 2 else None)


def withdraw(key: str) -> None:
    """Have the store close what it has of a mount."""
    with contextlib.suppress(OSError), _connected() as sock:
        sock.settimeout(ANSWER_S)
        sock.send(f"withdraw {key}".encode())
        sock.recv(fdstore.MAX_MESSAGE)


def states() -> dict[str, str]:
    """The mounts that the store has, by ``major:minor``: one of `fdstore.SUPERVISED`, `SERVED`, `WAITING`."""
    try:
        with _connected() as sock:
            sock.settimeout(ANSWER_S)
            sock.send(b"list")
            text = sock.recv(fdstore.MAX_ANSWER).decode()
    except OSError:
        return {}
    pairs = (line.partition(" ") for line in text.splitlines())
    return {key: state for key, _, state in pairs}


def _connected() -> socket.socket:
    """Raises OSError: there is no store."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        with sockets.short_name(fdstore.socket_path()) as name:
            sock.connect(name)
    except BaseException:  # nobody else has the socket yet
        sock.close()
        raise
    return sock
