"""Telling cache nodes what a stream will read of them, and when: so cold shards are there in the order of their use.

    every second    each node that is the first owner of shards that are needed hears which, the nearest first
    less often      where all that it was told is sealed there already
    with it         how long the consumer waited, to one node: the local one, where there is one

The rule: nothing here is ever the trainer's trouble. Calls only take notes; a daemon thread does the telling, a node
that does not answer is not told, and a process that is killed need not say so, for nodes forget whoever is silent.

Safe under fork: a child's announcer knows of nothing, is a stream of its own, and starts its own thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.errors import ClusterUnavailable, InvalidRequest, ShoalError
from shoal.watch import Watch
from shoal.wire import stream_post
from shoal.wire.stream_post import MAX_AHEAD_MS, MAX_NEEDS, Cause, StreamPost, Wait

if TYPE_CHECKING:
    from shoal.cluster import Cluster
    from shoal.cluster_map import Node
    from shoal.snapshot import Snapshot

log = logging.getLogger(__name__)

#: Seconds between two posts to one node: as long as something is missing there, and where nothing is. A node forgets a
#: stream that is silent for 30 s.
INTERVAL_S = 1.0
LONGEST_INTERVAL_S = 10.0
#: One post may take so long.
POST_TIMEOUT_S = 5.0
#: `close` waits so long for the last words.
CLOSE_TIMEOUT_S = 2.0

Ordinals = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one node is told: parts of shards that it is the first owner of, each once, and when they are needed."""

    node: int
    ordinals: Ordinals
    parts: Ordinals
    in_s: Seconds


def shares(
    ordinals: Ordinals, parts: Ordinals, in_s: Seconds, firsts: npt.NDArray[np.integer], *, count: int
) -> list[Share]:
    """Cut what comes into what each node is told, in the order of time, the nearest `count` a node. Pure.

    Args:
        ordinals, parts: of shards, in any order; a part that comes twice counts with the earlier time. Shapes (n,).
        in_s: seconds until each is needed; below 0 is now. Shape (n,).
        firsts: each one's first owner, as an index. Shape (n,).
    """
    in_s = np.maximum(in_s, 0.0)
    order = np.lexsort((parts, ordinals, in_s))
    order = order[in_s[order] <= MAX_AHEAD_MS / 1000]
    _, first_places = np.unique(ordinals[order] << 32 | parts[order], return_index=True)
    order = order[np.sort(first_places)]
    owners = firsts[order]
    found = []
    for node in np.unique(owners).tolist():
        mine = order[owners == node][:count]
        found.append(Share(node, ordinals[mine], parts[mine], in_s[mine]))
    return found


def next_post_in_s(in_s: Seconds, is_sealed: npt.NDArray[np.bool_], *, is_all: bool) -> float:
    """When a node is to hear again that was told of shards, of which it said which are sealed. Pure.

    Args:
        in_s: when they are needed, ascending.
        is_all: whether these are all that are needed of it; else it is told of more before they are used up.
    """
    if not is_sealed.all():
        return INTERVAL_S
    reach_s = LONGEST_INTERVAL_S if is_all or not len(in_s) else float(in_s[-1]) / 2
    return min(LONGEST_INTERVAL_S, max(INTERVAL_S, reach_s))


class Announcer:
    """One stream's announcements. Threads may share it.

    Args:
        snapshot: that the stream reads.
        replicas: of its dataset.
    """

    def __init__(self, cluster: Cluster, snapshot: Snapshot, replicas: int) -> None:
        self._cluster = cluster
        self._snapshot = snapshot
        self._replicas = replicas
        self._forget()
        _all.add(self)

    def _forget(self) -> None:
        """At the start, and in a fork's child: neither the parent's thread nor its needs are ours."""
        self.stream_id = uuid.uuid4().hex
        self._lock = threading.Lock()  # guards _needs, _waits and _thread
        self._needs: tuple[Ordinals, Ordinals, Seconds, float] | None = None  # with the time that seconds count from
        self._waits: dict[tuple[Cause, str], float] = defaultdict(float)
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._told: dict[str, float] = {}  # by node id: when it is to hear again. Of the thread alone, as is the next
        self._complaints: set[type[Exception]] = set()
        self._finalizer = weakref.finalize(self, self._wake.set)

    def update(self, ordinals: npt.ArrayLike, seconds_from_now: npt.ArrayLike, parts: npt.ArrayLike = 0) -> None:
        """Say what is needed from now on, in the place of what was said before. Returns at once.

        Args:
            ordinals: of shards of the snapshot, in any order; none: nothing is needed. Shape (n,).
            seconds_from_now: when each is needed, as far as anybody can say. Shape (n,).
            parts: which 8 MiB of each shard, counted from 0. Shape (n,).
        """
        shards = np.array(ordinals, np.int64).reshape(-1)
        numbers = np.broadcast_to(np.array(parts, np.int64), shards.shape)
        with self._lock:
            self._needs = shards, numbers, np.array(seconds_from_now, np.float64).reshape(-1), time.monotonic()
            self._start()

    def waited(self, cause: Cause, node_id: str, seconds: float) -> None:
        """Add to how long the consumer waited, for what and for which node ("": none). Returns at once."""
        with self._lock:
            self._waits[cause, stream_post.node_id_or_none(node_id)] += max(0.0, seconds)
            self._start()

    def close(self) -> None:
        """The stream is over: say so to whoever heard of it, within `CLOSE_TIMEOUT_S`. Never raises."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join(CLOSE_TIMEOUT_S)

    def _start(self) -> None:
        if self._thread is None and not self._is_closed:
            self._thread = threading.Thread(
                target=_run, args=(weakref.ref(self), self._wake), name="shoal-announce", daemon=True
            )
            self._thread.start()

    # What follows is done by the thread.

    def announce(self, *, is_over: bool = False) -> None:
        """Tell every node whose time has come; all of them, and that the stream is over, if it `is_over`.

        Never raises: what goes wrong is logged, once a kind.
        """
        try:
            self._announce(is_over=is_over)
        except Exception as error:  # noqa: BLE001 - whatever it is, reads go on without it
            self._complain(error)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def _announce(self, *, is_over: bool) -> None:
        now = time.monotonic()
        with self._lock:
            needs = self._needs
        by_id = self._shares(needs, now) if needs is not None and not is_over else {}
        posts: dict[str, Share | None] = {i: share for i, share in by_id.items() if now >= self._told.get(i, 0.0)}
        for node_id in self._told.keys() - by_id.keys():  # nothing more is needed of these
            posts[node_id] = None
            del self._told[node_id]
        reachable = {node.id: node for node in self._cluster.map.nodes if self._answers(node)}
        home = self._home(reachable, by_id)
        waits: list[Wait] = []
        if home in posts or (home and home not in by_id):  # else its time comes
            waits = self._take_waits()
        if waits:
            posts.setdefault(home, None)
        for node_id, share in posts.items():
            if node_id in reachable:
                self._post(reachable[node_id], share, waits if node_id == home else [], now)

    def _shares(self, needs: tuple[Ordinals, Ordinals, Seconds, float], now: float) -> dict[str, Share]:
        ordinals, parts, in_s, since = needs
        placement = self._cluster.placement(self._snapshot, self._replicas)
        cut = shares(ordinals, parts, in_s - (now - since), placement.firsts(ordinals), count=MAX_NEEDS)
        return {placement.nodes[share.node].id: share for share in cut}

    def _answers(self, node: Node) -> bool:
        return not self._cluster.transport.health.is_open(self._cluster.address_of(node))

    def _home(self, reachable: Mapping[str, Node], by_id: Iterable[str]) -> str:
        """Who hears how long the consumer waited: the local node, or one that is told something anyway; "": nobody."""
        local = self._cluster.local
        if local is not None and local.node_id in reachable:
            return local.node_id
        return next((node_id for node_id in (*by_id, *reachable) if node_id in reachable), "")

    def _take_waits(self) -> list[Wait]:
        with self._lock:
            waits = [Wait(cause, node_id, seconds) for (cause, node_id), seconds in self._waits.items()]
            self._waits.clear()
        now, later = stream_post.clip_waits(waits)
        self._give_back(later)
        return now

    def _give_back(self, waits: Sequence[Wait]) -> None:
        with self._lock:
            for wait in waits:
                self._waits[wait.cause, wait.node_id] += wait.seconds

    def _post(self, node: Node, share: Share | None, waits: list[Wait], now: float) -> None:
        """Tell one node what is needed of it, None: nothing; where that fails, the waits are told later."""
        nothing = np.zeros(0, np.int64)
        ordinals, parts = (share.ordinals, share.parts) if share is not None else (nothing, nothing)
        in_s = share.in_s if share is not None else np.zeros(0)
        table = self._snapshot.shard_table()
        in_ms = np.minimum(in_s * 1000, MAX_AHEAD_MS).astype(np.uint32)
        where = table.rows[ordinals], table.indexes[ordinals], parts.astype(np.uint32)
        post = StreamPost(*where, in_ms, tuple(waits), is_leaving=share is None)
        transport, address = self._cluster.transport, self._cluster.address_of(node)
        try:
            answer = transport.get(
                address,
                stream_post.target(self._snapshot.digest, self.stream_id),
                method="POST",
                content=stream_post.encode(post),
                watch=Watch(transport, address, until=time.monotonic() + POST_TIMEOUT_S, is_hasty=True),
                is_hasty=True,
            )
            self._cluster.note_epoch(answer.epoch)
            if share is not None:
                is_sealed = stream_post.sealed(answer.body, len(ordinals))
                self._told[node.id] = now + next_post_in_s(in_s, is_sealed, is_all=len(ordinals) < MAX_NEEDS)
        except (ShoalError, ValueError) as error:
            if not isinstance(error, InvalidRequest):
                self._give_back(waits)
            if share is not None:
                self._told[node.id] = now + INTERVAL_S
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if isinstance(error, ClusterUnavailable) or type(error) in self._complaints:
            log.debug("what will be read is not told: %s", error)
            return
        self._complaints.add(type(error))
        log.warning("cache nodes are not told what will be read, which only costs speed: %r", error)


def _run(announcer: weakref.ref[Announcer], wake: threading.Event) -> None:
    """The thread: it does not keep its announcer alive, and ends with it."""
    while True:
        ours = announcer()
        if ours is None:
            return  # forgotten by everybody; nodes forget it too
        is_over = ours.is_closed
        ours.announce(is_over=is_over)
        del ours
        if is_over:
            return
        if not wake.wait(INTERVAL_S):
            continue
        wake.clear()


_all: weakref.WeakSet[Announcer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for announcer in _all:
        announcer._finalizer.detach()
        announcer._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
