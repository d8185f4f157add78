"""Bits of a sealed shard that flip on the drive: who receives them over the network notices, no node seals them again.

The drive lies: no time of the file tells that it changed (tests/faults/test_torn_files.py is about those that do). A
node does not read a sealed shard again before it sends it, so it is the reader's comparison that these tests are about:
with ``verify=False`` the very same reads give the wrong byte.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal import shards
from shoal.cluster_map import Node
from shoal.connection import Connection, Interrupted
from shoal.errors import ShardCorrupt, ShoalError
from shoal.filesystem import ShoalFileSystem
from shoal.health import Latency
from shoal.reader import ObjectReader
from shoal.transport import Transport
from shoal_cachenode import sealed_file
from shoal_cachenode.node import CacheNode
from tests.support.minicluster import MiniCluster

PART, SHARD = 64, 256
PLAIN = bytes(i * 37 % 251 for i in range(600))  # three shards; the last has a short part at its end
SMALL = {f"small/{n}": bytes((i * n) % 251 for i in range(40)) for n in range(1, 9)}
OBJECTS = {"o": PLAIN, **SMALL}


class Harm:
    """A cluster whose drives this test writes to behind the nodes' backs."""

    def __init__(self, cluster: MiniCluster) -> None:
        self.cluster = cluster

    def filesystem(self, *, verify: bool = True) -> ShoalFileSystem:
        endpoint = self.cluster.nodes[0].address
        return ShoalFileSystem(endpoint=endpoint, local=False, verify=verify, skip_instance_cache=True)

    def order(self, path: str, index: int) -> list[CacheNode]:
        """Who owns a shard, the first one first, and then everybody else."""
        fs = self.filesystem()
        row = self._row(path)
        placement = fs.cluster.placement(self.cluster.snapshot, self.cluster.replicas)
        nodes: tuple[Node, ...] = placement.order(
            self.cluster.snapshot.first_shard(row) + index, self._key(path, index)
        )
        return [next(n for n in self.cluster.nodes if n.id == node.id) for node in nodes]

    def fill(self, node: CacheNode, path: str, index: int) -> bytes:
        """Let a node seal a shard: ask it for all of it, and wait; return the bytes that it sent."""
        reader = ObjectReader(
            self.filesystem().cluster, self.cluster.snapshot, self.cluster.replicas, self._row(path), verify=True
        )
        shard = reader.shard(index)
        view = memoryview(bytearray(shard.size_bytes))
        Transport().read_into(node.address, shard.target, 0, shard.size_bytes, view)
        self.cluster.run(node.fills.settle())
        return bytes(view)

    def fill_all(self) -> None:
        fs = self.filesystem()
        for path in OBJECTS:
            fs.cat_file(f"set/{path}")
        for node in self.cluster.nodes:
            self.cluster.run(node.fills.settle())

    def file(self, node: CacheNode, path: str, index: int) -> Path | None:
        """The sealed file of a shard on a node's drive, if it has one."""
        key = self._key(path, index).hex()
        return next((node.config.data_dir / "shards").rglob(key), None)

    def flip(self, node: CacheNode, path: str, place: int) -> bytes:
        """Flip a bit of a sealed object on a node's drive; return the object as it is there now."""
        index, offset = divmod(place, SHARD)
        file = self.file(node, path, index)
        assert file is not None, "only what is sealed can be harmed"
        times = file.stat()
        file.chmod(0o644)
        with file.open("rb+") as opened:
            opened.seek(offset)
            (byte,) = opened.read(1)
            opened.seek(offset)
            opened.write(bytes([byte ^ 0x10]))
        file.chmod(0o444)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        plain = OBJECTS[path]
        return plain[:place] + bytes([plain[place] ^ 0x10]) + plain[place + 1 :]

    def _row(self, path: str) -> int:
        row = self.cluster.snapshot.find(path)
        assert row is not None
        return row

    def _key(self, path: str, index: int) -> bytes:
        return shards.shard_key(self.cluster.snapshot.key(self._row(path)), index)


def start(directory: Path, **options: Any) -> MiniCluster:
    return MiniCluster(directory, OBJECTS, part_size=PART, shard_size=SHARD, **options)


@pytest.fixture(autouse=True)
def files_that_tell_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_file, "stamp", lambda fd: (0, 0))


@pytest.fixture
def one_copy(tmp_path: Path) -> Iterator[Harm]:
    """Three nodes; each shard is sealed on one of them."""
    with start(tmp_path, nodes=3) as cluster:
        harm = Harm(cluster)
        harm.fill_all()
        yield harm


@pytest.fixture
def two_copies(tmp_path: Path) -> Iterator[Harm]:
    """Three nodes; each shard is sealed on two of them."""
    with start(tmp_path, nodes=3, replicas=2) as cluster:
        harm = Harm(cluster)
        for path, plain in OBJECTS.items():
            for index in range(shards.shard_count(len(plain), SHARD)):
                for node in harm.order(path, index)[:2]:
                    assert harm.fill(node, path, index) == plain[index * SHARD : (index + 1) * SHARD]
        yield harm


# The only copy


@pytest.mark.parametrize("place", [0, 63, 64, 130, 255, 256, 511, 512, 575, 576, 599])
def test_wrong_byte_of_the_only_copy_is_fetched_anew(one_copy: Harm, place: int) -> None:
    """The reader finds it, the node drops the shard and fills it again, and the next reader finds it whole."""
    index = place // SHARD
    owner = one_copy.order("o", index)[0]
    before = owner.counters.shards_corrupt.value
    wrong = one_copy.flip(owner, "o", place)
    assert one_copy.filesystem(verify=False).cat_file("set/o") == wrong
    fs = one_copy.filesystem()
    into = bytearray(len(PLAIN))
    with fs.open("set/o") as file:
        assert file.readinto(into) == len(PLAIN)
    assert into == PLAIN
    assert owner.counters.shards_corrupt.value - before == 1
    one_copy.cluster.run(owner.fills.settle())
    assert one_copy.filesystem(verify=False).cat_file("set/o") == PLAIN
    file_of_it = one_copy.file(owner, "o", index)
    assert file_of_it is not None
    assert file_of_it.read_bytes() == PLAIN[index * SHARD : (index + 1) * SHARD]
    assert owner.counters.shards_corrupt.value - before == 1, "once"


def test_wrong_byte_of_the_only_copy_without_an_origin_is_an_error(one_copy: Harm) -> None:
    one_copy.flip(one_copy.order("o", 0)[0], "o", 70)
    one_copy.cluster.origin.is_down = True
    with pytest.raises(ShoalError):
        one_copy.filesystem().cat_file("set/o")


def test_every_node_that_passes_it_on_compares_too(one_copy: Harm) -> None:
    """Who asks a node that is not the owner is not given what the owner has: at most the parts before it."""
    owner, *others = one_copy.order("o", 0)
    one_copy.flip(owner, "o", 100)
    for node in others:
        with pytest.raises(Interrupted) as caught:
            one_copy.fill(node, "o", 0)
        assert one_copy.file(node, "o", 0) is None
        assert caught.value.received == PART


def test_node_whose_owner_sends_a_wrong_first_part_fills_the_shard_itself(one_copy: Harm) -> None:
    owner, second, third = one_copy.order("o", 0)
    one_copy.flip(owner, "o", 10)
    assert one_copy.fill(second, "o", 0) == PLAIN[:SHARD]
    assert is_sealed_right(one_copy, second, "o", 0)
    assert one_copy.fill(third, "o", 0) == PLAIN[:SHARD], "passed on from the second"


def test_part_that_began_at_a_node_that_died_is_compared_all_the_same(
    one_copy: Harm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner's copy is wrong; the next node passes on the right bytes (it has them from elsewhere) and dies within
    that part; the third one passes the owner's on."""
    owner, dying, _ = one_copy.order("o", 0)
    one_copy.flip(owner, "o", 100)

    async def cannot_heal(node: CacheNode, key: bytes) -> None:
        pass

    monkeypatch.setattr(CacheNode, "check", cannot_heal)
    fs = one_copy.filesystem()
    fs.info("set/o")
    take, died = fs.cluster.transport._take, list[socket.socket]()

    def take_or_die(address: str, *how: Any, **more: Any) -> Connection:
        if address != dying.address:
            return take(address, *how, **more)
        ours, theirs = socket.socketpair()
        theirs.sendall(b"HTTP/1.1 206 OK\r\nContent-Length: 256\r\n\r\n" + PLAIN[:70])
        theirs.shutdown(socket.SHUT_WR)
        died.append(theirs)
        return Connection(ours, Latency())

    monkeypatch.setattr(fs.cluster.transport, "_take", take_or_die)
    with pytest.raises(ShardCorrupt):
        fs.cat_file("set/o", 0, SHARD)
    assert died, "the node that dies was not asked"


def test_part_that_a_range_only_touches_is_not_compared(one_copy: Harm) -> None:
    """As `shoal.checksums` says. Whoever changes that may turn this test around."""
    wrong = one_copy.flip(one_copy.order("o", 0)[0], "o", 100)
    fs = one_copy.filesystem()
    assert fs.cat_file("set/o", 65, 128) == wrong[65:128]
    assert fs.cat_file("set/o", 0, 127) == wrong[:127]
    assert fs.cat_file("set/o", 64, 128) == PLAIN[64:128], "a whole part"


# One of two copies


@pytest.mark.parametrize("place", [0, 130, 255, 511, 599])
def test_right_bytes_come_from_the_other_copy(two_copies: Harm, place: int) -> None:
    first, second, _ = two_copies.order("o", place // SHARD)
    wrong = two_copies.flip(first, "o", place)
    assert two_copies.filesystem(verify=False).cat_file("set/o") == wrong
    asked_of_origin = two_copies.cluster.origin.bytes_read
    fs = two_copies.filesystem()
    assert fs.cat_file("set/o") == PLAIN
    assert fs.open_buffer("set/o").to_pybytes() == PLAIN
    assert b"".join(b.to_pybytes() for b in fs.open_buffers("set/o")) == PLAIN
    assert two_copies.cluster.origin.bytes_read == asked_of_origin
    two_copies.cluster.run(first.fills.settle())
    assert is_sealed_right(two_copies, first, "o", place // SHARD), "made again from the other copy"
    assert second.counters.shards_corrupt.value == 0


# Batches


def test_wrong_byte_of_a_whole_object_in_a_batch(one_copy: Harm) -> None:
    wrong = one_copy.flip(one_copy.order("small/3", 0)[0], "small/3", 17)
    paths = [f"set/{path}" for path in SMALL]
    trusting, fs = one_copy.filesystem(verify=False), one_copy.filesystem()
    expected = [SMALL[path] for path in SMALL]
    for starts, ends in ((None, None), ([0] * 8, [40] * 8)):
        assert trusting.cat_ranges(paths, starts, ends) == [*expected[:2], wrong, *expected[3:]]
    assert fs.cat_ranges(paths, None, None, on_error="raise") == expected


def test_batch_takes_the_other_copy_for_what_is_wrong(two_copies: Harm) -> None:
    for path in list(SMALL)[::2]:
        two_copies.flip(two_copies.order(path, 0)[0], path, 39)
    paths = [f"set/{path}" for path in SMALL]
    assert two_copies.filesystem(verify=False).cat_ranges(paths, None, None) != list(SMALL.values())
    assert two_copies.filesystem().cat_ranges(paths, None, None, on_error="raise") == list(SMALL.values())


# Fills between nodes


def is_sealed_right(harm: Harm, node: CacheNode, path: str, index: int) -> bool:
    file = harm.file(node, path, index)
    return file is not None and file.read_bytes() == OBJECTS[path][index * SHARD : (index + 1) * SHARD]


@pytest.mark.parametrize("place", [0, 100, 255, 256 + 64, 599])
def test_second_owner_does_not_seal_the_first_ones_wrong_byte(tmp_path: Path, place: int) -> None:
    index = place // SHARD
    # No moves: one that began before the read would have the shard from the first owner alone, and fail.
    with start(tmp_path, nodes=2, replicas=2, rebalance_rate=0) as cluster:
        harm = Harm(cluster)
        first, second = harm.order("o", index)
        harm.fill(first, "o", index)
        before = cluster.origin.bytes_read
        harm.flip(first, "o", place)
        plain = PLAIN[index * SHARD : (index + 1) * SHARD]
        assert harm.fill(second, "o", index) == plain
        assert is_sealed_right(harm, second, "o", index)
        # The origin stood in, at most for all of it and at least for the part.
        assert before + min(PART, len(plain) - place % SHARD // PART * PART) <= cluster.origin.bytes_read
        assert cluster.origin.bytes_read <= before + len(plain)


def test_without_harm_the_second_owner_asks_only_the_first(tmp_path: Path) -> None:
    """So that the test above is about a fill between nodes at all."""
    with start(tmp_path, nodes=2, replicas=2) as cluster:
        harm = Harm(cluster)
        first, second = harm.order("o", 0)
        harm.fill(first, "o", 0)
        before = cluster.origin.bytes_read
        assert harm.fill(second, "o", 0) == PLAIN[:SHARD]
        assert is_sealed_right(harm, second, "o", 0) and cluster.origin.bytes_read == before


def test_new_owner_does_not_seal_the_old_ones_wrong_byte(tmp_path: Path) -> None:
    with start(tmp_path, nodes=2) as cluster:
        harm = Harm(cluster)
        owner = harm.order("o", 0)[0]
        gone = cluster.nodes.index(owner)
        cluster.publish(absent=(gone,))
        harm.filesystem().cluster.refresh_map()
        (former,) = harm.order("o", 0)
        assert harm.fill(former, "o", 0) == PLAIN[:SHARD]
        cluster.publish()
        harm.filesystem().cluster.refresh_map()
        harm.flip(former, "o", 200)
        assert harm.fill(owner, "o", 0) == PLAIN[:SHARD]
        assert is_sealed_right(harm, owner, "o", 0)


def test_wrong_byte_in_what_a_killed_fill_left_is_filled_anew(tmp_path: Path) -> None:
    """A part that was written and noted, and then harmed before the shard was whole."""
    with start(tmp_path, nodes=1) as cluster:
        harm = Harm(cluster)
        (node,) = cluster.nodes
        key = harm._key("o", 0)
        partial = node.store.begin(key, SHARD)
        for part in (0, 1):
            partial.write_part(part, PLAIN[part * PART : (part + 1) * PART])
        os.pwrite(partial.fd, b"\xff", 70)
        node.store.suspend(partial)
        for fs in (harm.filesystem(verify=False), harm.filesystem()):
            assert fs.cat_file("set/o") == PLAIN
        cluster.run(node.fills.settle())
        assert is_sealed_right(harm, node, "o", 0)
