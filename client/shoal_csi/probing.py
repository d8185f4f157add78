"""A request through a mount, made by a process that may hang in it.

A process that waits for an answer that does not come waits even against SIGKILL, until the connection ends or another
daemon answers. It has no descriptor of the connection, so it keeps nothing alive, and nobody waits for it.

The rule: what is asked is answered by the daemon alone: neither the kernel's cache nor what lies under a mount counts.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import subprocess
import sys
import time

#: statvfs is never cached. ECONNABORTED, ENOTCONN and ECONNREFUSED say that nobody answered; other errors are answers.
_CODE = """
import os, sys
try:
    os.statvfs(sys.argv[1])
except OSError as error:
    sys.exit(2 if error.errno in (103, 107, 111) else 0)
status = os.stat(sys.argv[1])
sys.exit(0 if f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}" == sys.argv[2] else 3)
"""


class Outcome(enum.Enum):
    ANSWERED = "answered"
    DEAD = "dead"  # the connection has ended
    OTHER = "other"  # something else is there, or the request could not be made


class Probe:
    """One request, under way.

    Args:
        device: ``major:minor`` of the mount that should answer.

    Attributes:
        since: `time.monotonic` of its start.
        pidfd: readable when it is over.
    """

    def __init__(self, mountpoint: str, device: str) -> None:
        self.since = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE, mountpoint, device],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pidfd = os.pidfd_open(self._process.pid)

    def outcome(self) -> Outcome:
        """What came of it, when `pidfd` is readable."""
        return {0: Outcome.ANSWERED, 2: Outcome.DEAD}.get(self._process.wait(), Outcome.OTHER)

    def wait(self, timeout_s: float) -> Outcome | None:
        """What comes of it; None where nothing does in time."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return self.outcome() if poll.poll(timeout_s * 1000) else None

    def close(self) -> None:
        """Forget it. Where it hangs, it ends when the kernel lets it, and Python reaps it with a later child."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)
        self._process.poll()


def ask(mountpoint: str, device: str, timeout_s: float) -> Outcome | None:
    """Make one request and wait for its answer; None where none comes in time."""
    probe = Probe(mountpoint, device)
    try:
        return probe.wait(timeout_s)
    finally:
        probe.close()
