"""The server of one mount: takes requests off /dev/fuse and answers them, one method an opcode.

A few threads take requests. What is answered from the tree, from maps or from windows is answered by the thread that
took it; what waits for a node goes to a pool, so that a slow origin never keeps `ls` waiting.

    names, attributes    from the tree; they never expire, so the kernel asks once for each
    OPEN                 passthrough, where the object is one sealed file of the node on this machine, or a file of the
                         local tier; else cached
    READ                 `shoal_csi.reads`
    what writes          EROFS, if the kernel asks at all: it knows that the mount is read-only
    what is unknown      ENOSYS, after which the kernel mostly does not ask again

Datasets of small files are opened without asking the server at all (the kernel's "no open"): then there is no
passthrough, but what was read once is read, opened and closed at the page cache's own speed.

The rule: each request taken is answered once, whatever it holds and whatever goes wrong; no request ends the server.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from shoal.datasets import DatasetRecord
from shoal.errors import NotFound, ShoalError
from shoal.maps import RENEW_S
from shoal.parallel import run_parallel
from shoal.shards import shard_count
from shoal.snapshot import Snapshot
from shoal.threads import Threads
from shoal_csi import failures, kernel, protocol
from shoal_csi.keeping import Keeping
from shoal_csi.opens import CACHED, Opens
from shoal_csi.presence import Presence
from shoal_csi.protocol import WRITES, Header, Init, Malformed, Opcode, Open
from shoal_csi.reads import LIMIT_BYTES, Reads
from shoal_csi.state import MAX_THREADS, State
from shoal_csi.tier import Tier
from shoal_csi.tree import Tree

if TYPE_CHECKING:
    from shoal.reader import ObjectReader

log = logging.getLogger(__name__)

#: Threads that take requests, and threads that wait for nodes. Each of the latter holds one READ, and as many as the
#: kernel sends at a time may wait for an origin that hangs, without those that need it not waiting for a thread.
TAKERS, WAITERS = 4, 64
#: The largest READ, in pages, and in bytes what the kernel may read ahead.
MAX_PAGES = 256
MAX_READAHEAD = 4 << 20
#: Smaller objects are not worth asking the node for their file: one READ, and the kernel has them.
PASSTHROUGH_FROM = 128 << 10
#: Objects up to this size are opened silently, where they are most of a dataset's bytes.
SMALL_BYTES = 1 << 20

#: A request whose reader got a signal is looked at so often: the kernel tells of the first one alone, and not when a
#: later one is the last.
_INTERRUPTED_AGAIN_S = 1.0
_BUFFER_BYTES = 64 << 10
_SIGKILL_BIT = 1 << 8
#: Of a request whose answer is being written; no thread has this id.
_CLAIMED = -1
_VERSION, _OWNER, _CACHED = b"user.shoal.version", b"user.shoal.owner", b"user.shoal.cached"
#: Of the root alone: what the server of the mount has done, as JSON. Its answer says that the mount is alive.
MOUNT_XATTR = "user.shoal.mount"

Answer = bytes | None
"""An answer's body; None where it is given later, or never."""


class Refused(Exception):
    """A request is answered with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.number = number


class Served(NamedTuple):
    """What a mount is of."""

    record: DatasetRecord
    snapshot: Snapshot
    tree: Tree
    reader_of: Callable[[int], ObjectReader]


class Server:
    """Serves the connection behind `fd`.

    Args:
        state: shared with the servers before and after this one.
        on_over: called once no thread takes requests any more: the file system was unmounted, or `stop` was called.
        tier: where objects are kept that the node of this machine does not have; None: nowhere.
        window_bytes: what may be held that was fetched ahead.
        takers: threads that take requests.
        renew_s: between two times that nodes are told of what is open.

    Attributes:
        opens, reads: of the mount, with their counters.
    """

    def __init__(
        self,
        fd: int,
        served: Served,
        state: State,
        *,
        on_over: Callable[[], None],
        tier: Tier | None = None,
        window_bytes: int = LIMIT_BYTES,
        takers: int = TAKERS,
        renew_s: float = RENEW_S,
    ) -> None:
        assert takers <= MAX_THREADS
        self._fd = fd
        self._on_over = on_over
        self._served = served
        self._tree = served.tree
        self._state = state
        self._terms = state.terms
        self._silent = _is_of_small(served.snapshot)
        self._may_passthrough = True
        self._of_tier: set[int] = set()  # backing ids; those of a server that is gone count as the node's
        self.opens = Opens(state, self._close_backing)
        self.reads = Reads(served.reader_of, window_bytes)
        self._keeping = None if tier is None else self._keep(tier)
        if self._terms is not None:
            self._look_at(self._terms)
        hidden = self._tree.rows if self._silent else range(0)
        self._presence = Presence(served.reader_of, self._open_rows, hidden, every_s=renew_s)
        self._waiters = Threads(WAITERS, "shoal-mount-wait")
        self._lock = threading.Lock()  # guards _waiting, _interrupts and _ended
        self._waiting: dict[int, int] = {}  # unique to thread id of those whose answers the pool gives
        self._interrupts: list[int] = []  # that are to be had again
        self._ended = 0
        self._is_stopping = False
        self._busy = [False] * takers
        self.requests = self._reads = self._read_bytes = self._read_wait_us = 0
        self._node_opens = self._tier_opens = 0
        self._errors = dict.fromkeys(failures.ERRNOS, 0)
        self._handlers: dict[int, Callable[[Header, memoryview, int], Answer]] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.STATX: self._statx,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._nothing,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.INTERRUPT: self._interrupt,
            Opcode.FORGET: self._unanswered,
            Opcode.BATCH_FORGET: self._unanswered,
            Opcode.DESTROY: self._nothing,
        }

    # Life

    def start(self) -> None:
        """Take requests, on threads of this object; first those that a server took which is gone."""
        try:
            kernel.resend(self._fd)
        except OSError as error:
            log.info("this kernel hands no request out again (Linux 6.9 does): %s", error)
        for thread in range(len(self._busy)):
            threading.Thread(target=self._take, args=(thread,), name=f"shoal-mount_{thread}", daemon=True).start()
        self._presence.start()

    def stop(self, grace_s: float) -> bool:
        """Take no more requests, and wait for those under way; whether they were over in time.

        Those that are not over are handed out again to whoever comes next, where the kernel can do that; where it
        cannot, they are waited for however long it takes.
        """
        self._is_stopping = True
        can_resend = self._terms is None or self._terms.has_resend
        until = time.monotonic() + grace_s
        while self._waiting or any(self._busy):
            if can_resend and time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def close(self) -> None:
        self._presence.close()
        self._waiters.close()
        self.reads.close()
        if self._keeping is not None:
            self._keeping.close()

    def _take(self, thread: int) -> None:
        buffer = bytearray(_BUFFER_BYTES)
        whole = memoryview(buffer)
        try:
            while not self._is_stopping:
                try:
                    length = os.readv(self._fd, [buffer])
                except OSError as error:
                    if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                        continue  # the request was withdrawn before it was taken
                    if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                        log.exception("/dev/fuse gives no requests: unmount, and mount again")
                    return
                self._busy[thread] = True
                try:
                    self._handle(whole[:length], thread)
                finally:
                    self._busy[thread] = False
        finally:
            with self._lock:
                self._ended += 1
                is_last = self._ended == len(self._busy)
            if is_last:
                self._on_over()

    def _handle(self, request: memoryview, thread: int) -> None:
        """Answer one request, or see to it that it is answered."""
        unique = inode = 0
        try:
            header, body = protocol.parse_header(request)
            unique, inode = header.unique, header.node
            self.requests += 1
            handler = self._handlers.get(header.opcode)
            if handler is None:
                raise Refused(errno.EROFS if header.opcode in WRITES else errno.ENOSYS)
            answer = handler(header, body, thread)
        except Refused as refusal:
            self._reply(protocol.pack_error(unique, refusal.number))
        except NotFound as error:
            log.debug("%s", error)
            self._reply(protocol.pack_error(unique, errno.ENOENT))
        except ShoalError as error:
            self._reply(protocol.pack_error(unique, self._failed(inode, error)))
        except Malformed as error:
            log.warning("the kernel sent %s", error)
            if unique:
                self._reply(protocol.pack_error(unique, errno.EINVAL))
        except Exception:  # one request's surprise must not end the thread that takes the others
            log.exception("a request could not be answered")
            self._reply(protocol.pack_error(unique, errno.EIO))
        else:
            if answer is not None:
                self._reply(protocol.pack_header(unique, len(answer)) + answer)

    def _reply(self, answer: bytes) -> None:
        try:
            os.write(self._fd, answer)
        except OSError as error:
            _note_lost(error)

    def _reply_buffers(self, unique: int, buffers: Sequence[pa.Buffer | bytes]) -> None:
        length = sum(len(buffer) for buffer in buffers)
        try:
            os.writev(self._fd, [protocol.pack_header(unique, length), *buffers])
        except OSError as error:
            _note_lost(error)

    def _later(self, header: Header, inode: int, job: Callable[[], None]) -> None:
        """Have the pool do `job`, which answers with `_finish`; or answer with the errno of its failure."""
        with self._lock:
            self._waiting[header.unique] = header.pid
        self._waiters.submit(self._do_later, header.unique, inode, job)

    def _do_later(self, unique: int, inode: int, job: Callable[[], None]) -> None:
        if unique not in self._waiting:
            return  # its reader was killed while it waited for a thread
        try:
            job()
        except Refused as refusal:
            self._finish(unique, errno_=refusal.number)
        except ShoalError as error:
            self._finish(unique, errno_=self._failed(inode, error))
        except Exception:  # else its reader would wait for ever
            log.exception("a request could not be answered")
            self._errors[errno.EIO] += 1
            self._finish(unique, errno_=errno.EIO)

    def _failed(self, inode: int, error: ShoalError) -> int:
        """Log and count that bytes cannot be had; the errno for who wants them."""
        number, path = failures.errno_of(error), self._tree.path(inode)
        self._errors[number] += 1
        log.error("%s", failures.sentence(path, self._served.record.name, error), extra={"path": path, "errno": number})
        return number

    def _finish(self, unique: int, buffers: Sequence[pa.Buffer | bytes] = (), errno_: int = 0) -> None:
        """Answer a request of the pool, unless it was answered because its reader was killed."""
        with self._lock:
            if self._waiting.get(unique, _CLAIMED) == _CLAIMED:
                return
            self._waiting[unique] = _CLAIMED
        try:
            if errno_:
                self._reply(protocol.pack_error(unique, errno_))
            else:
                self._reply_buffers(unique, buffers)
        finally:
            with self._lock:
                del self._waiting[unique]

    # Requests

    def _init(self, header: Header, body: memoryview, thread: int) -> Answer:
        offer = protocol.parse_init(body)
        if offer.major != protocol.MAJOR:
            log.error("the kernel speaks FUSE %d, this server 7: mount on a Linux that has that", offer.major)
            raise Refused(errno.EPROTO)
        terms = protocol.negotiate(
            offer, passthrough=self._may_passthrough, silent_opens=self._silent, max_readahead=MAX_READAHEAD
        )
        self._state.agree(terms)  # before the answer: a successor is not asked again once that is given
        self._terms = terms
        if not terms.passthrough and not terms.opens_silently:
            log.warning("this kernel has no FUSE passthrough (Linux 6.9 has): files are read through the server")
        self._look_at(terms)
        return protocol.pack_init(terms, max_pages=MAX_PAGES)

    def _look_at(self, terms: protocol.Terms) -> None:
        if not terms.passthrough and self._keeping is not None:
            self._keeping.turn_off("in this mount nothing is passed through (docs/mount.md), so it would be of no use")

    def _lookup(self, header: Header, body: memoryview, thread: int) -> Answer:
        inode = self._tree.lookup(header.node, protocol.parse_name(body))
        return protocol.pack_entry(None if inode is None else self._tree.attributes(inode))

    def _getattr(self, header: Header, body: memoryview, thread: int) -> Answer:
        return protocol.pack_attr(self._attributes(header.node))

    def _statx(self, header: Header, body: memoryview, thread: int) -> Answer:
        return protocol.pack_statx(self._attributes(header.node))

    def _attributes(self, inode: int) -> protocol.Attributes:
        found = self._tree.attributes(inode)
        if found is None:
            raise Refused(errno.ENOENT)
        return found

    def _open(self, header: Header, body: memoryview, thread: int) -> Answer:
        flags = protocol.parse_open(body)
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            raise Refused(errno.EROFS)
        if self._terms is not None and self._terms.opens_silently:
            raise Refused(errno.ENOSYS)
        inode = header.node
        row = self._row(inode)
        self._presence.opened(row)
        backing = self.opens.open(thread, header.unique, inode, lambda: self._choose(row))
        if backing == CACHED:
            return protocol.pack_open(inode, Open.KEEP_CACHE | Open.NOFLUSH)
        if backing in self._of_tier:
            self._tier_opens += 1
        else:
            self._node_opens += 1
        return protocol.pack_open(inode, Open.PASSTHROUGH | Open.NOFLUSH, backing)

    def _release(self, header: Header, body: memoryview, thread: int) -> Answer:
        if self.opens.release(thread, header.unique, header.node):
            row = self._row(header.node)
            self.reads.forget(row)
            if self._keeping is not None and self._passes_through:
                self._keeping.released(row)
        return b""

    def _read(self, header: Header, body: memoryview, thread: int) -> Answer:
        offset, size = protocol.parse_read(body)
        unique, row = header.unique, self._row(header.node)
        end = min(offset + size, int(self._served.snapshot.size(row)))
        if offset >= end:
            return b""
        self._reads += 1
        self._read_bytes += end - offset
        if self._keeping is not None:
            self._keeping.has_read(row, end - offset)
        if self.reads.read_at_hand(row, offset, end, lambda buffers: self._reply_buffers(unique, buffers)):
            return None
        since = time.monotonic()
        send = lambda buffers: self._finish(unique, buffers)  # noqa: E731

        def read() -> None:
            try:
                self.reads.read(row, offset, end, send, since)
            finally:
                waited_us = int((time.monotonic() - since) * 1e6)
                self._read_wait_us += waited_us

        self._later(header, header.node, read)
        return None

    def _open_rows(self) -> list[int]:
        return [row for inode in self.opens.inodes() if (row := self._tree.row(inode)) is not None]

    def _row(self, inode: int) -> int:
        row = self._tree.row(inode)
        if row is None:
            raise Refused(errno.EISDIR if self._tree.is_dir(inode) else errno.ENOENT)
        return row

    def _opendir(self, header: Header, body: memoryview, thread: int) -> Answer:
        if self._terms is not None and self._terms.flags & Init.NO_OPENDIR_SUPPORT:
            raise Refused(errno.ENOSYS)  # which means: never ask, and keep what was listed
        return protocol.pack_open(header.node, Open.KEEP_CACHE | Open.CACHE_DIR)

    def _readdir(self, header: Header, body: memoryview, thread: int) -> Answer:
        offset, size = protocol.parse_read(body)
        return self._tree.read_dir(header.node, offset, size, is_plus=False)

    def _readdirplus(self, header: Header, body: memoryview, thread: int) -> Answer:
        offset, size = protocol.parse_read(body)
        return self._tree.read_dir(header.node, offset, size, is_plus=True)

    def _statfs(self, header: Header, body: memoryview, thread: int) -> Answer:
        return protocol.pack_statfs(self._served.snapshot.total_bytes, len(self._served.snapshot))

    def _nothing(self, header: Header, body: memoryview, thread: int) -> Answer:
        return b""

    def _unanswered(self, header: Header, body: memoryview, thread: int) -> Answer:
        return None

    def _interrupt(self, header: Header, body: memoryview, thread: int) -> Answer:
        """A reader got a signal. One that is to die need not wait; any other goes on waiting, as on a local disk."""
        unique = protocol.parse_interrupt(body)
        pid = self._waiting.get(unique, _CLAIMED)
        if pid != _CLAIMED and _is_killed(pid):
            self._finish(unique, errno_=errno.EINTR)
            return None
        with self._lock:
            self._interrupts.append(header.unique)
            is_first = len(self._interrupts) == 1
        if is_first:
            timer = threading.Timer(_INTERRUPTED_AGAIN_S, self._have_interrupts_again)
            timer.daemon = True
            timer.start()
        return None

    def _have_interrupts_again(self) -> None:
        with self._lock:
            interrupts, self._interrupts = self._interrupts, []
        for unique in interrupts:  # of a request that was answered meanwhile the kernel knows no more
            self._reply(protocol.pack_error(unique, errno.EAGAIN))

    # Attributes

    def _getxattr(self, header: Header, body: memoryview, thread: int) -> Answer:
        size, name = protocol.parse_getxattr(body)
        inode = header.node
        if name == MOUNT_XATTR.encode() and inode == protocol.ROOT_ID:
            return _xattr(json.dumps(self.report()).encode(), size)
        row = self._tree.row(inode)
        if row is None or name not in (_VERSION, _OWNER, _CACHED):
            raise Refused(errno.ENODATA)
        if name == _VERSION:
            return _xattr(self._served.snapshot.version(row).encode(), size)

        def answer() -> None:
            value = self._owner(row) if name == _OWNER else self._cached(row)
            self._finish(header.unique, [_xattr(value.encode(), size)])

        self._later(header, inode, answer)
        return None

    def _listxattr(self, header: Header, body: memoryview, thread: int) -> Answer:
        # Only what belongs to the object: whoever copies a file with its attributes is not to copy where it lay.
        is_file = self._tree.row(header.node) is not None
        return _xattr(_VERSION + b"\0" if is_file else b"", protocol.parse_size(body))

    def _owner(self, row: int) -> str:
        """Ids of the nodes that own the first shard of an object, the first owner first."""
        return ",".join(node.id for node in self._served.reader_of(row).owners(0))

    def _cached(self, row: int) -> str:
        """How many shards of an object are sealed at one of their owners, of how many: ``3/4``."""
        reader = self._served.reader_of(row)
        count = shard_count(reader.size_bytes, self._served.snapshot.shard_size)
        return f"{sum(run_parallel(reader.is_cached, range(count)))}/{count}"

    def report(self) -> dict[str, object]:
        """What this server is and has done since it started."""
        terms = self._terms
        return {
            "pid": os.getpid(),
            "starts": self._state.starts,
            "dataset": self._served.record.name,
            "snapshot": self._served.snapshot.digest,
            "passthrough": self._passes_through,
            "opens_silently": terms is not None and terms.opens_silently,
            "requests": self.requests,
            "open_inodes": len(self.opens),
            "opens_passthrough": self.opens.passthrough,
            "opens_cached": self.opens.cached,
            "read_exactly_bytes": self.reads.exact_bytes,
            "read_ahead_bytes": self.reads.ahead_bytes,
            "window_bytes": self.reads.window_bytes,
            "most_window_bytes": self.reads.most_window_bytes,
            "local_tier": None if self._keeping is None else self._keeping.report(),
        }

    def numbers(self) -> dict[str, int]:
        """What this server has counted since it started, and what is now: see `shoal_csi.numbers`."""
        reads, sources = self.reads, self.reads.sources
        return {
            "requests": self.requests,
            "reads": self._reads,
            "read_bytes": self._read_bytes,
            "read_wait_us": self._read_wait_us,
            "opens_node": self._node_opens,  # not a difference, which would fall for a moment
            "opens_tier": self._tier_opens,
            "opens_read": self.opens.cached,
            "received_local_bytes": sources.local_bytes,
            "received_peer_bytes": sources.peer_bytes,
            "received_origin_bytes": sources.origin_bytes,
            "ahead_bytes": reads.ahead_bytes,
            **{f"errors_{errno.errorcode[number].lower()}": count for number, count in self._errors.items()},
            "open_files": len(self.opens),
            "waiting": len(self._waiting),
            "window_bytes": reads.window_bytes,
            **({} if self._keeping is None else self._keeping.numbers()),
        }

    # Backing files

    @property
    def _passes_through(self) -> bool:
        return self._may_passthrough and self._terms is not None and self._terms.passthrough

    def _keep(self, tier: Tier) -> Keeping:
        record, snapshot, _, reader_of = self._served
        is_busy = lambda: bool(self._waiting or self.reads.fetching)  # noqa: E731
        return Keeping(tier, record, snapshot, reader_of, from_bytes=PASSTHROUGH_FROM, is_busy=is_busy)

    def _choose(self, row: int) -> int:
        """A new backing id for an object that the local node or the local tier has as one file; else `CACHED`."""
        if not self._passes_through:
            return CACHED
        reader = self._served.reader_of(row)
        if reader.size_bytes < PASSTHROUGH_FROM:
            return CACHED
        try:
            descriptor = reader.local_descriptor()
        except ShoalError as error:
            log.debug("no passthrough for row %d: %s", row, error)
            descriptor = None
        if descriptor is not None:
            return self._back(descriptor)
        descriptor = None if self._keeping is None else self._keeping.open(row)
        if self._keeping is None or descriptor is None:
            return CACHED
        backing = self._back(descriptor, self._keeping)
        if backing != CACHED:
            self._keeping.hits += 1
            self._of_tier.add(backing)
        return backing

    def _back(self, descriptor: int, keeping: Keeping | None = None) -> int:
        """A new backing id for the file behind `descriptor`, of `keeping` or of the local node; it is closed here."""
        try:
            return kernel.backing_open(self._fd, descriptor)
        except OSError as error:
            if error.errno == errno.ELOOP and keeping is not None:
                keeping.turn_off("it lies on a stacked file system such as overlayfs; name a directory of a drive")
            elif error.errno in _NEVER and self._may_passthrough:
                self._may_passthrough = False
                log.warning("files are read through the server, not by the kernel itself: %s", _NEVER[error.errno])
            return CACHED
        finally:
            os.close(descriptor)

    def _close_backing(self, backing: int) -> None:
        self._of_tier.discard(backing)
        try:
            kernel.backing_close(self._fd, backing)
        except OSError as error:
            log.debug("backing file %d was not open: %s", backing, error)


#: Failures of the first passthrough that the next would have, too.
_NEVER = {
    errno.EPERM: "passthrough takes CAP_SYS_ADMIN in the initial user namespace; give the mount's server that right",
    errno.ENOTTY: "this kernel has no passthrough; Linux 6.9 has",
    errno.EOPNOTSUPP: "this kernel was built without passthrough (CONFIG_FUSE_PASSTHROUGH)",
    errno.ELOOP: "the node's data directory lies on a stacked file system such as overlayfs; give it one of a drive",
}


def _is_of_small(snapshot: Snapshot) -> bool:
    """Whether most bytes of a dataset are in objects of at most `SMALL_BYTES`."""
    sizes = snapshot.sizes
    return 2 * int(sizes[sizes <= SMALL_BYTES].sum()) > snapshot.total_bytes


def _xattr(value: bytes, size: int) -> bytes:
    """The answer to somebody who has room for `size` bytes; 0: who asks how many there are."""
    if size == 0:
        return protocol.pack_xattr_size(len(value))
    if len(value) > size:
        raise Refused(errno.ERANGE)
    return value


def _is_killed(pid: int) -> bool:
    """Whether a thread of this machine is about to die: SIGKILL waits for it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False  # of another process namespace, perhaps: then it waits
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(bits & _SIGKILL_BIT for bits in pending)


def _note_lost(error: OSError) -> None:
    """An answer that was not taken: its request was withdrawn (ENOENT), or the mount is gone."""
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
        log.debug("an answer came too late: %s", error)
    else:
        log.error("the kernel refused an answer: %s", error)
