"""Memory that is free inside the process goes back to the kernel, and not only what lies at the end of the heap.

A node's threads fetch parts of all sizes, and glibc keeps for each arena what its busiest moment took. Over days
of bursts that adds up to several times of what is in use, on machines whose memory is the trainers'.

The rule: nothing depends on it. Other C libraries keep memory as they like.
"""

from __future__ import annotations

import asyncio
import ctypes

import pyarrow as pa

#: Arenas that glibc makes; by default eight a processor, each of which keeps a part or two. Threads that share one wait
#: for each other for less than they wait for Python's own lock.
ARENAS = 2
#: Pages that are given back are faulted in again by the next burst, so not more often.
INTERVAL_S = 10.0

_M_ARENA_MAX = -8  # mallopt(3)
_library = ctypes.CDLL(None)
_trim = getattr(_library, "malloc_trim", None)  # malloc_trim(3): glibc alone


def share_arenas() -> None:
    """Have all threads allocate from a few arenas, and Arrow too. To be called before there are threads.

    Arrow's own allocators keep free pages for each thread, and give back only those of the thread that asks.
    """
    if _trim is not None:
        _library.mallopt(_M_ARENA_MAX, ARENAS)
        pa.set_memory_pool(pa.system_memory_pool())


def give_back() -> None:
    """Give free pages of all arenas back. Takes milliseconds, in which other threads may run."""
    if _trim is not None:
        _trim(0)


async def keep_giving_back() -> None:
    """For ever, until cancelled."""
    while True:
        await asyncio.sleep(INTERVAL_S)
        await asyncio.to_thread(give_back)
