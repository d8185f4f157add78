"""What a supervisor and its daemons write: lines on stderr, which is a terminal, somebody's pipe, or the mount's log.

The rule: nothing here may fail or wait for long: a disk that is full must not end a mount.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from shoal import logs
from shoal.errors import ShoalError
from shoal_csi import rundir

#: A log of ours that grows beyond this begins anew; what it had lies beside it. It may be on a file system in memory.
MOST_BYTES = 4 << 20
_TAIL_BYTES = 64 << 10
_LOGGER = "shoal_csi.supervisor"


class Journal:
    """The stderr of this process. One a process.

    Args:
        fields: of each line, where lines are JSON (`shoal.logs`).

    Attributes:
        path: of the log, where stderr is a file; else "".
    """

    def __init__(self, **fields: object) -> None:
        self._fields = {"pid": os.getpid(), **fields}
        self._errors_fd = 2  # where whoever started this process reads why it failed
        self._is_ours = False  # else whoever redirected stderr to a file keeps that in bounds
        self.path = _path()

    def to_file(self, mountpoint: str) -> None:
        """From here on stderr, and so the daemons', is the mount point's log; `fail` is heard at both.

        Raises:
            ShoalError: it cannot be written.
        """
        path = rundir.log_of(mountpoint)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # the local node's socket is there, too, for everybody
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ShoalError(f"the log {path} cannot be written: {error.strerror}; set SHOAL_RUN_DIR") from error
        self._errors_fd = os.dup(2)
        os.dup2(log, 2)
        os.close(log)
        self.path, self._is_ours = _path(), True

    def let_go(self) -> None:
        """Whoever started this process has heard all there is."""
        if self._errors_fd != 2:
            os.close(self._errors_fd)
            self._errors_fd = 2

    def say(self, text: str) -> None:
        if logs.is_json():
            said = logs.line(_LOGGER, text, self._fields)
        else:
            now = time.time()
            when = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now * 1000) % 1000:03}"
            said = f"{when} {self._own}{text}"
        with contextlib.suppress(OSError):
            os.write(2, f"{said}\n".encode())

    def fail(self, sentence: str) -> None:
        """Say why this process ends."""
        told = f"error: {sentence}"  # which is what whoever started this process reads, and no line of a log
        for fd in {2, self._errors_fd}:
            as_json = fd == 2 and self._is_ours and logs.is_json()
            said = logs.line(_LOGGER, sentence, self._fields, level="critical") if as_json else told
            with contextlib.suppress(OSError):
                os.write(fd, f"{said}\n".encode())

    def size(self) -> int:
        """Bytes of the log; 0 where it is no file."""
        return os.fstat(2).st_size if self.path else 0

    def last_words(self, start: int) -> str:
        """The last ``error:`` line after `start`, else the last line that is not ours; "" where it cannot be read."""
        if not self.path:
            return ""
        try:
            size = self.size()
            with Path(self.path).open("rb") as log:
                log.seek(max(start if start <= size else 0, size - _TAIL_BYTES))  # it may have begun anew meanwhile
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return last_words(line for line in text.splitlines() if self._own not in line)

    def shorten(self) -> None:
        """Begin anew where the log has grown too long."""
        size = self.size()
        if self._is_ours and size > MOST_BYTES:
            with contextlib.suppress(OSError), Path(self.path).open("rb") as log:
                log.seek(size - MOST_BYTES)
                aside = os.open(f"{self.path}.1", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with os.fdopen(aside, "wb") as before:
                    before.write(log.read(MOST_BYTES))
            os.ftruncate(2, 0)  # all who write to it append

    @property
    def _own(self) -> str:
        return f"supervisor {os.getpid()}: "


def last_words(lines: Iterable[str]) -> str:
    """The last ``error:`` line of daemons, else their last line; "" where there is none. Pure."""
    said = [found for line in filter(None, map(str.strip, lines)) if (found := logs.parse(line)).logger != _LOGGER]
    errors = [each.message for each in said if each.is_last]
    return (errors or [each.message for each in said] or [""])[-1]


def _path() -> str:
    return str(Path("/proc/self/fd/2").readlink()) if stat.S_ISREG(os.fstat(2).st_mode) else ""
