"""Who scrapes a CSI driver, and who only connects."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from shoal.errors import StoreUnusable
from shoal.wire.process_metrics import Exposition
from shoal_csi import scrapes
from tests.support import metrics
from tests.support.waiting import wait_for


@pytest.fixture
def port() -> Iterator[int]:
    port, close = scrapes.serve(Exposition("p"), "127.0.0.1", 0)
    yield port
    close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def test_connections_are_bounded(port: int) -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(scrapes.MAX_CONNECTIONS):
            stack.enter_context(connect(port))
        for _ in range(3):
            assert stack.enter_context(connect(port)).recv(1) == b"", "one too many"
        assert threading.active_count() <= before + scrapes.MAX_CONNECTIONS
    wait_for(lambda: threading.active_count() == before)
    assert metrics.samples(metrics.scrape(port))


def test_who_is_silent_is_not_waited_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "SILENCE_S", 0.05)
    with connect(port) as silent, connect(port) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert silent.recv(1) == slow.recv(1) == b""


def test_an_address_that_is_taken(port: int) -> None:
    with pytest.raises(StoreUnusable, match="--metrics-listen"):
        scrapes.serve(Exposition("p"), "127.0.0.1", port)
