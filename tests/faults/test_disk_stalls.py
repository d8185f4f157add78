"""A node whose drive hangs: it answers whatever needs no drive, and reads of its files do not return."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.wire import http_connection
from shoal_cachenode import data_plane
from shoal_cachenode.node import CacheNode
from shoal_cachenode.sealed_file import Damage
from tests.faults.test_grey_nodes import PLAIN, SANE_S, Grey
from tests.support.proxy import FaultProxy
from tests.support.waiting import wait_for


class HungDrive:
    """From `hang` to `recover`, bytes of files below a node's directory are not in the page cache and do not come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = ""
        self._works = threading.Event()
        self._works.set()
        warm, resident = data_plane.warm, http_connection.is_resident

        def hung_warm(source: int, offset: int, length: int) -> Damage | None:
            if self._is_hung(source):
                self._works.wait()
            return warm(source, offset, length)

        def hung_is_resident(source: int, offset: int, length: int) -> bool:
            return not self._is_hung(source) and resident(source, offset, length)

        monkeypatch.setattr(data_plane, "warm", hung_warm)
        monkeypatch.setattr(http_connection, "is_resident", hung_is_resident)

    def _is_hung(self, source: int) -> bool:
        path = str(Path(f"/proc/self/fd/{source}").readlink())
        return not self._works.is_set() and path.startswith(self._directory)

    def hang(self, node: CacheNode) -> None:
        self._directory = str(node.config.data_dir)
        self._works.clear()

    def recover(self) -> None:
        self._works.set()


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Iterator[HungDrive]:
    drive = HungDrive(monkeypatch)
    yield drive
    drive.recover()


@contextmanager
def hung_owner(directory: Path, drive: HungDrive, replicas: int) -> Iterator[tuple[Grey, FaultProxy, list[str]]]:
    """Three warm nodes, one of whose drives hangs; its proxy, and what it is the first owner of."""
    grey = Grey(directory, replicas)
    try:
        grey.warm()
        proxy, owned = grey.victim()
        drive.hang(next(node for node in grey.cluster.nodes if node.address == proxy.address))
        yield grey, proxy, owned
    finally:
        drive.recover()
        grey.close()


def test_hung_drive_is_hedged_by_the_other_copy(tmp_path: Path, drive: HungDrive) -> None:
    with hung_owner(tmp_path, drive, 2) as (grey, _, owned):
        fs = grey.filesystem()
        before = grey.cluster.origin.bytes_read
        began = time.monotonic()
        for path in owned * 3:
            assert fs.cat_file(f"set/{path}") == PLAIN[path]
        assert time.monotonic() - began < SANE_S
        assert grey.cluster.origin.bytes_read == before


def test_node_says_that_its_drive_hangs_and_is_asked_again_when_it_does_not(tmp_path: Path, drive: HungDrive) -> None:
    """The only copy lies on the drive: the bytes come through another node from the origin, before the node itself has
    given the drive up."""
    with hung_owner(tmp_path, drive, 1) as (grey, proxy, owned):
        fs = grey.filesystem()
        began = time.monotonic()
        assert fs.cat_file(f"set/{owned[0]}") == PLAIN[owned[0]]
        assert time.monotonic() - began < SANE_S
        health = fs.cluster.transport.health
        assert health.reason(proxy.address) == "its drive hangs"
        drive.recover()
        wait_for(lambda: not health.is_open(proxy.address))
        sent = proxy.bytes_from_origin
        assert fs.cat_file(f"set/{owned[0]}") == PLAIN[owned[0]]
        assert proxy.bytes_from_origin - sent > len(PLAIN[owned[0]])
