"""What is dropped for whom, in which order: from values alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_cachenode import retention
from shoal_cachenode.retention import Holding, Mask, Step

N = 12
SIZES = np.full(N, 10, np.int64)
NONE = np.zeros(N, np.bool_)


def mask(places: Iterable[int]) -> Mask:
    found = NONE.copy()
    found[list(places)] = True
    return found


def dataset(
    name: str,
    places: Iterable[int],
    *,
    surplus: Iterable[int] = (),
    pinned: bool = False,
    live: bool = False,
    used: float = 0.0,
    guaranteed: int = 0,
) -> Holding:
    return Holding(name, mask(places), mask(surplus), pinned, live, used, guaranteed)


def drops(
    *holdings: Holding, served: Mask | None = None, filling: Mask = NONE, asker: str = "", wanted: int = 10
) -> list[tuple[int, Step]]:
    named = np.logical_or.reduce([h.shards for h in holdings]) if holdings else NONE
    found = retention.droppable(
        SIZES, filling, named if served is None else served, holdings, asker=asker, wanted_bytes=wanted
    )
    return [(drop.place, drop.step) for drop in found]


def places(found: list[tuple[int, Step]]) -> list[int]:
    return [place for place, _ in found]


def test_order_of_the_steps() -> None:
    found = drops(
        dataset("idle", [0, 1]),
        dataset("live", [2, 3, 4], surplus=[3], live=True),
        served=mask([0, 1, 2, 3, 4, 5]),
    )
    expected = [(place, Step.UNNAMED) for place in range(6, 12)]
    expected += [(5, Step.SUPERSEDED), (3, Step.SURPLUS), (0, Step.IDLE), (1, Step.IDLE)]
    assert found == expected


def test_idle_datasets_go_whole_the_longest_unused_first() -> None:
    found = drops(dataset("b", range(4), used=30), dataset("c", range(4, 8), used=10), dataset("a", range(8, 12)))
    assert places(found) == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]


def test_live_and_pinned_datasets_and_the_asker_keep_everything() -> None:
    holdings = (
        dataset("live", range(4), live=True),
        dataset("pinned", range(4, 8), surplus=[5], pinned=True),
        dataset("asker", range(8, 12)),
    )
    assert drops(*holdings, asker="asker") == []
    assert places(drops(*holdings, asker="live")) == [8, 9, 10, 11], "the asker of before is idle for others"


def test_what_is_filling_stays_whoever_names_it() -> None:
    assert places(drops(dataset("idle", range(3)), filling=mask([1, 11]))) == [*range(3, 11), 0, 2]


def test_shared_shard_is_kept_as_long_as_one_dataset_keeps_it() -> None:
    found = drops(dataset("idle", range(6)), dataset("live", range(3, 12), live=True))
    assert places(found) == [0, 1, 2]
    found = drops(dataset("older", range(6), used=1), dataset("newer", range(3, 12), used=2))
    assert places(found) == [0, 1, 2, *range(3, 12)], "it goes with the one that was used last"
    found = drops(dataset("surplus here", [0], surplus=[0], live=True), dataset("owned here", range(12), live=True))
    assert found == []


def test_guarantee_of_an_idle_dataset_is_kept() -> None:
    assert len(drops(dataset("idle", range(12), guaranteed=75))) == 4, "12 shards, of which 8 hold 75 bytes"
    assert drops(dataset("idle", range(6), guaranteed=60), dataset("other", range(6, 12), live=True)) == []


def test_dataset_below_its_quota_takes_from_those_above_theirs() -> None:
    asker = dataset("asker", [0, 1], live=True, guaranteed=40)
    rich = dataset("rich", range(2, 8), live=True, used=5, guaranteed=50)
    without = dataset("without", range(8, 12), live=True, used=9)
    found = drops(asker, rich, without, asker="asker")
    assert found == [(2, Step.OVER_QUOTA), (8, Step.OVER_QUOTA)], "20 bytes to its quota: down to theirs, oldest first"
    assert drops(asker, rich, without, asker="without") == []
    assert drops(asker, rich, without, asker="asker", wanted=21) == [], "with it, it would be above its own"
    full = dataset("asker", [0, 1], live=True, guaranteed=20)
    assert drops(full, rich, without, asker="asker") == []
    pinned = dataset("without", range(8, 12), pinned=True)
    assert places(drops(asker, rich, pinned, asker="asker")) == [2]


def test_filling_shards_count_towards_the_askers_quota() -> None:
    asker = dataset("asker", [0, 1], live=True, guaranteed=20)
    other = dataset("other", range(2, 12), live=True)
    assert drops(asker, other, filling=mask([1]), asker="asker") == []


@pytest.mark.parametrize(("quota", "weight", "total", "expected"), [(100, 1, 4, 25), (100, 0, 0, 0), (7, 2, 3, 4)])
def test_quota_of_the_cluster_is_split_by_weight(quota: int, weight: int, total: int, expected: int) -> None:
    assert retention.guaranteed_bytes(quota, weight, total) == expected


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Holding], Mask, Mask, str]:
    masks = st.lists(st.booleans(), min_size=N, max_size=N).map(lambda bits: np.array(bits, np.bool_))
    holdings = []
    for name in "abcd"[: draw(st.integers(0, 4))]:
        shards = draw(masks)
        holdings.append(
            Holding(
                name,
                shards,
                shards & draw(masks),
                draw(st.booleans()),
                draw(st.booleans()),
                draw(st.integers(0, 3)) * 1.0,
                draw(st.integers(0, 12)) * 10,
            )
        )
    served = draw(masks)
    for holding in holdings:
        served = served | holding.shards
    return holdings, served, draw(masks), draw(st.sampled_from(["", "a", "b"]))


@given(situations())
def test_what_is_protected_never_goes(situation: tuple[list[Holding], Mask, Mask, str]) -> None:
    holdings, served, filling, asker = situation
    found = retention.droppable(SIZES, filling, served, holdings, asker=asker, wanted_bytes=10)
    order = [drop.place for drop in found]
    assert len(order) == len(set(order)), "each at most once"
    assert [drop.step for drop in found] == sorted(drop.step for drop in found)
    assert all(SIZES[drop.place] == drop.size_bytes and not filling[drop.place] for drop in found)
    gone = mask(order)
    asking = next((h for h in holdings if h.name == asker), None)
    for holding in holdings:
        mine = gone & holding.shards
        if holding.is_pinned:
            assert not mine.any()
        held = int(SIZES[holding.shards].sum())
        if mine.any() and holding.guaranteed_bytes:
            assert held - int(SIZES[mine].sum()) >= holding.guaranteed_bytes
        if holding.is_live or holding is asking:
            kept_by_quota = [d.place for d in found if d.step in (Step.SURPLUS, Step.OVER_QUOTA)]
            assert set(np.flatnonzero(mine).tolist()) <= set(kept_by_quota)
    over = [drop for drop in found if drop.step is Step.OVER_QUOTA]
    if over:
        assert asking is not None
        assert not (mask(d.place for d in over) & asking.shards).any()
        claim = asking.guaranteed_bytes - int(SIZES[asking.shards].sum())
        assert sum(d.size_bytes for d in over) < claim + 10, "not more than it is short of, to a shard"
