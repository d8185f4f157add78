"""Fills: what becomes of one that nobody waits for any more."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading
from pathlib import Path
from typing import Any

import pytest

from shoal_cachenode.fill import Fills
from shoal_cachenode.origin_budget import OriginBudget, Rate
from shoal_cachenode.scheduler import Urgency
from shoal_cachenode.source import Nobody
from shoal_cachenode.store import Store

KEY = bytes(16)


def test_a_fill_that_cannot_begin_when_its_readers_have_left_is_no_error_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, 1000, part_size=64)
    partial = store.begin(KEY, 100)
    partial.open()
    store.suspend(partial)
    may_fail, told = threading.Event(), []

    def fails(*_: Any) -> None:
        assert may_fail.wait(20)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "begin", fails)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        fills = Fills(store, 2, on_sealed=lambda key: None)
        budget = OriginBudget(2, Rate(), fills.on_room)
        joining = asyncio.create_task(fills.join(KEY, 100, Nobody(), budget, Urgency.DEMAND, 0))
        while not fills.count:
            await asyncio.sleep(0)
        joining.cancel()
        await asyncio.wait([joining])
        may_fail.set()
        while fills.count:
            await asyncio.sleep(0.01)
        await fills.close()
        gc.collect()

    asyncio.run(main())
    gc.collect()
    assert told == []
    store.close()
