"""Requests to an API server: what goes over the wire, and what failures become."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import kubernetes.client
import pytest
from aiohttp import web

from shoal.errors import ShoalError
from shoal_controller.kube import api
from shoal_controller.kube import informer as informer_module
from shoal_controller.kube.api import DATASETS, LEASES, NODES, PODS, PREFETCHES, Answered, ApiError, HttpApi, Watched
from shoal_controller.kube.informer import Informer
from tests.support.kube import FakeApi

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def with_server(
    handler: Handler, test: Callable[[HttpApi], Awaitable[None]], answered: Answered = lambda *_: None
) -> None:
    async def whole() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        configuration = kubernetes.client.Configuration()
        configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        configuration.api_key["authorization"] = "Bearer secret"
        client = HttpApi(configuration, answered)
        try:
            async with asyncio.timeout(20):
                await test(client)
        finally:
            await client.close()
            await runner.cleanup()

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("resource", "words", "path"),
    [
        (DATASETS, {"name": "d"}, "/apis/shoal.io/v1alpha1/datasets/d"),
        (DATASETS, {"name": "d", "namespace": "ignored"}, "/apis/shoal.io/v1alpha1/datasets/d"),
        (PREFETCHES, {}, "/apis/shoal.io/v1alpha1/prefetches"),
        (
            PREFETCHES,
            {"namespace": "a", "name": "b", "subresource": "status"},
            "/apis/shoal.io/v1alpha1/namespaces/a/prefetches/b/status",
        ),
        (PODS, {"namespace": "a/b"}, "/api/v1/namespaces/a%2Fb/pods"),
        (NODES, {}, "/api/v1/nodes"),
        (LEASES, {"namespace": "a", "name": "l"}, "/apis/coordination.k8s.io/v1/namespaces/a/leases/l"),
    ],
)
def test_paths(resource: api.Resource, words: dict[str, str], path: str) -> None:
    assert resource.path(**words) == path


def test_requests_say_who_asks_and_what_they_send() -> None:
    seen: list[tuple[str, str, str, str, Any]] = []

    async def handler(request: web.Request) -> web.Response:
        body = await request.read()
        headers = request.headers
        seen.append(
            (
                request.method,
                request.path,
                headers.get("Authorization", ""),
                headers.get("Content-Type", ""),
                json.loads(body) if body else None,
            )
        )
        return web.json_response({"metadata": {"name": "x"}})

    async def test(client: HttpApi) -> None:
        await client.get(DATASETS, "x")
        await client.patch(DATASETS, "x", {"status": {}}, subresource="status")
        await client.create(PODS, {"metadata": {"name": "x"}}, namespace="a")
        await client.delete(PODS, "x", namespace="a", uid="u1")

    with_server(handler, test)
    token, pods = "Bearer secret", "/api/v1/namespaces/a/pods"
    assert seen == [
        ("GET", "/apis/shoal.io/v1alpha1/datasets/x", token, "", None),
        ("PATCH", "/apis/shoal.io/v1alpha1/datasets/x/status", token, "application/merge-patch+json", {"status": {}}),
        ("POST", pods, token, "application/json", {"metadata": {"name": "x"}}),
        ("DELETE", f"{pods}/x", token, "application/json", {"preconditions": {"uid": "u1"}}),
    ]


def test_a_long_list_comes_in_pages() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.query["labelSelector"] == "shoal.io/datasets"
        if "continue" not in request.query:
            metadata = {"resourceVersion": "5", "continue": "more"}
            return web.json_response({"items": [{"n": 1}], "metadata": metadata})
        assert request.query["continue"] == "more"
        return web.json_response({"items": [{"n": 2}], "metadata": {"resourceVersion": "5"}})

    async def test(client: HttpApi) -> None:
        listed = await client.list(PODS, selector="shoal.io/datasets")
        assert (listed.items, listed.version) == ([{"n": 1}, {"n": 2}], "5")

    with_server(handler, test)


def test_a_watch_is_lines_however_they_arrive() -> None:
    large = {"type": "MODIFIED", "object": {"metadata": {"name": "x" * 300_000}}}
    lines = [{"type": "ADDED", "object": {"metadata": {"name": "a"}}}, large]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    async def handler(request: web.Request) -> web.StreamResponse:
        assert (request.query["watch"], request.query["resourceVersion"]) == ("true", "7")
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(content), 70_001):
            await response.write(content[start : start + 70_001])
        return response

    async def test(client: HttpApi) -> None:
        found = [watched async for watched in client.watch(PODS, "7")]
        assert found == [Watched(line["type"], line["object"]) for line in lines]

    with_server(handler, test)


def test_a_watch_that_expired_says_so() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.query["resourceVersion"] == "1":
            return web.json_response({"message": "gone"}, status=410)
        return web.Response(body=b'{"type": "ERROR", "object": {"code": 410, "message": "too old"}}\n')

    async def test(client: HttpApi) -> None:
        for version in ("1", "2"):
            with pytest.raises(ApiError) as caught:
                async for _ in client.watch(PODS, version):
                    raise AssertionError
            assert caught.value.has_expired

    with_server(handler, test)


def test_refusals_keep_the_servers_words() -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.json_response({"message": 'datasets.shoal.io "x" not found'}, status=404)
        return web.Response(status=502, text="<html>bad gateway")

    async def test(client: HttpApi) -> None:
        with pytest.raises(ApiError, match=r'datasets.shoal.io "x" not found .HTTP 404') as caught:
            await client.get(DATASETS, "x")
        assert caught.value.is_missing
        with pytest.raises(ApiError, match=r"<html>bad gateway .HTTP 502"):
            await client.patch(DATASETS, "x", {})

    counted: list[tuple[str, str, int]] = []
    with_server(handler, test, lambda verb, resource, status, seconds: counted.append((verb, resource, status)))
    assert counted == [("get", "datasets", 404), ("patch", "datasets", 502)]


def test_a_server_that_is_not_there() -> None:
    async def test() -> None:
        configuration = kubernetes.client.Configuration()
        configuration.host = "http://127.0.0.1:9"
        counted: list[tuple[str, int]] = []
        client = HttpApi(configuration, lambda verb, resource, status, seconds: counted.append((verb, status)))
        try:
            with pytest.raises(ApiError, match="does not answer") as caught:
                await client.get(DATASETS, "x")
            assert caught.value.status == 0
            with pytest.raises(ApiError, match="does not answer"):
                async for _ in client.watch(DATASETS, "1"):
                    raise AssertionError
            assert counted == [("get", 0), ("watch", 0)]
        finally:
            await client.close()

    asyncio.run(test())


def test_without_any_configuration_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ShoalError, match="name a kubeconfig in KUBECONFIG"):
        asyncio.run(HttpApi.connect())


def test_an_informer_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(informer_module, "FIRST_RETRY_S", 0.01)

    async def test() -> None:
        server = FakeApi()
        changed = asyncio.Event()
        server.put(PODS, {"metadata": {"name": "a", "namespace": "x", "labels": {"l": ""}}})
        server.put(PODS, {"metadata": {"name": "other", "namespace": "x"}})
        restarts: list[tuple[str, str]] = []
        on_restart = lambda resource, why: restarts.append((resource, why))  # noqa: E731
        informer = Informer(server, PODS, changed.set, selector="l", on_restart=on_restart)
        keeping = asyncio.create_task(informer.keep())

        async def until(names: set[str]) -> None:
            while {name for _, name in informer.objects} != names:
                changed.clear()
                await changed.wait()

        async with asyncio.timeout(20):
            await informer.synced.wait()
            await until({"a"})
            assert informer.objects["x", "a"]["kind"] == "Pod"
            server.put(PODS, {"metadata": {"name": "b", "namespace": "x", "labels": {"l": ""}}})
            await until({"a", "b"})
            server.remove(PODS, "a", "x")
            await until({"b"})
            # What is not kept is no change.
            changed.clear()
            item = server.read(PODS, "b", "x")
            item["metadata"]["managedFields"] = [{"manager": "kubectl"}]
            server.put(PODS, item)
            version = server.read(PODS, "b", "x")["metadata"]["resourceVersion"]
            while informer.objects["x", "b"]["metadata"]["resourceVersion"] != version:
                await asyncio.sleep(0)
            assert not changed.is_set()
            # A watch whose version is too old begins with a new list.
            server.forget_history(PODS)
            server.put(PODS, {"metadata": {"name": "c", "namespace": "x", "labels": {"l": ""}}})
            await until({"b", "c"})
            assert ("pods", "expired") in restarts
        keeping.cancel()

    asyncio.run(test())


def test_an_answer_does_not_undo_what_is_newer() -> None:
    informer = Informer(FakeApi(), PODS, lambda: None)
    new = {"metadata": {"name": "a", "namespace": "x", "resourceVersion": "10"}}
    informer.put(new)
    informer.put({"metadata": {"name": "a", "namespace": "x", "resourceVersion": "9"}})
    assert informer.objects["x", "a"] == new
