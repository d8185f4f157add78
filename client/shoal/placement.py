"""Which nodes own a shard, scheme "v1": weighted rendezvous hashing, a load bound, replicas spread over topology. Pure.

1. Each shard prefers the nodes in the order of their scores (`shoal.rendezvous`).
2. The *primary* owner is the most preferred node, unless that has more than `LOAD_BOUND` times its fair share of the
   snapshot's bytes. Such a node gives up the shards that care least, those whose second score is nearest to the best,
   until it is within; in key order they go to their most preferred node with room.
3. Further owners go down the preference, those first that share the least topology with the owners so far.
4. All other nodes follow by preference: whom a reader asks when no owner answers.

So anybody who has the snapshot and the cluster map knows every owner. `docs/placement.md` has the reasons and figures.

The rule: the answer is a function of keys, sizes, node ids, weights and topology alone, bit for bit on every machine
and version; `tests/golden/placement_v1.json` never changes. A new scheme is a new module beside this one.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shoal import rendezvous
from shoal.cluster_map import ClusterMap, Node
from shoal.errors import ClusterUnavailable
from shoal.rendezvous import Contest, Words
from shoal.shards import U64, Key

#: A node is the primary owner of at most this multiple of its fair share of a snapshot's bytes.
LOAD_BOUND = 1.06
_BOUND_PERCENT = 106  # the same, for exact integer arithmetic
#: Snapshots of more shards are not bounded: so many are about as even by the law of large numbers (on a hundred nodes
#: the fullest is then near 1.05 x fair anyway), and each client would have to score all of them, in seconds and memory.
BOUND_MAX_SHARDS = 2**18

_ORDERS_KEPT = 8192
_LADDER = ("zone", "rack", "host")

Indexes = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]


class ShardTable(Protocol):
    """What placement needs of a snapshot: its shards' keys as words, shape (n, 2), and their bytes, shape (n,)."""

    @property
    def keys(self) -> npt.NDArray[np.uint64]: ...

    @property
    def sizes(self) -> npt.NDArray[np.int64]: ...


def preference(key: Key, nodes: tuple[Node, ...]) -> tuple[int, ...]:
    """Indexes of `nodes` by score for `key`, best first, without the bound.

    Args:
        nodes: sorted by id, with weights above 0, as `ClusterMap.owners` gives them.
    """
    return tuple(Contest(nodes).preference(_word(key)))


def order(key: Key, nodes: tuple[Node, ...], replicas: int, *, primary: int | None = None) -> tuple[Node, ...]:
    """All of `nodes` in the order in which a reader of `key` asks them: the owners, then the rest by preference.

    Args:
        nodes: as in `preference`; empty gives ().
        replicas: owners wanted, capped at the number of nodes.
        primary: index of the first owner where the bound gives it (`primaries`); by default the most preferred node.
    """
    return _Owners(nodes, replicas).order(key, primary) if nodes else ()


def primaries(keys: Words, sizes: npt.NDArray[np.int64], nodes: tuple[Node, ...]) -> Indexes:
    """The primary owner of every shard of one snapshot, as indexes of `nodes`, shape (n,).

    Bounded where there are at most `BOUND_MAX_SHARDS` shards. A shard that fits nowhere, because it is large or there
    are hardly more shards than nodes, takes the best node that is not over its limit yet. So no node ends more than one
    shard above its limit, and a handful of shards spreads.

    Args:
        keys: shape (n, 2), the shards' keys as words (`shards.shard_keys`).
        sizes: shape (n,), bytes.
        nodes: as in `preference`; at most 65,535.

    Raises:
        ClusterUnavailable: there are shards but no nodes.
    """
    if not len(keys):
        return np.zeros(0, np.uint16)
    if not nodes:
        raise ClusterUnavailable("no cache node can own a shard: start one, or wait until one has registered")
    contest = Contest(nodes)
    owners = contest.winners(keys[:, 0])
    if len(keys) > BOUND_MAX_SHARDS:
        return owners
    _bound(owners, keys, sizes, contest, [n.weight for n in nodes])
    return owners


def _bound(owners: Indexes, keys: Words, sizes: npt.NDArray[np.int64], contest: Contest, weights: list[int]) -> None:
    """Move shards in `owners`, the first choices, off the nodes that have too much."""
    total_bytes = int(sizes.sum())
    limits = [total_bytes * weight * _BOUND_PERCENT // (100 * sum(weights)) for weight in weights]
    # Sums of bytes are exact in float64 up to 8 PiB.
    held = [int(load) for load in np.bincount(owners, weights=sizes, minlength=len(limits))]
    homeless: list[npt.NDArray[np.intp]] = []
    for node, limit in enumerate(limits):
        if held[node] <= limit:
            continue
        mine = np.flatnonzero(owners == node)
        # The firmest first. Margins that are equal (as good as never) go by key.
        mine = mine[np.lexsort((keys[mine, 1], keys[mine, 0], -contest.margins(keys[mine, 0])))]
        filled = np.cumsum(sizes[mine])
        kept = int(np.searchsorted(filled, limit, side="right"))
        held[node] = int(filled[kept - 1]) if kept else 0
        homeless.append(mine[kept:])
    if not homeless:
        return
    walk = np.concatenate(homeless)
    walk = walk[np.lexsort((keys[walk, 1], keys[walk, 0]))]
    for shard, word, size in zip(walk.tolist(), keys[walk, 0].tolist(), sizes[walk].tolist(), strict=True):
        ranked = contest.preference(word)
        node = next((n for n in ranked if held[n] + size <= limits[n]), -1)
        if node < 0:  # there is one: if all nodes were over their limits, they would hold more than the snapshot
            node = next(n for n in ranked if held[n] <= limits[n])
        owners[shard] = node
        held[node] += size


class Placement:
    """Who owns the shards of one snapshot under one cluster map. Threads may share it.

    Args:
        table: gives the snapshot's shards (`Snapshot.shard_table`); not called before they are needed, then kept.
        shard_count: how many they are.
        cluster_map: of its nodes those of `ClusterMap.owners` take part.
        replicas: owners wanted; the attribute is capped at the number of nodes.
    """

    def __init__(
        self, table: Callable[[], ShardTable], shard_count: int, cluster_map: ClusterMap, replicas: int
    ) -> None:
        self._table = functools.lru_cache(maxsize=1)(table)
        self.cluster_map = cluster_map
        self.shard_count = shard_count
        self.nodes = tuple(sorted(cluster_map.owners(), key=lambda n: n.id))
        self._owners = _Owners(self.nodes, replicas)
        self.replicas = self._owners.replicas
        self._primaries: Indexes | None = None
        self._order = functools.lru_cache(maxsize=_ORDERS_KEPT)(self._owners.order)

    def order(self, ordinal: int, key: Key | None = None) -> tuple[Node, ...]:
        """The nodes to ask for shard `ordinal`, in order: its `replicas` owners, then the rest by preference.

        With its `key` given, a snapshot of more than `BOUND_MAX_SHARDS` shards is answered without its table.

        Raises:
            ClusterUnavailable: no node of the map may own shards.
        """
        if not self.nodes:
            raise self._nobody()
        primary = int(self.primaries()[ordinal]) if self.shard_count <= BOUND_MAX_SHARDS else None
        return self._order(key or self._table().keys[ordinal].astype("<u8").tobytes(), primary)

    def first(self, ordinal: int, key: Callable[[], Key | None] = lambda: None) -> Node:
        """The first of `order`, at the cost of a look-up where the snapshot is bounded: then no key is asked for.

        Raises as `order`.
        """
        if self.nodes and self.shard_count <= BOUND_MAX_SHARDS:
            return self.nodes[int(self.primaries()[ordinal])]
        return self.order(ordinal, key())[0]

    def firsts(self, ordinals: npt.NDArray[np.integer]) -> Indexes:
        """The first owners of some shards, as indexes of `nodes`, in their shape. Raises as `order`."""
        if not self.nodes:
            raise self._nobody()
        if self.shard_count <= BOUND_MAX_SHARDS:
            return np.asarray(self.primaries()[ordinals])
        return self._owners.preferred(self._table().keys[ordinals, 0])

    def _nobody(self) -> ClusterUnavailable:
        return ClusterUnavailable(
            f"no cache node is up (cluster map epoch {self.cluster_map.epoch}): start one, or wait until one has "
            "registered"
        )

    def primaries(self) -> Indexes:
        """Each shard's primary owner as an index of `nodes`, computed at the first call. Shared: do not write to it.

        Raises:
            ClusterUnavailable: there are shards, and no node of the map may own them.
        """
        if self._primaries is None:
            with _computing:
                if self._primaries is None:
                    table = self._table()
                    self._primaries = primaries(table.keys, table.sizes, self.nodes)
        return self._primaries

    def primary_of(self, node_id: str) -> Mask:
        """Whether the node is the first owner of each shard, shape (n,). Nowhere, where it takes no part."""
        index = self._index(node_id)
        if index is None:
            return np.zeros(self.shard_count, np.bool_)
        return np.asarray(self.primaries() == index)

    def owned_by(self, node_id: str, ordinals: npt.NDArray[np.integer] | None = None) -> Mask:
        """Whether the node is among the owners of each of the shards `ordinals`, by default of all: in their shape."""
        index = self._index(node_id)
        if index is None:
            return np.zeros(self.shard_count if ordinals is None else len(ordinals), np.bool_)
        firsts, words = self.primaries(), self._table().keys[:, 0]
        if ordinals is not None:
            firsts, words = firsts[ordinals], words[ordinals]
        if self.replicas == 1:
            return np.asarray(firsts == index)
        return np.asarray((self._owners.of(words, firsts) == index).any(axis=1))

    def owners(self, ordinals: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The owners of the shards `ordinals` as indexes of `nodes`, first owners first. Shape (n, replicas).

        Raises:
            ClusterUnavailable: as `primaries`.
        """
        firsts = self.primaries()[ordinals]
        if self.replicas < 2:
            return np.asarray(firsts[:, None], np.int64)
        return np.asarray(self._owners.of(self._table().keys[ordinals, 0], firsts), np.int64)

    def _index(self, node_id: str) -> int | None:
        return next((index for index, n in enumerate(self.nodes) if n.id == node_id), None)


# Guards the computing of primaries, of all placements. One for the process, so that a forked child can replace it: the
# thread that held it in the parent is not there to release it.
_computing = threading.Lock()


def _after_fork() -> None:
    global _computing
    _computing = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class _Owners:
    """Chooses the owners beside the primary. `replicas` is capped at the number of nodes."""

    def __init__(self, nodes: tuple[Node, ...], replicas: int) -> None:
        self.replicas = min(max(replicas, 1), len(nodes))
        self._nodes = nodes
        self._contest = Contest(nodes)
        self._sharing = _sharing(nodes, self.replicas)

    def preferred(self, words: Words) -> Indexes:
        """The most preferred node of each shard."""
        return self._contest.winners(words)

    def of(self, words: Words, firsts: Indexes) -> npt.NDArray[np.intp]:
        """Owners of the shards whose keys begin with `words`, shape (n, replicas), their primaries `firsts` first.

        The next owner is always the node whose zone has the fewest owners so far, among equals the one whose rack has,
        then whose host has, then for each other label, and among equals the most preferred.
        """
        chosen = np.empty((len(words), self.replicas), np.intp)
        chosen[:, 0] = firsts
        for block in self._contest.blocks(len(words)):
            self._fill(chosen[block], self._contest.scores(words[block]))
        return chosen

    def order(self, key: Key, primary: int | None) -> tuple[Node, ...]:
        scores = self._contest.scores(np.array([_word(key)], U64))
        ranked = rendezvous.ranking(scores[0])
        chosen = np.full((1, self.replicas), ranked[0] if primary is None else primary, np.intp)
        self._fill(chosen, scores)
        owners: list[int] = chosen[0].tolist()
        return tuple(self._nodes[n] for n in (*owners, *(n for n in ranked if n not in owners)))

    def _fill(self, chosen: npt.NDArray[np.intp], scores: npt.NDArray[np.float64]) -> None:
        """Choose all columns of `chosen` after the first; `scores` is used up."""
        rows = np.arange(len(chosen))
        crowding = np.zeros(scores.shape, np.int64)
        for rank in range(1, self.replicas):
            latest = chosen[:, rank - 1]
            scores[rows, latest] = np.inf  # taken
            crowding += self._sharing[latest]
            free = np.where(np.isinf(scores), np.iinfo(np.int64).max, crowding)
            least_crowded = free == free.min(axis=1, keepdims=True)
            chosen[:, rank] = np.where(least_crowded, scores, np.inf).argmin(axis=1)


def _sharing(nodes: tuple[Node, ...], replicas: int) -> npt.NDArray[np.int64]:
    """How near two nodes are, shape (nodes, nodes), as numbers that may be added over owners and then compared.

    Each has one digit in base `replicas` a topology level, the widest first: 1 where the two share the zone; the rack
    in the zone; the host in the rack; then each other label, by name. At most `replicas` - 1 owners are added up, so no
    digit overflows. Nodes without a label share its absence: nothing says that they are apart.
    """
    if replicas < 2:
        return np.zeros((0, 0), np.int64)
    named = {label for n in nodes for label in n.topology}
    ladder = [label for label in _LADDER if label in named]
    levels = [ladder[: depth + 1] for depth in range(len(ladder))]
    levels += [[label] for label in sorted(named.difference(_LADDER))]
    while replicas ** len(levels) > 2**62:
        levels.pop()  # dozens of labels: the last by name are left out
    sharing = np.zeros((len(nodes), len(nodes)), np.int64)
    for level in levels:
        places = [tuple(n.topology.get(label, "") for label in level) for n in nodes]
        numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
        codes = np.array([numbers[place] for place in places])
        sharing = sharing * replicas + (codes[:, None] == codes)
    return sharing


def _word(key: Key) -> int:
    return int.from_bytes(key[:8], "little")
