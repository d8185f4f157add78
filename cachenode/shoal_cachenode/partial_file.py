"""A shard that is filling: a sparse file whose attribute says which parts are in.

The rule: a part counts from the moment its checksum is in the attribute, and that is after its last byte is written.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from shoal.errors import ShardCorrupt
from shoal.shards import Key
from shoal_cachenode.sealed_file import SealedFile, part_is_good
from shoal_cachenode.shard_file import XATTR, ShardHeader

if TYPE_CHECKING:
    from shoal_cachenode.store import Store


class PartWriter:
    """Writes one part as its bytes come, hashing them while they are in the processor's cache."""

    def __init__(self, partial: PartialFile, part: int) -> None:
        partial.open()
        self._partial = partial
        self._part = part
        start, end = partial.header.part_range(part)
        self._start, self._length = start, end - start
        self._hasher = xxhash.xxh3_64()
        self.written = 0

    def write(self, data: memoryview) -> None:
        """Append bytes. Raises OSError as the disk does."""
        assert self.written + len(data) <= self._length, "a part has its length"
        self._hasher.update(data)
        with self._partial.timed:
            while data:
                count = os.pwrite(self._partial.fd, data, self._start + self.written)
                self.written += count
                data = data[count:]

    def finish(self) -> None:
        """Note the part as present. Raises OSError as the disk does."""
        assert self.written == self._length, "a part is written whole"
        self._partial.note_part(self._part, self._hasher.intdigest())


class PartialFile:
    """A shard that is filling. `write_part` may run in several threads, each for another part."""

    def __init__(self, store: Store, key: Key, path: Path, header: ShardHeader, fd: int | None = None) -> None:
        """Take over `fd`, the open file of an earlier fill; None: a new file is made when it is first written."""
        self.key = key
        self.header = header
        self._file = SealedFile(fd, header) if fd is not None else None
        self._store = store
        self._path = path
        self._lock = threading.Lock()  # guards _seal_claimed, _file, header.checksums and the attribute like them
        self._seal_claimed = False
        self.timed = store.operations.timed

    @property
    def fd(self) -> int:
        assert self._file is not None, "a partial file is opened before it is used"
        return self._file.fd

    @property
    def has_file(self) -> bool:
        """Whether something of it is on the disk."""
        return self._file is not None

    def retain(self) -> SealedFile | None:
        """The open file, counted for the caller; None where it is closed."""
        file = self._file
        return file if file is not None and file.retain() else None

    def open(self) -> None:
        """Make the file where there is none yet. Raises OSError as the disk does."""
        with self._lock:
            if self._file is not None:
                return
            with self.timed:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(fd, self.header.size_bytes)
                os.setxattr(fd, XATTR, self.header.encode(self.key))
            except BaseException:
                os.close(fd)
                with contextlib.suppress(OSError):
                    self._path.unlink()
                raise
            self._file = SealedFile(fd, self.header)

    def close(self) -> None:
        """Let go of the file; readers that hold it keep it."""
        if self._file is not None:
            self._file.release()

    def write_part(self, part: int, data: bytes | bytearray | memoryview) -> None:
        """Write one part and note its checksum. Raises OSError as the disk does."""
        writer = self.writer(part)
        writer.write(memoryview(data))
        writer.finish()

    def writer(self, part: int) -> PartWriter:
        """A writer of one part, piece by piece."""
        return PartWriter(self, part)

    def note_part(self, part: int, value: int) -> None:
        """Keep the checksum of a part that is wholly written. Raises OSError as the disk does."""
        with self._lock, self.timed:
            self.header.checksums[part] = value
            os.setxattr(self.fd, XATTR, self.header.encode(self.key))

    def claim_seal(self) -> bool:
        """Whether the caller is the one to seal: true once, after the last part."""
        with self._lock:
            if self._seal_claimed or not self.header.is_complete:
                return False
            self._seal_claimed = True
            return True

    def verify_part(self, part: int) -> bool:
        """Whether the bytes on the file are those that were written; forgets the part where they are not."""
        if part_is_good(self.fd, self.header, part):
            return True
        with self._lock:
            self.header.checksums[part] = None
            os.setxattr(self.fd, XATTR, self.header.encode(self.key))
        return False

    def seal(self) -> None:
        """Verify, make durable and publish. Raises ShardCorrupt (then the bad parts are missing again) or OSError."""
        assert self.header.is_complete, "only a whole shard is sealed"
        bad = [part for part in range(len(self.header.checksums)) if not self.verify_part(part)]
        if bad:
            raise ShardCorrupt(f"parts {bad} of shard {self.key.hex()} did not read back as written")
        with self._lock:
            self.header.generation = self._store.generation
            self.header.written_ns = os.fstat(self.fd).st_mtime_ns
            os.setxattr(self.fd, XATTR, self.header.encode(self.key))
        os.fchmod(self.fd, 0o444)
        os.fdatasync(self.fd)
        self._store._publish(self)

    def drop(self) -> None:
        """Give up: see `Store.give_up`. Readers that hold the file's descriptor keep it. Raises OSError."""
        try:
            self._store.give_up(self.key, self._path, is_there=self.has_file)
        finally:
            self.close()
