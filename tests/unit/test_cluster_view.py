"""Whom a client asks about the cluster, and what it says where nobody who answers is of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shoal.cluster import Cluster
from shoal.cluster_map import ClusterMap, Node
from shoal.errors import ClusterUnavailable, NotFound, Overloaded
from shoal.wire.http_messages import Request, Response
from shoal.wire.http_server import HttpServer

HTML = b"<html><body><h1>Welcome to nginx!</h1></body></html>"
GOOD_MAP = json.loads(ClusterMap(1, ()).to_json())


class Foreign(ThreadingHTTPServer):
    """Some other HTTP server: answers everything with one status and body."""

    status, body = 200, HTML

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Foreign

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def foreign() -> Iterator[Foreign]:
    with Foreign() as server:
        yield server
        server.shutdown()


@pytest.mark.parametrize("status", [200, 301, 401, 403, 404, 500, 502, 503, 504])
def test_a_foreign_server_is_named_and_its_page_is_not_shown(foreign: Foreign, status: int) -> None:
    foreign.status, foreign.body = status, HTML
    with pytest.raises(ClusterUnavailable, match="no Shoal process") as caught:
        Cluster(foreign.endpoint, use_local=False)
    said = str(caught.value)
    assert foreign.endpoint.removeprefix("http://") in said and "SHOAL_ENDPOINT" in said
    assert "html" not in said and "\n" not in said


@pytest.mark.parametrize(
    "document",
    [
        None,
        7,
        "text",
        [],
        {},
        {"map": GOOD_MAP},
        {"map": GOOD_MAP, "epoch": None},
        {"map": GOOD_MAP, "epoch": "1"},
        {"map": {"epoch": 1}, "epoch": 1},
        {"map": {"epoch": float("inf"), "nodes": []}, "epoch": 1},
        {"map": {"epoch": 1, "nodes": [{"id": "n"}]}, "epoch": 1},
        {"map": {"epoch": 1, "nodes": ["n"]}, "epoch": 1},
    ],
    ids=json.dumps,
)
def test_json_that_is_no_cluster_is_a_foreign_servers(foreign: Foreign, document: object) -> None:
    foreign.status, foreign.body = 200, json.dumps(document).encode()
    with pytest.raises(ClusterUnavailable, match=f"127.0.0.1:{foreign.server_port} is no Shoal process"):
        Cluster(foreign.endpoint, use_local=False)


class Processes:
    """HTTP servers of Shoal, each with a handler that tests change."""

    def __init__(self, count: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.asked: list[int] = []
        self.handlers: list[Callable[[Request], Response]] = [self.serve_document] * count
        self._servers = [HttpServer(self._handler(number), epoch=lambda: 1) for number in range(count)]
        self.addresses = [f"127.0.0.1:{self._run(each.listen_tcp('127.0.0.1', 0))}" for each in self._servers]

    def _run(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def _handler(self, number: int):  # type: ignore[no-untyped-def]
        async def handle(request: Request) -> Response:
            if request.path != "/v1/alive":
                self.asked.append(number)
            return self.handlers[number](request)

        return handle

    def serve_document(self, request: Request) -> Response:
        """All but the last are nodes; the last one is the controller."""
        nodes = tuple(Node(f"n{i}", address, 1, {}) for i, address in enumerate(self.addresses[:-1]))
        cluster_map = json.loads(ClusterMap(1, nodes).to_json())
        document = {"map": cluster_map, "epoch": 1, "controller_http": self.addresses[-1]}
        return Response(200, {}, json.dumps(document).encode())

    def close(self) -> None:
        for server in self._servers:
            self._run(server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def three() -> Iterator[Processes]:
    processes = Processes(3)
    yield processes
    processes.close()


def overloaded(request: Request) -> Response:
    raise Overloaded("no room now")


def absent(request: Request) -> Response:
    raise NotFound("not heard of")


def good(request: Request) -> Response:
    return Response(200, {}, b"good")


def test_who_is_overloaded_is_passed_over(three: Processes) -> None:
    view = Cluster(three.addresses[0], use_local=False)
    three.handlers[:] = [overloaded, good, good]
    three.asked.clear()
    assert view.ask("/v1/datasets").body == b"good"
    assert three.asked == [0, 1]


def test_where_all_are_overloaded_each_is_asked_again_and_the_sentence_says_so(three: Processes) -> None:
    view = Cluster(three.addresses[0], use_local=False)
    three.handlers[:] = [overloaded] * 3
    for is_patient, asked in ((True, [0, 1, 0, 1]), (False, [0, 1])):
        three.asked.clear()
        with pytest.raises(ClusterUnavailable, match=f"{three.addresses[0]}: no room now") as caught:
            view.ask("/v1/datasets", is_patient=is_patient)
        assert isinstance(caught.value.__cause__, Overloaded)
        assert three.asked == asked
    view.refresh_map()  # keeps the old one
    assert view.map.epoch == 1 and len(view.map.nodes) == 2


def test_a_controller_that_is_overloaded_does_not_change_what_a_node_said(three: Processes) -> None:
    view = Cluster(three.addresses[0], use_local=False)
    three.handlers[:] = [absent, good, good]
    assert view.ask("/v1/x").body == b"good", "a second opinion"
    three.handlers[2] = overloaded
    with pytest.raises(NotFound, match="not heard of"):
        view.ask("/v1/x")


def document(cluster_id: str, epoch: int, *addresses: str) -> bytes:
    nodes = tuple(Node(f"{cluster_id}{number}", address, 1) for number, address in enumerate(addresses))
    cluster_map = json.loads(ClusterMap(epoch, nodes).to_json())
    return json.dumps({"epoch": epoch, "map": cluster_map, "cluster_id": cluster_id}).encode()


def test_a_controller_that_lost_its_record_is_followed_and_nodes_that_have_not_heard_are_not() -> None:
    """Its epochs begin anew, and so would be taken for old ones."""
    with Foreign() as controller, Foreign() as node:
        address = node.endpoint.removeprefix("http://")
        controller.body = document("old", 50, address)
        ours = Cluster(controller.endpoint, use_local=False)
        assert (ours.map.epoch, ours.map.nodes[0].id) == (50, "old0")
        node.body = document("old", 51, address)
        controller.body = document("new", 2, address)
        assert ours.newer_map(50), "there is another one"
        assert (ours.map.epoch, ours.map.nodes[0].id) == (2, "new0")
        ours.note_epoch(51)  # says the node, which has not heard yet
        assert ours.map.nodes[0].id == "new0"
        controller.status, controller.body = 503, b""
        ours.note_epoch(51)
        assert ours.map.nodes[0].id == "new0", "the node alone is no proof"
        controller.status, controller.body = 200, document("new", 3, address)
        assert ours.newer_map(2) and ours.map.epoch == 3
        for server in (controller, node):
            server.shutdown()
