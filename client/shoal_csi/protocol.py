"""The FUSE protocol as a read-only server speaks it: layouts, numbers and flags of linux/fuse.h, version 7.40. Pure.

A request is a header and a body, an answer the same the other way; all little-endian, as on every machine that Linux
runs containers on. Names are those of the header, without the ``FUSE_``.

A directory's entries are packed many at a time: a hundred thousand of them in one directory are nothing special here.

The rule: what is too short to be what it says is `Malformed`, never an `IndexError` of some other line.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAJOR, MINOR = 7, 40
ROOT_ID = 1
#: Of a request that was handed out before, to a server that is gone (FUSE_UNIQUE_RESEND).
RESEND_BIT = 1 << 63
#: Seconds for which names and attributes are known to the kernel: a snapshot does not change.
FOREVER_S = 1 << 32
NAME_MAX = 255


class Opcode(enum.IntEnum):
    """What a request asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    STATX = 52
    TMPFILE = 51


#: Those that would change something.
WRITES = frozenset(
    {
        *(Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME),
        *(Opcode.LINK, Opcode.WRITE, Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.CREATE, Opcode.FALLOCATE),
        *(Opcode.RENAME2, Opcode.COPY_FILE_RANGE, Opcode.TMPFILE),
    }
)
#: Those that nobody waits for an answer to.
UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


class Init(enum.IntFlag):
    """Flags of INIT, those of the second word from bit 32 on."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    NO_OPENDIR_SUPPORT = 1 << 24
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40


class Open(enum.IntFlag):
    """Flags of an answer to OPEN and OPENDIR (FOPEN_…)."""

    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


IN_HEADER = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("<IiQ")  # len, -errno, unique
_INIT_IN = struct.Struct("<4I")
_INIT_OUT = struct.Struct("<4I2H2I2H2I12H")
_ATTR = struct.Struct("<6Q10I")
_ENTRY_OUT = struct.Struct("<4Q2I")
_ATTR_OUT = struct.Struct("<QII")
_OPEN_IN = struct.Struct("<II")
_OPEN_OUT = struct.Struct("<QIi")
_READ_IN = struct.Struct("<QQII")  # fh, offset, size, read_flags; lock_owner and flags follow
_GETXATTR = struct.Struct("<II")
_STATFS_OUT = struct.Struct("<5Q4I6I")
_STATX_OUT = struct.Struct("<QII2Q")
_STATX = struct.Struct("<2IQ3I2H4Q8q4I14Q")
_INTERRUPT_IN = struct.Struct("<Q")
_DIRENT = struct.Struct("<QQII")

ENTRY_BYTES = _ENTRY_OUT.size + _ATTR.size
DIRENT_BYTES = _DIRENT.size
_ENTRY_WORDS, _DIRENT_WORDS = ENTRY_BYTES // 8, DIRENT_BYTES // 8
#: Of a directory's entry (dirent(5)).
DT_DIR, DT_REG = 4, 8
_S_IFDIR, _S_IFREG = 0o040000, 0o100000
#: STATX_BASIC_STATS of linux/stat.h: everything but a time of birth, which no origin tells.
_STATX_BASIC = 0x7FF
_UNIT_BYTES = 4096


class Malformed(ValueError):
    """A request whose body is not what its opcode says."""


class Header(NamedTuple):
    """Of a request. `node` is the inode that it is about."""

    opcode: int
    unique: int
    node: int
    pid: int


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) tells. All times are `mtime_s`, seconds since 1970."""

    inode: int
    size_bytes: int
    is_dir: bool
    mtime_s: int = 0

    @property
    def mode(self) -> int:
        return _S_IFDIR | 0o555 if self.is_dir else _S_IFREG | 0o444


@dataclass(frozen=True, slots=True)
class Offer:
    """What the kernel says at INIT."""

    major: int
    minor: int
    max_readahead: int
    flags: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What the server answers to INIT: versions and flags that hold for the life of the mount."""

    minor: int
    flags: int
    max_readahead: int

    @property
    def passthrough(self) -> bool:
        return bool(self.flags & Init.PASSTHROUGH)

    @property
    def has_resend(self) -> bool:
        return bool(self.flags & Init.HAS_RESEND)

    @property
    def opens_silently(self) -> bool:
        """Files are opened without asking the server."""
        return bool(self.flags & Init.NO_OPEN_SUPPORT)


#: Flags that a read-only server wants where the kernel has them.
WANTED = (
    Init.ASYNC_READ
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.NO_OPENDIR_SUPPORT
    | Init.INIT_EXT
    | Init.HAS_RESEND
    | Init.ALLOW_IDMAP
)


def parse_header(request: memoryview) -> tuple[Header, memoryview]:
    """A request's header and its body. Raises Malformed."""
    if len(request) < IN_HEADER.size:
        raise Malformed(f"a request of {len(request)} bytes")
    length, opcode, unique, node, _, _, pid, _, _ = IN_HEADER.unpack_from(request)
    if length != len(request):
        raise Malformed(f"a request of {len(request)} bytes says that it has {length}")
    return Header(opcode, unique, node, pid), request[IN_HEADER.size :]


def parse_init(body: memoryview) -> Offer:
    """The body of INIT. Raises Malformed."""
    major, minor, max_readahead, flags = _unpack(_INIT_IN, body)
    if flags & Init.INIT_EXT and len(body) >= _INIT_IN.size + 4:
        flags |= int.from_bytes(body[_INIT_IN.size : _INIT_IN.size + 4], "little") << 32
    return Offer(major, minor, max_readahead, flags)


def negotiate(offer: Offer, *, passthrough: bool, silent_opens: bool, max_readahead: int) -> Terms:
    """The terms for what the kernel offers.

    Args:
        passthrough: the server wants it.
        silent_opens: it wants files to be opened without being asked; then there is no passthrough.
    """
    wanted: int = WANTED
    if silent_opens and offer.flags & Init.NO_OPEN_SUPPORT:
        wanted |= Init.NO_OPEN_SUPPORT
    elif passthrough:
        wanted |= Init.PASSTHROUGH
    return Terms(min(offer.minor, MINOR), offer.flags & wanted, max_readahead)


def pack_init(terms: Terms, *, max_pages: int) -> bytes:
    """The answer to INIT. NO_OPEN_SUPPORT is not said here, but by ENOSYS to the first OPEN."""
    flags = terms.flags & ~(Init.NO_OPEN_SUPPORT | Init.NO_OPENDIR_SUPPORT)
    # A stack of one file system below ours: overlayfs may still lie above it.
    depth = int(terms.passthrough)
    head = (MAJOR, terms.minor, terms.max_readahead, flags & 0xFFFFFFFF)
    # Requests at a time that nobody waits for, and from which number on more are held back; largest WRITE; ns of times.
    limits = (64, 48, 4096, 1)
    return _INIT_OUT.pack(*head, *limits, max_pages, 0, flags >> 32, depth, *[0] * 12)


def parse_open(body: memoryview) -> int:
    """The flags of open(2), of OPEN's body. Raises Malformed."""
    flags: int
    flags, _ = _unpack(_OPEN_IN, body)
    return flags


def parse_read(body: memoryview) -> tuple[int, int]:
    """Offset and size, of the body of READ, READDIR and READDIRPLUS. Raises Malformed."""
    _, offset, size, _ = _unpack(_READ_IN, body)
    return offset, size


def parse_name(body: memoryview) -> bytes:
    """The name in LOOKUP's body. Raises Malformed."""
    name = bytes(body)
    if not name.endswith(b"\0") or name.count(b"\0") != 1:
        raise Malformed("a name without an end")
    return name[:-1]


def parse_getxattr(body: memoryview) -> tuple[int, bytes]:
    """How many bytes of a value are taken (0: its size is asked), and the attribute's name. Raises Malformed."""
    size, _ = _unpack(_GETXATTR, body)
    return size, parse_name(body[_GETXATTR.size :])


def parse_size(body: memoryview) -> int:
    """How many bytes LISTXATTR takes. Raises Malformed."""
    size: int
    size, _ = _unpack(_GETXATTR, body)
    return size


def parse_interrupt(body: memoryview) -> int:
    """The unique number of the request that INTERRUPT is about. Raises Malformed."""
    unique: int
    (unique,) = _unpack(_INTERRUPT_IN, body)
    return unique


def pack_error(unique: int, number: int) -> bytes:
    """A whole answer that is an errno; 0: it was done, and there is nothing to say."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def pack_header(unique: int, body_bytes: int) -> bytes:
    """The header of an answer with a body."""
    return OUT_HEADER.pack(OUT_HEADER.size + body_bytes, 0, unique)


def pack_attributes(found: Attributes) -> bytes:
    """``struct fuse_attr``."""
    size, time_s = found.size_bytes, found.mtime_s
    units = -(-size // 512)
    # One link also for directories: their number of subdirectories is not known, and 1 is how that is said.
    return _ATTR.pack(
        *(found.inode, size, units, time_s, time_s, time_s), *(0, 0, 0, found.mode, 1, 0, 0, 0, _UNIT_BYTES, 0)
    )


def pack_entry(found: Attributes | None) -> bytes:
    """The answer to LOOKUP; None: there is no such name, which the kernel is to remember, too."""
    if found is None:
        return _ENTRY_OUT.pack(0, 0, FOREVER_S, 0, 0, 0) + bytes(_ATTR.size)
    return _ENTRY_OUT.pack(found.inode, 0, FOREVER_S, FOREVER_S, 0, 0) + pack_attributes(found)


def pack_attr(found: Attributes) -> bytes:
    """The answer to GETATTR."""
    return _ATTR_OUT.pack(FOREVER_S, 0, 0) + pack_attributes(found)


def pack_statx(found: Attributes) -> bytes:
    """The answer to STATX."""
    times = (found.mtime_s, 0) * 4
    stat = _STATX.pack(
        *(_STATX_BASIC, _UNIT_BYTES, 0, 1, 0, 0, found.mode, 0),
        *(found.inode, found.size_bytes, -(-found.size_bytes // 512), 0),
        *times,
        *(0, 0, 0, 0),
        *[0] * 14,
    )
    return _STATX_OUT.pack(FOREVER_S, 0, 0, 0, 0) + stat


def pack_open(handle: int, flags: int, backing_id: int = 0) -> bytes:
    """The answer to OPEN and OPENDIR."""
    return _OPEN_OUT.pack(handle, flags, backing_id)


def pack_xattr_size(size: int) -> bytes:
    """The answer to GETXATTR and LISTXATTR where a size was asked."""
    return _GETXATTR.pack(size, 0)


def pack_statfs(total_bytes: int, files: int) -> bytes:
    """The answer to STATFS: a full file system of that many bytes."""
    units = -(-total_bytes // _UNIT_BYTES)
    return _STATFS_OUT.pack(units, 0, 0, files, 0, _UNIT_BYTES, NAME_MAX, _UNIT_BYTES, 0, *[0] * 6)


def dirent_size(name_bytes: int, *, plus: bool) -> int:
    """Bytes of one entry of a directory, with its attributes where `plus`."""
    return DIRENT_BYTES + (name_bytes + 7) // 8 * 8 + (ENTRY_BYTES if plus else 0)


def pack_dirent(inode: int, next_offset: int, name: bytes, plus: Attributes | None, *, is_plus: bool) -> bytes:
    """One entry for a directory, which a directory is. `plus` is None for "." and "..", which are not looked up."""
    head = b""
    if is_plus:
        head = bytes(ENTRY_BYTES) if plus is None else pack_entry(plus)
    return head + _DIRENT.pack(inode, next_offset, len(name), DT_DIR) + name + bytes(-len(name) % 8)


def pack_files(
    inodes: npt.NDArray[np.uint64],
    next_offsets: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    data: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    limit: int,
    mtime_s: int,
    *,
    is_plus: bool,
) -> tuple[bytes, int]:
    """Entries for the files of a directory, as many as fit into `limit` bytes; and how many those are.

    Args:
        inodes, next_offsets, sizes, starts, lengths: one each a file; its name is `lengths` bytes of `data` from
            `starts` on.
    """
    prefix = _ENTRY_WORDS if is_plus else 0
    words = prefix + _DIRENT_WORDS + (lengths + 7) // 8
    ends = np.cumsum(words)
    count = int(np.searchsorted(ends, limit // 8, "right"))
    if not count:
        return b"", 0
    out = np.zeros(int(ends[count - 1]), np.uint64)
    at = (ends - words)[:count]
    inodes, lengths, starts = inodes[:count], lengths[:count], starts[:count]
    if is_plus:
        bytes_of = sizes[:count].astype(np.uint64)
        mode = _S_IFREG | 0o444
        out[at] = out[at + 5] = inodes  # nodeid, ino
        out[at + 2] = out[at + 3] = FOREVER_S
        out[at + 6] = bytes_of
        out[at + 7] = (bytes_of + np.uint64(511)) // np.uint64(512)
        out[at + 8] = out[at + 9] = out[at + 10] = mtime_s
        out[at + 12] = mode << 32
        out[at + 13] = 1  # nlink, uid
        out[at + 15] = _UNIT_BYTES
    head = at + prefix
    out[head] = inodes
    out[head + 1] = next_offsets[:count]
    out[head + 2] = lengths.astype(np.uint64) | np.uint64(DT_REG << 32)
    total = int(lengths.sum())
    into = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # 0, 1, … of each name
    out.view(np.uint8)[np.repeat((head + _DIRENT_WORDS) * 8, lengths) + into] = data[np.repeat(starts, lengths) + into]
    return out.tobytes(), count


def _unpack(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise Malformed(f"a body of {len(body)} bytes, where {layout.size} were due")
    return layout.unpack_from(body)
