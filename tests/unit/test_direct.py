"""The origin as the last resort: only where the dataset and the caller allow it, loud, counted, and of one version."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoal import watch
from shoal.direct import DirectOrigin
from shoal.errors import DeadlineExceeded, InvalidRequest, NodeUnavailable, OriginChanged
from shoal.filesystem import ShoalFileSystem
from shoal.origin import Sink, open_origin
from tests.support.minicluster import MiniCluster
from tests.support.proxy import Fault, FaultProxy
from tests.support.waiting import wait_for

PLAIN = {"a": bytes(range(200)), "b/c": bytes(range(100, 250))}


class World:
    """A cluster whose dataset lies in a directory, which the client can read too."""

    def __init__(self, directory: Path, *, direct: bool) -> None:
        self.files = directory / "origin"
        for path, data in PLAIN.items():
            (self.files / path).parent.mkdir(parents=True, exist_ok=True)
            (self.files / path).write_bytes(data)
        versions = {i.path: i.version for batch in open_origin(f"file://{self.files}", {}).list() for i in batch}
        self.cluster = MiniCluster(
            directory / "nodes",
            PLAIN,
            nodes=2,
            part_size=16,
            shard_size=64,
            versions=versions,
            origin_url=f"file://{self.files}",
            direct=direct,
        )

    def filesystem(self, **options: object) -> ShoalFileSystem:
        endpoint = self.cluster.nodes[0].address
        fs = ShoalFileSystem(endpoint=endpoint, local=False, skip_instance_cache=True, **options)
        fs.info("set/a")
        return fs

    def stop(self) -> None:
        for index in range(2):
            self.cluster.stop_node(index)


def test_reads_go_to_the_origin_when_no_node_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = world.filesystem(origin={})
        assert fs.cat_file("set/a") == PLAIN["a"] and fs.direct_bytes == 0
        world.stop()
        with caplog.at_level(logging.WARNING, "shoal.direct"):
            assert fs.cat_file("set/a") == PLAIN["a"]
            assert fs.cat_file("set/a", 10, 190) == PLAIN["a"][10:190]
            assert fs.open_buffer("set/b/c").to_pybytes() == PLAIN["b/c"]
            assert fs.cat_ranges(["set/a", "set/b/c"], [60, 3], [70, 9]) == [PLAIN["a"][60:70], PLAIN["b/c"][3:9]]
        # What is said of nodes that fail and a map that stays is said again after a second or two.
        said = [record for record in caplog.records if record.name == "shoal.direct"]
        assert len(said) == 1, "once for all reads"
        assert [record.name for record in caplog.records].count("shoal.direct") == 1
        assert fs.direct_bytes == 200 + 180 + 150 + 10 + 6


def test_version_is_the_snapshot_s(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = world.filesystem(origin={})
        world.stop()
        (world.files / "a").write_bytes(b"x" * 200)
        with pytest.raises(OriginChanged, match="dataset refresh"):
            fs.cat_file("set/a")


def test_nodes_that_were_only_late_are_asked_again_where_the_origin_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their copies are of the snapshot's version, so that a changed origin ends no read that a node can serve."""
    world = World(tmp_path, direct=True)
    with world.cluster, contextlib.ExitStack() as proxies:
        fault = Fault()
        for node in world.cluster.nodes:
            proxy = FaultProxy(f"http://{node.address}", lambda number: fault)
            node.address = proxies.enter_context(proxy).address
        world.cluster.publish()
        fs = world.filesystem(origin={})
        assert fs.cat_file("set/a") == PLAIN["a"]
        (world.files / "a").unlink()
        monkeypatch.setattr(watch, "HASTY_S", 0.3)
        fault = Fault(delay_s=0.6)  # later than a probe is waited for while there are others to ask
        fs.cluster.transport.drop_idle()
        with caplog.at_level(logging.WARNING, "shoal.direct"):
            assert fs.cat_file("set/a", 0, 10) == PLAIN["a"][:10]
        assert "shoal.direct" in [record.name for record in caplog.records], "the origin was asked before"
        assert fs.direct_bytes == 0


def test_timeout_ends_a_read_of_an_origin_that_hangs(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = world.filesystem(origin={}, timeout=0.5)
        world.stop()
        (world.files / "a").unlink()
        os.mkfifo(world.files / "a")  # opening it waits for a writer
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"'a' was not read within 0.5 s.*its origin file:.*'timeout'"):
            fs.cat_file("set/a", 0, 10)
        assert time.monotonic() - began < 10
        with (world.files / "a").open("wb"):
            wait_for(lambda: not direct_threads())
        assert fs.cat_file("set/b/c") == PLAIN["b/c"], "the next one is none the worse"


def direct_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shoal-direct"]


def test_nothing_is_written_for_a_reader_that_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        record = world.filesystem().cluster.dataset("set")
    goes_on = threading.Event()

    def stream(path: str, version: str, start: int, end: int, sink: Sink) -> None:
        sink(memoryview(b"one"))
        goes_on.wait()
        sink(memoryview(b"two"))

    monkeypatch.setattr("shoal.direct.MAX_READS", 1)
    monkeypatch.setattr("shoal.origin.open_origin", lambda url, options: SimpleNamespace(stream=stream))
    direct, buffer, reason = DirectOrigin(record, {}), bytearray(6), NodeUnavailable("nobody")
    for _ in range(2):  # the second one finds no room, and waits no longer for it than for the bytes
        with pytest.raises(DeadlineExceeded):
            direct.read_into("a", "1", 0, memoryview(buffer), reason, time.monotonic() + 0.1)
    assert len(direct_threads()) == 1
    buffer[:] = b"theirs"
    goes_on.set()
    wait_for(lambda: not direct_threads())
    assert buffer == b"theirs" and direct.bytes_read == 0
    direct.read_into("a", "1", 0, memoryview(buffer), reason, time.monotonic() + 10)
    assert buffer == b"onetwo" and direct.bytes_read == 6


@pytest.mark.parametrize(("direct", "options"), [(False, {"origin": {}}), (True, {})])
def test_neither_alone_is_enough(tmp_path: Path, direct: bool, options: dict[str, object]) -> None:
    world = World(tmp_path, direct=direct)
    with world.cluster:
        fs = world.filesystem(**options)
        world.stop()
        with pytest.raises(NodeUnavailable, match="no cache node gave bytes of 'a'"):
            fs.cat_file("set/a")


def test_origin_that_cannot_be_opened_is_said_beside_the_reason(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = world.filesystem(origin={"no": "such option"})
        world.stop()
        with pytest.raises(NodeUnavailable, match=r"no cache node answers .* takes no storage options"):
            fs.cat_file("set/a")


def test_chained_url_has_its_own_options(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = ShoalFileSystem(
            endpoint=world.cluster.nodes[0].address,
            local=False,
            target_protocol="file",
            fo=str(world.files),
            skip_instance_cache=True,
        )
        fs.info(f"{world.files}/a")
        world.stop()
        assert fs.cat_file(f"{world.files}/a") == PLAIN["a"] and fs.direct_bytes == 200


def test_options_that_are_none() -> None:
    with pytest.raises(InvalidRequest, match="'origin'"):
        ShoalFileSystem(endpoint="127.0.0.1:1", origin="s3", skip_instance_cache=True)


def test_endpoint_of_the_dataset_is_used_where_the_caller_names_none(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        record = world.filesystem().cluster.dataset("set")
    s3 = dataclasses.replace(record, origin="s3://bucket/set", endpoint="http://s3:9000")
    named = {"client_kwargs": {"endpoint_url": "http://other"}}
    assert DirectOrigin(s3, {"key": "k"})._with_endpoint() == {"key": "k", "endpoint_url": "http://s3:9000"}
    assert DirectOrigin(s3, named)._with_endpoint() == named
    assert DirectOrigin(record, {})._with_endpoint() == {}
