"""How a supervisor comes by the descriptors of a mount that another one holds, or held.

    a supervisor that lives     is asked at its socket; it sends them (SCM_RIGHTS), and ends without touching anything.
                                Where its pids are not ours, because it is in another container, we could neither see
                                nor end its daemon: it is asked to have that finish first
    one that is dead            left them in its daemon, which serves on; they are taken from there (pidfd_getfd(2),
                                Linux 5.6, CAP_SYS_PTRACE), and the daemon does not notice
    both are dead               the descriptor store has them, if there is one (`shoal_csi.deposits`)

With none of these left the last descriptor is closed, and with it the kernel has ended the connection.

The rule: whoever hands over goes on until the other side said that it has everything.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.errors import ShoalError
from shoal_csi import sockets
from shoal_csi.rundir import Daemon, Record

#: Of a side that is there, for one message; and of one that has its daemon finish.
ANSWER_S, FINISH_S = 5.0, 70.0
#: The same number on every architecture that Linux numbers its newer calls alike on, which is all that Python knows.
_SYS_PIDFD_GETFD = 438
_MAX_MESSAGE = 64 << 10
_TAKEN, _FINISH, _FINISHED = b"taken", b"finish", b"finished"

_library = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Held:
    """What keeps a mount alive, as descriptors of this process. `ready_fd` is None where there is no daemon."""

    fuse_fd: int
    state_fd: int
    ready_fd: int | None

    def close(self) -> None:
        for fd in (self.fuse_fd, self.state_fd, self.ready_fd):
            if fd is not None:
                os.close(fd)


def from_daemon(daemon: Daemon) -> Held:
    """Take the descriptors from a daemon whose supervisor is gone.

    Raises:
        OSError: ESRCH: it is gone, too; EPERM: this process may not; EBADF: it does not hold them.
    """
    process = os.pidfd_open(daemon.pid)
    taken: list[int] = []
    try:
        if not daemon.is_running:  # a later process of the same pid
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        for number in (daemon.fuse_fd, daemon.state_fd, daemon.ready_fd):
            fd = _library.syscall(_SYS_PIDFD_GETFD, process, number, 0)  # close-on-exec by itself
            if fd < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            taken.append(fd)
        if Path(f"/proc/self/fd/{taken[0]}").readlink() != Path("/dev/fuse"):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return Held(*taken)
    except OSError:
        for fd in taken:
            os.close(fd)
        raise
    finally:
        os.close(process)


def ask(directory: Path, *, is_look: bool = False) -> tuple[Record, Held]:
    """Have the supervisor of a mount point's directory hand over; it ends then.

    Args:
        is_look: duplicates are all that is wanted: it goes on.

    Raises:
        ShoalError: it does not answer, or is not in a state to.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_S)
        try:
            with sockets.short_name(directory / "socket") as name:
                sock.connect(name)
            text, fds, _, _ = socket.recv_fds(sock, _MAX_MESSAGE, 3, socket.MSG_CMSG_CLOEXEC)
            if not fds:
                raise ShoalError(f"the supervisor does not hand over now: {text.decode() or 'it is ending'}; try again")
            record, held = Record.from_json(text), Held(fds[0], fds[1], fds[2] if len(fds) > 2 else None)
            if is_look:
                return record, held
            if not record.is_of_here and held.ready_fd is not None:
                record, held = _finished(sock, record, held)
            sock.send(_TAKEN)
            sock.recv(1)  # its end: the lock is free
        except OSError as error:
            raise ShoalError(f"the supervisor does not hand over: {error.strerror or error}") from error
        except ValueError as error:
            raise ShoalError(f"the supervisor is of a version that cannot be taken over from: {error}") from error
    return record, held


def _finished(sock: socket.socket, record: Record, held: Held) -> tuple[Record, Held]:
    """What is there once the daemon has ended. Raises OSError."""
    sock.settimeout(FINISH_S)
    sock.send(_FINISH)
    if sock.recv(len(_FINISHED)) != _FINISHED:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    assert held.ready_fd is not None
    os.close(held.ready_fd)
    return replace(record, daemon=None), replace(held, ready_fd=None)


def listen(directory: Path) -> socket.socket:
    """A socket at which `ask` finds this process. Raises OSError: it cannot be made."""
    return sockets.listen(directory / "socket", 1)


def give(
    listener: socket.socket, record: Record, held: Held, finish: Callable[[], None], *, refusal: str
) -> socket.socket | None:
    """Answer one successor. Returns the connection where it has everything: its end tells the successor of ours.

    Args:
        finish: ends the daemon, and returns when it has ended.
        refusal: why not now; "" to hand over.
    """
    try:
        sock, _ = listener.accept()
    except OSError:
        return None
    sock.settimeout(ANSWER_S)
    try:
        if not sockets.may_ask(sock):
            refusal = "it is another user's"
        if refusal:
            sock.send(refusal.encode())
        else:
            fds = [held.fuse_fd, held.state_fd, *([] if held.ready_fd is None else [held.ready_fd])]
            socket.send_fds(sock, [record.to_json().encode()], fds)
            said = sock.recv(len(_FINISH))
            if said == _FINISH:
                finish()
                sock.send(_FINISHED)
                said = sock.recv(len(_TAKEN))
            if said == _TAKEN:
                return sock
    except OSError:
        pass  # a successor that goes away takes nothing over
    sock.close()
    return None
