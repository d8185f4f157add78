"""The ``Cache-Status`` of answers with bytes of shards (RFC 9211): whether the node had them, else where from. Pure."""

from __future__ import annotations

_NAME = "shoal-cachenode"

#: All of it was sealed at the node.
HIT = f"{_NAME}; hit"
#: Some was on its way there, or went through: from the origin, or from another node's cache.
FROM_ORIGIN = f"{_NAME}; fwd=miss; detail=origin"
FROM_PEER = f"{_NAME}; fwd=miss; detail=peer"


def missed(*, from_origin: bool) -> str:
    """Of bytes that the node did not have."""
    return FROM_ORIGIN if from_origin else FROM_PEER
