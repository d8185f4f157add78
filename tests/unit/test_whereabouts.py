"""What peers hold, while they are still saying so. What comes of it: `tests/unit/test_rebalance.py`."""

from __future__ import annotations

import asyncio
from typing import Any

from shoal_cachenode.whereabouts import Known, Whereabouts


class Slow(bytes):
    """What one peer holds; while somebody looks at it, another peer answers."""

    known: Known

    def __getitem__(self, place: Any) -> Any:
        self.known.bits["late"] = bytes([0x80])
        return super().__getitem__(place)


def test_a_thread_may_ask_who_holds_a_shard_while_a_peer_answers() -> None:
    async def holders() -> frozenset[str]:
        found = Whereabouts(None)  # type: ignore[arg-type]
        bits = Slow([0xC0])
        bits.known = found._known["digest"] = Known(bits={"first": bits, "second": bytes([0x40])})
        return found.holders("digest", 1)

    assert asyncio.run(holders()) == {"first", "second"}
