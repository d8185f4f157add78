"""Whether a directory will do for a local tier, and what is said where it does not, or does no more.

The rule: a sentence names the directory and the remedy.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from shoal.errors import StoreUnusable
from shoal_csi.mount_table import MountTable


def check(directory: Path) -> None:
    """Raises StoreUnusable: it is missing, another user's, or its files cannot be passed through."""
    try:
        found = directory.stat()
    except FileNotFoundError:
        raise StoreUnusable(
            f"{directory} does not exist: make the local tier's directory (mkdir -m 700 {directory}), on a drive of "
            "this machine that is mounted"
        ) from None
    except OSError as error:
        raise StoreUnusable(sentence(directory, error)) from error
    if not stat.S_ISDIR(found.st_mode):
        raise StoreUnusable(f"{directory} is not a directory: name one for the local tier")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise StoreUnusable(
            f"{directory} is another user's, or others may write to it, and a local tier's files are given out as they "
            f"are: chown {os.geteuid()} {directory} && chmod go-w {directory}"
        )
    device = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
    if any(mount.device == device for mount in MountTable.now().of_kind("overlay")):
        raise StoreUnusable(
            f"{directory} lies on overlayfs, whose files the kernel does not pass through: name a directory of a drive"
        )


def check_folder(folder: Path) -> None:
    """Raises StoreUnusable: a folder in it is somebody else's."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StoreUnusable(
            f"{folder} is there and no folder of a local tier, which its owner alone may enter: name an empty directory"
        )


def sentence(directory: Path, error: OSError) -> str:
    """What is wrong with a tier, and the remedy."""
    if isinstance(error, StoreUnusable):
        return str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the file system of the local tier {directory} is full: free space, or lower --local-tier-size"
        case errno.EROFS:
            return f"the file system of the local tier {directory} is read-only: mount it writable, or name another"
        case errno.EOPNOTSUPP:
            return f"the file system of the local tier {directory} will not do ({error.strerror}): use ext4 or XFS"
        case errno.ENOENT:
            return f"the local tier {directory} was removed or emptied: make it, and mount again"
        case _:
            return f"the local tier {directory} cannot be used ({error.strerror}): name another directory"
