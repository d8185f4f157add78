"""How a dataset is mounted: by the commands that people use, as processes of their own.

The rule: a mount outlives whoever asked for it. No pipe, session or process group ties it to the driver.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

from shoal_csi import mounts
from shoal_csi.probing import Prober, State
from shoal_csi.refusals import MountFailed

#: From the command to the first answer; a mount begins with a snapshot, which may have to come from another node.
MOUNT_TIMEOUT_S = 60.0
UNMOUNT_TIMEOUT_S = 20.0
#: Of what a failed command said, as much as fits a status.
_SAID_BYTES = 1 << 10


class Mounts(Protocol):
    """Mounts whole datasets, each at a folder of its own."""

    def mount(self, dataset: str, snapshot: str, mountpoint: str) -> None:
        """Mount and return when the mount answers. Raises MountFailed."""

    def unmount(self, mountpoint: str) -> None:
        """Unmount and end what serves the mount. Raises MountFailed."""

    def is_answering(self, mountpoint: str) -> bool:
        """Whether the mount answers now, found out in bounded time."""

    def revive(self, folder: str) -> list[str]:
        """Go on with what only the descriptor store keeps, of the mounts in `folder`; a sentence for each."""

    def recover(self, folder: str) -> list[str]:
        """Go on with what lost its supervisor, take away what lost all; a sentence for each. Raises ShoalError."""

    def take_over(self, folder: str) -> list[str]:
        """Serve from here what other containers serve; a sentence for each."""


class CommandMounts:
    """``shoal mount`` and ``shoal umount``.

    Args:
        command: the words before ``mount`` or ``umount``.
        endpoint: of the cluster; "" for what the environment says.
        options: words after those of each ``mount``.
    """

    def __init__(self, command: Sequence[str], endpoint: str, prober: Prober, options: Sequence[str] = ()) -> None:
        self._command, self._options = tuple(command), tuple(options)
        self._environment = {**os.environ, **({"SHOAL_ENDPOINT": endpoint} if endpoint else {})}
        self._prober = prober

    def mount(self, dataset: str, snapshot: str, mountpoint: str) -> None:
        self._run(["mount", f"{dataset}@{snapshot}", mountpoint, *self._options], MOUNT_TIMEOUT_S)

    def unmount(self, mountpoint: str) -> None:
        self._run(["umount", mountpoint], UNMOUNT_TIMEOUT_S)

    def is_answering(self, mountpoint: str) -> bool:
        return self._prober.probe(mountpoint).state is State.ALIVE

    def revive(self, folder: str) -> list[str]:
        return _sentences(mounts.revive(under=folder))

    def recover(self, folder: str) -> list[str]:
        return _sentences(mounts.recover(under=folder))

    def take_over(self, folder: str) -> list[str]:
        return _sentences(mounts.take_over(under=folder))

    def _run(self, words: Sequence[str], timeout_s: float) -> None:
        line = " ".join(["shoal", *words])
        # Into a file: what serves the mount may keep the descriptor, and a pipe would never end.
        with tempfile.TemporaryFile() as said:
            try:
                status = subprocess.run(
                    [*self._command, *words],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                    timeout=timeout_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise MountFailed(f"'{line}' has not ended within {timeout_s:g} s and was stopped") from error
            except OSError as error:
                raise MountFailed(f"'{line}' cannot be run: {error}") from error
            if status != 0:
                said.seek(0)
                sentence = said.read()[-_SAID_BYTES:].decode(errors="replace").strip() or f"exit status {status}"
                raise MountFailed(f"'{line}' failed: {sentence}")


def _sentences(done: list[dict[str, Any]]) -> list[str]:
    return [f"{each['mountpoint']}: {each['how']}" for each in done]
