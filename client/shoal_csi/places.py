"""Where a mount may go, and what is done about one that is dead there.

The rule: whether something is mounted is asked of the kernel first; a directory under a dead mount is never looked at.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from pathlib import Path

from shoal.errors import ShoalError
from shoal_csi import deposits, kernel, probing
from shoal_csi.mount_table import Mount
from shoal_csi.probing import State
from shoal_csi.rundir import Record

#: A mount that has no supervisor known here and answers nothing for so long is taken for dead.
DEAD_AFTER_S = 5.0


def check(mountpoint: str) -> None:
    """Raises ShoalError: nothing can be mounted there."""
    path = Path(mountpoint)
    if not path.exists():
        raise ShoalError(f"{mountpoint} does not exist: make the directory first (mkdir -p {mountpoint})")
    if not path.is_dir() or path.is_symlink():
        raise ShoalError(f"{mountpoint} is not a directory: name one, an empty one, to mount over")
    try:
        is_empty = not any(path.iterdir())
    except PermissionError:
        is_empty = True  # what may not be listed may still be mounted over
    if not is_empty:
        raise ShoalError(f"{mountpoint} is not empty: a mount would hide what is in it; name an empty directory")


def open_device() -> int:
    """`kernel.open_device`. Raises ShoalError: it cannot be opened."""
    try:
        return kernel.open_device()
    except FileNotFoundError as error:
        raise ShoalError(
            f"{kernel.DEVICE} is missing: load the module (modprobe fuse); a container must be given the device"
        ) from error
    except OSError as error:
        raise ShoalError(f"{kernel.DEVICE} cannot be opened: {error.strerror}; mount as root") from error


def refusal(mountpoint: str, error: OSError) -> str:
    """What a person reads where mount(2) failed."""
    if error.errno == errno.EPERM:
        return f"mounting at {mountpoint} is not permitted: it takes root (CAP_SYS_ADMIN)"
    return f"mounting at {mountpoint} failed: {error.strerror}"


def detach_stale(there: Mount, record: Record | None) -> str:
    """Take away a mount of ours that has no supervisor; returns what was done, for people.

    Args:
        record: what is known of it; None where it was mounted under another run directory.

    Raises:
        ShoalError: it is not known here and not known to be dead; or it cannot be taken away.
    """
    finding = probing.ask(there.mountpoint, DEAD_AFTER_S)
    is_alive, is_dead = finding.is_answer_of(there.device), finding.state is State.DEAD
    if record is None and not is_dead:
        hangs = "" if is_alive else " that does not answer now"
        raise ShoalError(
            f"{there.mountpoint} is already a mount{hangs}, of {there.source}: "
            f"unmount it with 'shoal umount {there.mountpoint}'"
        )
    force_away(there.mountpoint, is_alive=is_alive)
    deposits.withdraw(there.device)  # nobody comes back for it: what is open ends with its daemon
    if record is not None and not is_alive:
        kill_orphan(record)
    was = "that no supervisor kept: files that are open in it may be read on" if is_alive else "that answered nothing"
    was = "whose daemon was gone" if is_dead else was
    return f"detached from {there.mountpoint} a mount of {there.source} {was}"


def force_away(mountpoint: str, *, is_alive: bool) -> None:
    """Detach a mount, whatever is open in it; one that is not `is_alive` with an error for all who wait in it.

    Raises:
        ShoalError: it cannot be taken away.
    """
    try:
        kernel.unmount(mountpoint, lazy=True, force=not is_alive)
    except OSError as error:
        remedy = "; it takes root (CAP_SYS_ADMIN)" if error.errno == errno.EPERM else ""
        raise ShoalError(f"{mountpoint} cannot be unmounted: {error.strerror}{remedy}") from error


def kill_orphan(record: Record) -> None:
    """End a daemon that has no supervisor and does not answer."""
    daemon = record.living_daemon
    if daemon is not None:
        with contextlib.suppress(OSError):
            os.kill(daemon.pid, signal.SIGKILL)
