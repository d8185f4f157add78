"""What is known of this machine's mounts besides what the kernel knows: a directory for each.

    RUN/ID/lock         held (flock(2)) by the supervisor for as long as it lives
    RUN/ID/mount.json   what is mounted, and how it fares: a `Record`
    RUN/ID/socket       where the supervisor hands over to a successor (`shoal_csi.handover`)
    RUN/fdstore.socket  where the descriptor store serves, if there is one (`shoal_csi.fdstore`)
    RUN/ID.log          what supervisor and daemons wrote, kept after the mount
    RUN/ID-PID/         the same of a mount that was taken away from there while files in it are open

ID is made from the mount point, so there is one supervisor a mount point. RUN is `shoal_csi.sockets.root`. Containers
may share it: then pids in it may be another container's.

The rule: the lock says whether a supervisor lives, never a pid in a file, which by now may be another process's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal_csi.sockets import root

#: Somebody who looks whether a lock is held holds it himself for a moment.
_CLAIM_AGAIN_S, _CLAIM_WITHIN_S = 0.01, 0.3


@dataclass(frozen=True, slots=True)
class Daemon:
    """A process, told apart from later ones of the same pid by when it began, and its numbers of what it holds.

    Attributes:
        started: clock ticks after boot (proc(5), field 22 of stat).
        fuse_fd, state_fd, ready_fd: the connection, the memory that outlives a daemon, and the pipe that says when it
            serves, as the process itself has them open.
    """

    pid: int
    started: int
    fuse_fd: int
    state_fd: int
    ready_fd: int

    @property
    def is_running(self) -> bool:
        return self.started > 0 and started(self.pid) == self.started


@dataclass(frozen=True, slots=True)
class Record:
    """One mount.

    Attributes:
        dataset: ``NAME@SNAPSHOT``.
        subpath: the directory of the dataset that is mounted; "" for all of it.
        endpoint: of the cluster; "" for the local node.
        device: ``major:minor`` of the file system; names the connection.
        spare_pid: of the daemon that is loaded and waits for its turn.
        state: phase of `shoal_csi.states`.
        restarts: daemons that ended unasked; `failures`: the last so many of them were never well.
        reason: why a daemon ended last; "" where none did.
        since: seconds since the epoch, of this state.
        log: file that the processes write to; "" where that is no file.
        daemon_module: what ``python -m`` runs.
        timeout_s: that one read may take; 0: what the daemon takes by itself. Records of before have none.
        local_tier, local_tier_size: as the daemon is given them; "" where there is none.
        keeps_spare: whether a spare is loaded once the daemon is well.
        pid_namespace: of the supervisor, in which the pids are; `mount_namespace`: a container has one of its own. As
            `namespace` gives them; 0: not known.
    """

    mountpoint: str
    dataset: str
    subpath: str
    endpoint: str
    allow_other: bool
    device: str
    supervisor_pid: int
    daemon: Daemon | None
    spare_pid: int | None
    state: str
    restarts: int
    failures: int
    reason: str
    is_established: bool
    since: float
    log: str
    daemon_module: str
    timeout_s: float = 0.0
    local_tier: str = ""
    local_tier_size: int = 0
    keeps_spare: bool = True
    pid_namespace: int = 0
    mount_namespace: int = 0

    @property
    def is_of_here(self) -> bool:
        """Whether the pids mean the same to this process."""
        return self.pid_namespace in (0, namespace("pid"))

    @property
    def living_daemon(self) -> Daemon | None:
        """The daemon, where this process can see that it runs."""
        return self.daemon if self.is_of_here and self.daemon is not None and self.daemon.is_running else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """Raises ValueError: it is none, or a version's that left out what is needed here."""
        try:
            raw: dict[str, Any] = json.loads(text)
            known = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
            known["daemon"] = Daemon(**raw["daemon"]) if raw["daemon"] is not None else None
            return cls(**known)
        except (TypeError, KeyError) as error:
            raise ValueError(f"no record of a mount: {error}") from error


class Claim:
    """The lock of one mount point, held until `release` or the end of the process.

    Attributes:
        directory: the mount point's own.
    """

    def __init__(self, directory: Path, fd: int) -> None:
        self.directory = directory
        self._fd = fd

    def write(self, record: Record) -> None:
        """Whoever reads the record finds all of it."""
        aside = self.directory / "mount.json.new"
        aside.write_text(record.to_json())
        aside.replace(self.directory / "mount.json")

    def move_aside(self) -> None:
        """Leave the mount point to another supervisor, and keep lock, record and socket under another name."""
        aside = self.directory.with_name(f"{self.directory.name}-{os.getpid()}")
        self.directory.rename(aside)
        self.directory = aside

    def release(self, *, forget: bool) -> None:
        """Let go; `forget`: there is nothing left to say of this mount point."""
        if forget:
            shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._fd)


def directory_of(mountpoint: str) -> Path:
    return root() / hashlib.blake2b(os.fsencode(mountpoint), digest_size=6).hexdigest()


def log_of(mountpoint: str) -> Path:
    return directory_of(mountpoint).with_suffix(".log")


def canonical(mountpoint: str) -> str:
    """An absolute path without links, but for its last part, which may be a mount that answers no question.

    Raises:
        ShoalError: it has no last part.
    """
    path = os.path.abspath(mountpoint)  # noqa: PTH100 - resolve() asks the mount itself
    parent, name = os.path.split(path)
    if not name:
        raise ShoalError(f"{mountpoint} is no place for a mount: name a directory")
    return os.path.join(os.path.realpath(parent), name)


def claim(mountpoint: str, *, within_s: float = _CLAIM_WITHIN_S) -> Claim | None:
    """Become the supervisor of a mount point; None where it has one that lives.

    Raises:
        ShoalError: the run directory cannot be used.
    """
    directory = directory_of(mountpoint)
    deadline = time.monotonic() + within_s
    while True:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # its last supervisor forgot it between the two lines
        except OSError as error:
            raise ShoalError(
                f"the run directory {root()} cannot be used: {error.strerror}; set SHOAL_RUN_DIR to one of your own"
            ) from error
        if _is_locked(fd) and _is_still(fd, directory / "lock"):
            return Claim(directory, fd)
        os.close(fd)
        if time.monotonic() > deadline:
            return None
        time.sleep(_CLAIM_AGAIN_S)


def has_supervisor(directory: Path) -> bool:
    """Whether somebody holds the lock."""
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _is_locked(fd)
    finally:
        os.close(fd)


def forget(directory: Path) -> None:
    """Remove what a supervisor left that died; nothing where one lives."""
    with contextlib.suppress(OSError):
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            if _is_locked(fd):
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(fd)


def read(directory: Path) -> Record | None:
    """The record in a mount point's directory; None where it has none that can be read."""
    try:
        return Record.from_json((directory / "mount.json").read_bytes())
    except (OSError, ValueError):
        return None


def records() -> Iterator[tuple[Path, Record]]:
    """Each mount point's directory and record, by mount point."""
    try:
        directories = [path for path in root().iterdir() if path.is_dir()]
    except OSError:
        return
    found = [(path, record) for path in directories if (record := read(path)) is not None]
    yield from sorted(found, key=lambda pair: pair[1].mountpoint)


def started(pid: int) -> int:
    """When a process began, in clock ticks after boot; 0 where there is none, or only its exit status is left."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return int(fields[19]) if fields[0] not in "ZX" else 0
    return 0


def namespace(kind: str) -> int:
    """The number of this process's own namespace (namespaces(7)), such as ``pid`` or ``mnt``."""
    return Path(f"/proc/self/ns/{kind}").stat().st_ino


def is_stopped(pid: int) -> bool:
    """Whether somebody stopped a process (SIGSTOP, a debugger)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] in "Tt"
    return False


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(fd: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False
