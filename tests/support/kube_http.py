"""`tests.support.kube.FakeApi` as a server, for processes; on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from aiohttp import web

from shoal_controller.kube import api
from shoal_controller.kube.api import ApiError, Resource
from tests.support.kube import FakeApi

T = TypeVar("T")

_PATH = re.compile(r"/(?:api/v1|apis/[^/]+/[^/]+)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?(?:/(status))?")
_RESOURCES = {
    resource.plural: resource
    for resource in (
        api.DATASETS,
        api.PREFETCHES,
        api.NODES,
        api.PODS,
        api.SECRETS,
        api.EVENTS,
        api.LEASES,
        api.ENDPOINT_SLICES,
    )
}


class KubeHttp:
    """A running server.

    Attributes:
        fake: what it serves; touch it through `call` alone.
        kubeconfig: a file by which programs find it.
    """

    def __init__(self, fake: FakeApi, loop: asyncio.AbstractEventLoop, kubeconfig: Path) -> None:
        self.fake = fake
        self.kubeconfig = kubeconfig
        self._loop = loop

    def call(self, look: Callable[[FakeApi], T]) -> T:
        """`look` at what is there, or change it, on the server's thread."""

        async def looked() -> T:
            return look(self.fake)

        return asyncio.run_coroutine_threadsafe(looked(), self._loop).result(30)

    def status(self, resource: Resource, name: str, namespace: str = "") -> dict[str, Any]:
        def look(fake: FakeApi) -> dict[str, Any]:
            return (
                fake.read(resource, name, namespace).get("status") or {} if fake.has(resource, name, namespace) else {}
            )

        return self.call(look)


@contextmanager
def running(directory: Path) -> Iterator[KubeHttp]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="kube-http", daemon=True)
    thread.start()

    def run(work: Awaitable[T]) -> T:
        async def whole() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(whole(), loop).result(30)

    async def started() -> tuple[FakeApi, web.AppRunner]:
        fake = FakeApi()
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/{path:.*}", _handler(fake))
        # A watch ends with its connection.
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return fake, runner

    fake, runner = run(started())
    kubeconfig = directory / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    users = [{"name": "u", "user": {"token": "t"}}]
    config = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "users": users, "contexts": [context]}
    kubeconfig.write_text(yaml.safe_dump({**config, "current-context": "x"}))
    try:
        yield KubeHttp(fake, loop, kubeconfig)
    finally:
        run(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _handler(fake: FakeApi) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        match = _PATH.fullmatch(request.path)
        if match is None or match[2] not in _RESOURCES:
            return web.json_response({"message": "the server could not find the requested resource"}, status=404)
        namespace, resource, name = match[1] or "", _RESOURCES[match[2]], match[3] or ""
        body = await request.json() if request.can_read_body else None
        try:
            if request.query.get("watch"):
                return await _watch(fake, request, resource, namespace)
            return web.json_response(await _answer(fake, request, resource, namespace, name, match[4] or "", body))
        except ApiError as error:
            return web.json_response({"message": str(error)}, status=error.status or 500)

    return handle


async def _answer(
    fake: FakeApi, request: web.Request, resource: Resource, namespace: str, name: str, subresource: str, body: Any
) -> Any:
    match request.method:
        case "GET" if name:
            return await fake.get(resource, name, namespace=namespace)
        case "GET":
            selector = request.query.get("labelSelector", "")
            listed = await fake.list(resource, selector=selector, namespace=namespace)
            return {"items": listed.items, "metadata": {"resourceVersion": listed.version}}
        case "POST":
            return await fake.create(resource, body, namespace=namespace)
        case "PUT":
            return await fake.replace(resource, body, namespace=namespace)
        case "PATCH":
            return await fake.patch(resource, name, body, namespace=namespace, subresource=subresource)
        case "DELETE":
            await fake.delete(resource, name, namespace=namespace)
            return {}
    raise ApiError(f"{request.method} is not served", 405)


async def _watch(fake: FakeApi, request: web.Request, resource: Resource, namespace: str) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    query = request.query
    watch = fake.watch(resource, query["resourceVersion"], selector=query.get("labelSelector", ""), namespace=namespace)
    try:
        async for watched in watch:
            line = {"type": watched.kind, "object": watched.item}
            await response.write(json.dumps(line).encode() + b"\n")
    except ApiError as error:
        status = {"code": error.status, "message": str(error)}
        await response.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
    return response
