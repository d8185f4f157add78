"""Which files of the local tier go where room is needed. Pure.

Trainers read each object once an epoch, so of data that is being read no file is worth more than another, and dropping
the one used longest ago for the next would fetch everything again and again, and hit least (docs/cachenode.md measures
it). So the first come stay while their dataset is read; what may go, goes in the order of its last use:

    of a dataset that no mount has used for `IDLE_S`    every file that was not used within that time
    of any dataset                                      a file that was not used for `FORGOTTEN_S`: an object that a
                                                        newer snapshot has no more, for one

The rule: nothing is dropped unless that makes the room that is needed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

#: As the cache nodes' --idle-after; and longer than any epoch.
IDLE_S, FORGOTTEN_S = 3600, 86_400
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Kept:
    """A file as it was last seen.

    Attributes:
        folder: of its dataset.
        allocated_bytes: on the drive.
        used_ns: when it was last opened, since the epoch of Unix.
    """

    folder: str
    allocated_bytes: int
    used_ns: int


def may_go(used_ns: int, dataset_used_ns: int, now_ns: int) -> bool:
    """Whether a file may make room for another one."""
    unused_s, dataset_unused_s = (now_ns - used_ns) / _NS, (now_ns - dataset_used_ns) / _NS
    return unused_s > FORGOTTEN_S or min(unused_s, dataset_unused_s) > IDLE_S


def droppable_bytes(kept: Mapping[str, Kept], datasets: Mapping[str, int], now_ns: int) -> int:
    """What could be had at most. Takes the same as `victims`."""
    return sum(
        each.allocated_bytes for each in kept.values() if may_go(each.used_ns, datasets.get(each.folder, 0), now_ns)
    )


def victims(
    kept: Mapping[str, Kept], datasets: Mapping[str, int], now_ns: int, look: Callable[[str], int | None]
) -> Iterator[str]:
    """The files that may go, by name, the one used longest ago first. Take as many as are needed.

    Args:
        datasets: when each folder's dataset was last used.
        look: when a file was really used last: another process may have; None where it is gone.
    """
    heap = [
        (each.used_ns, name)
        for name, each in kept.items()
        if may_go(each.used_ns, datasets.get(each.folder, 0), now_ns)
    ]
    heapq.heapify(heap)
    while heap:
        used_ns, name = heapq.heappop(heap)
        now_used_ns = look(name)
        if now_used_ns == used_ns:
            yield name
        elif now_used_ns is not None and may_go(now_used_ns, datasets.get(kept[name].folder, 0), now_ns):
            heapq.heappush(heap, (now_used_ns, name))
