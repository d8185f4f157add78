"""Nodes behind a proxy that delays, stalls, cuts, throttles and corrupts: the bytes are right, and nobody waits long.

Deterministic where it can be: what is asserted is who was asked and what came, and that nothing hangs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal import shards
from shoal.errors import DeadlineExceeded, InvalidRequest, NodeUnavailable
from shoal.filesystem import ShoalFileSystem
from tests.support.minicluster import MiniCluster
from tests.support.origin_contract import content
from tests.support.processes import Child, Say
from tests.support.proxy import HARMLESS, Fault, FaultProxy
from tests.support.waiting import wait_for

PART, SHARD = 16 << 10, 256 << 10
PLAIN = {f"{n}": content(SHARD - 1000 * n, seed=n * 31) for n in range(6)}
#: Far more than any of these reads takes, far less than the time limits that would end a hang.
SANE_S = 10.0


class Grey:
    """Three nodes, each behind a proxy. The client starts at the last one, which tests leave in peace."""

    def __init__(self, directory: Path, replicas: int) -> None:
        self.cluster = MiniCluster(directory, PLAIN, nodes=3, part_size=PART, shard_size=SHARD, replicas=replicas)
        self.proxies: dict[str, FaultProxy] = {}
        for node in self.cluster.nodes:
            proxy = self.proxies[node.id] = FaultProxy(f"http://{node.address}").__enter__()
            node.address = proxy.address
        self.cluster.publish()

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.__exit__(None, None, None)
        self.cluster.close()

    def filesystem(self, **options: object) -> ShoalFileSystem:
        """A client that knows the cluster, and whose endpoint is the node that no test harms."""
        endpoint = self.cluster.nodes[2].address
        fs = ShoalFileSystem(endpoint=endpoint, local=False, skip_instance_cache=True, **options)
        fs.info("set/0")
        return fs

    def owners(self, path: str) -> list[str]:
        """Ids of all nodes in the order in which they are asked."""
        snapshot = self.cluster.snapshot
        row = snapshot.find(path)
        assert row is not None
        placement = self.filesystem().cluster.placement(snapshot, self.cluster.replicas)
        key = shards.shard_key(snapshot.key(row), 0)
        return [node.id for node in placement.order(snapshot.first_shard(row), key)]

    def warm(self) -> None:
        """Let every owner seal what it owns."""
        for path, data in PLAIN.items():
            row = self.cluster.snapshot.find(path)
            for owner in self.owners(path)[: self.cluster.replicas]:
                node = next(n for n in self.cluster.nodes if n.id == owner)
                view = memoryview(bytearray(len(data)))
                target = f"/v1/snapshots/{self.cluster.snapshot.digest}/rows/{row}/shards/0"
                self.filesystem().cluster.transport.read_into(node.address, target, 0, len(data), view)
        for node in self.cluster.nodes:
            self.cluster.run(node.fills.settle())

    def victim(self) -> tuple[FaultProxy, list[str]]:
        """The proxy of a node that is first owner of something and not the endpoint; and what it is first owner of."""
        for node in self.cluster.nodes[:2]:
            owned = [path for path in PLAIN if self.owners(path)[0] == node.id]
            if owned:
                return self.proxies[node.id], owned
        raise AssertionError("no node but the endpoint owns anything: choose other objects")


@pytest.fixture
def two_copies(tmp_path: Path) -> Iterator[Grey]:
    grey = Grey(tmp_path, replicas=2)
    grey.warm()
    yield grey
    grey.close()


@pytest.fixture
def one_copy(tmp_path: Path) -> Iterator[Grey]:
    grey = Grey(tmp_path, replicas=1)
    grey.warm()
    yield grey
    grey.close()


FAULTS = {
    "accepts, then silent": Fault(stall_after=0),
    "stalls within the head": Fault(stall_after=40),
    "stalls within the body": Fault(stall_after=100_000),
    "cut within the head": Fault(cut_after=40),
    "cut within the body": Fault(cut_after=100_000),
    "reset within the body": Fault(cut_after=100_000, is_reset=True),
    "delays": Fault(delay_s=0.4),
    "trickles": Fault(bytes_per_s=100_000),
    "one flipped bit": Fault(flip=(70_000,)),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("copies", ["one_copy", "two_copies"])
def test_bytes_are_right_whatever_the_owner_does(name: str, copies: str, request: pytest.FixtureRequest) -> None:
    grey: Grey = request.getfixturevalue(copies)
    proxy, owned = grey.victim()
    fs = grey.filesystem()
    proxy.choose = lambda number: FAULTS[name]
    began = time.monotonic()
    for path in owned:
        assert fs.cat_file(f"set/{path}") == PLAIN[path]
        assert fs.open_buffer(f"set/{path}").to_pybytes() == PLAIN[path]
    found = fs.cat_ranges([f"set/{path}" for path in PLAIN], [5] * 6, [90_000] * 6, on_error="raise")
    assert found == [data[5:90_000] for data in PLAIN.values()]
    assert time.monotonic() - began < SANE_S


def test_stopped_owner_costs_the_origin_nothing_where_there_is_a_copy(two_copies: Grey) -> None:
    proxy, owned = two_copies.victim()
    fs = two_copies.filesystem()
    before = two_copies.cluster.origin.bytes_read
    proxy.stop()
    for path in owned * 2:
        assert fs.cat_file(f"set/{path}") == PLAIN[path]
    assert two_copies.cluster.origin.bytes_read == before


def test_trickling_owner_gives_way_to_a_copy(two_copies: Grey) -> None:
    """At this rate it would take a hundred seconds: what came is kept, and the rest comes from the other one."""
    proxy, owned = two_copies.victim()
    fs = two_copies.filesystem()
    before = two_copies.cluster.origin.bytes_read
    proxy.choose = lambda number: Fault(bytes_per_s=2_000)
    began = time.monotonic()
    assert fs.cat_file(f"set/{owned[0]}") == PLAIN[owned[0]]
    assert time.monotonic() - began < SANE_S
    assert two_copies.cluster.origin.bytes_read == before


def test_stopped_owner_is_asked_last_and_first_again_when_it_goes_on(one_copy: Grey) -> None:
    proxy, owned = one_copy.victim()
    fs = one_copy.filesystem()
    health = fs.cluster.transport.health
    proxy.stop()
    assert fs.cat_file(f"set/{owned[0]}") == PLAIN[owned[0]]
    assert health.is_open(proxy.address)
    proxy.reset()
    for path in owned:
        assert fs.cat_file(f"set/{path}") == PLAIN[path]
    proxy.go_on()
    wait_for(lambda: not health.is_open(proxy.address))
    sent = proxy.bytes_from_origin
    assert fs.cat_file(f"set/{owned[0]}") == PLAIN[owned[0]]
    assert proxy.bytes_from_origin - sent > len(PLAIN[owned[0]])


def test_forked_child_knows_what_its_parent_found_and_probes_by_itself(one_copy: Grey) -> None:
    proxy, owned = one_copy.victim()
    fs = one_copy.filesystem()
    health = fs.cluster.transport.health
    proxy.stop()
    assert fs.cat_file(f"set/{owned[0]}") == PLAIN[owned[0]]

    def read(say: Say) -> bool:
        say(health.is_open(proxy.address))
        wait_for(lambda: fs.cat_file(f"set/{owned[0]}") == PLAIN[owned[0]] and not health.is_open(proxy.address))
        return True

    with Child(read) as child:
        assert child.heard()
        proxy.go_on()
        assert child.heard()


def test_node_that_is_asked_instead_does_not_wait_for_the_stopped_owner(one_copy: Grey) -> None:
    """Its relay would be silent for as long as the owner: it is told to avoid it, and fills from the origin."""
    proxy, owned = one_copy.victim()
    fs = one_copy.filesystem()
    proxy.stop()
    before = one_copy.cluster.origin.bytes_read
    fs.cluster.transport.failed(proxy.address, "as another reader found")
    began = time.monotonic()
    assert fs.cat_file(f"set/{owned[0]}") == PLAIN[owned[0]]
    assert one_copy.cluster.origin.bytes_read - before == len(PLAIN[owned[0]])
    assert time.monotonic() - began < SANE_S


def test_relay_leaves_a_stopped_owner_by_itself(one_copy: Grey) -> None:
    """A client that only knows one node, and nothing of the owner's state: the node finds out, and remembers."""
    proxy, owned = one_copy.victim()
    node = one_copy.cluster.nodes[2]
    transport = one_copy.filesystem().cluster.transport
    proxy.stop()
    for path in owned:
        data = PLAIN[path]
        row = one_copy.cluster.snapshot.find(path)
        view = memoryview(bytearray(len(data)))
        target = f"/v1/snapshots/{one_copy.cluster.snapshot.digest}/rows/{row}/shards/0"
        began = time.monotonic()
        transport.read_into(node.address, target, 0, len(data), view)
        assert view == data and time.monotonic() - began < SANE_S
    assert node.transport.health.is_open(proxy.address)


def test_slow_origin_is_waited_for_and_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A living owner that fills keeps its fill: neither the reader nor any other node asks the origin beside it."""
    with MiniCluster(tmp_path, PLAIN, nodes=3, part_size=PART, shard_size=SHARD) as cluster:
        read = cluster.origin.read

        def slow(path: str, version: str, start: int, end: int) -> bytes:
            time.sleep(0.05 if start else 1.0)
            return read(path, version, start, end)

        monkeypatch.setattr(cluster.origin, "read", slow)
        fs = cluster.filesystem()
        assert fs.cat_file("set/0") == PLAIN["0"]
        assert cluster.origin.bytes_read == len(PLAIN["0"])
        assert not fs.cluster.transport.health.circuits


def test_all_nodes_silent_is_one_sentence(one_copy: Grey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.watch.PATIENT_S", 0.3)
    fs = one_copy.filesystem()
    for proxy in one_copy.proxies.values():
        proxy.stop()
    with pytest.raises(NodeUnavailable, match=r"no cache node gave bytes of '0', 3 were asked: .* is silent"):
        fs.cat_file("set/0")


def test_nodes_that_are_merely_late_are_waited_for(one_copy: Grey) -> None:
    """A machine so short of processors that no probe is answered in time: slow, but no error."""
    fs = one_copy.filesystem()
    for proxy in one_copy.proxies.values():
        proxy.choose = lambda number: Fault(delay_s=0.6)
    fs.cluster.transport.drop_idle()  # connections of before
    assert fs.cat_file("set/0", 0, 1000) == PLAIN["0"][:1000]


def test_cluster_map_is_had_from_others_while_the_endpoint_is_silent(one_copy: Grey) -> None:
    fs = one_copy.filesystem()
    endpoint = one_copy.proxies[one_copy.cluster.nodes[2].id]
    endpoint.stop()
    began = time.monotonic()
    assert fs.cluster.dataset("set").name == "set"
    assert fs.cluster.dataset("set").name == "set"
    assert fs.cluster.transport.health.is_open(endpoint.address)
    assert time.monotonic() - began < SANE_S


# Deadlines


@pytest.mark.parametrize("fault", [Fault(stall_after=0), Fault(bytes_per_s=20_000)], ids=["silent", "trickle"])
def test_read_that_takes_too_long_names_the_object_and_the_remedy(one_copy: Grey, fault: Fault) -> None:
    fs = one_copy.filesystem(timeout=0.5)
    for proxy in one_copy.proxies.values():
        proxy.choose = lambda number: fault
    fs.cluster.transport.drop_idle()
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"'0' was not read within 0.5 s.*'timeout'") as caught:
        fs.cat_file("set/0")
    assert isinstance(caught.value, TimeoutError)
    assert time.monotonic() - began < SANE_S
    for found in fs.cat_ranges(["set/0"], [0], [100_000]):
        assert isinstance(found, DeadlineExceeded)
    for proxy in one_copy.proxies.values():
        proxy.choose = lambda number: HARMLESS
    fs.cluster.transport.drop_idle()
    assert fs.cat_file("set/0") == PLAIN["0"]


def test_node_gives_up_with_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MiniCluster(tmp_path, PLAIN, part_size=PART, shard_size=SHARD) as cluster:
        read = cluster.origin.read

        def slow(path: str, version: str, start: int, end: int) -> bytes:
            time.sleep(0.0 if start else 1.0)
            return read(path, version, start, end)

        monkeypatch.setattr(cluster.origin, "read", slow)
        fs = cluster.filesystem()
        target = f"/v1/snapshots/{cluster.snapshot.digest}/rows/0/shards/0"
        with pytest.raises(DeadlineExceeded, match="no first byte within"):
            fs.cluster.transport.get(cluster.nodes[0].address, target, {"Shoal-Timeout": "0.2"})
        for wrong in ("0", "-1", "nan", "inf", "soon", ""):
            with pytest.raises(InvalidRequest, match="no number of seconds"):
                fs.cluster.transport.get(cluster.nodes[0].address, target, {"Shoal-Timeout": wrong})


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", None, True])
def test_timeout_that_is_none(timeout: object) -> None:
    with pytest.raises(InvalidRequest, match="'timeout'"):
        ShoalFileSystem(endpoint="127.0.0.1:1", timeout=timeout, skip_instance_cache=True)
