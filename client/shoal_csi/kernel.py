"""What the kernel is asked for around a FUSE mount: the device, mount(2), backing files, a second hand-out of requests.

    device      one open of /dev/fuse is one connection; whoever holds a descriptor of it may serve the mount
    mount       needs CAP_SYS_ADMIN; nothing is asked of the server before it answers INIT
    backing     a file that the kernel reads by itself for opens with passthrough (Linux 6.9 and CAP_SYS_ADMIN)
    resend      requests that a server took and never answered are handed out again (Linux 6.9)

The rule: nothing here touches a path inside a mount, because there the answer is the server's, and it may be gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from shoal_csi.mount_table import MountTable

DEVICE = "/dev/fuse"
FS_TYPE = "fuse.shoal"
#: What the kernel reads ahead in a file that is read in order, where it may be set; the default is 128 KiB.
READ_AHEAD_BYTES = 2 << 20

# mount(2), umount2(2)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOATIME = 1, 2, 4, 1024
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8

# linux/fuse.h: _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t), fuse_notify_code
_BACKING_OPEN = (1 << 30) | (16 << 16) | (229 << 8) | 1
_BACKING_CLOSE = (1 << 30) | (4 << 16) | (229 << 8) | 2
_NOTIFY_RESEND = 7
_BACKING_MAP = struct.Struct("<iIQ")
_OUT_HEADER = struct.Struct("<IiQ")

_library = ctypes.CDLL(None, use_errno=True)


def open_device() -> int:
    """A new connection's descriptor. It is not inherited by programs that are run, unless they are given it.

    Raises:
        OSError: there is no FUSE on this machine, or it may not be used.
    """
    return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)


def mount(fd: int, mountpoint: str, source: str, *, allow_other: bool = True, max_read: int = 1 << 20) -> None:
    """Mount the connection behind `fd`, read-only. It answers once somebody serves `fd`.

    Args:
        source: what `mount_table` and ``findmnt`` show as the source, such as ``shoal:NAME@SNAPSHOT``.
        allow_other: users other than the one who mounts may read.
        max_read: bytes of the largest READ.

    Raises:
        OSError: mount(2) refused.
    """
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    options += f",max_read={max_read}" + (",allow_other" if allow_other else "")
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOATIME
    path = os.path.realpath(mountpoint)
    _check(
        _library.mount(
            os.fsencode(source), os.fsencode(path), FS_TYPE.encode(), ctypes.c_ulong(flags), options.encode()
        ),
        mountpoint,
    )
    made = MountTable.now().at(path)
    if made is not None:
        # A faster first read, and no more: in a container /sys may be read-only.
        with contextlib.suppress(OSError):
            Path(f"/sys/class/bdi/{made.device}/read_ahead_kb").write_text(str(READ_AHEAD_BYTES >> 10))


def unmount(mountpoint: str, *, lazy: bool, force: bool = False) -> None:
    """Unmount what is mounted last at `mountpoint`.

    Args:
        lazy: also where files in it are open: they stay readable while the server lives.
        force: end the connection first, for one that nobody will serve any more: requests that wait for an answer get
            ECONNABORTED (whoever waits cannot even be killed before), and so does what is open, also after EBUSY.

    Raises:
        OSError: EBUSY: files in it are open; EINVAL: nothing is mounted there.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0) | (_MNT_FORCE if force else 0)
    _check(_library.umount2(os.fsencode(mountpoint), flags), mountpoint)


def backing_open(fd: int, file_fd: int) -> int:
    """Make the file behind `file_fd` one that the kernel reads for opens of this connection; returns its id.

    `file_fd` may be closed afterwards. The id is good until `backing_close` or the end of the connection.

    Raises:
        OSError: EPERM: without CAP_SYS_ADMIN, or passthrough was not agreed on at INIT; ENOTTY: before Linux 6.9;
            ELOOP: the file lies on a stacked file system.
    """
    # The answer is the call's own result, which `fcntl.ioctl` gives for a buffer that may be written to.
    backing_id: int = fcntl.ioctl(fd, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(file_fd, 0, 0)), True)
    return backing_id


def backing_close(fd: int, backing_id: int) -> None:
    """Let go of a backing file. Opens that use it keep it.

    Raises:
        OSError: ENOENT: there is no such id.
    """
    fcntl.ioctl(fd, _BACKING_CLOSE, bytearray(struct.pack("<I", backing_id)), True)


def resend(fd: int) -> None:
    """Have all requests that were taken and not answered handed out again, to whoever reads `fd`.

    Raises:
        OSError: EINVAL: before Linux 6.9.
    """
    os.write(fd, _OUT_HEADER.pack(_OUT_HEADER.size, _NOTIFY_RESEND, 0))


def _check(result: int, path: str) -> None:
    if result:
        number = ctypes.get_errno() or errno.EIO
        raise OSError(number, os.strerror(number), path)
