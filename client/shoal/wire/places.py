"""Which shards the descriptors of one answer are of: the ``Shoal-Descriptors`` header (docs/wire.md). Pure."""

from __future__ import annotations

from collections.abc import Iterable

Place = tuple[int, int, int]
"""(row, index of the shard, its length in bytes)."""


def format_places(places: Iterable[Place]) -> str:
    """``row/index/length`` of each, by commas."""
    return ",".join(f"{row}/{index}/{length}" for row, index, length in places)


def parse_places(text: str) -> list[Place]:
    """Parse what `format_places` gave. Raises ValueError."""
    places = []
    for place in text.split(","):
        row, index, length = place.split("/")
        places.append((int(row), int(index), int(length)))
    return places
