"""A daemon as its supervisor sees it: a process that waits as a spare, then serves, says so, and ends.

The rule: it is known by a pidfd, so that no signal ever reaches a later process of the same pid.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shoal_csi import rundir, spare
from shoal_csi.rundir import Daemon


class DaemonProcess:
    """One process. Its descriptors are closed by `bury`.

    Attributes:
        known: as others find it.
        pidfd: readable when it has ended.
        ready_fd: readable when it says something. Its other end is open for as long as the process lives, whatever
            that does with its stdout: by this its end is known where its pid is not.
        is_loaded, is_ready: it has said so.
    """

    def __init__(self, known: Daemon, ready_fd: int, process: subprocess.Popen[bytes] | None, go_fd: int) -> None:
        self.known = known
        self.pidfd = os.pidfd_open(known.pid)
        self.ready_fd = ready_fd
        self.is_loaded = self.is_ready = False
        self._process = process
        self._go_fd = go_fd
        self._heard = b""

    @classmethod
    def spawn(
        cls, module: str, args: Sequence[str], fuse_fd: int, state_fd: int, oom_score_adj: str | None
    ) -> DaemonProcess:
        """Start one that loads, and waits for `go`.

        Args:
            oom_score_adj: its own; None: this process's.

        Raises:
            OSError: no memory, no processes.
        """
        ready_fd, says_fd = os.pipe2(os.O_CLOEXEC)
        waits_fd, go_fd = os.pipe2(os.O_CLOEXEC)
        own = ["--fd", str(fuse_fd), "--state-fd", str(state_fd)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal_csi.spare", module, *own, *args],
                stdin=waits_fd,
                stdout=says_fd,
                # Both ends of the pipe: without a supervisor it must not fail at saying that it is ready.
                pass_fds=(fuse_fd, state_fd, ready_fd, says_fd),
                # Ctrl-C is for the supervisor. A process group of its own would be enough for that, but in a session of
                # ours the kernel hangs up (SIGHUP) one that is stopped when we end, and the mount would end with us.
                start_new_session=True,
            )
        except OSError:
            os.close(ready_fd)
            os.close(go_fd)
            raise
        finally:
            os.close(says_fd)
            os.close(waits_fd)
        if oom_score_adj is not None:
            with contextlib.suppress(OSError):  # it inherits the supervisor's
                Path(f"/proc/{process.pid}/oom_score_adj").write_text(oom_score_adj)
        known = Daemon(process.pid, rundir.started(process.pid), fuse_fd, state_fd, ready_fd)
        return cls(known, ready_fd, process, go_fd)

    @classmethod
    def adopted(cls, known: Daemon, ready_fd: int) -> DaemonProcess:
        """One that another supervisor started. Raises OSError: it has ended."""
        daemon = cls(known, ready_fd, None, -1)
        if not known.is_running:  # looked at once the pidfd is there: it is of this process or of a later one
            os.close(daemon.pidfd)
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return daemon

    def go(self) -> bool:
        """Let it serve; whether it still lives to do so."""
        try:
            os.write(self._go_fd, spare.GO)
        except BrokenPipeError:
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def hear(self) -> bool:
        """Take in what it says, when `ready_fd` is readable; False where there will be no more."""
        heard = os.read(self.ready_fd, 1 << 16)
        self._heard += heard
        *lines, self._heard = self._heard.split(b"\n")
        self.is_loaded |= spare.LOADED.encode() in lines
        self.is_ready |= any(line.startswith(b"ready") for line in lines)
        return bool(heard)

    def wait_until_loaded(self, within_s: float) -> bool:
        """Whether it came to wait for its turn; else it has ended, or takes too long."""
        deadline = time.monotonic() + within_s
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        poll.register(self.ready_fd, select.POLLIN)
        while not self.is_loaded:
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready or self.pidfd in ready:
                return False
            self.hear()
        return True

    def finish(self, within_s: float) -> None:
        """Have it finish what is under way, and wait for its end; kill it where that takes too long."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        self.signal(signal.SIGTERM)
        if not poll.poll(within_s * 1000):
            self.signal(signal.SIGKILL)
            poll.poll()

    def bury(self) -> int | None:
        """Wait for the end, and close what there was. The status, negative for a signal; None: another's to know."""
        status = None if self._process is None else self._process.wait()
        for fd in (self.pidfd, self.ready_fd, self._go_fd):
            if fd >= 0:
                os.close(fd)
        return status


def how(status: int | None) -> str:
    """A sentence's part on how a process ended."""
    if status is None:
        return "it ended, and its status was another process's to know"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
