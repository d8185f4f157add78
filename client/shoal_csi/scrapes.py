"""Answers Prometheus, from threads of its own.

`prometheus_client.start_http_server` has a thread for each connection and waits for each for ever, so that whoever can
connect could have a process of root's hold as many as he likes.

The rule: so many connections at a time, and none that is silent for long.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from shoal.errors import StoreUnusable
from shoal.wire.process_metrics import Exposition

#: Connections at a time; one too many is closed. Prometheus has one, or two where it is two.
MAX_CONNECTIONS = 16
#: That a peer may be silent.
SILENCE_S = 10.0


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(SILENCE_S)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody wants a line a scrape."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread is to be had
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that left, or was silent: its connection is closed, and that is all."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def serve(exposition: Exposition, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answer scrapes; the port, and what ends that.

    Raises:
        StoreUnusable: the address cannot be used.
    """
    kind = _Server6 if ":" in host else _Server
    try:
        server = make_server(host, port, make_wsgi_app(exposition.registry), kind, _Handler)
    except OSError as error:
        raise StoreUnusable(
            f"cannot listen on {host}:{port} ({error.strerror or error}): name another address with --metrics-listen"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="shoal-scrapes", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return int(server.server_port), close
