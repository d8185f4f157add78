"""Reads through real sockets and files against the plain bytes: every cached set, range and boundary."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal import cluster as clusters
from shoal.errors import ClusterUnavailable, NodeUnavailable, OriginChanged, OriginUnavailable, Overloaded
from shoal.filesystem import ShoalFileSystem
from shoal_cachenode import recent
from tests.support.minicluster import MiniCluster
from tests.support.waiting import wait_for

PART, SHARD = 16, 64
SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200)
NAMES = (
    "plain",
    "a b",
    "ünïcødé/日本",
    "per%20cent",
    "hash#1",
    "q?x=1",
    "plus+",
    "deep/" * 30 + "x",
    "back\\slash",
    "tab\tx",
)


def content(name: str, size_bytes: int) -> bytes:
    return bytes((len(name) * 7 + i * 13) % 256 for i in range(size_bytes))


OBJECTS = {f"sizes/{n}": content("s", n) for n in SIZES} | {f"names/{n}": content(n, 100) for n in NAMES}


@pytest.fixture(scope="module", params=[1, 3], ids=["one-node", "three-nodes"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    directory = tmp_path_factory.mktemp("c")
    with MiniCluster(directory, OBJECTS, nodes=request.param, part_size=PART, shard_size=SHARD) as cluster:
        yield cluster


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("path", sorted(OBJECTS))
def test_whole_objects(cluster: MiniCluster, path: str, local: bool) -> None:
    fs = cluster.filesystem(local=local)
    assert fs.cat_file(f"set/{path}") == OBJECTS[path]
    assert fs.info(f"set/{path}")["size"] == len(OBJECTS[path])
    with fs.open(f"set/{path}") as file:
        assert file.read() == OBJECTS[path]
        assert file.read(1) == b""


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_over_any_cached_parts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Some parts there from a killed fill, some from earlier reads, then any range: always the plain file's bytes."""
    size_bytes = data.draw(st.sampled_from(SIZES))
    plain = content("s", size_bytes)
    bound = st.integers(0, size_bytes + 5)
    earlier = data.draw(st.lists(st.tuples(bound, bound), max_size=3))
    start, end = data.draw(st.tuples(bound, bound))
    with MiniCluster(tmp_path_factory.mktemp("r"), {"o": plain}, part_size=PART, shard_size=SHARD) as cluster:
        keep_partial(cluster, data.draw(st.sets(st.integers(0, 12))))
        for first, last in earlier:
            assert cluster.filesystem().cat_file("set/o", first, last) == plain[first:last]
        for local in (False, True):
            assert cluster.filesystem(local=local).cat_file("set/o", start, end) == plain[start:end]
            with cluster.filesystem(local=local).open("set/o") as file:
                file.seek(start)
                assert file.read(max(0, end - start)) == plain[start : max(start, end)]


def keep_partial(cluster: MiniCluster, parts: set[int]) -> None:
    """Put some parts of the object's shards on the node's disk, as a killed fill leaves them."""
    from shoal import shards
    from shoal_cachenode.store import Store

    store: Store = cluster.nodes[0].store
    plain = cluster.origin.objects["o"]
    for index in range(shards.shard_count(len(plain), SHARD)):
        length = shards.shard_length(len(plain), SHARD, index)
        partial = store.begin(shards.shard_key(cluster.snapshot.key(0), index), length)
        for part in range(len(partial.header.checksums)):
            if index * (SHARD // PART) + part in parts:
                first, last = partial.header.part_range(part)
                partial.write_part(part, plain[index * SHARD + first : index * SHARD + last])
        store.suspend(partial)


def test_each_byte_is_fetched_from_the_origin_once(tmp_path: Path) -> None:
    plain = content("x", 5000)
    with MiniCluster(tmp_path, {"o": plain}, nodes=3, part_size=64, shard_size=512) as cluster:
        results: list[bytes] = []
        readers = [
            threading.Thread(target=lambda n=n: results.append(cluster.filesystem(node=n % 3).cat_file("set/o")))
            for n in range(8)
        ]
        [r.start() for r in readers]
        [r.join() for r in readers]
        assert results == [plain] * 8
        assert cluster.origin.bytes_read == 5000


def test_second_read_asks_the_origin_nothing_and_a_restart_is_warm(tmp_path: Path) -> None:
    plain = content("x", 5000)
    with MiniCluster(tmp_path, {"o": plain}, nodes=2, part_size=64, shard_size=512) as cluster:
        assert cluster.filesystem().cat_file("set/o") == plain
    with MiniCluster(tmp_path, {"o": plain}, nodes=2, part_size=64, shard_size=512) as cluster:
        assert cluster.filesystem().cat_file("set/o") == plain
        assert cluster.origin.bytes_read == 0


def test_full_node_passes_reads_through(tmp_path: Path) -> None:
    plain = content("x", 5000)
    with MiniCluster(tmp_path, {"o": plain}, part_size=64, shard_size=512, capacity_bytes=1024) as cluster:
        for _ in range(2):
            assert cluster.filesystem().cat_file("set/o") == plain
        assert cluster.nodes[0].store.used_bytes <= 1024
        assert cluster.nodes[0].counters.served_through_bytes.value > 0


def test_readers_of_what_passes_through_share_the_origins_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = content("x", 5000)
    with MiniCluster(tmp_path, {"o": plain}, part_size=64, shard_size=512, capacity_bytes=1024) as cluster:
        assert cluster.filesystem().cat_file("set/o") == plain
        cluster.run(cluster.nodes[0].fills.settle())  # else what one of them has of a shard is not asked of the origin
        held = cluster.nodes[0].store.used_bytes
        cluster.origin.reads.clear()
        monkeypatch.setattr(recent, "KEPT_S", -1.0)
        cluster.nodes[0].recent.expire()
        before = cluster.nodes[0].recent.given.value
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: cluster.filesystem().cat_file("set/o"), range(8))) == {plain}
        assert held and cluster.nodes[0].store.used_bytes == held
        assert cluster.origin.bytes_read == len(plain) - held
        assert cluster.nodes[0].recent.given.value - before == 7 * (len(plain) - held)


def test_dead_node_is_passed_over(tmp_path: Path) -> None:
    plain = content("x", 5000)
    with MiniCluster(tmp_path, {"o": plain}, nodes=3, part_size=64, shard_size=512) as cluster:
        fs = cluster.filesystem(node=0)
        fs.ls("set")
        cluster.stop_node(1)
        assert fs.cat_file("set/o") == plain


def test_all_nodes_dead_is_one_sentence(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": b"x" * 100}, nodes=2) as cluster:
        fs = cluster.filesystem()
        fs.ls("set")
        cluster.stop_node(0)
        cluster.stop_node(1)
        with pytest.raises(NodeUnavailable, match="no cache node gave bytes of 'o', 2 were asked"):
            fs.cat_file("set/o")


def test_new_owner_fills_from_the_old_one(tmp_path: Path) -> None:
    plain = content("x", 20_000)
    with MiniCluster(tmp_path, {"o": plain}, nodes=3, part_size=64, shard_size=512, rebalance_rate=0) as cluster:
        cluster.publish(absent=(2,))
        assert cluster.filesystem().cat_file("set/o") == plain
        for node in cluster.nodes[:2]:
            cluster.run(node.fills.settle())  # what is not sealed yet no peer gives
        cluster.publish()
        before = cluster.origin.bytes_read
        assert cluster.filesystem().cat_file("set/o") == plain
        cluster.run(cluster.nodes[2].fills.settle())  # what another node gave faster may still be under way to it
        assert cluster.origin.bytes_read == before
        assert cluster.nodes[2].store.used_bytes > 0
        assert cluster.nodes[2].counters.peer_bytes.value == cluster.nodes[2].store.used_bytes


def test_stale_client_reads_on_and_learns_the_new_map(tmp_path: Path) -> None:
    plain = content("x", 20_000)
    with MiniCluster(tmp_path, {"o": plain}, nodes=3, part_size=64, shard_size=512) as cluster:
        cluster.publish(absent=(2,))
        fs = cluster.filesystem()
        assert fs.cat_file("set/o") == plain
        cluster.publish()
        assert fs.cat_file("set/o") == plain
        assert fs.cluster.map.epoch == cluster.epoch
        assert fs.cat_file("set/o") == plain
        assert cluster.origin.bytes_read == len(plain)


def test_client_of_a_map_without_nodes_asks_for_the_next_one(tmp_path: Path) -> None:
    """The only node says goodbye and comes back: no answer of a node could tell a client of it."""
    plain = content("x", 5000)
    with MiniCluster(tmp_path, {"o": plain}, part_size=64, shard_size=512) as cluster:
        fs = cluster.filesystem()
        fs.ls("set")
        cluster.publish(absent=(0,))
        fs.cluster.refresh_map()
        with pytest.raises(ClusterUnavailable, match="no cache node is up"):
            fs.cat_file("set/o")
        cluster.publish()
        assert fs.cat_file("set/o") == plain


def test_origin_that_is_down_or_changed_is_named(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": b"x" * 100, "p": b"y" * 100}) as cluster:
        fs = cluster.filesystem()
        cluster.origin.is_down = True
        with pytest.raises(OriginUnavailable):
            fs.cat_file("set/o")
        cluster.origin.is_down = False
        assert fs.cat_file("set/o") == b"x" * 100
        cluster.origin.versions["p"] = "2"
        with pytest.raises(OriginChanged, match="dataset refresh"):
            fs.cat_file("set/p")


@pytest.mark.parametrize("nodes", [1, 4])
def test_origin_that_fails_within_a_body_is_named(tmp_path: Path, nodes: int) -> None:
    """Every node cuts the body behind the part that came: the reader is told of the origin, not of the nodes."""
    with MiniCluster(tmp_path, {"o": b"x" * 65}, nodes=nodes) as cluster:
        cluster.origin.reads_left = 1
        assert cluster.filesystem().cat_file("set/o", 0, 1) == b"x"
        for node in cluster.nodes:
            cluster.run(node.fills.settle())
        read = cluster.origin.read

        def fail_late(*args: Any) -> bytes:
            time.sleep(0.2)  # as a real one that is asked again: the part that is there is sent meanwhile
            return read(*args)

        cluster.origin.read = fail_late  # type: ignore[method-assign]
        with pytest.raises(OriginUnavailable, match="the origin is down"):
            cluster.filesystem().cat_file("set/o")


def test_one_request_opens_the_large_shards_behind_it(tmp_path: Path) -> None:
    """The rest of an epoch is then look-ups in this process; the map outlives the node."""
    large = {f"{n}": bytes([n]) * ((1 << 20) + n) for n in range(5)} | {"small": b"s" * 100}
    with MiniCluster(tmp_path, large, part_size=1 << 20, shard_size=2 << 20) as cluster:
        node = cluster.nodes[0]
        for path in large:
            cluster.filesystem().cat_file(f"set/{path}")
        cluster.run(node.fills.settle())
        cluster.run(node.holdings_of(cluster.snapshot.digest))
        fs = cluster.filesystem(local=True)
        fs.info("set/0")
        transport, asked = fs.cluster.transport, []
        get = transport.get
        transport.get = lambda *a, **k: asked.append(a) or get(*a, **k)  # type: ignore[func-returns-value, method-assign]
        for path, data in large.items():
            assert fs.open_buffer(f"set/{path}").to_pybytes() == data
        assert len(asked) == 2, "one for the five large ones, one for the small one"
        local = fs.cluster.local
        assert local is not None
        assert len(local.maps) == 6
        cluster.stop_node(0)
        assert fs.open_buffer("set/3").to_pybytes() == large["3"]


def test_a_local_node_that_starts_after_its_readers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host that starts: the mount may be there before the node."""
    plain = content("x", 200)
    with MiniCluster(tmp_path, {"x": plain}, part_size=PART) as cluster:
        cluster.filesystem().cat_file("set/x")
        cluster.run(cluster.nodes[0].fills.settle())
        link = tmp_path / "later.sock"
        fs = ShoalFileSystem(endpoint=cluster.nodes[0].address, socket=str(link), skip_instance_cache=True)
        assert fs.cat_file("set/x") == plain and fs.cluster.local is None
        link.symlink_to(cluster._socket(0))
        assert fs.cluster.local is None, "looked for just now"
        monkeypatch.setattr(clusters, "LOOK_FOR_LOCAL_S", 0.0)
        fs.cluster._look_for_local_at = 0.0
        assert fs.open_buffer("set/x").to_pybytes() == plain
        assert fs.cluster.local is not None and len(fs.cluster.local.maps) == 1


def test_a_local_node_that_is_gone_is_not_asked_by_each_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its socket stays where it was killed. Who reads is told once, waits for nobody, and finds the next one."""
    monkeypatch.setattr(clusters, "LOOK_FOR_LOCAL_S", 0.0)
    caplog.set_level("INFO")
    path = tmp_path / "node.sock"
    with MiniCluster(tmp_path, {"x": b"x"}) as cluster:
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(path))
        fs = ShoalFileSystem(endpoint=cluster.nodes[0].address, socket=str(path), skip_instance_cache=True)
        for _ in range(20):
            assert fs.cat_file("set/x") == b"x"
        assert caplog.text.count("no cache node answers on") == 1
        path.unlink()
        path.symlink_to(cluster._socket(0))
        wait_for(lambda: fs.cluster.local is not None)


def test_a_node_of_another_cluster_is_not_taken_for_the_local_one(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    with MiniCluster(tmp_path / "1", {"x": b"x"}) as cluster, MiniCluster(tmp_path / "2", {"x": b"x"}) as other:
        link = tmp_path / "later.sock"
        fs = ShoalFileSystem(endpoint=cluster.nodes[0].address, socket=str(link), skip_instance_cache=True)
        assert fs.cluster.local is None
        link.symlink_to(other._socket(0))
        fs.cluster._cluster_id = "this one"
        fs.cluster._look_for_local_at = 0.0
        assert fs.cluster.local is None


def test_shard_that_is_filling_is_streamed_to_the_local_node_s_readers_and_mapped_later(tmp_path: Path) -> None:
    plain = content("x", 200)
    with MiniCluster(tmp_path, {"x": plain}, part_size=PART) as cluster:
        fs = cluster.filesystem(local=True)
        local = fs.cluster.local
        assert local is not None
        assert fs.open_buffer("set/x").to_pybytes() == plain
        assert len(local.maps) == 0, "it was cold: nothing to map yet"
        cluster.run(cluster.nodes[0].fills.settle())
        assert fs.open_buffer("set/x").to_pybytes() == plain
        assert len(local.maps) == 1
        assert cluster.origin.bytes_read == len(plain)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[MiniCluster]:
    """A node without room, which passes everything through, and takes no reader for that now."""
    with MiniCluster(tmp_path, {"o": content("o", 100)}, capacity_bytes=1) as cluster:
        cluster.nodes[0].passing._most = 0
        yield cluster


def test_nodes_that_are_overloaded_are_asked_again_ever_more_seldom(
    full: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 8:
            full.nodes[0].passing._most = 1  # who read through it is done

    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=sleep))
    assert full.filesystem().cat_file("set/o") == content("o", 100)
    assert len(waits) == 8
    assert all(0 <= seconds <= min(5.0, 0.1 * 2**number) for number, seconds in enumerate(waits))


def test_nodes_that_stay_overloaded_are_not_asked_past_the_time_limit(full: MiniCluster) -> None:
    fs = full.filesystem(timeout=0.3)
    with pytest.raises(Overloaded, match="0 readers have bytes pass through this node"):
        fs.cat_file("set/o")
    assert full.origin.reads == []
