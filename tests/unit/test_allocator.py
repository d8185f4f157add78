"""What a burst of threads leaves in their arenas goes back to the kernel."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shoal_cachenode import allocator
from tests.support.processes import Child, Say


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(allocator._trim is None, reason="the C library has no malloc_trim")
def test_free_memory_of_all_arenas_goes_back() -> None:
    def burst(say: Say) -> tuple[int, int]:
        pins: list[bytearray] = []

        def work() -> None:
            held = [bytearray(40_000) for _ in range(2000)]
            pins.append(held[-1])  # the end of the arena stays in use, so what is free before it does not go by itself

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = anonymous_bytes()
        allocator.give_back()
        return before, anonymous_bytes()

    with Child(burst) as child:
        before, after = child.heard()
    assert before - after > 100 << 20
