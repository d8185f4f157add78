"""A value that many wait for, of which only the newest matters.

The rule: a slow reader misses versions, never the last one, and holds nothing up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """For one event loop."""

    def __init__(self, value: T) -> None:
        self.value = value
        self.version = 1
        self._changed = asyncio.Event()

    def publish(self, value: T) -> None:
        self.value = value
        self.version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def newer_than(self, version: int) -> tuple[int, T]:
        """The newest version and its value, as soon as it is newer than `version`; 0 gives the present one."""
        while self.version <= version:
            await self._changed.wait()
        return self.version, self.value

    async def until(self, holds: Callable[[T], bool]) -> T:
        """The first value that is seen to satisfy `holds`."""
        version, value = self.version, self.value
        while not holds(value):
            version, value = await self.newer_than(version)
        return value
