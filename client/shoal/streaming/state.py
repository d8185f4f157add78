"""Where a stream stands, as a small dictionary of JSON values that goes into a checkpoint.

A position in the flat order is all it takes: neither world size, batch size, nodes nor workers are part of it, so a
resume may change them. What the order follows from is part of it, and is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from shoal.errors import InvalidRequest
from shoal.streaming import order

VERSION = 1


@dataclass(frozen=True, slots=True)
class State:
    """A place in a stream.

    Attributes:
        dataset, pattern, format: what is read; for people, and to refuse another stream's state.
        snapshot: digest.
        samples: of an epoch.
        seed, shuffle, window, order: what the flat order follows from; the last is the version of how.
        epoch, position: samples of the epoch that were consumed.
        worker, workers, taken: of a stream in one of several workers of a DataLoader: how many batches this one has
            handed out since. `merged` makes one state of all of theirs.
        step_size: samples a step, by which `taken` is counted.
    """

    dataset: str
    snapshot: str
    pattern: str
    format: str
    samples: int
    seed: int
    shuffle: bool
    window: int
    epoch: int
    position: int
    order: int = order.VERSION
    worker: int = 0
    workers: int = 1
    taken: int = 0
    step_size: int = 1

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> State:
        """Raises InvalidRequest where `raw` is no state, or a newer version's."""
        try:
            if raw["version"] != VERSION:
                raise InvalidRequest(
                    f"this stream state is of version {raw['version']!r}, this version of Shoal reads {VERSION}"
                )
            state = cls(**{field.name: raw[field.name] for field in fields(cls)})
        except (KeyError, TypeError) as error:
            raise InvalidRequest(
                f"this is no state of a stream ({error!r}): give what state_dict() returned"
            ) from error
        for name in (
            "samples",
            "seed",
            "window",
            "epoch",
            "position",
            "order",
            "worker",
            "workers",
            "taken",
            "step_size",
        ):
            if not isinstance(getattr(state, name), int) or (name != "seed" and getattr(state, name) < 0):
                raise InvalidRequest(f"this is no state of a stream: {name} is {getattr(state, name)!r}")
        if not 0 <= state.position <= state.samples:
            raise InvalidRequest(
                f"this is no state of a stream: position {state.position} is not within {state.samples} samples"
            )
        return state

    def check(self, ours: State, *, other_snapshot: bool) -> None:
        """Refuse to go on from this state in a stream that stands at `ours`.

        Args:
            other_snapshot: allow another snapshot; then the position is a number of samples, no more.

        Raises:
            InvalidRequest: the order that follows is another; the message says why and what to do.
        """
        for name in ("dataset", "pattern", "format", "seed", "shuffle", "window", "order"):
            theirs, mine = getattr(self, name), getattr(ours, name)
            if theirs != mine:
                raise InvalidRequest(
                    f"the state is of a stream with {name}={theirs!r}, this one has {mine!r}, so its order is "
                    "another: open the stream with the arguments of then"
                )
        if self.snapshot == ours.snapshot or other_snapshot:
            return
        raise InvalidRequest(
            f"the state is of snapshot {self.snapshot[:8]} of {self.dataset}, this stream reads {ours.snapshot[:8]}: "
            f"open {self.dataset}@{self.snapshot[:8]} to go on exactly, or pass other_snapshot=True to go on after as "
            "many samples of the new one, some of which may have been read already"
        )


def merged(states: Sequence[State]) -> State:
    """The state of a whole stream from those of all workers of one DataLoader, in any order.

    Raises:
        InvalidRequest: a worker's state is missing, or they are not those of one stream.
    """
    if not states:
        raise InvalidRequest("there is no worker's state to merge")
    first = replace(states[0], worker=0, taken=0)
    if sorted(state.worker for state in states) != list(range(first.workers)):
        raise InvalidRequest(f"{len(states)} workers' states were given where the stream had {first.workers} workers")
    if any(replace(state, worker=0, taken=0) != first for state in states):
        raise InvalidRequest("the workers' states are those of different streams, or of different epochs")
    taken = sum(state.taken for state in states)
    for state in states:
        # Steps go to workers in turn, and are consumed in turn.
        if state.taken != len(range(state.worker, taken, state.workers)):
            raise InvalidRequest(
                f"worker {state.worker} of {state.workers} has handed out {state.taken} batches of {taken}, so they "
                "were not consumed in order, and what is left is no place in a stream: leave in_order as it is"
            )
    position = min(first.samples, first.position + taken * first.step_size)
    return replace(first, workers=1, position=position)
