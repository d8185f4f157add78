"""In which order what streams need is filled, how much of it at a time, and when it is forgotten."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shoal import placement
from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.errors import ClusterUnavailable, InvalidRequest, Overloaded
from shoal.streaming.announce import INTERVAL_S, LONGEST_INTERVAL_S, next_post_in_s, shares
from shoal.wire import stream_post
from shoal.wire.stream_post import Cause, StreamPost, Wait
from shoal_cachenode import needs
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.needs import Need, Stream

A, B = "a" * 32, "b" * 32
COUNT = 20


class Table:
    """Shards of 10 bytes and more."""

    def __init__(self, first: int) -> None:
        self.keys = np.arange(first, first + 2 * COUNT, dtype=np.uint64).reshape(-1, 2)
        self.sizes = 10 + np.arange(COUNT, dtype=np.int64)
        self.rows, self.indexes = np.arange(COUNT, dtype=np.uint32), np.zeros(COUNT, np.uint32)

    def __len__(self) -> int:
        return COUNT


def holdings(*held: int, first: int = 0) -> Holdings:
    found = Holdings(Table(first))  # type: ignore[arg-type] # has what is needed of one
    found.held[list(held)] = True
    return found


def stream(digest: str, *uses: tuple[int, float], part: int = 0, heard_at: float = 0.0) -> Stream:
    ordinals, dues = zip(*uses, strict=True) if uses else ((), ())
    parts = np.full(len(uses), part)
    return Stream(digest, np.array(ordinals, np.int64), parts, np.array(dues, np.float64), heard_at)


def places(found: needs.Outlook) -> list[tuple[str, int, float]]:
    return [(need.digest, need.ordinal, need.due) for need in found.nearest]


def test_parts_of_a_shard_are_needed_each_at_its_time() -> None:
    streams = [
        stream(A, (3, 10.0), (1, 20.0)),
        stream(A, (3, 5.0), (1, 30.0), part=2),
        stream(A, (3, 7.0), part=2),
    ]
    found = needs.outlook(streams, {A: holdings()})
    assert [(need.ordinal, need.part, need.due) for need in found.nearest] == [
        (3, 2, 5.0),
        (3, 0, 10.0),
        (1, 0, 20.0),
        (1, 2, 30.0),
    ]
    assert found.missing_bytes == 13 + 11, "of each shard once"


def test_the_next_use_over_all_streams_decides_and_a_shard_counts_once() -> None:
    streams = [
        stream(A, (3, 10.0), (1, 20.0), (7, 30.0)),
        stream(A, (7, 5.0), (1, 25.0), (9, 40.0)),
        stream(B, (0, 7.0), (3, 50.0)),
    ]
    found = needs.outlook(streams, {A: holdings(9), B: holdings(first=1000)})
    assert places(found) == [(A, 7, 5.0), (B, 0, 7.0), (A, 3, 10.0), (A, 1, 20.0), (B, 3, 50.0)]
    assert found.missing_bytes == (17 + 13 + 11) + (10 + 13)
    assert found.is_all
    assert found.needs((A, 9)), "it is here, and is to stay"
    assert not found.needs((A, 0)) and not found.needs(("c" * 32, 0))


def test_only_the_nearest_are_put_in_order() -> None:
    found = needs.outlook([stream(A, *((n, float(n)) for n in range(COUNT)))], {A: holdings(0, 1)}, count=3)
    assert places(found) == [(A, 2, 2.0), (A, 3, 3.0), (A, 4, 4.0)]
    assert not found.is_all
    assert found.missing_bytes == sum(range(12, 30)), "of all of them"


def test_streams_over_snapshots_that_are_not_here_are_left_out() -> None:
    assert places(needs.outlook([stream(A, (0, 1.0))], {})) == []


def test_as_much_as_keeps_the_fetches_busy() -> None:
    queue = [Need(float(n), A, n // 2, n % 2) for n in range(8)]

    def chosen(widths: dict[int, int], fetches: int) -> tuple[list[float], int]:
        found, left = needs.to_fetch(queue, lambda need: widths.get(int(need.due), 2), fetches=fetches)
        return [need.due for need in found], left

    assert chosen({}, 6) == ([0, 1, 2], 0)
    assert chosen({0: 1, 1: 1}, 6) == ([0, 1, 2, 3], 0)
    assert chosen({0: 0, 2: 0}, 4) == ([1, 3], 0), "what is here, or not to be fetched now, takes none"
    assert chosen({}, 5) == ([0, 1, 2], 0), "rather one more than one that is idle"
    assert chosen({}, 100) == (list(range(8)), 84)


def test_what_a_stream_says_takes_the_place_of_what_it_said() -> None:
    running = needs.Streams()
    running.hear("x", stream(A, (1, 1.0), (2, 2.0)))
    running.hear("x", stream(A, (2, 3.0), heard_at=1.0))
    running.hear("y", stream(A, (5, 4.0), heard_at=2.0))
    assert places(needs.outlook(running.all(), {A: holdings()})) == [(A, 2, 3.0), (A, 5, 4.0)]
    assert running.leave("x") and not running.leave("x")
    assert places(needs.outlook(running.all(), {A: holdings()})) == [(A, 5, 4.0)]


def test_a_stream_that_is_silent_is_forgotten() -> None:
    running = needs.Streams()
    assert running.expires_at() == math.inf
    running.hear("x", stream(A, (1, 1.0), heard_at=100.0))
    running.hear("y", stream(A, (2, 1.0), heard_at=110.0))
    assert running.expires_at() == 100.0 + needs.SILENCE_S
    assert not running.expire(99.9 + needs.SILENCE_S)
    assert running.expire(100.0 + needs.SILENCE_S)
    assert len(running) == 1 and running.expires_at() == 110.0 + needs.SILENCE_S


def test_streams_over_snapshots_that_are_gone_are_forgotten() -> None:
    running = needs.Streams()
    running.hear("x", stream(A))
    running.hear("y", stream(B))
    assert running.forget({B}) and not running.forget({B})
    assert [each.digest for each in running.all()] == [B]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "MAX_STREAMS", 2)
    monkeypatch.setattr(needs, "MAX_NEEDS", 5)
    running = needs.Streams()
    running.hear("x", stream(A, (0, 0.0), (1, 0.0), (2, 0.0)))
    with pytest.raises(Overloaded):
        running.hear("y", stream(A, (0, 0.0), (1, 0.0), (2, 0.0)))
    running.hear("y", stream(A, (0, 0.0), (1, 0.0)))
    with pytest.raises(Overloaded):
        running.hear("z", stream(A))
    running.hear("x", stream(A, (0, 0.0)))  # less than before
    running.hear("y", stream(A, *((n, 0.0) for n in range(4))))
    running.leave("x")
    running.hear("z", stream(A, (0, 0.0)))


def test_pauses_between_attempts_grow_and_end() -> None:
    assert [needs.pause_s(count) for count in (1, 2, 3, 4, 50)] == [1.0, 2.0, 4.0, 8.0, needs.SILENCE_S]


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_each_node_is_told_its_nearest_shards() -> None:
    ordinals = np.array([5, 1, 4, 1, 3, 2])
    in_s = np.array([3.0, 9.0, -1.0, 2.0, 1.0, 1e9])
    parts = np.zeros(6, np.int64)
    found = shares(ordinals, parts, in_s, np.array([0, 1, 0, 1, 0, 1]), count=2)
    told = {share.node: (share.ordinals.tolist(), share.in_s.tolist()) for share in found}
    assert told == {0: ([4, 3], [0.0, 1.0]), 1: ([1], [2.0])}, "2 is needed in thirty years"
    assert shares(ordinals[:0], parts[:0], in_s[:0], ordinals[:0], count=2) == []
    of_one = shares(np.full(3, 5), np.array([1, 0, 1]), np.array([3.0, 2.0, 1.0]), np.zeros(3, np.int64), count=9)
    assert [(share.parts.tolist(), share.in_s.tolist()) for share in of_one] == [([1, 0], [1.0, 2.0])]


def test_a_node_that_has_everything_hears_less_often() -> None:
    times, yes, no = np.array([1.0, 8.0]), np.array([True, True]), np.array([True, False])
    assert next_post_in_s(times, no, is_all=True) == INTERVAL_S
    assert next_post_in_s(times, yes, is_all=True) == LONGEST_INTERVAL_S < needs.SILENCE_S
    assert next_post_in_s(times, yes, is_all=False) == 4.0, "before what it was told of is used up"
    assert next_post_in_s(times / 100, yes, is_all=False) == INTERVAL_S
    assert next_post_in_s(times[:0], yes[:0], is_all=True) == LONGEST_INTERVAL_S


def post(*needs: tuple[int, int, int, int], waits: tuple[Wait, ...] = (), is_leaving: bool = False) -> StreamPost:
    columns = np.array(needs, np.uint32).reshape(-1, 4).T
    return StreamPost(*columns, waits, is_leaving)


def test_a_post_comes_as_it_was_sent() -> None:
    waits = (Wait(Cause.ORIGIN, "0123456789ab", 1.5), Wait(Cause.DECODE, "", 0.000001))
    sent = post((0, 0, 0, 0), (7, 3, 9, 0), (7, 3, 8, 0), (2**32 - 1, 1, 0, 5000), waits=waits)
    found = stream_post.decode(stream_post.encode(sent))
    for name in ("rows", "indexes", "parts", "in_ms"):
        assert getattr(found, name).tolist() == getattr(sent, name).tolist()
    assert (found.waits, found.is_leaving) == (waits, False)
    assert stream_post.decode(stream_post.encode(post(is_leaving=True))).is_leaving


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (post((0, 0, 0, 5), (1, 0, 0, 4)), "sorted"),
        (post((0, 0, 0, stream_post.MAX_AHEAD_MS + 1)), "ahead"),
        (post((4, 1, 7, 0), (4, 1, 7, 9)), "twice"),
        (post((0, 0, 0, 0), is_leaving=True), "leaves"),
        (post(*((row, 0, 0, 0) for row in range(stream_post.MAX_NEEDS + 1))), "nearest"),
        (post(waits=(Wait(Cause.PEER, "x", 1.0), Wait(Cause.PEER, "x", 2.0))), "once"),
        (post(waits=(Wait(Cause.PEER, "a\nb", 1.0),)), "node"),
    ],
)
def test_a_wrong_post_is_refused(wrong: StreamPost, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        stream_post.decode(stream_post.encode(wrong))


def test_waits_that_are_too_long_or_too_many_are_told_in_several_posts() -> None:
    most_s = stream_post.MAX_WAIT_US / 1e6
    now, later = stream_post.clip_waits([Wait(Cause.ORIGIN, "", most_s + 2), Wait(Cause.PEER, "", 1.0)])
    assert [wait.seconds for wait in now] == [most_s, 1.0]
    assert [(wait.cause, round(wait.seconds, 6)) for wait in later] == [(Cause.ORIGIN, 2.0)]
    now, later = stream_post.clip_waits([Wait(Cause.PEER, str(n), 1.0) for n in range(stream_post.MAX_WAITS + 1)])
    assert (len(now), len(later)) == (stream_post.MAX_WAITS, 1)
    stream_post.decode(stream_post.encode(post(waits=tuple(now))))


@pytest.mark.parametrize("bound", [placement.BOUND_MAX_SHARDS, 0], ids=["bounded", "unbounded"])
def test_first_owners_of_some_shards_are_those_of_each(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "BOUND_MAX_SHARDS", bound)
    nodes = tuple(Node(f"n{i}", f"h:{i}", 1 + i, {}, NodeState.UP) for i in range(3))
    found = placement.Placement(lambda: Table(7), COUNT, ClusterMap(1, nodes), 1)
    ordinals = np.array([3, 19, 0, 3])
    firsts = [found.nodes[index].id for index in found.firsts(ordinals).tolist()]
    assert firsts == [found.order(ordinal)[0].id for ordinal in ordinals.tolist()]
    with pytest.raises(ClusterUnavailable):
        placement.Placement(lambda: Table(7), COUNT, ClusterMap(1, ()), 1).firsts(ordinals)
