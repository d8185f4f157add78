"""Quantities, durations, schedules and conditions."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal_controller.kube import conditions, quantities, schedule
from shoal_controller.kube.conditions import Condition, Transition
from shoal_controller.kube.schedule import Schedule


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("4096", 4096), ("256Mi", 256 << 20), ("1.5Gi", 3 << 29), ("2k", 2000), ("1E", 10**18), ("0.5Ki", 512)],
)
def test_quantities(text: str, size_bytes: int) -> None:
    assert quantities.parse(text) == size_bytes


@pytest.mark.parametrize("text", ["", "1K", "1 Gi", "-1", "1GiB", "Gi", "1e3"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(InvalidRequest, match="no quantity"):
        quantities.parse(text)


@given(st.integers(0, 10**6), st.sampled_from(["Ki", "Mi", "Gi", "Ti", "Pi"]))
def test_binary_units_are_powers_of_1024(number: int, unit: str) -> None:
    assert quantities.parse(f"{number}{unit}") == number * 1024 ** (1 + "KMGTP".index(unit[0]))


@pytest.mark.parametrize(("text", "seconds"), [("1h", 3600), ("90m", 5400), ("1h30m5s", 5405)])
def test_durations(text: str, seconds: float) -> None:
    assert schedule.duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1d", "h", "1h 5m", "1.5h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidRequest, match="no duration"):
        schedule.duration_s(text)


def test_schedules() -> None:
    assert Schedule.parse({}) is None
    hourly = Schedule.parse({"interval": "1h"})
    assert hourly is not None
    assert hourly.next_utc_s(1000.0) == 4600.0
    nightly = Schedule.parse({"cron": "0 3 * * *"})
    assert nightly is not None
    since = datetime(2026, 3, 1, 2, 59, tzinfo=UTC).timestamp()
    assert nightly.next_utc_s(since) == datetime(2026, 3, 1, 3, tzinfo=UTC).timestamp()
    assert nightly.next_utc_s(since + 60) == datetime(2026, 3, 2, 3, tzinfo=UTC).timestamp()


def test_an_interval_is_never_too_short() -> None:
    shortest = Schedule.parse({"interval": "1s"})
    assert shortest is not None
    assert shortest.next_utc_s(0.0) == 60.0


def test_a_wrong_cron_expression_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"'61 3 . . .' is no cron expression"):
        Schedule.parse({"cron": "61 3 * * *"})


def test_conditions_keep_the_time_of_their_last_change() -> None:
    first = conditions.merge([], [Condition("Ready", False, "Listing", "x")], generation=1, now_utc_s=0.0)
    assert first[0]["lastTransitionTime"] == "1970-01-01T00:00:00Z"
    same = conditions.merge(first, [Condition("Ready", False, "Failed", "y")], generation=2, now_utc_s=60.0)
    assert same == [
        {
            "type": "Ready",
            "status": "False",
            "reason": "Failed",
            "message": "y",
            "observedGeneration": 2,
            "lastTransitionTime": "1970-01-01T00:00:00Z",
        }
    ]
    other = conditions.merge(same, [Condition("Ready", True, "Serving")], generation=2, now_utc_s=60.0)
    assert (other[0]["status"], other[0]["lastTransitionTime"]) == ("True", "1970-01-01T00:01:00Z")


def test_a_change_of_status_or_reason_is_told() -> None:
    before = conditions.merge([], [Condition("Ready", False, "Listing", "x")], generation=1, now_utc_s=0.0)
    assert conditions.transitions(before, [Condition("Ready", False, "Listing", "y")]) == []
    changed = [
        Condition("Ready", False, "OriginDenied", "no", is_trouble=True),
        Condition("Warm", True, "Cached", "all of it is cached"),
        Condition("Replicated", True, "EnoughNodes"),  # says nothing that the others do not
    ]
    assert conditions.transitions(before, changed) == [
        Transition("OriginDenied", "no", True),
        Transition("Cached", "all of it is cached", False),
    ]


@given(st.integers(0, 2**33))
def test_times_are_read_back(seconds: int) -> None:
    assert conditions.parse_timestamp(conditions.timestamp(seconds)) == seconds


@given(st.text(max_size=300), st.integers(1, 200))
def test_sentences_are_shortened_to_the_limit(sentence: str, limit: int) -> None:
    assert len(conditions.shortened(sentence, limit)) <= limit
