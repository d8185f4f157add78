"""What the kernel says of this machine and this process. Asks no server, and nothing that may hang."""

from __future__ import annotations

import importlib.util
import os
import platform
import pwd
import resource
import socket
from pathlib import Path

from shoal.doctor.facts import Machine, MountFact

_SHARED_MEMORY, _FUSE = "/dev/shm", "/dev/fuse"
#: In the mask of proc(5): the right to mount (capabilities(7)).
_CAP_SYS_ADMIN = 1 << 21


def look(mounts: tuple[MountFact, ...] | None) -> Machine:
    return Machine(
        kernel=platform.release(),
        user=_user(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        shared_memory_bytes=_size(_SHARED_MEMORY),
        has_torch=importlib.util.find_spec("torch") is not None,
        has_fuse=os.access(_FUSE, os.R_OK | os.W_OK),
        may_mount=_has(_CAP_SYS_ADMIN),
        mounts=mounts,
    )


def is_here(host: str) -> bool:
    """Whether a host is this machine: a socket can be bound to an address of it. Asks the resolver, which may hang."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_DGRAM)
    except (OSError, ValueError):
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
        except OSError:
            continue
    return False


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _size(path: str) -> int | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def _has(capability: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & capability)
    return False
