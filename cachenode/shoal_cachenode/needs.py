"""What running streams will read of a node's shards, and when; and which of it is to be on its way now. Pure.

Every stream says anew, once a second or so, what it needs of this node and when (`shoal.wire.stream_post`). Over all
streams a part of a shard is needed when the first of them needs it, and parts are fetched in that order.

The rule: what a stream said last is all that it needs, and one that says nothing for `SILENCE_S` needs nothing. So a
trainer that was killed leaves nothing behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shoal.errors import Overloaded
from shoal_cachenode.holdings import Holdings

#: A stream that says nothing for so long is over.
SILENCE_S = 30.0
#: What a node remembers of all streams together.
MAX_STREAMS = 1 << 14
MAX_NEEDS = 1 << 22
#: Needs that are put in order at a time: the nearest ones.
NEAREST = 4096

Ordinals = npt.NDArray[np.int64]
Times = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

Place = tuple[str, int]
"""A snapshot's digest, and a shard's ordinal in it."""


@dataclass(frozen=True, slots=True)
class Need:
    """A part of a shard that is not sealed here, and when the first stream needs it (`time.monotonic`)."""

    due: float
    digest: str
    ordinal: int
    part: int

    @property
    def place(self) -> Place:
        return self.digest, self.ordinal


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """What one stream said last.

    Attributes:
        ordinals, parts: of the snapshot's shards what it needs of this node, each part once. Shapes (n,).
        dues: when, ascending. Shape (n,).
        heard_at: when it said so.
    """

    digest: str
    ordinals: Ordinals
    parts: Ordinals
    dues: Times
    heard_at: float


class Streams:
    """The streams that are running, as far as this node knows. All times are of one clock, which the caller reads."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}
        self._need_count = 0

    def __len__(self) -> int:
        return len(self._streams)

    def all(self) -> Sequence[Stream]:
        return list(self._streams.values())

    def hear(self, stream_id: str, stream: Stream) -> None:
        """Take what a stream says now, in the place of what it said before.

        Raises:
            Overloaded: there are too many streams, or they need too much.
        """
        before = self._streams.get(stream_id)
        count = self._need_count + len(stream.ordinals) - (len(before.ordinals) if before is not None else 0)
        if count > MAX_NEEDS or (before is None and len(self._streams) >= MAX_STREAMS):
            raise Overloaded(
                f"this node knows of {len(self._streams)} streams that need {self._need_count} parts of it, and of no "
                "more: read without telling it, or again in a moment"
            )
        self._streams[stream_id], self._need_count = stream, count

    def leave(self, stream_id: str) -> bool:
        """Forget a stream; whether it was known."""
        gone = self._streams.pop(stream_id, None)
        if gone is not None:
            self._need_count -= len(gone.ordinals)
        return gone is not None

    def expire(self, now: float) -> bool:
        """Forget the streams that have been silent for too long; whether there were any."""
        late = [name for name, stream in self._streams.items() if now - stream.heard_at >= SILENCE_S]
        for name in late:
            self.leave(name)
        return bool(late)

    def forget(self, served: set[str]) -> bool:
        """Forget the streams over snapshots that are not among these; whether there were any."""
        unserved = [name for name, stream in self._streams.items() if stream.digest not in served]
        for name in unserved:
            self.leave(name)
        return bool(unserved)

    def expires_at(self) -> float:
        """When the next stream will have been silent for too long; infinity where there is none."""
        return min((stream.heard_at for stream in self._streams.values()), default=math.inf) + SILENCE_S


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What all streams together need.

    Attributes:
        nearest: of what is not sealed here the nearest, in the order in which it is needed.
        is_all: whether that is all of it.
        masks: by snapshot, every shard that is needed, sealed or not.
        missing_bytes: of all needed shards that are not sealed here.
    """

    nearest: Sequence[Need] = ()
    is_all: bool = True
    masks: Mapping[str, Mask] = field(default_factory=dict)
    missing_bytes: int = 0

    def needs(self, place: Place) -> bool:
        """Whether some stream needs a shard."""
        mask = self.masks.get(place[0])
        return mask is not None and bool(mask[place[1]])


def outlook(streams: Iterable[Stream], holdings: Mapping[str, Holdings], *, count: int = NEAREST) -> Outlook:
    """Put together what streams need, each part at the earliest time that any of them says.

    Args:
        holdings: of the streams' snapshots; streams over others are left out.
        count: needs that are put in order.
    """
    by_digest: dict[str, list[Stream]] = {}
    for stream in streams:
        if stream.digest in holdings:
            by_digest.setdefault(stream.digest, []).append(stream)
    masks: dict[str, Mask] = {}
    found: list[Need] = []
    missing_bytes = missing_count = 0
    for digest, members in by_digest.items():
        held, sizes = holdings[digest].held, holdings[digest].table.sizes
        ordinals, parts, dues = next_uses(members)
        masks[digest] = mask = np.zeros(len(held), np.bool_)
        mask[ordinals] = True
        missing_bytes += int(sizes[mask & ~held].sum())
        is_missing = ~held[ordinals]
        ordinals, parts, dues = ordinals[is_missing], parts[is_missing], dues[is_missing]
        missing_count += len(ordinals)
        near = zip(dues[:count].tolist(), ordinals[:count].tolist(), parts[:count].tolist(), strict=True)
        found += [Need(due, digest, ordinal, part) for due, ordinal, part in near]
    found.sort(key=lambda need: (need.due, need.digest, need.ordinal, need.part))
    return Outlook(found[:count], missing_count <= count, masks, missing_bytes)


def next_uses(streams: Iterable[Stream]) -> tuple[Ordinals, Ordinals, Times]:
    """What streams over one snapshot need, shard and part, and when the first of them does; in that order, once."""
    members = list(streams)
    ordinals = np.concatenate([stream.ordinals for stream in members])
    parts = np.concatenate([stream.parts for stream in members])
    dues = np.concatenate([stream.dues for stream in members])
    order = np.lexsort((parts, ordinals, dues))
    _, firsts = np.unique(ordinals[order] << 32 | parts[order], return_index=True)
    chosen = order[np.sort(firsts)]
    return ordinals[chosen], parts[chosen], dues[chosen]


def to_fetch(nearest: Iterable[Need], width: Callable[[Need], int], *, fetches: int) -> tuple[list[Need], int]:
    """The nearest needs that keep so many fetches busy; and how many more fetches would be welcome.

    A need that came late and is near is among them although those after it are on their way: theirs yield to it.

    Args:
        width: how many fetches a need takes: 0 where all of it is here, or it is not to be fetched now.
    """
    chosen: list[Need] = []
    for need in nearest:
        if fetches <= 0:
            break
        wide = width(need)
        if wide:
            chosen.append(need)
            fetches -= wide
    return chosen, max(0, fetches)


def pause_s(failures: int) -> float:
    """How long to wait before a shard is tried again that failed so often in a row."""
    return min(SILENCE_S, 2.0 ** (failures - 1))
