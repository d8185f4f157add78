"""One folder seen at another place: bind mounts, made and undone.

The rule: a bind mount is read-only, without devices and setuid programs, whatever is bound; and undoing never waits for
a file system that does not answer.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from shoal.errors import InvalidRequest, NotFound
from shoal_csi.mount_table import MountTable
from shoal_csi.refusals import MountFailed

_MS_REMOUNT, _MS_BIND = 0x20, 0x1000
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
#: Detached one by one, others may come meanwhile; more than that over each other nobody mounts.
_MAX_STACKED = 64

_libc = ctypes.CDLL(None, use_errno=True)


def bind(root: str, subpath: str, target: str, flags: int) -> None:
    """Show the folder `subpath` of `root` at `target`, which is made where it is missing.

    Args:
        flags: of mount(2), from `shoal_csi.capability.mount_flags`.

    Raises:
        NotFound: there is no such folder.
        InvalidRequest: it is no folder.
        MountFailed: the kernel refuses.
    """
    folder = _open(root, subpath, os.O_DIRECTORY)
    try:
        try:
            Path(target).mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise MountFailed(f"cannot make {target}: {error.strerror}") from error
        # By descriptor: what was checked is what is bound. A bind takes no flags before a second call (mount(2));
        # killed in between, the next `bind` or `restrict` finishes it, and the dataset's own mount is read-only anyway.
        _mount(f"/proc/self/fd/{folder}", target, _MS_BIND)
    finally:
        os.close(folder)
    restrict(target, flags)


def replace(root: str, subpath: str, target: str, flags: int) -> None:
    """Show `subpath` of `root`, a folder or a file, in the place of all that is mounted at `target`.

    What is there stays where there is nothing to be shown: a target without a mount is an empty folder, which a pod
    would take for its volume.

    Raises:
        NotFound, InvalidRequest, MountFailed: as `bind`.
    """
    found = _open(root, subpath, 0)
    try:
        detach(target)
        _mount(f"/proc/self/fd/{found}", target, _MS_BIND)
    finally:
        os.close(found)
    restrict(target, flags)


def restrict(target: str, flags: int) -> None:
    """Give a bind mount its flags. Raises MountFailed."""
    _mount("none", target, _MS_REMOUNT | _MS_BIND | flags)


def detach(target: str) -> int:
    """Take away all that is mounted at `target`, also where its server is gone or hangs; how many mounts that were.

    Readers that have files open keep them; nobody finds the mount any more.

    Raises:
        MountFailed: the kernel refuses.
    """
    for count in range(_MAX_STACKED):
        if MountTable.now().at(target) is None:
            return count
        if _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            if number != errno.EINVAL:  # which says that another process was faster
                raise MountFailed(number, f"cannot unmount {target}: {os.strerror(number)}")
    raise MountFailed(f"cannot unmount {target}: something mounts there again and again")


def _open(root: str, subpath: str, kind: int) -> int:
    """A descriptor of `subpath`, found without following any link: a volume shows nothing outside its dataset.

    Args:
        kind: `os.O_DIRECTORY`; 0 where it may as well be a file.
    """
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | kind
    try:
        folder = os.open(root, flags)
    except OSError as error:
        raise MountFailed(f"cannot open the mount at {root}: {error.strerror}") from error
    for name in filter(None, subpath.split("/")):
        try:
            inner = os.open(name, flags, dir_fd=folder)
        except FileNotFoundError as error:
            raise NotFound(f"the volume's subpath {subpath!r} is not in the dataset: {name!r} is missing") from error
        except NotADirectoryError as error:
            raise InvalidRequest(f"{name!r} of the volume's subpath {subpath!r} is no folder: name one") from error
        except OSError as error:
            raise MountFailed(f"cannot open {name!r} in the mount at {root}: {error.strerror}") from error
        finally:
            os.close(folder)
        folder = inner
    return folder


def _mount(source: str, target: str, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise MountFailed(number, f"cannot mount at {target}: {os.strerror(number)}")
