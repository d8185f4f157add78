"""The process that keeps mounts while nobody serves them: ``shoal-fdstore``, or ``python -m shoal_csi.fdstore``.

A mount ends with the last descriptor of its connection. Its supervisor and its daemon have one, and where they end
together, as the processes of a container do, so does the mount. This process, in a container or service of its own, has
duplicates: whoever comes next takes them from here and goes on. It knows nothing of mounts, and sees no other process.

A client sends messages (SOCK_SEQPACKET) to ``RUN/fdstore.socket``, each a verb and a mount's ``major:minor``:

    deposit KEY     with the descriptors of /dev/fuse, of the daemons' state and, where there is a daemon, of a pipe
                    that ends with it. No answer. The mount has a supervisor for as long as this connection is open
    fetch KEY       ``here`` with the same descriptors, or ``none``
    withdraw KEY    ``done``; they are closed here
    list            a line ``KEY STATE`` for each mount; STATE is one of `SUPERVISED`, `SERVED`, `WAITING`

What is closed without being asked for: a connection that has ended, which the descriptor itself says (POLLERR),
however it came to that; nobody waits for this process when a file system is unmounted. And, after ``--keep-for``, what
nobody serves: its readers wait, and are better told that it is gone. Both are looked for once a second; whoever waits
in poll(2) for a connection is woken by the kernel for each of its requests.

The rule: nothing is done here but to hold: no descriptor is read or written, and no client is waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from shoal_csi import sockets

SUPERVISED, SERVED, WAITING = "supervised", "served", "waiting"
HERE, NONE, DONE = b"here", b"none", b"done"
MAX_MESSAGE, MAX_ANSWER, MAX_FDS = 256, 64 << 10, 3
#: Longer than a container that crashes is kept from starting again, and than its next image is fetched.
KEEP_S = 900.0
_FUSE = os.makedev(10, 229)  # Documentation/admin-guide/devices.txt
_LOOK_MS = 1000
_BACKLOG = 128
_OOM_SCORE_ADJ = "-900"


def socket_path() -> Path:
    return sockets.root() / "fdstore.socket"


class Kept:
    """The descriptors of one mount.

    Attributes:
        fds: of the connection, of the state, of the pipe that ends with the daemon.
        depositor: the number of its connection; None: it has ended.
        waiting_since: `time.monotonic` of when nobody was seen to serve it; None: somebody does.
    """

    __slots__ = ("depositor", "fds", "waiting_since")

    def __init__(self, fds: list[int], depositor: int) -> None:
        self.fds = fds
        self.depositor: int | None = depositor
        self.waiting_since: float | None = None

    @property
    def state(self) -> str:
        if self.depositor is not None:
            return SUPERVISED
        return SERVED if len(self.fds) > 2 and has_writer(self.fds[2]) else WAITING


class Store:
    """Serves at `listener`."""

    def __init__(self, listener: socket.socket, *, keep_s: float) -> None:
        self._listener = listener
        self._keep_s = keep_s
        self._clients: dict[int, socket.socket] = {}
        self._kept: dict[str, Kept] = {}
        self._connections = select.poll()
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def run(self) -> NoReturn:
        """For ever."""
        while True:
            ready = dict(self._poll.poll(_LOOK_MS if self._kept else None))
            self._look()
            for fd in ready.keys() & self._clients.keys():
                self._hear(self._clients[fd])
            if self._listener.fileno() in ready:
                self._welcome()

    def _welcome(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            say(f"a connection cannot be taken: {error.strerror}")
            time.sleep(_LOOK_MS / 1000 if error.errno in (errno.EMFILE, errno.ENFILE) else 0)
            return
        if not sockets.may_ask(sock):
            sock.close()
            return
        sock.setblocking(False)
        self._clients[sock.fileno()] = sock
        self._poll.register(sock, select.POLLIN)

    def _hear(self, sock: socket.socket) -> None:
        fds: list[int] = []
        try:
            text, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            match text.decode("ascii").split():
                case ["deposit", key] if len(fds) > 1 and os.fstat(fds[0]).st_rdev == _FUSE:
                    self._take(key, fds, sock.fileno())
                    fds = []
                case ["fetch", key] if key in self._kept:
                    socket.send_fds(sock, [HERE], self._kept[key].fds)
                case ["fetch", _]:
                    sock.send(NONE)
                case ["withdraw", key]:
                    self._drop(key, "it was withdrawn")
                    sock.send(DONE)
                case ["list"]:
                    lines = "".join(f"{key} {kept.state}\n" for key, kept in self._kept.items())
                    sock.send(lines.encode()[:MAX_ANSWER])
                case _:
                    self._part(sock)
        except (OSError, UnicodeDecodeError):
            self._part(sock)  # it is gone, or does not take answers
        for fd in fds:
            os.close(fd)

    def _part(self, sock: socket.socket) -> None:
        for kept in self._kept.values():
            if kept.depositor == sock.fileno():
                kept.depositor = None
        del self._clients[sock.fileno()]
        self._poll.unregister(sock)
        sock.close()

    def _take(self, key: str, fds: list[int], depositor: int) -> None:
        if key in self._kept:
            self._drop(key)
        else:
            say(f"keeps the mount {key}")
        self._kept[key] = Kept(fds, depositor)
        self._connections.register(fds[0], 0)  # POLLERR alone

    def _drop(self, key: str, why: str = "") -> None:
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        self._connections.unregister(kept.fds[0])
        for fd in kept.fds:
            os.close(fd)
        if why:
            say(f"keeps the mount {key} no more: {why}")

    def _look(self) -> None:
        now, ended = time.monotonic(), dict(self._connections.poll(0))
        for key, kept in list(self._kept.items()):
            if kept.fds[0] in ended:
                self._drop(key, "its connection has ended")
            elif kept.state != WAITING:
                kept.waiting_since = None
            elif kept.waiting_since is None:
                kept.waiting_since = now
            elif self._keep_s and now - kept.waiting_since >= self._keep_s:
                self._drop(key, f"nobody served it for {self._keep_s:g} s")


def has_writer(pipe_fd: int) -> bool:
    """Whether a process has the writing end of a pipe open."""
    poll = select.poll()
    poll.register(pipe_fd, 0)
    return not any(events & select.POLLHUP for _, events in poll.poll(0))


def say(text: str) -> None:
    if os.environ.get("SHOAL_LOG_FORMAT") == "json":
        from shoal import logs  # only then: without it this process stays small

        text = logs.line("shoal_csi.fdstore", text)
    else:
        text = f"shoal-fdstore {text}"
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Serve until SIGTERM, which closes everything."""
    parser = argparse.ArgumentParser(
        prog="shoal-fdstore", description="Keep mounts alive while what serves them starts again."
    )
    parser.add_argument(
        "--keep-for",
        type=float,
        default=KEEP_S,
        metavar="SECONDS",
        help="then a mount that nobody serves is let go, and its readers get errors; 0: never (default: %(default)g)",
    )
    options = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT):  # by default the first process of a container gets neither
        signal.signal(number, lambda *_: sys.exit(0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # three descriptors a mount, and the usual limit is 1,024
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(OSError):  # what it holds is all that cannot be replaced; takes CAP_SYS_RESOURCE
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJ)
    path = socket_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # the local node's socket is there, too, for everybody
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waits: another one serves at {path}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        listener = sockets.listen(path, _BACKLOG)
    except OSError as error:
        print(f"error: {path} cannot be made: {error.strerror}; set SHOAL_RUN_DIR", file=sys.stderr)
        sys.exit(1)
    os.chdir("/")
    say(f"serves at {path}")
    Store(listener, keep_s=options.keep_for).run()


if __name__ == "__main__":
    main()
