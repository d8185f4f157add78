"""Latencies and circuits with a clock that the tests move."""

from __future__ import annotations

import random

import pytest

from shoal.health import (
    FIRST_PATIENCE_S,
    LOOK_EVERY,
    MAX_ADDRESSES,
    MAX_BACKOFF_S,
    MIN_BACKOFF_S,
    PATIENCE_STEPS_S,
    SAMPLES,
    Health,
    Latency,
)


def taught(*seconds: float) -> float:
    latency = Latency()
    for each in seconds:
        latency.add(each)
    return latency.patience_s


def test_patience_before_anything_is_known() -> None:
    assert taught() == taught(*[9.0] * (LOOK_EVERY - 1)) == FIRST_PATIENCE_S


@pytest.mark.parametrize(
    ("usual_s", "patience_s"), [(0.0001, 0.02), (0.005, 0.02), (0.007, 0.03), (0.02, 0.1), (0.03, 0.15), (60.0, 0.15)]
)
def test_patience_is_a_multiple_of_what_is_usual_within_bounds(usual_s: float, patience_s: float) -> None:
    assert taught(*[usual_s] * SAMPLES) == patience_s


def test_few_late_answers_do_not_make_patient_and_many_do() -> None:
    assert taught(*[0.001] * (SAMPLES - 3), *[5.0] * 3) == PATIENCE_STEPS_S[0]
    assert taught(*[0.001] * (SAMPLES - 8), *[5.0] * 8) == PATIENCE_STEPS_S[-1]


def test_old_answers_are_forgotten() -> None:
    assert taught(*[5.0] * SAMPLES, *[0.001] * SAMPLES) == PATIENCE_STEPS_S[0]


def test_circuit_opens_waits_ever_longer_and_closes() -> None:
    health, now = Health(random.Random(1)), 100.0
    assert not health.circuits and health.next_due_at() is None
    assert health.failed("a", "refused", now)
    assert health.circuits and health.is_open("a") and not health.is_open("b")
    assert (health.reason("a"), health.reason("b")) == ("refused", "")
    waits = []
    for _ in range(8):
        due_at = health.next_due_at()
        assert due_at is not None
        assert health.due(due_at - 1e-6) == [] and health.due(due_at) == ["a"]
        waits.append(due_at - now)
        now = due_at
        assert not health.failed("a", "silent", now), "it was open already"
    for number, wait in enumerate(waits):
        longest = min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2**number)
        assert longest / 2 <= wait <= longest
    assert health.answered("a") and not health.answered("a")
    assert not health.circuits and health.due(now + 100) == []
    assert health.failed("a", "refused", now)
    due_at = health.next_due_at()
    assert due_at is not None and due_at <= now + MIN_BACKOFF_S, "a new failure begins anew"


def test_many_that_find_the_same_do_not_put_the_probe_off() -> None:
    health = Health(random.Random(1))
    health.failed("a", "refused", 100.0)
    due_at = health.next_due_at()
    for _ in range(50):
        health.failed("a", "refused", 100.01)
    assert health.next_due_at() == due_at


def test_memory_is_bounded() -> None:
    health = Health()
    for number in range(2 * MAX_ADDRESSES):
        health.latency(f"{number}")
        health.failed(f"{number}", "gone", 1.0)
    assert len(health._latencies) <= MAX_ADDRESSES and len(health.circuits) <= MAX_ADDRESSES
