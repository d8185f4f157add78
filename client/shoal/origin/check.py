"""Whether an origin still gives what a snapshot lists: asked of each process that reads it, by ``shoal doctor``.

    check     one byte of a few objects, at the version listed: what a read needs, with this process's credentials
    Checks    the same for a server, which anybody may ask: one at a time a snapshot of a dataset, whose answer all get
              who ask meanwhile, and a rest after each

The rule: an origin is read and never written, and asked for a handful of bytes however often somebody wants to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DeadlineExceeded, OriginChanged, Overloaded, ShoalError
from shoal.origin.base import Deadlines
from shoal.origin.opening import open_origin
from shoal.threads import Threads

if TYPE_CHECKING:
    from shoal.snapshot import Snapshot

#: What the whole check may take, at whatever it hangs. Whoever asks waits a little longer than that.
CHECK_S = 5.0
#: One attempt, because what passes by itself is not what a person asks for.
_PATIENCE = Deadlines(contact_s=4.0, read_s=4.0, connect_s=2.0, idle_s=3.0, tries=1)
#: Objects that are looked at: the first, the last, and those between at equal distances.
_OBJECTS = 3
#: Between two checks of the same: nobody makes a server read an origin without end.
REST_S = 0.5
#: Origins that are checked at a time.
_THREADS = 4

_Key = tuple[str, str]


def check(url: str, storage_options: Mapping[str, Any], snapshot: Snapshot) -> None:
    """Read one byte of up to three objects of `snapshot` at the origin. Blocks.

    Raises:
        InvalidRequest: the options refer to what is not there, or cannot be.
        OriginChanged: an object is not the one that the snapshot lists.
        OriginNotFound: nothing of the dataset is there any more.
        OriginDenied, OriginUnavailable, OriginError: the origin's own answer.
    """
    opened = open_origin(url, storage_options, deadlines=_PATIENCE)
    try:
        rows = np.flatnonzero(snapshot.sizes)
        if not len(rows):  # nothing is read of an empty object
            next(iter(opened.list()))
        places = np.linspace(0, len(rows) - 1, min(len(rows), _OBJECTS)).astype(int)
        for row in map(int, rows[places]):
            opened.read(snapshot.path(row), snapshot.version(row), 0, 1)
    except OriginChanged as error:
        if isinstance(error.__cause__, FileNotFoundError):
            next(iter(opened.list()))  # raises where it is not the one object that is gone, but all
        raise
    finally:
        opened.close()


class Checks:
    """A server's checks. For one event loop."""

    def __init__(self) -> None:
        self._threads = Threads(_THREADS, "origin-check")  # their own: an origin may hold them for long
        self._running: dict[_Key, tuple[Future[None], asyncio.Future[None]]] = {}
        self._rests_until: dict[_Key, float] = {}  # by the loop's clock

    async def of(self, name: str, digest: str, call: Callable[[], None]) -> dict[str, Any]:
        """The document of ``/v1/datasets/{name}/origin`` (docs/wire.md).

        Args:
            digest: of the dataset's newest snapshot. Those of others may have the same.
            call: does `check` for them, in a thread.
        """
        key = name, digest
        rest_s = self._rests_until.get(key, 0.0) - asyncio.get_running_loop().time()
        if rest_s > 0:
            await asyncio.sleep(rest_s)  # and not what was found before: it may have been mended since
        job, done = self._run(key, call)
        try:
            async with asyncio.timeout(CHECK_S):
                await asyncio.shield(done)
        except TimeoutError:
            if not job.running():
                sentence = "checks of other origins, which do not answer, take all the time: ask again"
                return {"error": Overloaded.__name__, "sentence": sentence}
            sentence = f"it did not answer within {CHECK_S:g} s: see that it can be reached from there"
            return {"error": DeadlineExceeded.__name__, "sentence": sentence}
        except ShoalError as error:
            return {"error": type(error).__name__, "sentence": str(error)}
        return {"error": None, "sentence": ""}

    def _run(self, key: _Key, call: Callable[[], None]) -> tuple[Future[None], asyncio.Future[None]]:
        """The check that is under way, or a new one. One that hangs is joined, so it costs one thread."""
        known = self._running.get(key)
        if known is None:
            job = self._threads.submit(call)
            done = asyncio.wrap_future(job)
            known = self._running[key] = job, done
            done.add_done_callback(lambda _: self._is_over(key))
            done.add_done_callback(lambda done: done.cancelled() or done.exception())  # all who asked may have left
        return known

    def _is_over(self, key: _Key) -> None:
        del self._running[key]
        loop = asyncio.get_running_loop()
        self._rests_until[key] = loop.time() + REST_S
        loop.call_later(REST_S, self._rests_until.pop, key)

    def close(self) -> None:
        """Begin none any more; nobody waits for what is under way."""
        self._threads.close()
