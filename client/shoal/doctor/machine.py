"""Whether this machine lets its readers do what they do. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shoal import sizes
from shoal.doctor.facts import Facts, Machine, MountFact
from shoal.doctor.findings import Finding, Kind, Outcome

CHECK = "machine"

#: Each rank maps shards of the node and has connections to the others; a DataLoader's workers inherit the limit.
FEW_OPEN_FILES = 1024
#: Containers have 64 MiB unless told otherwise, where one batch of images may be larger.
SMALL_SHARED_MEMORY_BYTES = 1 << 30
#: From where on the kernel reads what lies on this machine's node by itself.
PASSTHROUGH_KERNEL = (6, 9)

ALL_WELL = Kind(CHECK, "ok", Outcome.OK, "Linux {kernel}, {files} open files; {mounts}")
OPEN_FILES = Kind(
    CHECK,
    "open-files",
    Outcome.WARNING,
    "a process here may have {files} files open: near that limit shards are read over a socket instead of being "
    "mapped, "
    "and then connections fail",
    "raise it, to {most} at most without root: 'ulimit -n' in a shell, LimitNOFILE= in systemd, the runtime's in a "
    "container",
)
SHARED_MEMORY = Kind(
    CHECK,
    "shared-memory",
    Outcome.WARNING,
    "/dev/shm has {size}: workers of torch's DataLoader hand batches over in it and end with a bus error when it is "
    "full",
    "give the container more: --shm-size in Docker and Podman, an emptyDir of medium Memory at /dev/shm on Kubernetes; "
    "shoal.torch hands its batches over without it",
)
MOUNT_DEAD = Kind(
    CHECK,
    "mount-dead",
    Outcome.PROBLEM,
    "the mount of {dataset} at {mountpoint} has nobody left who serves it ({why})",
    "'shoal mount {dataset} {mountpoint}' mounts it anew, 'shoal umount {mountpoint}' takes it away",
)
MOUNT_TROUBLE = Kind(
    CHECK,
    "mount-trouble",
    Outcome.WARNING,
    "the mount of {dataset} at {mountpoint} is {state} ({why})",
    "see its log, which 'shoal mount --json' names; a mount that nobody supervises is mounted again when it is not "
    "used",
)

_WELL = ("new", "starting", "serving", "unknown")


def judge(facts: Facts) -> list[Finding]:
    machine = facts.machine
    found = [*_limits(machine), *(_mount(mount) for mount in machine.mounts or () if mount.state not in _WELL)]
    return found or [ALL_WELL.found(kernel=machine.kernel, files=machine.open_files[0], mounts=_mounting(machine))]


def _limits(machine: Machine) -> Iterator[Finding]:
    files, most = machine.open_files
    if 0 <= files < FEW_OPEN_FILES:
        yield OPEN_FILES.found(files=files, most=most if most >= 0 else "any number")
    size_bytes = machine.shared_memory_bytes
    if machine.has_torch and size_bytes is not None and size_bytes < SMALL_SHARED_MEMORY_BYTES:
        yield SHARED_MEMORY.found(size=sizes.format(size_bytes))


def _mount(mount: MountFact) -> Finding:
    kind = MOUNT_DEAD if mount.state in ("dead", "ended") else MOUNT_TROUBLE
    named = {"dataset": mount.dataset, "mountpoint": mount.mountpoint, "state": mount.state}
    return kind.found(mount.mountpoint, why=mount.reason or "nobody said why", **named)


def _mounting(machine: Machine) -> str:
    """What 'shoal mount' can do here, in words."""
    if not machine.has_fuse:
        return "no 'shoal mount' without /dev/fuse"
    if not machine.may_mount:
        return "no 'shoal mount' without root"
    numbers = tuple(int(part) for part in machine.kernel.split("-")[0].split(".")[:2] if part.isdecimal())
    if numbers < PASSTHROUGH_KERNEL:
        return "'shoal mount' works, all through its server: the kernel reads by itself from Linux 6.9 on"
    return "'shoal mount' works, with passthrough"
