"""Whether what is mounted somewhere answers, found out without hanging where it does not.

A FUSE mount whose server is gone for good fails every call. One whose server is being replaced, or is stuck, fails none
and keeps it waiting, even against SIGKILL, until another server answers or the connection ends. So a child asks, which
may hang in our place: it has no descriptor of the connection, so it keeps nothing alive, and nobody waits for it.

    Probe     one question, under way; for whoever waits for other things, too
    ask       one question, and its answer within a time
    Prober    questions of many threads: where one has no answer yet no other is asked, so a mount that hangs costs one
              thread and one child

The rule: what is asked is answered by the server alone: neither the kernel's cache nor what lies under a mount counts.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

#: statvfs(3) is never answered from the kernel's memory; what stat(2) says then is the file system that answered.
_CODE = """
import os, sys
try:
    s = os.statvfs(sys.argv[1])
    d = os.stat(sys.argv[1]).st_dev
except OSError as error:
    print(error.errno)
    sys.exit(1)
print(s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_favail, os.major(d), os.minor(d))
"""

#: Errors of a mount whose server is gone for good.
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNREFUSED)


class State(enum.Enum):
    ALIVE = "answers"
    SILENT = "does not answer"  # or with an error that says no more than that
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
    """What a probe found.

    Attributes:
        usage: where the mount is alive.
        device: ``major:minor`` of the file system that answered; "" where none did.
        error: the errno that was the answer; 0: none was.
    """

    state: State
    usage: Usage | None = None
    device: str = ""
    error: int = 0

    def is_answer_of(self, device: str) -> bool:
        """Whether the server of that file system said something, be it an error."""
        return self.device == device if self.state is State.ALIVE else self.error != 0 and self.state is not State.DEAD


class Probe:
    """One question, under way.

    Attributes:
        since: `time.monotonic` of its start.
        pidfd: readable when it is over.

    Raises:
        OSError: it cannot be put: no memory, no processes.
    """

    def __init__(self, path: str) -> None:
        self.since = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE, path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.pidfd = os.pidfd_open(self._process.pid)

    def finding(self) -> Finding:
        """What came of it, when `pidfd` is readable."""
        self._process.wait()
        assert self._process.stdout is not None
        return found(self._process.stdout.read())

    def wait(self, timeout_s: float | None) -> Finding | None:
        """What comes of it; None where nothing does in time."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return self.finding() if poll.poll(None if timeout_s is None else timeout_s * 1000) else None

    def close(self) -> None:
        """Forget it. Where it hangs, it ends when the kernel lets it, and Python reaps it with a later child."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.poll()


def ask(path: str, timeout_s: float | None) -> Finding:
    """Put one question and wait for its answer; `State.SILENT` where none comes in time.

    Raises:
        OSError: it cannot be put.
    """
    probe = Probe(path)
    try:
        return probe.wait(timeout_s) or Finding(State.SILENT)
    finally:
        probe.close()


def found(said: bytes) -> Finding:
    """What a child's words mean; one that was killed said none. Pure."""
    numbers = [int(word) for word in said.split()]
    match numbers:
        case [size, blocks, free, available, files, free_files, available_files, major, minor]:
            usage = Usage(
                blocks * size, (blocks - free) * size, available * size, files, files - free_files, available_files
            )
            return Finding(State.ALIVE, usage, f"{major}:{minor}")
        case [number] if number in _DEAD:
            return Finding(State.DEAD, error=number)
        case [number]:
            return Finding(State.MISSING if number == errno.ENOENT else State.SILENT, error=number)
    return Finding(State.SILENT)


class Prober:
    """Asks mounts. Thread-safe.

    Args:
        timeout_s: a mount that is silent for longer does not answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # guards _asked
        self._asked: dict[str, _Question] = {}

    def probe(self, path: str) -> Finding:
        """What is to be said of the mount at `path` now."""
        with self._lock:
            question = self._asked.get(path)
            if question is None:
                question = self._asked[path] = _Question()
                threading.Thread(target=self._ask, args=(path, question), name="probe", daemon=True).start()
        question.is_answered.wait(self._timeout_s)
        return question.finding

    def _ask(self, path: str, question: _Question) -> None:
        try:
            question.finding = ask(path, None)
        except OSError:
            pass  # no child could be made: silent, and nothing is to be taken away for that
        with self._lock:
            del self._asked[path]
        question.is_answered.set()


class _Question:
    def __init__(self) -> None:
        self.finding = Finding(State.SILENT)
        self.is_answered = threading.Event()
