"""Where the bytes came from that a mount's daemon gave to the kernel, added up.

The rule: plain integers, because this is counted for each READ.
"""

from __future__ import annotations

from shoal.provenance import Observation
from shoal.wire.stream_post import Cause


class Sources(Observation):
    """An observation that keeps sums alone.

    Attributes:
        local_bytes: from the node on this machine, mapped or sent.
        peer_bytes: from other nodes, which had them, or which did not give all of what they were asked for.
        origin_bytes: fetched from the origin for this, by a node or by this process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.local_bytes = self.peer_bytes = self.origin_bytes = 0

    def add(self, cause: Cause, node_id: str, since: float, bytes: int) -> None:
        if cause is Cause.LOCAL:
            self.local_bytes += bytes
        elif cause is Cause.ORIGIN:
            self.origin_bytes += bytes
        else:
            self.peer_bytes += bytes
