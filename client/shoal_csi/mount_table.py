"""The kernel's list of mounts, ``/proc/self/mountinfo``, taken apart.

The rule: this is the only memory of what is mounted. A driver or supervisor that was killed, or that another one
replaced, knows afterwards what the former one did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line.

    Attributes:
        device: ``major:minor``. All mounts of one file system, and no others, share it.
        root: the folder of that file system which is seen at `mountpoint`.
        options: of this mount, such as ``ro`` or ``nosuid``.
    """

    device: str
    root: str
    mountpoint: str
    options: frozenset[str]
    kind: str
    source: str


class MountTable:
    """The mounts of one moment."""

    def __init__(self, mounts: Iterable[Mount]) -> None:
        self._mounts = tuple(mounts)

    @classmethod
    def now(cls) -> MountTable:
        """As this process sees them. No mount is touched, so one that hangs does no harm."""
        return cls.parse(Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape"))

    @classmethod
    def parse(cls, text: str) -> MountTable:
        return cls(_parsed(line) for line in text.split("\n") if line)

    def at(self, path: str) -> Mount | None:
        """What is seen at exactly `path`: the last of those mounted over each other."""
        return next((mount for mount in reversed(self._mounts) if mount.mountpoint == path), None)

    def of_kind(self, kind: str) -> list[Mount]:
        """Those of one file system type, the oldest first."""
        return [mount for mount in self._mounts if mount.kind == kind]

    def under(self, folder: str) -> list[Mount]:
        """What is mounted somewhere inside of `folder`."""
        return [mount for mount in self._mounts if mount.mountpoint.startswith(folder.rstrip("/") + "/")]

    def of_device(self, device: str) -> list[Mount]:
        return [mount for mount in self._mounts if mount.device == device]


def _parsed(line: str) -> Mount:
    # ID parent major:minor root mountpoint options [tag…] - kind source super-options; see proc_pid_mountinfo(5)
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    kind, source = after.split(" ")[:2]
    return Mount(fields[2], _text(fields[3]), _text(fields[4]), frozenset(fields[5].split(",")), kind, _text(source))


def _text(field: str) -> str:
    """A blank, tab, line feed or backslash of a path is written as three octal digits."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
