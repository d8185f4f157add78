"""The election: one leads, and who cannot renew stops before another may take over."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from shoal_controller.kube import lease
from shoal_controller.kube.api import LEASES, ApiError
from shoal_controller.kube.lease import Election, LeaseLost, Seen, Timing
from tests.support.kube import FakeApi

TIMING = Timing(duration_s=2.0, renew_s=0.2, retry_s=0.02)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def election(api: FakeApi, identity: str, clock: Clock | None = None) -> Election:
    more = {} if clock is None else {"clock": clock}
    return Election(api, namespace="shoal", name="shoal", identity=identity, timing=TIMING, **more)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(whole())


def holder(api: FakeApi) -> str:
    return str(api.read(LEASES, "shoal", "shoal")["spec"]["holderIdentity"])


def test_time_is_counted_from_when_a_version_was_first_seen() -> None:
    item = {"metadata": {"resourceVersion": "1"}, "spec": {"holderIdentity": "a", "leaseDurationSeconds": 10}}
    first = lease.observe(item, None, 100.0)
    assert first == Seen("1", "a", 10.0, 100.0)
    assert lease.observe(item, first, 109.0) == first
    assert not lease.may_take(first, "b", 109.9)
    assert lease.may_take(first, "b", 110.0)
    assert lease.may_take(first, "a", 100.0)
    renewed = lease.observe({**item, "metadata": {"resourceVersion": "2"}}, first, 109.0)
    assert not lease.may_take(renewed, "b", 118.9)
    assert lease.may_take(Seen("3", "", 1.0, 100.0), "b", 100.0)


def test_a_silent_leader_is_followed_within_seconds() -> None:
    timing = Timing()
    # Of 15 s the rest is for the start of the one that follows.
    assert timing.duration_s + timing.retry_s <= 10
    with pytest.raises(AssertionError):
        Timing(duration_s=5.0, renew_s=5.0)


def test_the_second_waits_until_the_first_gives_back() -> None:
    async def test() -> None:
        api = FakeApi()
        first, second = election(api, "a"), election(api, "b")
        await first.acquire()
        assert holder(api) == "a"
        assert (first.is_leader, second.is_leader) == (True, False)
        waiting = asyncio.create_task(second.acquire())
        holding = asyncio.create_task(first.hold())
        await api.asked(10)  # by both
        assert not waiting.done()
        holding.cancel()
        await first.release()
        await waiting
        assert (first.is_leader, second.is_leader, second.transitions) == (False, True, 1)
        assert first.renewals["ok"] > 0
        assert first.renewals["failed"] == 0
        assert holder(api) == "b"
        assert api.read(LEASES, "shoal", "shoal")["spec"]["leaseTransitions"] == 1
        await first.release()  # it is not its own any more
        assert holder(api) == "b"

    run(test())


def test_the_second_takes_over_from_one_that_is_silent() -> None:
    async def test() -> None:
        api, clock = FakeApi(), Clock()
        await election(api, "a").acquire()
        second = election(api, "b", clock)
        waiting = asyncio.create_task(second.acquire())
        await api.asked(2)  # the second one has looked
        clock.now_s += TIMING.duration_s - 0.1
        await api.asked(2)
        assert not waiting.done()
        clock.now_s += 0.1
        await waiting
        assert holder(api) == "b"

    run(test())


def test_two_that_take_at_once_are_one() -> None:
    async def test() -> None:
        api = FakeApi()
        both = [asyncio.create_task(election(api, identity).acquire()) for identity in ("a", "b")]
        done, waiting = await asyncio.wait(both, timeout=0.3)
        assert (len(done), len(waiting)) == (1, 1)
        waiting.pop().cancel()

    run(test())


def test_who_was_deposed_ends() -> None:
    async def test() -> None:
        api = FakeApi()
        first = election(api, "a")
        await first.acquire()
        item = api.read(LEASES, "shoal", "shoal")
        item["spec"]["holderIdentity"] = "b"
        api.put(LEASES, item)
        with pytest.raises(LeaseLost, match="b leads now: a ends"):
            await first.hold()

    run(test())


def test_who_cannot_renew_in_time_ends() -> None:
    async def test() -> None:
        api = FakeApi()
        first = election(api, "a")
        await first.acquire()
        api.failing = ApiError("the API server is gone")
        with pytest.raises(LeaseLost, match=r"could not be renewed for 0.2 s .the API server is gone."):
            await first.hold()
        assert not first.is_leader
        assert first.renewals["failed"] > 0

    run(test())


def test_a_short_outage_is_survived() -> None:
    async def test() -> None:
        api = FakeApi()
        first = election(api, "a")
        await first.acquire()
        holding = asyncio.create_task(first.hold())
        api.failing = ApiError("gone for a moment")
        await asyncio.sleep(TIMING.retry_s * 2)
        api.failing = None
        before = api.read(LEASES, "shoal", "shoal")["metadata"]["resourceVersion"]
        while api.read(LEASES, "shoal", "shoal")["metadata"]["resourceVersion"] == before:
            await asyncio.sleep(0.01)
        assert not holding.done()
        holding.cancel()

    run(test())
