"""Files that every node mounts at the same path: NFS, Lustre, a read-only image, one machine's own disk.

A version is the modification time in nanoseconds and the size. The inode is left out: it differs between nodes on some
shared file systems and changes when a tree is copied or restored with its times, where the bytes do not.

The rule: a file is checked by its open descriptor before its bytes are read, and after each step before they are
handed on, so that bytes of two versions never meet. Links are followed, out of the prefix too (trees of links are how
DVC and the Hugging Face cache keep data), since whoever registers an origin chooses what is served; a link that leads
nowhere is an error, because a file left out silently is a rank without data.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shoal import memory
from shoal.errors import (
    InvalidRequest,
    OriginDenied,
    OriginError,
    OriginNotFound,
    OriginUnavailable,
)
from shoal.origin import base, pieces, urls
from shoal.origin.base import ObjectInfo, Sink

if TYPE_CHECKING:
    from typing_extensions import Buffer

_GONE = {errno.ENOENT, errno.ENOTDIR}
_DENIED = {errno.EACCES, errno.EPERM}
#: What network file systems and sick disks say when another attempt may do better.
_FOR_NOW = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO, errno.EMFILE, errno.ENFILE}

_Identity = tuple[int, int]


class LocalOrigin:
    """An `Origin` over a directory, or one file."""

    def __init__(self, url: urls.OriginUrl) -> None:
        self.url = str(url)
        self.endpoint = ""
        self.identity = "file://"
        self._root = url.path
        self.key_prefix = url.path.rstrip("/") + "/"

    # -- listing ---------------------------------------------------------------------------------------------------

    def list(self) -> Iterator[list[ObjectInfo]]:
        """See `Origin.list`. What is neither file nor directory (sockets, pipes, devices) is left out."""
        try:
            found = os.stat(self._root)  # noqa: PTH116 - file names are bytes to the kernel; Path adds nothing here
        except OSError as error:
            raise _converted(error, self.url) from error
        if not stat.S_ISDIR(found.st_mode):
            yield [ObjectInfo("", found.st_size, _version(found))]
            return
        batch: list[ObjectInfo] = []
        is_empty = True
        for row in self._below("", (_identity(found),)):
            batch.append(row)
            is_empty = False
            if len(batch) == base.PAGE_ROWS:
                yield batch
                batch = []
        if is_empty:
            raise OriginNotFound(f"{self.url} is a directory without files: check the path, or write the files first")
        if batch:
            yield batch

    def _below(self, path: str, ancestors: tuple[_Identity, ...]) -> Iterator[ObjectInfo]:
        """All files under directory `path`. `ancestors` are it and the directories above it, so that loops end."""
        pending = [(path, ancestors)]
        while pending:
            path, ancestors = pending.pop()
            directory = os.path.join(self._root, path)
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        child = _check_name(f"{path}/{entry.name}" if path else entry.name, self.url)
                        found = self._stat(entry, child)
                        if found is None:
                            continue
                        if stat.S_ISREG(found.st_mode):
                            yield ObjectInfo(child, found.st_size, _version(found))
                        elif stat.S_ISDIR(found.st_mode) and _identity(found) not in ancestors:
                            pending.append((child, (*ancestors, _identity(found))))
            except OSError as error:
                if isinstance(error, OriginError):
                    raise
                raise _converted(error, urls.join(self.url, path)) from error

    def _stat(self, entry: os.DirEntry[str], path: str) -> os.stat_result | None:
        """What `entry` leads to; None for a file that was removed while we listed."""
        try:
            return entry.stat()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            if not entry.is_symlink():
                return None
            raise OriginNotFound(
                f"{urls.join(self.url, path)} is a link to nothing ({Path(entry.path).readlink()}): repair or remove it"
            ) from error

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, path: str, version: str, start: int, end: int) -> Buffer:
        """See `Origin.read`. Made of steps, which is no slower than one call of the kernel for the whole."""
        return pieces.collected(self, path, version, start, end)

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        """See `Origin.stream`. Nothing is retried: how patient a mount is, its own options say."""
        url = urls.join(self.url, path)
        base.check_range(url, start, end)
        if ".." in path.split("/") or path.startswith("/"):
            raise InvalidRequest(f"{path!r} is no path below {self.url}")
        if start < end:
            pieces.hand_over(self._pieces(url, path, version, start, end), sink)

    def _pieces(self, url: str, path: str, version: str, start: int, end: int) -> pieces.Pieces:
        try:
            descriptor = os.open(os.path.join(self._root, path) if path else self._root, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield from _steps(descriptor, url, version, start, end)
            finally:
                os.close(descriptor)
        except OriginError:
            raise
        except OSError as error:
            if error.errno in _GONE:
                raise base.changed(url, "was removed") from error
            raise _converted(error, url) from error

    def close(self) -> None:
        """See `Origin.close`. Nothing is kept open."""


def _steps(descriptor: int, url: str, version: str, start: int, end: int) -> pieces.Pieces:
    """[start, end) in steps, all in one buffer."""
    _check(descriptor, url, version, end)
    step = memory.view(memory.allocate(min(end - start, pieces.STEP_BYTES)))
    while start < end:
        count = os.preadv(descriptor, [step[: end - start]], start)
        _check(descriptor, url, version, end)
        if count == 0:
            raise base.changed(url, "has become shorter")
        yield step[:count]
        start += count


def _check(descriptor: int, url: str, version: str, end: int) -> None:
    found = os.fstat(descriptor)
    if _version(found) != version:
        raise base.changed(url, "has changed")
    if found.st_size < end:
        raise base.changed(url, "has become shorter")


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _identity(found: os.stat_result) -> _Identity:
    return found.st_dev, found.st_ino


def _check_name(path: str, url: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{url} has a file whose name is no UTF-8 ({os.fsencode(path)!r}): rename it, or register a prefix without "
            "it"
        ) from error
    return path


def _converted(error: OSError, url: str) -> OriginError:
    if error.errno in _GONE:
        return OriginNotFound(
            f"{url} does not exist on this machine: mount file origins at the same path on the controller and on every "
            "cache node"
        )
    if error.errno in _DENIED:
        return OriginDenied(f"{url} cannot be read by user {os.getuid()}: let that user read it")
    if error.errno in _FOR_NOW:
        return OriginUnavailable(
            f"{url} cannot be read now ({error.strerror}): check the disk or mount, then try again"
        )
    return OriginError(f"{url} cannot be read ({error.strerror}): check the disk or mount")
