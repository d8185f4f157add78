"""The soak in small: the same faults on the same cluster, as long as a test may take; and its parts by themselves."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.soak import content, plan
from tests.faults.soak.__main__ import soak
from tests.faults.soak.content import Content
from tests.faults.soak.plan import TRACKS, Kind
from tests.faults.soak.report import Memory
from tests.faults.soak.verdict import Facts, Window, explanation, judge


def test_short_soak(tmp_path: Path) -> None:
    report = soak(minutes=0.25, seed=11, nodes=3, readers=2, threads=2, directory=tmp_path, log=print)
    assert report.defects == [], report.table()
    assert report.reads > 100
    assert sum(report.actions.values()) + sum(report.skipped.values()) >= 4, "the seed has faults early on"
    lives = Counter(memory.name for memory in report.memory)
    assert lives["node-0"] == lives["reader-0"] == 1, "they live through it, and are looked at"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_longer_soak(tmp_path: Path, seed: int) -> None:
    report = soak(minutes=4, seed=seed, nodes=4, readers=4, threads=2, directory=tmp_path, log=print)
    assert report.defects == [], report.table()


@pytest.mark.parametrize("track", TRACKS, ids=lambda track: track.name)
def test_plan_is_a_function_of_the_seed(track: plan.Track) -> None:
    def first(seed: int) -> list[plan.Action]:
        return list(itertools.islice(plan.actions(track, seed, 4), 200))

    actions = first(7)
    assert actions == first(7)
    assert actions != first(8)
    assert {action.kind for action in actions} == set(track.kinds), "each kind comes"
    ends = [action.at_s + action.for_s for action in actions]
    assert all(end < after.at_s for end, after in zip(ends, actions[1:], strict=False)), "one at a time"
    short = list(plan.actions_until(track, 7, 4, 60.0))
    assert short == actions[: len(short)], "a longer soak begins as a shorter one does"


@pytest.mark.parametrize("nodes", [2, 4])
def test_no_fault_ends_the_first_node_or_the_first_reader(nodes: int) -> None:
    """So that there are processes whose memory says something; whatever leaves them alive is done to them too."""
    faults = [action for track in TRACKS for action in itertools.islice(plan.actions(track, 7, nodes), 500)]
    for kind in (Kind.NODE_KILLED, Kind.NODE_RESTARTED):
        assert {fault.node for fault in faults if fault.kind is kind} == set(range(1, nodes))
    for kind in (Kind.NODE_STOPPED, Kind.NODE_DRAINED, Kind.DISK_FULL, Kind.BIT_FLIPPED, Kind.FILE_TRUNCATED):
        assert {fault.node for fault in faults if fault.kind is kind} == set(range(nodes))
    killed = {fault.reader(nodes) for fault in faults if fault.kind is Kind.READER_KILLED}
    assert killed == set(range(1, nodes))


def test_every_kind_of_fault_is_in_the_plan() -> None:
    assert {kind for track in TRACKS for kind in track.kinds} == set(Kind)


def test_a_leak_is_told_from_bursts() -> None:
    """Of 900 samples each fifth is one right after free pages were given back."""
    times = [2.0 * number for number in range(900)]
    bursts = [(60 + (number % 5) * number / 20) * 2**20 for number in range(900)]
    leak = [size + number * 0.2 * 2**20 for number, size in enumerate(bursts)]
    assert Memory.of("node-0", list(zip(times, map(int, bursts), strict=True))).is_flat
    assert not Memory.of("node-0", list(zip(times, map(int, leak), strict=True))).is_flat


@pytest.mark.parametrize("size", [1, 777, 5_000_000])
def test_content_tells_where_it_is_wrong(size: int) -> None:
    data = bytearray(content.make("twice/x", 3, size))
    mine = Content("twice/x", 3)
    assert mine.first_difference(memoryview(data), 0) is None
    place = size * 2 // 3
    data[place] ^= 1
    assert mine.first_difference(memoryview(data), 0) == place
    assert mine.first_difference(memoryview(data)[place:], place) == place
    assert mine.first_difference(memoryview(data)[place + 1 :], place + 1) is None


def test_content_differs_by_version_place_and_object() -> None:
    data = memoryview(content.make("twice/x", 3, 20 << 20))
    for other in (Content("twice/x", 4), Content("once/x", 3)):
        assert other.first_difference(data, 0) == 0 or other.first_difference(data[:16], 0) is not None
    for distance in (1, content.MIB, 8 * content.MIB, content.SHARD_SIZE):
        assert Content("twice/x", 3).first_difference(data[distance:][:64], 0) is not None


def test_table_is_recognised() -> None:
    assert Content("twice/t", 1).is_table(Content("twice/t", 1).table())
    assert not Content("twice/t", 2).is_table(Content("twice/t", 1).table())
    assert not Content("twice/t", 1).is_table(Content("twice/t", 1).table().slice(1))


FACTS = Facts(
    windows=[Window(Kind.ORIGIN_STALLS, 10.0, 20.0), Window(Kind.CONTROLLER_KILLED, 30.0, 40.0)],
    replaced={"once/x": [(0.0, 0), (50.0, 1)]},
    served={"old": (0.0, 60.0), "new": (0.0, float("inf"))},
)


def word(error: str, start: float, end: float, **more: object) -> dict[str, object]:
    about = {"error": error, "way": "cat", "start": start, "end": end, "path": "once/x", "version": 0, "held": False}
    return about | {"snapshot": "new"} | more


@pytest.mark.parametrize(
    "said",
    [
        word("OriginUnavailable", 15.0, 16.0),
        word("OriginUnavailable", 5.0, 11.0),
        word("OriginUnavailable", 21.0, 22.0),
        word("OriginChanged", 45.0, 51.0),
        word("SnapshotNotFound", 55.0, 61.0, snapshot="old"),
        word("ClusterUnavailable", 35.0, 36.0, way="connect"),
    ],
)
def test_error_that_is_explained(said: dict[str, object]) -> None:
    assert explanation(said, FACTS)
    assert judge([said], FACTS)[0] == []


@pytest.mark.parametrize(
    "said",
    [
        word("OriginUnavailable", 15.0, 16.0, held=True),
        word("OriginUnavailable", 25.0, 26.0),
        word("OriginChanged", 45.0, 46.0),
        word("OriginChanged", 55.0, 56.0, version=1),
        word("SnapshotNotFound", 55.0, 61.0),
        word("SnapshotNotFound", 55.0, 59.0, snapshot="old"),
        word("ClusterUnavailable", 35.0, 36.0),
        word("ClusterUnavailable", 45.0, 46.0, way="connect"),
        word("NodeUnavailable", 15.0, 16.0),
        {"wrong": "a byte", "way": "cat", "start": 15.0, "end": 16.0},
        {"late": "cat of once/x", "start": 15.0},
    ],
)
def test_error_that_is_a_defect(said: dict[str, object]) -> None:
    assert judge([said], FACTS)[0] == [said]
