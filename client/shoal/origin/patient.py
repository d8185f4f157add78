"""An origin that is asked again: what every reader gets around itself, whatever library it reads with.

A read that fails for now is tried again after a wait with full jitter, or the one that the origin asks for, until the
attempts or the deadline of `Deadlines` are used up. A stream goes on at the byte it reached, at the same version, so
nobody receives a byte twice, or bytes of two versions. What no attempt can cure (a changed or missing object, refused
credentials) is said at once.

The rule: an attempt is the reader's affair, how many there are is this module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from shoal.errors import OriginUnavailable
from shoal.origin.base import Deadlines, ObjectInfo, Origin, Sink

if TYPE_CHECKING:
    from typing_extensions import Buffer

OnTrouble = Callable[[OriginUnavailable], None]
"""Told of each attempt that failed for now, in the thread that reads."""


class PatientOrigin:
    """An `Origin` around one whose reads are single attempts. Listings are passed on: a page is the reader's to retry.

    Args:
        inner: the reader of single attempts.
        on_trouble: see `OnTrouble`.
    """

    def __init__(self, inner: Origin, deadlines: Deadlines, on_trouble: OnTrouble | None = None) -> None:
        self.inner = inner
        self._deadlines = deadlines
        self._on_trouble = on_trouble
        self.url = inner.url
        self.endpoint = inner.endpoint
        self.identity = inner.identity
        self.key_prefix = inner.key_prefix

    def list(self) -> Iterator[list[ObjectInfo]]:
        """See `Origin.list`."""
        return self.inner.list()

    def read(self, path: str, version: str, start: int, end: int) -> Buffer:
        """See `Origin.read`. Tried again from the beginning until the deadline of a read."""

        def attempt() -> Buffer:
            try:
                return self.inner.read(path, version, start, end)
            except OriginUnavailable as error:
                self._tell(error)
                raise

        return self._deadlines.attempts(self._deadlines.read_s)(attempt)

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        """See `Origin.stream`. Goes on from the byte reached until the deadline of a read, which starts with the call.

        The time that `sink` takes is part of the deadline.
        """
        counted = _Counted(sink, start)

        def attempt() -> None:
            try:
                self.inner.stream(path, version, counted.reached, end, counted)
            except OriginUnavailable as error:
                if counted.failure is None:
                    self._tell(error)
                    if counted.reached < end:
                        raise
                    # Every byte is here and was of the version asked for: what broke after the last is no loss.

        try:
            self._deadlines.attempts(self._deadlines.read_s)(attempt)
        finally:
            if counted.failure is not None:
                raise counted.failure

    def close(self) -> None:
        """See `Origin.close`."""
        self.inner.close()

    def _tell(self, error: OriginUnavailable) -> None:
        if self._on_trouble is not None:
            self._on_trouble(error)


class _Counted:
    """A sink that knows how far it is, and tells its own failure from the origin's."""

    def __init__(self, sink: Sink, start: int) -> None:
        self._sink = sink
        self.reached = start
        self.failure: BaseException | None = None

    def __call__(self, piece: memoryview) -> None:
        try:
            self._sink(piece)
        except BaseException as error:
            self.failure = error
            raise
        self.reached += len(piece)
