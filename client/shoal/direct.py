"""The last resort: the origin itself, read by the client with credentials of its own when no cache node answers.

Only where the dataset says so (``direct``) and the caller gave credentials: the options behind ``shoal::URL``, or the
storage option ``origin``. Reads name the version that the snapshot lists, so a changed object is an error here too.

An origin is as patient as its own options say, and a hung mount is so for ever. So each read has a thread of its own,
which is left to itself when the reader's time is over.

The rule: it is loud (one warning) and counted, and nobody is sent here while a node answers: a cluster of readers that
all turn to the origin at once is what a cache is there to prevent. Nothing is written for a reader that has left.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from shoal import origin
from shoal.datasets import DatasetRecord
from shoal.errors import DeadlineExceeded, NodeUnavailable, ShoalError
from shoal.origin import Origin

log = logging.getLogger(__name__)

#: Reads of one dataset that one process has under way at its origin, those included that their readers have left.
MAX_READS = 64


class DirectOrigin:
    """The origin of one dataset; opened at the first read. Thread-safe, and good after a fork.

    Attributes:
        bytes_read: from the origin by this process.
    """

    def __init__(self, record: DatasetRecord, storage_options: Mapping[str, Any]) -> None:
        self._record = record
        self._options = dict(storage_options)
        self.reset_lock()
        self._opened: tuple[int, Origin] | None = None
        self.bytes_read = 0
        _all.add(self)

    def reset_lock(self) -> None:
        """New locks, for a fork's child: the threads that held the old ones are not there to release them."""
        self._lock = threading.Lock()  # guards _opened, bytes_read
        self._room = threading.Semaphore(MAX_READS)

    def read_into(
        self, path: str, version: str, start: int, view: memoryview, reason: ShoalError, until: float
    ) -> None:
        """Read the bytes from `start` on that `view` has room for, because of `reason`.

        Args:
            until: `time.monotonic` at which the caller's time is over; from then on `view` is not written to.

        Raises:
            NodeUnavailable: the origin cannot be opened here either.
            DeadlineExceeded: it did not give all bytes in time.
            OriginChanged, OriginError: the origin's own answer.
        """
        read = _Read(self._open(reason), path, version, start, view)
        room = self._room  # of this process: a fork's child has its own
        if not room.acquire(timeout=max(0.0, until - time.monotonic())):
            raise self._too_late()
        try:
            # A daemon, as no kept pool has them: a process does not wait at its end for a mount that hangs.
            threading.Thread(target=read.run, args=(room,), name="shoal-direct", daemon=True).start()
        except BaseException:
            room.release()
            raise
        if not read.wait(until):
            raise self._too_late()
        with self._lock:
            self.bytes_read += len(view)

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"no cache node answers, and its origin {self._record.origin} did not in time")

    def _open(self, reason: ShoalError) -> Origin:
        with self._lock:
            # A fork's child opens its own: connections, and threads behind some libraries, stayed in the parent.
            if self._opened is None or self._opened[0] != os.getpid():
                name = self._record.name
                try:
                    opened = origin.open_origin(self._record.origin, self._with_endpoint())
                except ShoalError as error:
                    raise NodeUnavailable(
                        f"no cache node answers for dataset {name} ({reason}), and its origin cannot be read from "
                        f"here: {error}"
                    ) from error
                log.warning("no cache node answers, reading dataset %s from its origin %s", name, self._record.origin)
                self._opened = os.getpid(), opened
            return self._opened[1]

    def _with_endpoint(self) -> Mapping[str, Any]:
        """The caller's options, with the dataset's endpoint where they name none."""
        named = self._options.get("endpoint_url") or (self._options.get("client_kwargs") or {}).get("endpoint_url")
        if self._record.endpoint and not named and self._record.origin.startswith("s3:"):
            return {**self._options, "endpoint_url": self._record.endpoint}
        return self._options


class _Read:
    """One read, on a thread of its own, and its reader, who may leave."""

    def __init__(self, source: Origin, path: str, version: str, start: int, view: memoryview) -> None:
        self._source, self._path, self._version = source, path, version
        self._start, self._end, self._position = start, start + len(view), 0
        self._lock = threading.Lock()  # guards _view: who has left it under the lock is written to no more
        self._view: memoryview | None = view
        self._is_over = threading.Event()
        self._failure: BaseException | None = None

    def run(self, room: threading.Semaphore) -> None:
        try:
            self._source.stream(self._path, self._version, self._start, self._end, self._take)
        except BaseException as error:  # noqa: BLE001 - it is raised where the read is waited for
            self._failure = error
        finally:
            room.release()
            self._is_over.set()

    def wait(self, until: float) -> bool:
        """Whether it was over by `until`. Raises what the origin raised."""
        try:
            is_over = self._is_over.wait(max(0.0, until - time.monotonic()))
        finally:
            with self._lock:
                self._view = None
        if is_over and self._failure is not None:
            raise self._failure
        return is_over

    def _take(self, data: memoryview) -> None:
        with self._lock:
            if self._view is None:
                raise DeadlineExceeded("its reader has left")  # which ends the read
            self._view[self._position : self._position + len(data)] = data
            self._position += len(data)


_all: weakref.WeakSet[DirectOrigin] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for each in _all:
        each.reset_lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
