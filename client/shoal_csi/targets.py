"""Where a volume is shown to a pod: checking the path, and what may be there already.

The rule: one call at a time for a target. Everything that a call did is found again in the kernel's table, so it may be
repeated, and may stop anywhere.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from shoal.errors import AlreadyExists, InvalidRequest
from shoal_csi import bind, capability
from shoal_csi.locks import Locks
from shoal_csi.mount_table import Mount
from shoal_csi.refusals import MountFailed
from shoal_csi.shared import SharedMount
from shoal_csi.volume import Volume


def target_lock(locks: Locks, target: str) -> AbstractContextManager[None]:
    """The lock of a target. Raises Busy at once where another call has it."""
    return locks.hold(f"the volume at {target}")


def checked(path: str, field: str) -> str:
    """A path that a call names, as the kernel names it. The path itself is not looked at: its mount may hang.

    Raises:
        InvalidRequest: it is missing, relative or leads through "..".
    """
    if not path:
        raise InvalidRequest(f"{field} is missing")
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise InvalidRequest(f"{field} is {path!r}: an absolute path without '..' is wanted")
    parent, name = os.path.split(path.rstrip("/"))
    if not name:
        raise InvalidRequest(f"{field} is {path!r}, the root")
    return os.path.join(os.path.realpath(parent), name)


def check_parent(target: str) -> None:
    """Raises InvalidRequest where the folder that the caller makes is missing."""
    if not Path(target).parent.is_dir():
        raise InvalidRequest(f"target_path is {target!r}, and its parent is no folder: the caller makes that")


def settle(seen: Mount, shared: SharedMount | None, volume: Volume, flags: int) -> None:
    """Return if `seen`, which is at the target, is the volume; finish it where a killed driver did not.

    Args:
        shared: of which `seen` is a bind mount.
        flags: as it should be mounted.

    Raises:
        AlreadyExists: it is something else.
    """
    if shared is None:
        found = f"a mount of {seen.source} ({seen.kind})"
    else:
        inside = seen.root.strip("/")
        found = f"a volume of {shared.name}" + (f"/{inside}" if inside else "")
        is_same = shared.dataset == volume.dataset and shared.snapshot.startswith(volume.wanted_snapshot)
        if is_same and inside == volume.subpath:
            if "ro" not in seen.options:  # bound, and not yet restricted
                bind.restrict(seen.mountpoint, flags)
                return
            if capability.is_as_wanted(seen.options, flags):
                return
            found += " with other mount options"
    raise AlreadyExists(f"{found} is at {seen.mountpoint} already: unpublish that first")


def remove(target: str) -> bool:
    """Detach and remove the target; whether anything was there.

    Raises:
        MountFailed: the kernel refuses, or there are files in it.
    """
    count = bind.detach(target)
    try:
        Path(target).rmdir()
    except FileNotFoundError:
        return count > 0
    except OSError as error:
        raise MountFailed(f"cannot remove {target}, where nothing is mounted: {error.strerror}") from error
    return True
