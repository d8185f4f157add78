"""A real mount of a dataset, with its server as a process that can be killed, replaced and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from shoal_csi import kernel, numbers, state_head
from shoal_csi.server import MOUNT_XATTR

#: A server that is not ready, or does not end, by then hangs.
DEADLINE_S = 60.0


class Mounted:
    """A mount of `dataset` at `path`. A context manager; the mount and its server end with it, whatever happened.

    Args:
        env: of the server, beside this process's own.
        args: more of its arguments.
        wrapper: a command that becomes the server's.

    Attributes:
        path: where it is mounted.
        log_path: what its servers wrote to stderr.
    """

    def __init__(
        self, dataset: str, env: Mapping[str, str], args: Sequence[str] = (), wrapper: Sequence[str] = ()
    ) -> None:
        if os.geteuid() != 0 or not Path(kernel.DEVICE).exists():
            pytest.skip("mounting takes root and /dev/fuse")
        self._dataset, self._args, self._wrapper = dataset, args, wrapper
        self._env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._directory = Path(tempfile.mkdtemp(prefix="shoal-mount-", dir="/tmp"))
        self.path = self._directory / "m"
        self.log_path = self._directory / "log"
        self.path.mkdir()
        self._process: subprocess.Popen[str] | None = None
        self._fd = self._state_fd = -1

    def __enter__(self) -> Self:
        self._fd = kernel.open_device()
        self._state_fd = os.memfd_create("shoal-mount")
        kernel.mount(self._fd, str(self.path), f"shoal:{self._dataset}")
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> dict[str, Any]:
        """Start a server on the mount and wait until it is ready; what it says then."""
        command = [sys.executable, "-m", "shoal_csi.daemon", "--fd", str(self._fd), "--state-fd", str(self._state_fd)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._wrapper, *command, "--dataset", self._dataset, *self._args],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=(self._fd, self._state_fd),
                text=True,
            )
        assert self._process.stdout is not None
        line = ""
        if select.select([self._process.stdout], [], [], DEADLINE_S)[0]:
            line = self._process.stdout.readline()
        assert line.startswith("ready "), f"the server did not start: {self.log()}"
        ready: dict[str, Any] = json.loads(line.removeprefix("ready "))
        return ready

    @property
    def fd(self) -> int:
        """The connection."""
        return self._fd

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End the server as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def terminate(self) -> int:
        """Ask the server to end; its status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=DEADLINE_S)
        return self._process.returncode

    def unmount(self) -> int:
        """Unmount; the status with which the server ends."""
        assert self._process is not None
        kernel.unmount(str(self.path), lazy=False)
        self._process.communicate(timeout=DEADLINE_S)
        return self._process.returncode

    def report(self) -> dict[str, Any]:
        """What the server says of itself."""
        found: dict[str, Any] = json.loads(os.getxattr(self.path, MOUNT_XATTR))
        return found

    def numbers(self) -> dict[str, int]:
        """What its servers have counted; up to a second old."""
        found = state_head.peek(self._state_fd)
        assert found is not None
        return numbers.decode(found[1])

    def log(self) -> str:
        return self.log_path.read_text()

    def xattr(self, name: str, attribute: str) -> str:
        return os.getxattr(self.path / name, attribute).decode()

    def close(self) -> None:
        """Take everything down, also where the server hangs or is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        # Readers that wait for a server that will not come cannot be killed, and may hold the device open themselves.
        with contextlib.suppress(OSError):
            kernel.unmount(str(self.path), lazy=True, force=True)
        for fd in (self._fd, self._state_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._state_fd = -1
        with contextlib.suppress(OSError):
            self.log_path.unlink(missing_ok=True)
            self.path.rmdir()
            self._directory.rmdir()
