"""States and worlds: what goes on, what is refused and with which words; ranks that differ stop before they read."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from shoal.errors import InvalidRequest
from shoal.streaming.state import State, merged
from shoal.streaming.world import World

STATE = State("set", "a" * 32, "t/*", "arrow", 1000, 7, True, 64, 2, 300, step_size=10)


def test_a_state_survives_json() -> None:
    assert State.from_dict(json.loads(json.dumps(STATE.to_dict()))) == STATE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"position": 2000}, "position 2000 is not within 1000"),
        ({"position": "3"}, "position is '3'"),
        ({"epoch": -1}, "epoch is -1"),
        ({"samples": None}, "samples is None"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        State.from_dict(STATE.to_dict() | change)
    with pytest.raises(InvalidRequest, match=r"no state of a stream.*'version'"):
        State.from_dict({})


@pytest.mark.parametrize("name", ["dataset", "pattern", "format", "seed", "shuffle", "window", "order"])
def test_another_order_is_refused(name: str) -> None:
    value = getattr(STATE, name)
    other = dataclasses.replace(STATE, **{name: not value if name == "shuffle" else value * 2})
    with pytest.raises(InvalidRequest, match=f"{name}=.*open the stream with the arguments of then"):
        other.check(STATE, other_snapshot=True)


def test_another_snapshot_only_when_told() -> None:
    other = dataclasses.replace(STATE, snapshot="b" * 32)
    with pytest.raises(InvalidRequest, match=r"bbbbbbbb.*set@bbbbbbbb.*other_snapshot=True"):
        other.check(STATE, other_snapshot=False)
    other.check(STATE, other_snapshot=True)


def workers(*taken: int) -> list[State]:
    return [dataclasses.replace(STATE, worker=w, workers=len(taken), taken=t) for w, t in enumerate(taken)]


def test_workers_states_make_one() -> None:
    assert merged(workers(4, 3, 3)) == dataclasses.replace(STATE, position=400)
    assert merged(workers(40, 39)[::-1]).position == 1000  # not past the end
    assert merged([STATE]) == STATE


def test_workers_states_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="2 workers' states were given where the stream had 3"):
        merged(workers(4, 3, 3)[:2])
    one, two = workers(1, 1)
    with pytest.raises(InvalidRequest, match="different"):
        merged([one, dataclasses.replace(two, epoch=9)])
    with pytest.raises(InvalidRequest, match="no worker's state"):
        merged([])


class Meeting:
    """An all-gather over threads."""

    def __init__(self, size: int) -> None:
        self._said: list[bytes] = [b""] * size
        self._barrier = threading.Barrier(size)

    def of(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def gather(mine: bytes) -> list[bytes]:
            self._said[rank] = mine
            self._barrier.wait(20)
            return list(self._said)

        return gather


def meet(settings: list[dict[str, Any]]) -> list[Any]:
    meeting, found = Meeting(len(settings)), [None] * len(settings)

    def run(rank: int) -> None:
        try:
            world = World(rank, len(settings), meeting.of(rank))
            found[rank] = world.agree(settings[rank], {"rank": rank})  # type: ignore[call-overload]
        except InvalidRequest as error:
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_agree_or_all_stop() -> None:
    assert meet([{"seed": 1}] * 3) == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3
    failures = meet([{"seed": 1}, {"seed": 1}, {"seed": 2}])
    assert {str(failure) for failure in failures} == {
        "rank 0 streams with seed=1 and rank 2 with seed=2: all ranks must open a stream with the same arguments, in "
        "the same order"
    }


def test_ranks_that_cannot_meet_agree_on_nothing() -> None:
    assert World(1, 2).agree({}, {"a": 1}) is None
    assert World(0, 1).agree({}, {"a": 1}) == [{"a": 1}]


def test_the_world_is_given_or_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World.find(3, 4, None) == World(3, 4)
    with pytest.raises(InvalidRequest, match="both rank and world_size"):
        World.find(3, None, None)
    with pytest.raises(InvalidRequest, match="rank 4 of 4"):
        World.find(4, 4, None)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert World.find(None, None, None) == World(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert World.find(None, None, None) == World(2, 8)
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(InvalidRequest, match="RANK or WORLD_SIZE"):
        World.find(None, None, None)
