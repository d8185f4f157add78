"""Which epoch the next ``for`` over a loader reads, known to the trainer and to all workers that it ever starts.

A DataLoader tells its data set nothing when a loop begins: it forks new workers, or bids old ones iterate again. So the
workers of a loop agree by themselves. The first that begins takes the next place and writes it down; the others find
it by what they share: the seed that the loader drew for the loop, and how often they have been bidden to iterate.

    [place of the next loop, loops that began: (seed, number with this seed, place, its workers)]

It lies in memory without a name that processes inherit, guarded by a lock that ends with its holder (POSIX record
locks), so a process that is killed leaves nothing behind and nobody waiting.

The rule: a loop is one place, whoever asks first and however late the others come.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from multiprocessing import context, reduction
from typing import Any

Place = tuple[int, int]
"""Epoch, and position in its flat order."""

#: Loops that are remembered: of workers that begin this late, nobody reads a batch any more.
LOOPS_KEPT = 16


class Epochs:
    """The places of loops. Pickled for a worker that is being started, it is the same one; else a copy."""

    def __init__(self, place: Place = (0, 0)) -> None:
        self._fd = os.memfd_create("shoal-epochs")
        self._write([place, []])

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._fd)

    def __getstate__(self) -> dict[str, Any]:
        if context.get_spawning_popen() is None:
            return {"place": self.next}
        return {"fd": reduction.DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "fd" in state:
            self._fd = state["fd"].detach()
        else:
            self.__init__(tuple(state["place"]))  # type: ignore[misc]

    @property
    def next(self) -> Place:
        """Where the next loop begins."""
        with self._locked():
            epoch, position = self._read()[0]
        return epoch, position

    @next.setter
    def next(self, place: Place) -> None:
        with self._locked():
            _, loops = self._read()
            self._write([place, loops])

    @property
    def is_with_workers(self) -> bool:
        """Whether workers read the last loop that began."""
        with self._locked():
            loops = self._read()[1]
        return bool(loops and loops[-1][3])

    def begin(self) -> Place:
        """A loop of this process alone begins: where."""
        with self._locked():
            place, loops = self._read()
            self._write([(place[0] + 1, 0), [*loops, [0, 0, place, []]][-LOOPS_KEPT:]])
        return place[0], place[1]

    def join(self, worker: int, seed: int, number: int, place: Place | None = None) -> Place:
        """A worker begins its part of a loop: where.

        Args:
            seed: that the loader drew; of all its workers the same.
            number: how often this worker process began before.
            place: where the loop begins, from a state that each of the loop's workers was given; None: they ask.
        """
        with self._locked():
            following, loops = self._read()
            for loop in reversed(loops):
                # A worker that is in it already: the trainer set torch's seed anew, so that two loops drew the same.
                if loop[:2] == [seed, number] and worker not in loop[3] and place in (None, tuple(loop[2])):
                    break
            else:
                begin = place or tuple(following)
                loop = [seed, number, begin, []]
                loops = [*loops, loop][-LOOPS_KEPT:]
                following = (begin[0] + 1, 0)
            loop[3].append(worker)
            self._write([following, loops])
        return loop[2][0], loop[2][1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _read(self) -> list[Any]:
        found: list[Any] = json.loads(os.pread(self._fd, os.fstat(self._fd).st_size, 0).partition(b"\n")[0])
        return found

    def _write(self, content: list[Any]) -> None:
        os.pwrite(self._fd, json.dumps(content).encode() + b"\n", 0)
