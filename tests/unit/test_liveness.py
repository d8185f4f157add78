"""The thread that probes: there while it has something to do, gone when its transport is closed or nobody's."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Iterator

import pytest

from shoal import health
from shoal.errors import NodeUnavailable
from shoal.transport import Transport
from tests.support.waiting import wait_for

_others: list[threading.Thread] = []


def all_probers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shoal-probe"]


def probers() -> list[threading.Thread]:
    """Those that this test began: others may be of transports that nobody closed, as in a process's `Cluster`."""
    return [thread for thread in all_probers() if thread not in _others]


@pytest.fixture(autouse=True)
def only_ours() -> None:
    _others[:] = all_probers()


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is open is probed again after an hour: whatever ends the thread before is no round of probes."""
    monkeypatch.setattr(health, "MIN_BACKOFF_S", 7200.0)
    monkeypatch.setattr(health, "MAX_BACKOFF_S", 7200.0)


def fail(transport: Transport, address: str) -> None:
    with pytest.raises(NodeUnavailable):
        transport.get(address, "/")
    assert transport.health.is_open(address)


def test_no_thread_is_left_after_close(seldom: None, nobody: str) -> None:
    transport = Transport()
    fail(transport, nobody)
    assert len(probers()) == 1
    wait_for(lambda: transport.health.next_due_at() is not None and not transport.prober._news.is_set())
    transport.close()
    wait_for(lambda: not probers())


def test_close_within_a_round_of_probes(seldom: None, silent: str) -> None:
    transport = Transport()
    for _ in range(20):
        transport.prober.ask(silent)
    transport.close()
    wait_for(lambda: not probers())
    transport.prober.wake()  # a reader that was under way finds somebody silent
    wait_for(lambda: not probers())


def test_a_thread_without_open_circuits_ends_by_itself(silent: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        transport = Transport()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        transport.prober.ask(address)
        wait_for(lambda: not probers())
        assert not transport.health.circuits
        transport.close()


def test_a_transport_that_nobody_uses_can_go(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_BACKOFF_S", 0.1)
    transport = Transport()
    fail(transport, nobody)
    del transport

    def is_gone() -> bool:
        gc.collect()  # again and again: it is the prober's own within a round
        return not probers()

    wait_for(is_gone)
