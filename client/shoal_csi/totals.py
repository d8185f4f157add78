"""Sums by dataset of what the mounts of a node have counted, those that are gone too.

A mount's numbers go with it (`shoal_csi.numbers`), and the sums stay: a counter that falls would be taken for one that
began anew, and all that is left of it counted again. What a mount had counted before there were sums is not theirs.

The rule: a sum never falls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from shoal_csi import numbers
from shoal_csi.rundir import Record

#: Counts beside those of `numbers.COUNTERS`.
STARTS, RESTARTS, TAKEOVERS = numbers.STARTS, "daemon_restarts", "takeovers"


class Totals:
    """For one caller at a time."""

    def __init__(self) -> None:
        self._last: dict[str, Mapping[str, int] | None] = {}  # by mount point; None: was there before, and not seen yet
        self._supervisors: dict[str, int] = {}
        self._sums: dict[str, Counter[str]] = {}

    def begin_with(self, record: Record, seen: Mapping[str, int] | None) -> None:
        """A mount that is there from the start. Arguments are as in `add`."""
        self._last[record.mountpoint] = None if seen is None else _counts(record, seen)
        self._supervisors[record.mountpoint] = record.supervisor_pid

    def add(self, record: Record, seen: Mapping[str, int] | None) -> None:
        """A mount has counted so much by now: ``seen`` is `numbers.read`'s, None where that could not see it."""
        place = record.mountpoint
        sums = self._sums.setdefault(dataset_of(record), Counter())
        if self._supervisors.setdefault(place, record.supervisor_pid) != record.supervisor_pid:
            self._supervisors[place] = record.supervisor_pid
            sums[TAKEOVERS] += 1
        if seen is None:
            return
        counts = _counts(record, seen)
        before = self._last.get(place, {})
        self._last[place] = counts
        if before is not None:
            for name, count in counts.items():
                known = before.get(name, 0)
                sums[name] += count - known if count >= known else count  # else it began anew

    def keep_only(self, mountpoints: Collection[str]) -> None:
        """Those mounts are there, and others are gone."""
        for place in self._last.keys() - mountpoints:
            del self._last[place]
        for place in self._supervisors.keys() - mountpoints:
            del self._supervisors[place]

    def by_dataset(self) -> dict[str, Mapping[str, int]]:
        return dict(sorted(self._sums.items()))


def dataset_of(record: Record) -> str:
    return record.dataset.partition("@")[0]


def _counts(record: Record, seen: Mapping[str, int]) -> dict[str, int]:
    return {name: seen[name] for name in (STARTS, *numbers.COUNTERS)} | {RESTARTS: record.restarts}
