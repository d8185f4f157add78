"""The HTTP routes that cache nodes and the controller share: cluster, datasets, resolve, snapshots, health, metrics.

Each server says what it knows through a `ClusterView`; what a path means is written once, here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from shoal import datasets
from shoal.datasets import DatasetRecord
from shoal.errors import DatasetNotFound, InvalidRequest, NotFound, SnapshotNotFound
from shoal.wire.byte_range import ByteRange
from shoal.wire.http_messages import FileSlice, Request, Response
from shoal.wire.http_server import Handler, MethodNotAllowed

JSON = "application/json"
ARROW_FILE = "application/vnd.apache.arrow.file"


class ClusterView(Protocol):
    """What a server knows of the cluster."""

    def epoch(self) -> int: ...

    def cluster(self) -> dict[str, Any]:
        """The document of ``/v1/cluster`` (docs/wire.md)."""
        ...

    def datasets(self) -> list[DatasetRecord]: ...

    async def resolve(self, url: str, endpoint: str) -> tuple[DatasetRecord, str] | None:
        """The dataset over `url` and the path in it; None, or a `DatasetNotFound` that says what to type."""
        ...

    async def snapshot_path(self, digest: str, *, may_fetch: bool) -> Path:
        """The file of a snapshot. Raises SnapshotNotFound."""
        ...

    async def check_origin(self, name: str) -> dict[str, Any]:
        """What comes of a read of a dataset's origin from here: `shoal.origin.check`. Raises DatasetNotFound."""
        ...

    def stalled(self) -> str | None:
        """None while whatever is asked of this process can be answered; else a sentence (docs/wire.md, "Probes")."""
        ...

    def ready(self) -> str | None:
        """None when ready to serve, else a sentence that says what is missing."""
        ...


def make_handler(
    view: ClusterView,
    metrics: Callable[[], bytes],
    otherwise: Callable[[Request], Awaitable[Response]] | None = None,
) -> Handler:
    """A handler for the shared routes; requests that match none go to `otherwise`.

    Args:
        view: what the server knows.
        metrics: returns the Prometheus text.
        otherwise: the server's own routes; None: 404.
    """

    async def handle(request: Request) -> Response:
        parts = request.path.split("/")[1:]
        if request.method == "POST" and not (otherwise is not None and _takes_posts(parts)):
            raise MethodNotAllowed("POST", "GET, HEAD")
        match parts:
            case ["v1", "snapshots", digest]:
                return await _snapshot(view, request, digest)
            case ["v1", "snapshots", *_] if otherwise is not None:
                return await otherwise(request)
            case ["v1", "cluster"]:
                return _json(view.cluster())
            case ["v1", "datasets"]:
                return _json([record.to_dict() for record in view.datasets()])
            case ["v1", "datasets", name]:
                return _json(_dataset(view, unquote(name)).to_dict())
            case ["v1", "datasets", name, "origin"]:
                return _json(await view.check_origin(_dataset(view, unquote(name)).name))
            case ["v1", "resolve"]:
                return await _resolve(view, request)
            case ["v1", "alive"]:
                stalled = view.stalled()  # not 503, which a server that is only too busy gives to whoever comes
                return _text(507 if stalled else 200, stalled or "alive")
            case ["healthz"]:
                return _text(200, "ok")
            case ["readyz"]:
                missing = view.ready()
                return _text(503 if missing else 200, missing or "ready")
            case ["metrics"]:
                return Response(200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}, metrics())
        raise NotFound(f"nothing is served at {request.path!r}: see docs/wire.md for the paths")

    return handle


def _takes_posts(parts: list[str]) -> bool:
    """Whether a path is one of a cache node's that are posted to."""
    match parts:
        case ["v1", "snapshots", *_, "ranges"] | ["v1", "snapshots", _, "streams", _]:
            return True
    return False


def _json(value: object) -> Response:
    return Response(200, {"Content-Type": JSON}, json.dumps(value).encode())


def _text(status: int, sentence: str) -> Response:
    return Response(status, {"Content-Type": "text/plain; charset=utf-8"}, f"{sentence}\n".encode())


def _dataset(view: ClusterView, name: str) -> DatasetRecord:
    records = view.datasets()
    for record in records:
        if record.name == name:
            return record
    raise DatasetNotFound(unknown_dataset(name, records))


def unknown_dataset(name: str, records: list[DatasetRecord]) -> str:
    """The sentence for a dataset that is not there; it names the ones that are."""
    names = [record.name for record in records if not record.adhoc]
    known = f"the cluster has {', '.join(names[:10])}" if names else "the cluster has none yet"
    return f"no dataset is named {name!r}: {known}; 'shoal dataset add {name} ORIGIN_URL' registers one"


async def _resolve(view: ClusterView, request: Request) -> Response:
    url = request.query.get("url", "")
    if not url:
        raise InvalidRequest("resolve needs ?url=ORIGIN_URL")
    found = await view.resolve(url, request.query.get("endpoint", ""))
    if found is None:
        raise DatasetNotFound(not_registered(url))
    record, path = found
    return _json({"dataset": record.to_dict(), "path": path})


def not_registered(url: str) -> str:
    """The sentence for an origin URL that no dataset lies over, with the line to type."""
    prefix = url.rsplit("/", 1)[0] if url.count("/") > 3 else url
    return f"no dataset lies over {url}: register one with 'shoal dataset add NAME {prefix}'"


async def _snapshot(view: ClusterView, request: Request, digest: str) -> Response:
    path = await view.snapshot_path(datasets.check_digest(digest), may_fetch="via" not in request.headers)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # it went while this was looked up
        raise SnapshotNotFound(f"snapshot {digest} is not here any more: ask another node") from None
    try:
        size_bytes = os.fstat(fd).st_size
        headers = {"Content-Type": ARROW_FILE, "ETag": f'"{digest}"'}
        if request.is_local and "shoal-descriptor" in request.headers:
            return Response(200, headers, FileSlice(fd, 0, size_bytes, lambda: os.close(fd)), pass_descriptor=True)
        wanted = ByteRange.parse(request.headers.get("range"), size_bytes)
        body = FileSlice(fd, wanted.start, wanted.end - wanted.start, lambda: os.close(fd))
        return Response(wanted.status, headers | wanted.headers(size_bytes), body)
    except BaseException:
        os.close(fd)
        raise
