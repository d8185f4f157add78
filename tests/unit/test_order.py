"""The flat order: every sample once, in any stretch, whatever the cut; and what a shuffle is worth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal.streaming.order import Order

GOLDEN = Path(__file__).parents[1] / "golden" / "order_v1.json"

lengths = st.lists(st.integers(0, 40), max_size=30).map(lambda found: np.array(found, np.int64))
windows = st.sampled_from([1, 2, 3, 7, 50, 10_000])


@settings(deadline=None)
@given(lengths, st.integers(), st.integers(0, 1 << 40), windows, st.booleans())
def test_each_sample_comes_once(lengths: np.ndarray, seed: int, epoch: int, window: int, shuffle: bool) -> None:
    order = Order(lengths, seed=seed, epoch=epoch, window=window, shuffle=shuffle)
    assert sorted(order.samples(0, order.length).tolist()) == list(range(order.length))


@settings(deadline=None)
@given(lengths, st.integers(0, 9), windows, st.booleans(), st.data())
def test_any_stretch_is_that_stretch_of_the_whole(
    lengths: np.ndarray, seed: int, window: int, shuffle: bool, data: st.DataObject
) -> None:
    order = Order(lengths, seed=seed, epoch=0, window=window, shuffle=shuffle)
    start = data.draw(st.integers(0, order.length))
    stop = data.draw(st.integers(start, order.length))
    whole = order.samples(0, order.length)
    assert order.samples(start, stop).tolist() == whole[start:stop].tolist()


@settings(deadline=None)
@given(lengths, windows)
def test_no_sample_moves_a_window_or_more(lengths: np.ndarray, window: int) -> None:
    order = Order(lengths, seed=1, epoch=2, window=window)
    sequence = Order(lengths, seed=1, epoch=2, window=1).samples(0, order.length)
    places = np.empty_like(sequence)
    places[sequence] = np.arange(order.length)
    moved = np.abs(places[order.samples(0, order.length)] - np.arange(order.length))
    assert (moved < window).all()


@settings(deadline=None)
@given(lengths)
def test_without_a_shuffle_it_is_the_order_of_the_data(lengths: np.ndarray) -> None:
    order = Order(lengths, seed=1, epoch=2, shuffle=False)
    assert order.samples(0, order.length).tolist() == list(range(order.length))


def test_seeds_and_epochs_differ() -> None:
    found = {
        tuple(Order(np.full(50, 20), seed=seed, epoch=epoch, window=100).samples(0, 1000).tolist())
        for seed in range(-3, 5)
        for epoch in range(5)
    }
    assert len(found) == 40


@pytest.mark.parametrize("window", [1, 64, 4096])
def test_is_what_it_always_was(window: int) -> None:
    expected = json.loads(GOLDEN.read_text())[str(window)]
    order = Order(np.arange(40) % 7, seed=2024, epoch=3, window=window)
    assert order.samples(0, order.length).tolist() == expected


def test_a_stretch_of_a_large_epoch_is_made_without_the_rest() -> None:
    order = Order(np.full(1 << 20, 1 << 20), seed=1, epoch=1, window=4096)  # 2 to the power of 40 samples
    found = order.samples((1 << 40) - 1000, 1 << 40)
    assert len(set(found.tolist())) == 1000


def test_neighbours_come_from_many_runs() -> None:
    """With a window of many runs nearly every sample of a batch is of another run, as in a full shuffle."""
    runs, length = 1000, 100
    order = Order(np.full(runs, length), seed=5, epoch=0, window=256 * length)
    batches = order.samples(0, order.length).reshape(-1, 250) // length
    distinct = np.mean([len(np.unique(batch)) for batch in batches])
    full = runs * (1 - (1 - 1 / runs) ** 250)
    within_window = 256 * (1 - (1 - 1 / 256) ** 250)
    assert distinct == pytest.approx(within_window, rel=0.05), f"{full:.0f} would be a full shuffle's"


@pytest.mark.parametrize(
    ("lengths", "window", "words"), [([3], 0, "window of 0"), ([3], -1, "window of -1"), ([-1], 5, "negative")]
)
def test_nonsense_is_refused(lengths: list[int], window: int, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Order(np.array(lengths), seed=0, epoch=0, window=window)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_a_stretch_outside_the_epoch_is_refused(start: int, stop: int) -> None:
    with pytest.raises(InvalidRequest, match="not within an epoch of 3"):
        Order(np.array([3]), seed=0, epoch=0).samples(start, stop)
