"""What may be asked of an origin at a time: the decisions with a clock of the test's, the waiting with real threads."""

from __future__ import annotations

import math
import threading

import pytest

from shoal.errors import OriginUnavailable, Overloaded
from shoal_cachenode import origin_budget
from shoal_cachenode.origin_budget import OriginBudget, OriginBusy, Rate, Window
from tests.support.waiting import wait_for

THROTTLED = OriginUnavailable("slow down", is_busy=True)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def budget(most: int = 4, rate: Rate | None = None) -> tuple[OriginBudget, Clock, list[int]]:
    clock, calls = Clock(), list[int]()
    return OriginBudget(most, rate or Rate(), lambda: calls.append(1), clock=clock), clock, calls


def test_a_window_halves_once_a_round_and_grows_by_one_a_round() -> None:
    window = Window(16)
    assert window.width == 16
    for _ in range(16):
        window.asked_for_less(10.0)  # sixteen reads that were under way at once
    assert window.width == 8
    for at_s in (11.0, 12.0, 13.0, 14.0, 15.0):
        window.asked_for_less(at_s)
    assert window.width == 1, "never less"
    widths = []
    for _ in range(400):
        window.succeeded()
        widths.append(window.width)
    assert widths[0] == 2 and widths[2] == 2 and widths[6] < 5, "one wider after a window of successes"
    assert widths[-1] == 16, "never more than it began with"


def test_a_rate_lets_reads_begin_while_what_began_is_paid_for() -> None:
    rate = Rate(1000)
    assert rate.wait_s(5.0) == 0
    rate.spend(3000, 5.0)
    assert rate.wait_s(5.0) == 3
    assert rate.wait_s(8.0) == 0
    begun, now_s = 0, 8.0
    while now_s < 108.0:
        if (wait_s := rate.wait_s(now_s)) > 0:
            now_s += wait_s
            continue
        rate.spend(700, now_s)
        begun += 700
    assert 100_000 <= begun <= 100_700
    assert Rate().wait_s(0) == 0


def test_a_fill_that_finds_no_room_is_told_and_holds_nothing() -> None:
    one, _, calls = budget(most=1)
    with one.read(10, waits=False):
        assert (one.in_flight, one.room_in_s()) == (1, math.inf)
        with pytest.raises(OriginBusy), one.read(10, waits=False):
            raise AssertionError("there is no room")
        assert one.in_flight == 1
    assert (one.in_flight, one.room_in_s(), one.successes, calls) == (0, 0, 1, [])
    with one.read(10, waits=True):
        pass
    assert calls == [1], "nobody else would tell the fills"


def test_a_prefetch_leaves_room_for_readers() -> None:
    one, _, _ = budget(most=4)
    with one.read(1, waits=False), one.read(1, waits=False), one.read(1, waits=False):
        assert one.room_in_s(0.75) == math.inf
        assert one.room_in_s() == 0


def test_throttling_halves_the_window_and_pauses_as_long_as_the_origin_asks() -> None:
    one, clock, _ = budget(most=8)
    one.trouble(OriginUnavailable("broken off"))
    assert (one.width, one.retries, one.throttles) == (8, 1, 0), "one bad connection asks for nothing"
    one.trouble(OriginUnavailable("slow down", is_busy=True, retry_after_s=3))
    assert (one.width, one.room_in_s(), one.throttles) == (4, 3, 1)
    clock.now_s += 3
    assert one.room_in_s() == 0
    one.trouble(OriginUnavailable("slow down", is_busy=True, retry_after_s=3600))
    assert one.room_in_s() == origin_budget.MAX_PAUSE_S, "nobody is kept for an hour"


def test_a_read_with_trouble_does_not_widen_the_window() -> None:
    one, clock, _ = budget(most=4)
    one.trouble(THROTTLED)
    assert one.width == 2
    for _ in range(5):
        clock.now_s += 2
        with one.read(1, waits=False):
            one.trouble(OriginUnavailable("broken off"))
    assert one.width == 2
    for _ in range(3):
        with one.read(1, waits=False):
            pass
    assert one.width == 3


def test_a_failed_read_gives_its_place_back() -> None:
    one, _, calls = budget(most=1)
    with pytest.raises(OriginUnavailable), one.read(1, waits=False):
        raise THROTTLED
    assert (one.in_flight, one.successes, calls) == (0, 0, [])


def test_a_reader_waits_its_turn_and_goes_before_fills() -> None:
    one, _, _ = budget(most=1)
    order: list[str] = []

    def reader() -> None:
        with one.read(1, waits=True):
            order.append("reader")

    with one.read(1, waits=False):
        thread = threading.Thread(target=reader)
        thread.start()
        wait_for(lambda: one._waiting == 1)
        assert one.room_in_s() == math.inf
    thread.join(20)
    assert order == ["reader"]
    assert one.room_in_s() == 0


def test_a_reader_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin_budget, "MAX_WAIT_S", 0.05)
    one = OriginBudget(1, Rate(), lambda: None)
    with (
        one.read(1, waits=False),
        pytest.raises(Overloaded, match="the origin was busy for 0 s with 1 other reads"),
        one.read(1, waits=True),
    ):
        raise AssertionError("there is no room")
    assert one.room_in_s() == 0
