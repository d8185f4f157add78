"""What peers hold, while they are still saying so. What comes of it: `tests/unit/test_rebalance.py`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from shoal_cachenode import whereabouts
from shoal_cachenode.whereabouts import Known, Whereabouts
from tests.support.minicluster import MiniCluster


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


def test_what_a_peer_got_while_an_origin_was_tried_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of an origin that fails is tried for 20 s, and others' failures have asked the peers meanwhile."""
    monkeypatch.setattr(whereabouts, "ANSWER_AGE_S", 0.0)
    objects = {f"o{number}": b"x" * 100 for number in range(40)}
    with MiniCluster(tmp_path, objects, nodes=2, rebalance_rate=0) as cluster:
        asking, filling = cluster.nodes
        found, digest = asking.whereabouts, cluster.snapshot.digest
        cluster.run(found.ask(digest))
        fs = cluster.filesystem(node=1)
        assert {path: fs.cat_file(f"set/{path}") for path in objects} == objects
        cluster.run(filling.fills.settle())
        found.ask_from_thread(digest)
        assert any(filling.id in found.holders(digest, ordinal) for ordinal in range(len(objects)))
