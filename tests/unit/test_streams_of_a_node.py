"""Which parts of which shards a node fetches next for its streams, and what becomes of the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import InvalidRequest
from shoal.origin import Sink
from shoal.wire.stream_post import StreamPost
from shoal_cachenode import streams
from shoal_cachenode.library import find_shard
from shoal_cachenode.scheduler import Urgency
from tests.support.minicluster import DictOrigin, MiniCluster
from tests.support.waiting import wait_for

PART, PARTS = 64, 5
SIZE = PART * (PARTS - 1) + 10
OBJECTS = {f"o{n}": bytes((n * 7 + i) % 251 for i in range(SIZE)) for n in range(4)}
NAME = "0" * 32


class Held(DictOrigin):
    """Answers when it is let, and counts who waits."""

    def __init__(self, origin: DictOrigin) -> None:
        self.__dict__ = origin.__dict__
        self.asked: list[tuple[int, int]] = []
        self.may_answer = threading.Event()

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        self.asked.append((int(path[1:]), start // PART))
        assert self.may_answer.wait(20)
        super().stream(path, version, start, end, sink)


class Node:
    """One node that fetches one part at a time, from an origin that is held up."""

    def __init__(self, cluster: MiniCluster) -> None:
        self.cluster = cluster
        self.node = cluster.nodes[0]
        self.origin = Held(cluster.origin)
        self.node.library.origin = lambda known: self.origin  # type: ignore[method-assign, assignment, return-value]

    def post(self, *needs: tuple[int, int, int], is_leaving: bool = False) -> None:
        """Say what a stream needs: of which object which part in how many seconds."""
        rows, parts, in_s = np.array(needs, np.uint32).reshape(-1, 3).T
        post = StreamPost(rows, rows * 0, parts, in_s * 1000, is_leaving=is_leaving)
        self.cluster.run(self.node.streams.hear(self.cluster.snapshot.digest, NAME, post))

    def prefetch(self, row: int) -> None:
        digest = self.cluster.snapshot.digest
        spec = find_shard(self.node.library.knowledge.dataset_of(digest), self.cluster.snapshot, row, 0)
        self.cluster.run(self.node.fill(spec, self.node.order(spec), Urgency.PREFETCH))

    def waits_for(self, count: int) -> None:
        """Until so many parts wait for their fetch."""
        wait_for(lambda: len(self.origin.asked) + self.node.fills.fetches_waiting >= count)

    def is_awaited(self, row: int) -> bool:
        key = self.cluster.snapshot.key(row)
        fill = dict(self.node.fills.all()).get(key)
        return fill is not None and any(map(fill.is_awaited, range(PARTS)))

    @property
    def sealed(self) -> int:
        return len(self.node.store.sealed_sizes())


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Node]]:
    monkeypatch.setattr(streams, "PART_SIZE", PART)
    clusters: list[MiniCluster] = []
    made: list[Node] = []

    def make(**settings: Any) -> Node:
        clusters.append(MiniCluster(tmp_path, OBJECTS, **({"fetches": 1} | settings)))
        made.append(Node(clusters[0]))
        return made[0]

    yield make
    for node in made:
        node.origin.may_answer.set()
    for cluster in clusters:
        cluster.close()


def test_parts_come_in_the_order_of_their_use_and_the_rest_behind_them(make: Callable[..., Node]) -> None:
    node = make()
    node.post((0, 3, 0), (2, 1, 1), (0, 0, 2), (2, 4, 3), (2, 0, 4))
    node.waits_for(2)
    node.origin.may_answer.set()
    wait_for(lambda: node.sealed == 2)
    assert node.origin.asked[:5] == [(0, 3), (2, 1), (0, 0), (2, 4), (2, 0)]
    assert sorted(node.origin.asked) == [(n, part) for n in (0, 2) for part in range(PARTS)], "each once"
    fs = node.cluster.filesystem()
    assert [fs.cat_file(f"set/o{n}") for n in (0, 2)] == [OBJECTS["o0"], OBJECTS["o2"]]


def test_what_is_needed_sooner_than_it_was_goes_first(make: Callable[..., Node]) -> None:
    node = make()
    node.post((0, 0, 0), (1, 0, 50), (2, 0, 60))
    node.waits_for(2)
    node.post((2, 0, 1), (1, 3, 2), (1, 0, 5))
    wait_for(lambda: any(need.part == 3 for need in node.node.streams._outlook.nearest))
    node.waits_for(3)
    node.origin.may_answer.set()
    wait_for(lambda: node.sealed == 3)
    assert node.origin.asked[:3] == [(0, 0), (2, 0), (1, 3)]


def test_when_the_streams_are_over_nothing_more_is_begun(make: Callable[..., Node]) -> None:
    node = make()
    node.post((0, 3, 0), (1, 0, 1))
    node.waits_for(2)
    node.post(is_leaving=True)
    wait_for(lambda: not node.node.inventory.needed)
    node.origin.may_answer.set()
    wait_for(lambda: node.node.fills.count == 0)
    assert node.origin.asked == [(0, 3)]
    assert node.cluster.filesystem().cat_file("set/o0") == OBJECTS["o0"]
    assert sorted(node.origin.asked) == [(0, part) for part in range(PARTS)], "and what had come is of use"


def test_a_reader_who_wants_it_all_gets_it_when_the_streams_are_over(make: Callable[..., Node]) -> None:
    node = make()
    node.post((0, 3, 0))
    node.waits_for(1)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(node.cluster.filesystem().cat_file("set/o0", 0, 30)))
    reader.start()
    wait_for(lambda: node.node.fills.fetches_waiting > 0 and node.node.fills.all()[0][1].is_awaited(0))
    node.post(is_leaving=True)
    wait_for(lambda: not node.node.inventory.needed)
    node.origin.may_answer.set()
    reader.join(20)
    assert found == [OBJECTS["o0"][:30]]
    wait_for(lambda: node.sealed == 1)


def test_what_is_prefetched_too_does_not_wait_for_the_streams(
    make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams.Streams, "_fetch_rest", lambda *_: None)
    node = make()
    node.post((0, 3, 0))
    node.waits_for(1)
    node.origin.may_answer.set()
    wait_for(lambda: node.node.fills.fetches_in_flight == 0)
    assert node.origin.asked == [(0, 3)]
    node.prefetch(0)
    wait_for(lambda: node.sealed == 1)


def test_so_many_shards_are_begun_and_then_one_after_the_other_finished(
    make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_FILLS", 2)
    node = make(fetches=2)
    most = 0

    class Counting(threading.Thread):
        def run(self) -> None:
            nonlocal most
            while node.sealed < len(OBJECTS):
                most = max(most, node.node.fills.count)

    node.origin.may_answer.set()
    counting = Counting()
    counting.start()
    node.post(*((n, part, part * 10 + n) for part in range(PARTS) for n in range(len(OBJECTS))))
    wait_for(lambda: node.sealed == len(OBJECTS))
    counting.join(20)
    assert 0 < most <= 2
    assert len(node.origin.asked) == len(OBJECTS) * PARTS, "each once"


def test_a_part_that_a_shard_does_not_have_is_refused(make: Callable[..., Node]) -> None:
    node = make()
    with pytest.raises(InvalidRequest, match=rf"has no part {PARTS}: it has {SIZE} bytes"):
        node.post((0, PARTS - 1, 0), (1, PARTS, 1))
    assert node.node.streams.count == 0


def test_a_reader_goes_before_what_streams_need_also_with_its_second_part(make: Callable[..., Node]) -> None:
    node = make()
    every = [(n, part) for n in range(len(OBJECTS)) for part in range(PARTS)]
    node.post(*((n, part, 10 * n + part) for n, part in every))
    node.waits_for(2)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(node.cluster.filesystem().cat_file("set/o3")))
    reader.start()
    wait_for(lambda: len(node.node.fills.all()) > 1 and node.is_awaited(3))
    node.origin.may_answer.set()
    reader.join(20)
    assert found == [OBJECTS["o3"]]
    wait_for(lambda: node.sealed == len(OBJECTS))
    last = max(place for place, (n, _) in enumerate(node.origin.asked) if n == 3)
    assert last < 15, "not behind all that is needed in the next half minute"


def test_a_move_does_not_wait_for_the_streams_word(make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.Streams, "_fetch_rest", lambda *_: None)
    node = make()
    node.post((0, 3, 0))
    node.waits_for(1)
    node.origin.may_answer.set()
    wait_for(lambda: node.node.fills.fetches_in_flight == 0)
    ((_, fill),) = node.node.fills.all()
    node.cluster._loop.call_soon_threadsafe(fill.join, Urgency.REBALANCE)
    wait_for(lambda: node.sealed == 1)
