"""The paths of the data plane, and who answers them (docs/wire.md)."""

from __future__ import annotations

from shoal import datasets
from shoal.errors import NotFound
from shoal.wire.http_messages import Request, Response
from shoal.wire.http_server import Handler, MethodNotAllowed
from shoal_cachenode.batches import Batches
from shoal_cachenode.data_plane import DataPlane
from shoal_cachenode.node import CacheNode


def make_handler(node: CacheNode) -> Handler:
    """A handler for the paths that only cache nodes serve."""
    plane = DataPlane(node)
    batches = Batches(plane, node)

    async def handle(request: Request) -> Response:
        match request.path.split("/")[1:]:
            case ["v1", "snapshots", digest, "rows", row, "shards", index] if _is_number(row) and _is_number(index):
                return await plane(request, datasets.check_digest(digest), int(row), int(index))
            case ["v1", "snapshots", digest, "ranges"]:
                if request.method != "POST":
                    raise MethodNotAllowed(request.method, "POST")
                return await batches(request, datasets.check_digest(digest))
        raise NotFound(f"nothing is served at {request.path!r}: see docs/wire.md for the paths")

    return handle


def _is_number(text: str) -> bool:
    """Whether `text` is a row or an index as this server writes them: digits, fewer than Python refuses to count."""
    return text.isascii() and text.isdigit() and len(text) < 20
