"""The last resort: the origin itself, read by the client with credentials of its own when no cache node answers.

Only where the dataset says so (``direct``) and the caller gave credentials: the options behind ``shoal::URL``, or the
storage option ``origin``. Reads name the version that the snapshot lists, so a changed object is an error here too.

The rule: it is loud (one warning) and counted, and nobody is sent here while a node answers: a cluster of readers that
all turn to the origin at once is what a cache is there to prevent.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from shoal import origin
from shoal.datasets import DatasetRecord
from shoal.errors import NodeUnavailable, ShoalError
from shoal.origin import Origin

log = logging.getLogger(__name__)


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
        """A new lock, for a fork's child: the thread that held the old one is not there to release it."""
        self._lock = threading.Lock()  # guards _opened, bytes_read

    def read_into(self, path: str, version: str, start: int, view: memoryview, reason: ShoalError) -> None:
        """Read the bytes from `start` on that `view` has room for, because of `reason`.

        Raises:
            NodeUnavailable: the origin cannot be opened here either.
            OriginChanged, OriginError: the origin's own answer.
        """
        opened = self._open(reason)
        position = 0

        def take(data: memoryview) -> None:
            nonlocal position
            view[position : position + len(data)] = data
            position += len(data)

        opened.stream(path, version, start, start + len(view), take)
        with self._lock:
            self.bytes_read += len(view)

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


_all: weakref.WeakSet[DirectOrigin] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for each in _all:
        each.reset_lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
