"""The paths of the data plane, and who answers them (docs/wire.md)."""

from __future__ import annotations

from shoal import datasets
from shoal.errors import NotFound, SnapshotNotFound
from shoal.wire import routes, stream_post
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
            case ["v1", "snapshots", digest, "streams", stream_id]:
                return await hear_stream(node, request, datasets.check_digest(digest), stream_id)
            case ["v1", "snapshots", digest, "index"]:
                return await index_of(node, request, datasets.check_digest(digest))
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


async def index_of(node: CacheNode, request: Request, digest: str) -> Response:
    """The index of the samples of a selection (`shoal.streaming.index`); 202 while it is built."""
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed(request.method, "GET, HEAD")
    found = await node.indexes.get(digest, request.query.get("pattern", ""), request.query.get("format", ""))
    if found is None:
        return Response(202, {"Retry-After": "1", "Content-Type": "text/plain; charset=utf-8"}, b"it is being built\n")
    return Response(200, {"Content-Type": routes.ARROW_FILE, "ETag": f'"{found.digest}"'}, found.body)


async def hear_stream(node: CacheNode, request: Request, digest: str, stream_id: str) -> Response:
    """Take what a stream needs, and how long it waited; one bit for each need: whether it is sealed here."""
    if request.method != "POST":
        raise MethodNotAllowed(request.method, "POST")
    post = stream_post.decode(request.body)
    answer = await node.streams.hear(digest, stream_post.check_stream_id(stream_id), post)
    return Response(200, {"Content-Type": BINARY}, answer)


def _is_number(text: str) -> bool:
    """Whether `text` is a row or an index as this server writes them: digits, fewer than Python refuses to count."""
    return text.isascii() and text.isdigit() and len(text) < 20
