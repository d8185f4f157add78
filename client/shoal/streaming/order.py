"""The flat order: every sample of an epoch, once, as the data, the seed and the epoch alone decide. Pure.

A *run* is samples that lie side by side in one object, such as a record batch; a *segment* is runs that lie side by
side and are fetched together. Without a shuffle the order is that of the runs. With one,

    1. segments are sorted by  h(seed, epoch, segment), so that neighbours come from anywhere in the dataset, and each
       is left as it is, so that what a cold cache fetches is soon used up
    2. the sample at place p of that sequence gets the key  p + h(seed, epoch, p) mod window
    3. samples are sorted by key, then by hash, then by place

so a sample moves by less than `window` places, and there are no borders that it cannot cross (as there are where a
sequence is cut into blocks and each is shuffled). Whoever reads in this order holds the runs of one window at a time.
Any stretch of the order is worked out from the stretch itself and one window before and after it, so a resume in the
middle of a billion samples costs what the first step costs.

The rule: world size, batch size, workers, nodes and the machine are no arguments here, so none of them can change the
order. All arithmetic is on integers, `tests/golden/order_v1.json` never changes, and another order is another version.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shoal.errors import InvalidRequest
from shoal.shards import U64, mix64

Samples = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

VERSION = 1
#: Samples that a sample may move by, unless the caller says otherwise.
WINDOW = 1 << 16
_RUNS, _PLACES = U64(0x52554E53), U64(0x504C4143)  # so that runs and places never share a hash


class Order:
    """The order of one epoch.

    Args:
        lengths: samples of each run, in the order of the data. Shape (runs,).
        seed, epoch: what the shuffle depends on; any integers.
        window: how far a sample may move, at least 1. 1 keeps runs whole.
        shuffle: False: the order of the data.
        segments: the number of each run's segment, ascending; None: each run is one. Shape (runs,).

    Attributes:
        length: samples.
        window: as above; 1 where nothing is shuffled.

    Raises:
        InvalidRequest: a length is negative, or the window is not positive.
    """

    def __init__(
        self,
        lengths: Samples,
        *,
        seed: int,
        epoch: int,
        window: int = WINDOW,
        shuffle: bool = True,
        segments: Samples | None = None,
    ) -> None:
        if window < 1:
            raise InvalidRequest(f"a shuffle window of {window} samples is none: give 1 or more, or shuffle=False")
        lengths = np.asarray(lengths, np.int64)
        if (lengths < 0).any():
            raise InvalidRequest("a run has a negative number of samples")
        self._starts = np.cumsum(lengths) - lengths
        self.length = int(lengths.sum())
        key = _key(seed, epoch)
        self._place_key = key ^ _PLACES
        self.window = window if shuffle else 1
        if shuffle:
            numbers = np.arange(len(lengths)) if segments is None else segments
            hashes = mix64(numbers.astype(U64) ^ mix64(_array(key ^ _RUNS)))
            self._runs = np.argsort(hashes, kind="stable")  # no two numbers have one hash: mix64 is a bijection
        else:
            self._runs = np.arange(len(lengths))
        self._ends = np.cumsum(lengths[self._runs])

    @property
    def sequence(self) -> tuple[Samples, Samples]:
        """The runs in the order of step 1, and the place at which each begins. Shapes (runs,)."""
        return self._runs, np.concatenate([[0], self._ends[:-1]]) if len(self._ends) else self._ends

    def samples(self, start: int, stop: int) -> Samples:
        """The samples at positions [start, stop) of the order, numbered as in the data. Shape (stop - start,).

        Costs as much as `stop - start` and two windows.

        Raises:
            InvalidRequest: not ``0 <= start <= stop <= length``.
        """
        if not 0 <= start <= stop <= self.length:
            raise InvalidRequest(f"positions {start} to {stop} are not within an epoch of {self.length} samples")
        places = self._places(start, stop)
        order = np.searchsorted(self._ends, places, side="right")
        runs = self._runs[order]
        ends = self._ends[order]
        lengths = ends - np.where(order > 0, self._ends[order - 1], 0)
        return self._starts[runs] + (places - (ends - lengths))

    def _places(self, start: int, stop: int) -> Samples:
        """The places whose samples come at positions [start, stop)."""
        if self.window == 1 or start == stop:
            return np.arange(start, stop)
        # Fewer than `start` keys are below `start`, for a key is at least its place; and at least `stop` of them, or
        # all, are below `stop + window`. So the wanted ones have keys in between, and places from a window before.
        low, high = start, stop + self.window
        first = max(0, low - self.window + 1)
        places = np.arange(first, min(high, self.length))
        hashes = mix64(places.astype(U64) ^ mix64(_array(self._place_key)))
        keys = places + (hashes % U64(self.window)).astype(np.int64)
        before = first + int(np.count_nonzero(keys < low))
        chosen = np.flatnonzero((keys >= low) & (keys < high))
        chosen = chosen[np.lexsort((places[chosen], hashes[chosen], keys[chosen]))]
        return places[chosen[start - before : stop - before]]


def _key(seed: int, epoch: int) -> np.uint64:
    mask = (1 << 64) - 1
    return np.uint64(mix64(mix64(_array(seed & mask)) ^ _array(epoch & mask))[0])


def _array(word: int | np.uint64) -> Words:
    return np.array([word], U64)
