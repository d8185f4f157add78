"""A process that told a node what it would read is killed: nothing is left of what it needed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shoal.cluster import Cluster
from shoal.origin import Sink
from shoal.streaming.announce import Announcer
from shoal_cachenode import needs
from shoal_cachenode.scheduler import NEEDS_AT_FIRST
from tests.support.minicluster import DictOrigin, MiniCluster
from tests.support.processes import Child, Say
from tests.support.waiting import wait_for

OBJECTS = {f"{n:02}": bytes([n]) * 640 for n in range(30)}  # a shard of ten parts each


class HeldOrigin(DictOrigin):
    """Answers nothing until it is let."""

    def __init__(self) -> None:
        super().__init__(OBJECTS)
        self.go = threading.Event()

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        assert self.go.wait(60)
        super().stream(path, version, start, end, sink)


@pytest.mark.parametrize("leaves", [False, True], ids=["killed", "leaves"])
def test_its_needs_are_forgotten_and_its_fills_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    if not leaves:
        monkeypatch.setattr(needs, "SILENCE_S", 3.0)
    with MiniCluster(tmp_path, OBJECTS) as cluster:
        node, origin = cluster.nodes[0], HeldOrigin()
        cluster.origin = origin
        wait_for(lambda: not node.rebalance.is_busy)

        def announce(say: Say) -> None:
            opened = Cluster(node.address, use_local=False)
            announcer = Announcer(opened, opened.snapshot(cluster.snapshot.digest), 1)
            announcer.update(range(30), range(30))
            say("told")
            if leaves:
                wait_for(lambda: origin_is_asked.is_file())
                announcer.close()
            threading.Event().wait()

        origin_is_asked = tmp_path / "asked"
        with Child(announce) as child:
            assert child.heard() == "told"
            wait_for(lambda: node.fills.fetches_in_flight == NEEDS_AT_FIRST)
            origin_is_asked.touch()
            assert node.streams.count == 1 and node.streams.missing_bytes == 30 * 640
            if not leaves:
                child.kill()
            wait_for(lambda: node.streams.count == 0 and node.streams.missing_bytes == 0)
        fs = cluster.filesystem()
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(fs.cat_file("set/29")))
        reader.start()
        origin.go.set()
        reader.join(20)
        assert found == [OBJECTS["29"]], "whoever reads has its bytes"
        wait_for(lambda: node.fills.count == 0)
        fetched = {path for path, _, _ in origin.reads} - {"29"}
        assert len([path for path, _, _ in origin.reads if path != "29"]) == NEEDS_AT_FIRST, (
            "the parts that were under way"
        )
        assert not node.inventory.needed
        for path in sorted(fetched):  # the next stream has them, and no part of them comes twice
            assert fs.cat_file(f"set/{path}") == OBJECTS[path]
            assert sum(end - start for name, start, end in origin.reads if name == path) == 640
        cluster.run(node.fills.settle())


def test_a_forks_child_is_a_stream_of_its_own(tmp_path: Path) -> None:
    """As a DataLoader's worker is: it inherits an announcer whose thread and needs stayed in the parent."""
    with MiniCluster(tmp_path, OBJECTS) as cluster:
        node = cluster.nodes[0]
        opened = Cluster(node.address, use_local=False)
        announcer = Announcer(opened, opened.snapshot(cluster.snapshot.digest), 1)
        announcer.update([0], [0.0])
        wait_for(lambda: node.streams.count == 1)

        def announce(say: Say) -> None:
            say(announcer.stream_id)
            announcer.update([1], [0.0])
            threading.Event().wait()

        with Child(announce) as child:
            assert child.heard() != announcer.stream_id
            wait_for(lambda: node.streams.count == 2)
        announcer.close()
        wait_for(lambda: node.streams.count == 1)
        wait_for(lambda: {path for path, _, _ in cluster.origin.reads} == {"00", "01"})
        cluster.run(node.fills.settle())


def test_an_announcer_that_nobody_holds_ends(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS) as cluster:
        opened = Cluster(cluster.nodes[0].address, use_local=False)
        announcer = Announcer(opened, opened.snapshot(cluster.snapshot.digest), 1)
        announcer.update([0], [0.0])
        thread = announcer._thread
        assert thread is not None and thread.is_alive()
        del announcer
        wait_for(lambda: not thread.is_alive())
