"""Which fault happens when. Pure: the same seed gives the same faults at the same seconds.

Three tracks run beside each other, each with one fault at a time, so that there is always a node to read from: a node
fails while the origin is slow and the controller is away, but no two nodes fail at once.

Node 0 and reader 0 are spared the faults that end a process, and bear all others: a leak shows only in a process that
lives for long, and where every process is killed every few minutes none would, so that "memory is flat" would be said
of nobody.

The rule: what a plan cannot know (which files there are) it leaves to a number in [0, 1), which is the seed's too.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """What is done to the cluster."""

    NODE_KILLED = "node killed (-9), back later"
    NODE_STOPPED = "node stopped (SIGSTOP), goes on later"
    NODE_RESTARTED = "node restarted in good order"
    NODE_JOINED = "node joined, leaves later"
    NODE_DRAINED = "node drained, undrained later"
    DISK_FULL = "disk full, empty later"
    BIT_FLIPPED = "bit of a sealed file flipped"
    FILE_TRUNCATED = "sealed file truncated"
    ORIGIN_SLOWS_DOWN = "origin answers 503 SlowDown"
    ORIGIN_RESETS = "origin resets within bodies"
    ORIGIN_STALLS = "origin stalls"
    ORIGIN_LATE = "origin answers late"
    ORIGIN_GONE = "origin refuses connections"
    CONTROLLER_KILLED = "controller killed (-9), back later"
    CONTROLLER_STOPPED = "controller stopped (SIGSTOP), goes on later"
    REFRESHED = "objects changed, dataset refreshed"
    PREFETCHED = "prefetch"
    READER_KILLED = "reader killed (-9), another one started"


#: They end the process of a node, for good or until it is started again.
ENDS_A_NODE = {Kind.NODE_KILLED, Kind.NODE_RESTARTED}


@dataclass(frozen=True, slots=True)
class Action:
    """One fault.

    Attributes:
        at_s: when, after the beginning.
        for_s: how long it lasts; 0 where it is done at once.
        node: to which node, where it is done to one; the last one is the guest, which joins and leaves.
        draw: in [0, 1): chooses among what there is when it happens.
    """

    at_s: float
    kind: Kind
    for_s: float
    node: int
    draw: float

    def reader(self, readers: int) -> int:
        """Which of the `readers`, two or more, is killed: never the first."""
        return 1 + int(self.draw * (readers - 1))


@dataclass(frozen=True, slots=True)
class Track:
    """Faults that come one after the other.

    Attributes:
        gap_s: least and most seconds between two.
        kinds: how often each comes, relative to the others, and how long it lasts, least and most seconds.
    """

    name: str
    gap_s: tuple[float, float]
    kinds: dict[Kind, tuple[int, float, float]]


TRACKS = (
    Track(
        "nodes",
        (1.0, 5.0),
        {
            Kind.NODE_KILLED: (4, 0.0, 9.0),
            Kind.NODE_STOPPED: (4, 0.3, 12.0),
            Kind.NODE_RESTARTED: (3, 0.0, 0.0),
            Kind.NODE_JOINED: (2, 4.0, 15.0),
            Kind.NODE_DRAINED: (2, 2.0, 10.0),
            Kind.DISK_FULL: (2, 3.0, 10.0),
            Kind.BIT_FLIPPED: (3, 0.0, 0.0),
            Kind.FILE_TRUNCATED: (1, 0.0, 0.0),
        },
    ),
    Track(
        "origin",
        (4.0, 15.0),
        {
            Kind.ORIGIN_SLOWS_DOWN: (3, 1.0, 8.0),
            Kind.ORIGIN_RESETS: (3, 1.0, 8.0),
            Kind.ORIGIN_STALLS: (2, 1.0, 15.0),
            Kind.ORIGIN_LATE: (3, 1.0, 10.0),
            Kind.ORIGIN_GONE: (2, 1.0, 8.0),
        },
    ),
    Track(
        "control",
        (3.0, 12.0),
        {
            Kind.CONTROLLER_KILLED: (3, 0.0, 12.0),
            Kind.CONTROLLER_STOPPED: (2, 1.0, 12.0),
            Kind.REFRESHED: (4, 0.0, 0.0),
            Kind.PREFETCHED: (2, 0.0, 0.0),
            Kind.READER_KILLED: (3, 0.0, 0.0),
        },
    ),
)


def actions(track: Track, seed: int, nodes: int) -> Iterator[Action]:
    """The faults of a track, for ever.

    Args:
        nodes: how many there are besides the guest, two or more.
    """
    rng = random.Random(f"{seed}/{track.name}")
    kinds, weights = list(track.kinds), [weight for weight, _, _ in track.kinds.values()]
    at_s = 0.0
    while True:
        at_s += rng.uniform(*track.gap_s)
        (kind,) = rng.choices(kinds, weights)
        _, least_s, most_s = track.kinds[kind]
        for_s = rng.uniform(least_s, most_s)
        node = nodes if kind is Kind.NODE_JOINED else rng.randrange(1 if kind in ENDS_A_NODE else 0, nodes)
        yield Action(round(at_s, 3), kind, round(for_s, 3), node, rng.random())
        at_s += for_s


def actions_until(track: Track, seed: int, nodes: int, end_s: float) -> Iterator[Action]:
    """Those that end before `end_s`."""
    for action in actions(track, seed, nodes):
        if action.at_s + action.for_s > end_s:
            return
        yield action
