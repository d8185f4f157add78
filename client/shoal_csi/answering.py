"""Whether what is mounted somewhere answers, found out without hanging where it does not.

A FUSE mount whose server is gone fails every call; one whose server is being replaced, or is stuck, fails none and
keeps it waiting, even against SIGKILL. The first is to be taken away. The second is not: what is open in it goes on
when the server is back. So the question is put by a child, which may hang in our place.

The rule: where a question has no answer yet no other is asked, so a mount that hangs costs one thread and one child.
"""

from __future__ import annotations

import enum
import errno
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass

#: statvfs(3) is never answered from the kernel's memory.
_CODE = """
import os, sys
try:
    s = os.statvfs(sys.argv[1])
except OSError as error:
    print(error.errno)
    sys.exit(1)
print(s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_favail)
"""

#: Errors of a mount whose server is gone for good.
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)


class State(enum.Enum):
    ALIVE = "answers"
    SILENT = "does not answer"
    DEAD = "has lost its server"
    MISSING = "is not there"


@dataclass(frozen=True, slots=True)
class Usage:
    """What statvfs(3) says: bytes and inodes, in all, used and to be had."""

    total_bytes: int
    used_bytes: int
    available_bytes: int
    total_inodes: int
    used_inodes: int
    available_inodes: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found; `usage` where the mount is alive."""

    state: State
    usage: Usage | None = None


class Prober:
    """Asks mounts. Thread-safe.

    Args:
        timeout_s: a mount that is silent for longer does not answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # guards _asked
        self._asked: dict[str, Future[Finding]] = {}

    def probe(self, path: str) -> Finding:
        """What is to be said of the mount at `path` now."""
        with self._lock:
            future = self._asked.get(path)
            if future is None:
                future = self._asked[path] = Future()
                threading.Thread(target=self._ask, args=(path, future), name="probe", daemon=True).start()
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            return Finding(State.SILENT)

    def _ask(self, path: str, future: Future[Finding]) -> None:
        try:
            finding = _found(path)
        except OSError:
            finding = Finding(State.SILENT)  # no child could be made: nothing is to be taken away for that
        with self._lock:
            del self._asked[path]
        future.set_result(finding)


def _found(path: str) -> Finding:
    """Raises OSError: the question could not be put."""
    command = [sys.executable, "-I", "-S", "-c", _CODE, path]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    numbers = [int(word) for word in done.stdout.split()]
    match numbers:
        case [size, blocks, free, available, *inodes]:
            files, free_files, available_files = inodes
            used = (blocks - free) * size
            return Finding(
                State.ALIVE,
                Usage(blocks * size, used, available * size, files, files - free_files, available_files),
            )
        case [number]:
            if number in _DEAD:
                return Finding(State.DEAD)
            return Finding(State.MISSING if number == errno.ENOENT else State.SILENT)
    return Finding(State.SILENT)  # the child was killed
