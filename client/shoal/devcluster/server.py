"""One server as a child process that can be stopped, killed and started again with the same arguments.

A server says ``ready {json}`` on stdout when it serves; what it writes to stderr goes to a log file. One that ends
before it is ready has said why in its last line there, and that line becomes the error.

The rule: a process that this object started is reaped by it, and every end that nobody asked for is told once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import logs
from shoal.errors import ShoalError

#: From SIGTERM to SIGKILL.
STOP_GRACE_S = 10.0
_LOG_TAIL = 64 << 10


@dataclass(frozen=True, slots=True)
class Death:
    """A server ended although nobody stopped it. `sentence` names it and says how it ended."""

    name: str
    sentence: str


class ServerProcess:
    """A server of this machine's cluster; at most one process at a time.

    Attributes:
        name: ``controller``, ``node-0``, …
        log_path: its stderr, appended over restarts.
    """

    def __init__(
        self,
        name: str,
        module: str,
        args: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str],
        spawner: Executor,
        on_death: Callable[[Death], None],
        ready_timeout_s: float,
        wrapper: Sequence[str] = (),
    ) -> None:
        """Describe the server; `start` starts it.

        Args:
            module: what ``python -m`` runs.
            env: the whole environment.
            spawner: runs the fork. The kernel takes the end of the *thread* that forked for the end of the parent
                (prctl(2), PR_SET_PDEATHSIG), so this is one thread that lives as long as the cluster.
            on_death: called on a thread of this object when the server ends unasked after it was ready.
            wrapper: a command that becomes the rest of its command line.
        """
        self.name = name
        self.log_path = log_path
        self._command = [*wrapper, sys.executable, "-m", "shoal.devcluster.child", str(os.getpid()), module, *args]
        self._env = dict(env)
        self._spawner = spawner
        self._on_death = on_death
        self._ready_timeout_s = ready_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._ready: Future[dict[str, Any]] = Future()
        self._is_ending = False

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the running process. Raises ShoalError where there is none."""
        if self._process is None or not self.is_running:
            raise ShoalError(f"{self.name} is not running")
        return self._process.pid

    @property
    def ready(self) -> Mapping[str, Any]:
        """What the server said in its ``ready`` line. Raises ShoalError where it has not, or ended before."""
        if not self._ready.done():
            raise ShoalError(f"{self.name} is not ready")
        return self._ready.result()

    def start(self) -> None:
        """`spawn`, then `wait_until_ready`."""
        self.spawn()
        self.wait_until_ready()

    def spawn(self) -> None:
        """Start the process without waiting for it; nothing where it runs."""
        if self.is_running:
            return
        self._join()
        self._ready = Future()
        self._is_ending = False
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            start = log.tell()
            self._process = self._spawner.submit(self._popen, log.fileno()).result()
        self._reader = threading.Thread(target=self._read, args=(self._process, start), name=self.name, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> Mapping[str, Any]:
        """Return what the server says when it serves.

        Raises:
            ShoalError: it ended before that, with its own sentence, or took too long.
        """
        try:
            return self._ready.result(self._ready_timeout_s)
        except TimeoutError:
            raise ShoalError(
                f"{self.name} was not ready within {self._ready_timeout_s:.0f} s: see {self.log_path}"
            ) from None

    def terminate(self) -> None:
        """Ask the process to end in good order; `join` waits for it."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process as a crash would, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        self._join()

    def join(self, timeout_s: float = STOP_GRACE_S) -> None:
        """Wait for the end of a process that was asked to end; after `timeout_s` kill it."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
        self._join()

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """`terminate`, then `join`."""
        self.terminate()
        self.join(grace_s)

    def _signal(self, number: signal.Signals) -> None:
        self._is_ending = True
        if self._process is not None:
            self._process.send_signal(number)  # checks that the process was not reaped

    def _join(self) -> None:
        if self._reader is not None:
            self._reader.join()
        self._reader = None

    def _popen(self, log_fd: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_fd,
            text=True,
            # Ctrl-C in a terminal reaches its whole process group; who stops first is the cluster's decision.
            process_group=0,
        )

    def _read(self, process: subprocess.Popen[str], log_start: int) -> None:
        """Take in stdout until the process ends, then say how it ended. Runs on a thread of its own."""
        ready = self._ready
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.startswith("ready ") and not ready.done():
                    ready.set_result(json.loads(line.removeprefix("ready ")))
        code = process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if not ready.done():
            reason = last_words(self._log_since(log_start)) or f"{how}, see {self.log_path}"
            ready.set_exception(ShoalError(f"{self.name} did not start: {reason}"))
        elif not self._is_ending:
            said = last_words(self._log_since(log_start)) if code > 0 else ""
            self._on_death(Death(self.name, f"{self.name} ended ({how}){': ' if said else ''}{said}"))

    def _log_since(self, start: int) -> str:
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(start, size - _LOG_TAIL))
            return log.read().decode("utf-8", "replace")


def last_words(log: str) -> str:
    """The sentence with which a process ended: its last ``error:`` line, else its last line, else ""."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [said.message for line in lines if (said := logs.parse(line)).is_last]
    if errors:
        return errors[-1]
    if lines and lines[-1].startswith("ModuleNotFoundError:"):
        return f"{lines[-1].partition(':')[2].strip()}; install the servers with: pip install 'shoal[all]'"
    return lines[-1] if lines else ""
