"""What an orchestrator wants to do with a volume, and whether a read-only one can be that. Pure.

The rule: a writer is told no where a claim is made, not when its first write fails. Who can only ask as a writer (an
inline volume always does) says ``readOnly: true`` or has ``writers: read-only`` in the volume's attributes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from shoal.errors import InvalidRequest, ShoalError
from shoal_csi import csi_pb2 as pb
from shoal_csi.volume import Volume

Mode = pb.VolumeCapability.AccessMode.Mode

_READERS = (Mode.SINGLE_NODE_READER_ONLY, Mode.MULTI_NODE_READER_ONLY)

#: What every mount has.
ALWAYS = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
#: Mount options that people may name, and what mount(2) knows them by.
OPTIONS = {
    "ro": os.ST_RDONLY,
    "nosuid": os.ST_NOSUID,
    "nodev": os.ST_NODEV,
    "noexec": os.ST_NOEXEC,
    "noatime": os.ST_NOATIME,
    "nodiratime": os.ST_NODIRATIME,
}


class Unsupported(ShoalError):
    """The volume exists and cannot be used in this way: ask for it in another."""


def check(capability: pb.VolumeCapability) -> None:
    """Refuse a capability that is not well formed.

    Raises:
        InvalidRequest: it has no access type or mode.
    """
    if capability.WhichOneof("access_type") is None:
        raise InvalidRequest("the volume capability has no access type: say 'mount'")
    if not capability.HasField("access_mode") or capability.access_mode.mode == Mode.UNKNOWN:
        raise InvalidRequest("the volume capability has no access mode: say MULTI_NODE_READER_ONLY (ReadOnlyMany)")


def refusal(capability: pb.VolumeCapability, volume: Volume | None, *, is_readonly: bool = False) -> str:
    """Why a well-formed capability cannot be had; "" where it can.

    Args:
        volume: None where its attributes are not known.
        is_readonly: the caller says that nobody will write, whatever the mode.
    """
    if capability.WhichOneof("access_type") == "block":
        return "a dataset is a tree of files and no block device: use volumeMode Filesystem"
    mode = capability.access_mode.mode
    admits_writers = is_readonly or (volume is not None and volume.admits_writers)
    if mode not in _READERS and not admits_writers:
        return (
            f"datasets are read-only and the access mode is {Mode.Name(mode)}: ask for ReadOnlyMany, or where that "
            "cannot be chosen add 'readOnly: true' to the pod's volume, or 'writers: read-only' to the attributes"
        )
    unknown = next((flag for flag in capability.mount.mount_flags if flag not in OPTIONS), None)
    if unknown is not None:
        return f"the mount option {unknown!r} is not one of {', '.join(OPTIONS)}"
    if capability.mount.volume_mount_group:
        return "a mount group cannot be set: everybody may read a dataset's files already"
    return ""


def first_refusal(capabilities: Iterable[pb.VolumeCapability], volume: Volume | None) -> str:
    """`check` and `refusal` of all; the first refusal, or ""."""
    reasons = []
    for capability in capabilities:
        check(capability)
        reasons.append(refusal(capability, volume))
    return next(filter(None, reasons), "")


def mount_flags(capability: pb.VolumeCapability) -> int:
    """The flags of mount(2) for a capability that is not refused; they equal those that statvfs(3) reports."""
    flags = ALWAYS
    for flag in capability.mount.mount_flags:
        flags |= OPTIONS[flag]
    return flags


def is_as_wanted(options: Iterable[str], flags: int) -> bool:
    """Whether a mount with these options serves who asked for `flags`. One that keeps fewer times does."""
    has = flags_of(options)
    return has & flags == flags and has & os.ST_NOEXEC == flags & os.ST_NOEXEC


def flags_of(options: Iterable[str]) -> int:
    """The flags of a mount whose options the kernel's table names."""
    flags = ALWAYS
    for option in options:
        flags |= OPTIONS.get(option, 0)
    return flags
