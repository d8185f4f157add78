"""What a mount tells nodes of: what is open, what was opened since the last time, or of small files some."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from shoal.errors import ClusterUnavailable
from shoal.reader import ObjectReader
from shoal_csi.presence import MOST_FILES, Presence


@dataclass
class Readers:
    """Rows of objects whose owner is node ``row % 10``."""

    asked: list[int] = field(default_factory=list)
    is_down: bool = False

    def of(self, row: int) -> ObjectReader:
        return cast(ObjectReader, _Reader(self, row))


@dataclass
class _Reader:
    readers: Readers
    row: int

    def tell_of_use(self, told: set[str]) -> int:
        if self.readers.is_down:
            raise ClusterUnavailable("no node is up")
        self.readers.asked.append(self.row)
        is_new = str(self.row % 10) not in told
        told.add(str(self.row % 10))
        return int(is_new)


def test_nothing_is_told_of_a_mount_that_nobody_uses() -> None:
    readers = Readers()
    assert Presence(readers.of, list, range(0)).tell() == 0
    assert readers.asked == []


def test_what_is_open_is_told_each_time_and_what_was_opened_once() -> None:
    readers = Readers()
    presence = Presence(readers.of, lambda: [3], range(0))
    presence.opened(14)
    assert presence.tell() == 2 and sorted(readers.asked) == [3, 14]
    assert presence.tell() == 1 and readers.asked[2:] == [3]


def test_each_node_is_told_once_and_few_files_are_looked_at() -> None:
    readers = Readers()
    presence = Presence(readers.of, lambda: range(1000), range(0))
    for row in range(1000):
        presence.opened(row)
    assert presence.tell() == 10
    assert len({*readers.asked}) == len(readers.asked) == MOST_FILES


def test_of_small_files_others_are_told_each_time() -> None:
    readers = Readers()
    presence = Presence(readers.of, list, range(500, 100_000))
    assert presence.tell() > 0
    first, readers.asked = readers.asked, []
    presence.tell()
    assert min(first) >= 500 and {*first} != {*readers.asked}


def test_a_cluster_that_is_away_is_nothing_to_the_mount() -> None:
    assert Presence(Readers(is_down=True).of, lambda: [1], range(0)).tell() == 0
