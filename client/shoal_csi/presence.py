"""Tells cache nodes that a mounted dataset is in use, where its reads do not.

What the kernel reads from its page cache, or by itself from a sealed file, reaches no node, and a node takes a dataset
that nobody asks for as idle: the first to give way. So the nodes that own what is open, or was opened since the last
time, are told every so often.

A dataset of small files is opened without a word to the server. There the mount itself is the only sign of use: some of
its files are taken by chance, others each time.

The rule: what is said costs a request without a body a node, however much is read; nobody waits for it or misses it.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from shoal.errors import ShoalError
from shoal.maps import RENEW_S

if TYPE_CHECKING:
    from shoal.reader import ObjectReader

log = logging.getLogger(__name__)

#: Files whose owners are told each time.
MOST_FILES = 64


class Presence:
    """Thread-safe. `start` begins, `close` ends.

    Args:
        reader_of: of a row of the snapshot.
        open_rows: those that are open now.
        hidden_rows: those that may be open without our knowledge.
        every_s: from one time to the next; a client that reads through maps asks anew as often.
    """

    def __init__(
        self,
        reader_of: Callable[[int], ObjectReader],
        open_rows: Callable[[], Iterable[int]],
        hidden_rows: range,
        *,
        every_s: float = RENEW_S,
    ) -> None:
        self._reader_of = reader_of
        self._open_rows = open_rows
        self._hidden_rows = hidden_rows
        self._every_s = every_s
        self._opened: set[int] = set()
        self._over = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="shoal-mount-presence", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def opened(self, row: int) -> None:
        """Note an open, of which nothing may be left the next time."""
        if len(self._opened) < MOST_FILES:
            self._opened.add(row)

    def tell(self) -> int:
        """Tell the nodes once; returns how many heard it."""
        opened, self._opened = self._opened, set()
        rows = _some([*opened | {*self._open_rows()}]) or _some(self._hidden_rows)
        told: set[str] = set()
        heard = 0
        for row in rows:
            try:
                heard += self._reader_of(row).tell_of_use(told)
            except ShoalError as error:
                log.debug("nobody is told that row %d is in use: %s", row, error)
        return heard

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                self.tell()
            except Exception:  # an errand: the mount does without
                log.exception("the nodes are not told that the dataset is in use")


def _some(rows: list[int] | range) -> list[int]:
    return random.sample(rows, min(len(rows), MOST_FILES))
