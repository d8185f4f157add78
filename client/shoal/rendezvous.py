"""Weighted rendezvous hashing: how much each node wants each shard, the same bits on every machine. Pure.

    H(n)  = xxh3_64(node id, UTF-8)
    h     = mix64(first little-endian word of the shard key XOR H(n))
    u     = ((h >> 12) + 1/2) / 2**52               # exact, inside (0, 1)
    score = -ln(u) / weight(n)                      # the smallest wins; of equal scores the first node by id

A score is an exponential variate whose rate is the weight. So node n wins with probability weight(n) / sum of weights,
and a node that comes, goes or is resized moves only shards to or from itself (rendezvous: Thaler & Ravishankar 1998;
logarithmic weights: Schindelhauer & Schomaker 2005).

The rule: only operations whose every bit IEEE 754 fixes may decide between two nodes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from shoal.cluster_map import Node
from shoal.shards import U64, mix64

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

_ROWS = 1 << 14  # shards at a time against one node: arrays of 128 KiB, which stay in the processor's cache
_ELEMENTS = 1 << 17  # shards x nodes at a time: arrays of 1 MiB
# Scores closer than this are compared exactly. The error of any platform's logarithm is orders of magnitude smaller.
_DOUBT = 1e-6


def ln(u: Floats) -> Floats:
    """The natural logarithm of positive, normal numbers, within 1e-10 relative. Any shape.

    Not `np.log`: its last bits differ between processors and numpy versions, and one bit can change an owner. Here each
    operation is correctly rounded by IEEE 754 and an array pass of its own, which no compiler fuses. u is m 2**e with
    sqrt(1/2) <= m < sqrt(2), and ln m = 2 artanh s, s = (m - 1) / (m + 1), whose Taylor series ends at s**11 / 11.
    """
    m, e = np.frexp(u)
    low = m < 0.7071067811865476
    m *= 1.0 + low
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = z * (1 / 11)
    for coefficient in (1 / 9, 1 / 7, 1 / 5, 1 / 3):
        series += coefficient
        series *= z
    series += 1.0
    series *= s
    series *= 2.0
    series += (e - low.astype(e.dtype)) * 0.6931471805599453
    return series


def ranking(scores: Floats) -> list[int]:
    """The nodes by one shard's scores, best first."""
    ranked: list[int] = np.argsort(scores, kind="stable").tolist()
    return ranked


def _unit(h: Words) -> Floats:
    """Hashes as numbers inside (0, 1): 52 bits and a half, so that nothing is rounded."""
    u = (h >> U64(12)).astype(np.float64)
    u += 0.5
    u *= 2.0**-52
    return u


class Contest:
    """Nodes as arrays, ready to compete for shards. A shard is the first word of its key, a node its index.

    Args:
        nodes: sorted by id, with weights above 0, at most 65,535.
    """

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self._hashes = np.array([xxhash.xxh3_64_intdigest(n.id.encode()) for n in nodes], U64)
        self._weights = np.array([n.weight for n in nodes], np.float64)

    def blocks(self, count: int) -> Iterator[slice]:
        """Cuts `count` shards so that the scores of each slice are small."""
        step = max(1, _ELEMENTS // len(self._weights))
        return (slice(start, start + step) for start in range(0, count, step))

    def scores(self, words: Words) -> Floats:
        """Shapes (n,) to (n, nodes); the smallest is the best. For many shards, ask for `blocks` of them."""
        scores = ln(_unit(mix64(words[:, None] ^ self._hashes)))
        scores /= -self._weights
        return scores

    def preference(self, word: int) -> list[int]:
        """The nodes, best first."""
        return ranking(self.scores(np.array([word], U64))[0])

    def margins(self, words: Words) -> Floats:
        """How firmly each shard holds to its best of two or more nodes, shape (n,): second score over best score."""
        margins = np.empty(len(words))
        for block in self.blocks(len(words)):
            two = np.partition(self.scores(words[block]), 1, axis=1)
            np.divide(two[:, 1], two[:, 0], out=margins[block])
        return margins

    def winners(self, words: Words) -> npt.NDArray[np.uint16]:
        """The best node for each shard, shape (n,), in little memory.

        The platform's logarithm is several times as fast, so it nominates; what it leaves in doubt `scores` decides.
        """
        winners = np.zeros(len(words), np.uint16)
        for start in range(0, len(words), _ROWS):
            block, winner = words[start : start + _ROWS], winners[start : start + _ROWS]
            best, second = np.full(len(block), np.inf), np.full(len(block), np.inf)
            for index, (node_hash, weight) in enumerate(zip(self._hashes, self._weights, strict=True)):
                score = _unit(mix64(block ^ node_hash))
                np.log(score, out=score)
                score *= -1.0 / weight
                np.putmask(winner, score < best, index)
                np.minimum(second, np.maximum(best, score), out=second)
                np.minimum(best, score, out=best)
            doubtful = np.flatnonzero(second <= best * (1.0 + _DOUBT))
            winner[doubtful] = self.scores(block[doubtful]).argmin(axis=1)
        return winners
