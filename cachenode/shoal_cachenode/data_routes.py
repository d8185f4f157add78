"""The paths of the data plane, and who answers them (docs/wire.md)."""

from __future__ import annotations

from shoal import datasets
from shoal.errors import NotFound, SnapshotNotFound
from shoal.wire.http_messages import Request, Response
from shoal.wire.http_server import Handler, MethodNotAllowed
from shoal_cachenode import whereabouts
from shoal_cachenode.batches import Batches
from shoal_cachenode.data_plane import BINARY, DataPlane
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
            case ["v1", "snapshots", digest, "held"]:
                return await held(node, request, datasets.check_digest(digest))
        raise NotFound(f"nothing is served at {request.path!r}: see docs/wire.md for the paths")

    return handle


async def held(node: CacheNode, request: Request, digest: str) -> Response:
    """One bit for each shard of a snapshot: whether it is sealed here."""
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed(request.method, "GET, HEAD")
    node.library.knowledge.dataset_of(digest)
    holdings = await node.holdings_of(digest)
    if holdings is None:
        raise SnapshotNotFound(f"snapshot {digest} is not here yet: ask another node")
    return Response(200, {"Content-Type": BINARY}, whereabouts.pack(holdings.held))


def _is_number(text: str) -> bool:
    """Whether `text` is a row or an index as this server writes them: digits, fewer than Python refuses to count."""
    return text.isascii() and text.isdigit() and len(text) < 20
