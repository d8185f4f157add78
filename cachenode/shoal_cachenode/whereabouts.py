"""Who holds what: for each snapshot, which shards each peer has sealed, as it last said.

A map change gives shards new owners, and somebody still has their bytes. Guessing who would miss some and send the
cluster back to the origin; so every node asks every other one, once a change and now and then, for one bit a shard
(``GET /v1/snapshots/{digest}/held``, docs/wire.md): 125 KB for a million shards.

The rule: what is known here says whom to ask. A peer may have dropped a shard since, so it is asked for what it has
cached, and one that did not answer is taken to hold nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.cluster_map import Node, NodeState
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal_cachenode.node import CacheNode

log = logging.getLogger(__name__)

#: A read that finds no shard here right after a map change waits so long to hear who holds it.
PATIENCE_S = 2.0
#: While an origin fails and many fills ask who else has their shards, an answer of so long ago is new enough.
ANSWER_AGE_S = 0.25

Bits = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def pack(held: Mask) -> bytes:
    """One bit a shard, the first in the highest bit of the first byte."""
    return np.packbits(held).tobytes()


def unpack(data: bytes, count: int) -> Mask:
    """What `pack` made of `count` shards.

    Raises:
        ValueError: it is of another number of shards.
    """
    if len(data) != -(-count // 8):
        raise ValueError(f"{len(data)} bytes do not hold a bit for each of {count} shards")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(np.bool_)


@dataclass(slots=True)
class Known:
    """What peers said of one snapshot: packed bits by node id, those who did not answer left out."""

    epoch: int = -1
    asked_at: float = -1.0
    bits: dict[str, bytes] = field(default_factory=dict)


class Whereabouts:
    """What peers hold, by snapshot digest. Lives on the event loop."""

    def __init__(self, node: CacheNode) -> None:
        self._node = node
        self._known: dict[str, Known] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.get_running_loop()

    def holders(self, digest: str, ordinal: int) -> frozenset[str]:
        """Ids of peers that said they hold a shard."""
        known = self._known.get(digest)  # fills ask in threads, while peers answer
        if known is None:
            return frozenset()
        byte, bit = ordinal >> 3, 0x80 >> (ordinal & 7)
        return frozenset(peer for peer, bits in known.bits.copy().items() if bits[byte] & bit)

    def masks(self, digest: str, count: int) -> Mapping[str, Mask]:
        """For each peer that answered, which of the snapshot's `count` shards it holds."""
        known = self._known.get(digest)  # `room` asks in a thread, while peers answer
        return {peer: unpack(bits, count) for peer, bits in known.bits.copy().items()} if known is not None else {}

    def asked_at(self, digest: str) -> float:
        """When peers were asked last (`time.monotonic`); below 0: never."""
        known = self._known.get(digest)
        return known.asked_at if known is not None else -1.0

    def is_current(self, digest: str) -> bool:
        """Whether peers were asked under the map of now."""
        known = self._known.get(digest)
        return known is not None and known.epoch == self._node.library.knowledge.cluster_map.epoch

    async def settle(self, digest: str) -> None:
        """Wait, for a moment, until it is known who holds what under the map of now."""
        if not self.is_current(digest) and self._peers():
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self.ask(digest)
            except TimeoutError:
                log.warning("it is not known yet who holds what of snapshot %s", digest)

    async def ask(self, digest: str, *, newer_than: float = -1.0) -> None:
        """Ask all peers anew, unless that was done under the map of now and after `newer_than` (`time.monotonic`)."""
        while True:
            known = self._known.get(digest)
            if known is not None and self.is_current(digest) and known.asked_at > newer_than:
                return
            task = self._asking.get(digest)
            if task is None:
                task = self._asking[digest] = asyncio.create_task(self._ask(digest))
                task.add_done_callback(lambda _: self._asking.pop(digest))
            await asyncio.shield(task)

    def ask_from_thread(self, digest: str) -> None:
        """Ask all peers anew, in any other thread than the loop's, and no longer than a reader waits for news of it."""
        newer_than = time.monotonic() - ANSWER_AGE_S
        ask = self.ask(digest, newer_than=newer_than)
        try:
            asking = asyncio.run_coroutine_threadsafe(ask, self._loop)
        except RuntimeError:  # the node has ended
            ask.close()
            return
        try:
            asking.result(PATIENCE_S)
        except (TimeoutError, CancelledError):
            asking.cancel()  # a peer is silent, or the node ends; what the others said is known

    def forget(self, served: set[str]) -> None:
        """Drop what is known of snapshots that are served no more."""
        for digest in set(self._known) - served:
            del self._known[digest]

    async def close(self) -> None:
        for task in list(self._asking.values()):
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    def _peers(self) -> list[Node]:
        nodes = self._node.library.knowledge.cluster_map.nodes
        return [node for node in nodes if node.state is not NodeState.DOWN and node.id != self._node.id]

    async def _ask(self, digest: str) -> None:
        asked_at = time.monotonic()
        epoch = self._node.library.knowledge.cluster_map.epoch
        found: dict[str, bytes] = {}
        try:
            count = (await self._node.library.snapshot(digest)).shard_count()
        except ShoalError as error:
            log.info("snapshot %s is not to be had: %s", digest, error)
        else:
            before = self._known.setdefault(digest, Known())

            async def ask(peer: Node) -> None:
                bits = await asyncio.to_thread(self._ask_peer, peer, digest)
                if bits is not None and len(bits) == -(-count // 8):
                    # Known at once: whoever asks now need not wait for a peer that does not answer.
                    found[peer.id] = before.bits[peer.id] = bits

            await asyncio.gather(*map(ask, self._peers()))
        self._known[digest] = Known(epoch, asked_at, found)

    def _ask_peer(self, peer: Node, digest: str) -> bytes | None:
        headers = {"Via": f"1.1 {self._node.id}"}
        try:
            return self._node.transport.get(peer.address, f"/v1/snapshots/{digest}/held", headers, is_hasty=True).body
        except ShoalError as error:
            log.info("node %s did not say what it holds of snapshot %s: %s", peer.id, digest, error)
            return None
