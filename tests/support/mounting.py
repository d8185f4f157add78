"""A place to mount at, supervisors for it, and nothing of either left afterwards.

The rule: everything that is started here knows the place's run directory from its environment, and by that it is found.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from shoal_csi import kernel, rundir
from shoal_csi.mount_table import MountTable
from shoal_csi.rundir import Daemon, Record
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
STAND_IN = "tests.support.fuse_stand_in"

#: Of a mount that is served, for whoever makes another one of it.
RECORD = Record(
    mountpoint="/m",
    dataset="d@0",
    subpath="",
    endpoint="",
    allow_other=True,
    device="0:1",
    supervisor_pid=1,
    daemon=Daemon(1, 1, 0, 0, 0),
    spare_pid=None,
    state="serving",
    restarts=0,
    failures=0,
    reason="",
    is_established=True,
    since=0.0,
    log="",
    daemon_module="",
)


def why_not() -> str:
    """Why this process may not mount; "" where it may."""
    with Place() as place:
        try:
            fd = kernel.open_device()
            try:
                kernel.mount(fd, place.mountpoint, "shoal:probe")
            finally:
                os.close(fd)
        except OSError as error:
            return f"FUSE cannot be mounted here: {error}"
    return ""


class Place:
    """A context manager.

    Attributes:
        mountpoint: an empty directory.
        steps: where files make `tests.support.fuse_stand_in` end.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sm-", dir="/tmp"))
        self.mountpoint = str(self.directory / "m")
        self.run_dir = self.directory / "run"
        self.steps = self.directory / "steps"
        for path in (Path(self.mountpoint), self.run_dir, self.steps):
            path.mkdir()
        own = {"SHOAL_RUN_DIR": str(self.run_dir), "SHOAL_STAND_IN": str(self.steps)}
        self.environment = self.paths() | dict(environment or {}) | own
        self.supervisors: list[subprocess.Popen[str]] = []
        self.stores: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()
        while MountTable.now().at(self.mountpoint) is not None:
            kernel.unmount(self.mountpoint, lazy=True, force=True)
        for started in (*self.supervisors, *self.stores):
            started.kill()
            started.communicate()
        shutil.rmtree(self.directory)

    @staticmethod
    def paths() -> dict[str, str]:
        """This process's environment, in which every package is found from any directory."""
        path = (str(ROOT / part) for part in ("client", "controller", "cachenode", "."))
        return os.environ | {"PYTHONPATH": os.pathsep.join(path)}

    # Supervisors.

    def supervise(self, *words: str, module: str = STAND_IN, wrapper: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start one, as what the command `wrapper` becomes; `ready` waits for it."""
        own = ["--mountpoint", self.mountpoint, "--dataset", "set@1234", "--daemon-module", module]
        process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "shoal_csi.supervisor", *own, *words, "--background"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.supervisors.append(process)
        return process

    def mount(self, *words: str, module: str = STAND_IN) -> subprocess.Popen[str]:
        """A supervisor whose mount answers."""
        process = self.supervise(*words, module=module)
        self.ready(process)
        return process

    def ready(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """What a supervisor says when its mount answers; fails where it ends before."""
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), (line, process.stderr.read() if process.stderr else "", self.log())
        said: dict[str, Any] = json.loads(line.removeprefix("ready "))
        return said

    def store(self, *words: str) -> subprocess.Popen[str]:
        """A descriptor store that serves, or waits for the end of the one that does."""
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal_csi.fdstore", *words],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stores.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "serves at" in line, line
        return process

    def stored(self) -> dict[str, str]:
        """What the store says that it has."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(self.run_dir / "fdstore.socket"))
            sock.send(b"list")
            lines = sock.recv(1 << 16).decode().splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``python -m WORDS…`` in the place's environment."""
        return subprocess.run(
            [sys.executable, "-m", *words], env=self.environment, capture_output=True, text=True, check=False
        )

    def unmount(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("shoal_csi.mounts", "unmount", self.mountpoint, *words)

    def listed(self) -> list[dict[str, Any]]:
        """What ``shoal mount`` lists of this place."""
        found = json.loads(self.run("shoal_csi.mounts", "list").stdout)
        return [each for each in found if each["mountpoint"] == self.mountpoint]

    # What is there.

    @property
    def record(self) -> Record:
        (directory,) = (path for path in self.run_dir.iterdir() if path.is_dir())
        record = rundir.read(directory)
        assert record is not None
        return record

    @property
    def daemon_pid(self) -> int:
        assert self.record.daemon is not None
        return self.record.daemon.pid

    def wait_for_record(self) -> None:
        """Wait until a daemon was started."""
        wait_for(lambda: any(self.run_dir.glob("*/mount.json")) and self.record.daemon is not None)

    def wait_for_state(self, state: str, *, restarts: int = 0) -> Record:
        """Wait until the mount has come to a state, and its daemon was replaced at least so often."""
        wait_for(lambda: self.record.state == state and self.record.restarts >= restarts)
        return self.record

    def kill_daemon(self, *, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.daemon_pid, number)

    def kill_all(self, *, but: Sequence[subprocess.Popen[str]] = ()) -> None:
        """End whoever was started for this place, supervisors first, so that none does anything about it."""
        pids = sorted({*self.processes()} - {each.pid for each in but})
        for pid in pids:  # a supervisor is older than its daemons
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        asks = {pid for pid in pids if _is_question(pid)}  # one that waits in the mount may do so for longer
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not {*self.processes()} & {*pids} - asks)

    def wait_for_spare(self) -> int:
        """Wait until a daemon is loaded and waits for its turn; its pid."""
        wait_for(lambda: self.record.spare_pid is not None)
        assert self.record.spare_pid is not None
        return self.record.spare_pid

    def is_mounted(self) -> bool:
        return MountTable.now().at(self.mountpoint) is not None

    def log(self) -> str:
        return "".join(path.read_text() for path in self.run_dir.glob("*.log"))

    def processes(self) -> list[int]:
        """Whoever was started for this place and still runs."""
        mark = f"SHOAL_RUN_DIR={self.run_dir}".encode()
        found = []
        for path in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if path.name.isdecimal() and mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found


def _is_question(pid: int) -> bool:
    """Whether a process is one of `shoal_csi.probing`."""
    with contextlib.suppress(OSError):
        return b"-c" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


wants_fuse = pytest.mark.skipif(bool(why := why_not()), reason=why)
