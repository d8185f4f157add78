"""Nodes come and go under readers: only what the map says moves, from peer to peer, and nobody reads a wrong byte.

The origin is taken away once all is cached, so that whoever asks it gets an error.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from tests.support.moves import Fetched, Shards, StoodIn
from tests.support.readers import SANE_S, Heard, Readers, warm
from tests.support.waiting import wait_for

OBJECTS = {f"{n}.bin": random.Random(n).randbytes((256 << 10) - 1000 * n) for n in range(80)}
READERS, PAUSE_S = 3, 0.005
#: What is moved twice, or moved although the map does not say so, of what it says.
TOLERANCE = 1.05


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DevCluster]:
    """Four nodes that hold everything once, and no origin."""
    (tmp_path / "origin").mkdir()
    for path, data in OBJECTS.items():
        (tmp_path / "origin" / path).write_bytes(data)
    with DevCluster(nodes=4, data_dir=tmp_path / "cluster", capacity="1GiB") as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", f"file://{tmp_path}/origin", shard_size=0, replicas=1, storage_options="{}")
        warm(cluster, OBJECTS, 1)
        (tmp_path / "origin").rename(tmp_path / "away")
        yield cluster


def check(heard: list[Heard]) -> None:
    errors = [error for each in heard for error in each.errors]
    assert not errors, errors[0]
    assert sum(each.wrong for each in heard) == 0
    assert all(each.reads for each in heard)


def node_command(cluster: DevCluster, *words: str) -> subprocess.CompletedProcess[str]:
    """``shoal node …``, as somebody types it."""
    command = [sys.executable, "-m", "shoal.cli", "node", *words]
    env = {**os.environ, "SHOAL_ENDPOINT": cluster.endpoint}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=3 * SANE_S)


def moved_as_the_map_says(cluster: DevCluster, before: dict[int, Fetched], gained: dict[int, int]) -> None:
    """Each node fetched what it gained, once, from peers, and nothing from the origin."""
    for node, gained_bytes in gained.items():
        now, then = Fetched.by(cluster, node), before.get(node, Fetched(0, 0))
        assert now.from_origin == then.from_origin
        assert gained_bytes <= now.from_peers - then.from_peers <= TOLERANCE * gained_bytes


def test_node_added_under_readers(cluster: DevCluster) -> None:
    shards = Shards(cluster, 1)
    held = {node: shards.held(node) for node in range(4)}
    before = {node: Fetched.by(cluster, node) for node in range(4)}
    with Readers(cluster, OBJECTS, READERS, pause_s=PAUSE_S) as readers:
        cluster.add_node()
        wait_for(lambda: shards.are_with_their_owners(range(5)))
        check(readers.stop())
    gained = {node: shards.bytes_of(shards.owned(node) & ~held[node]) for node in range(4)}
    gained[4] = shards.bytes_of(shards.owned(4))
    assert gained[4] > 0
    moved_as_the_map_says(cluster, before, gained)


def test_shards_that_have_not_moved_yet_are_read_from_their_holders(tmp_path: Path) -> None:
    """At a byte a second hardly anything moves, so nearly all that the new node owns is elsewhere."""
    (tmp_path / "origin").mkdir()
    for path, data in OBJECTS.items():
        (tmp_path / "origin" / path).write_bytes(data)
    args = ["--rebalance-rate", "1"]
    with DevCluster(nodes=2, data_dir=tmp_path / "cluster", capacity="1GiB", node_args=args) as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", f"file://{tmp_path}/origin", shard_size=0, replicas=1, storage_options="{}")
        warm(cluster, OBJECTS, 1)
        (tmp_path / "origin").rename(tmp_path / "away")
        cluster.add_node()
        fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
        for start in (1000, 100_000):
            assert {path: fs.cat_file(f"set/{path}", start, start + 50_000) for path in OBJECTS} == {
                path: data[start : start + 50_000] for path, data in OBJECTS.items()
            }
        shards = Shards(cluster, 1)
        expected = 2 * int((shards.owned(2) & ~shards.held(2)).sum())
        assert expected > 20
        stood_in = StoodIn.by(cluster, 2)
        assert stood_in.relayed_bytes == 0
        assert expected <= stood_in.referrals <= expected + 2, "the first part moves at once"
        assert Fetched.by(cluster, 2).from_origin == 0


def test_node_drained_and_removed_under_readers(cluster: DevCluster) -> None:
    shards = Shards(cluster, 1)
    held = {node: shards.held(node) for node in range(4)}
    before = {node: Fetched.by(cluster, node) for node in range(4)}
    node_id = cluster.node_ids[1]
    with Readers(cluster, OBJECTS, READERS, pause_s=PAUSE_S) as readers:
        drained = node_command(cluster, "drain", node_id, "--json", "--timeout", str(2 * SANE_S))
        assert drained.returncode == 0, drained.stderr
        told = json.loads(drained.stdout)
        assert (told["id"], told["state"], told["drained"], told["handover_bytes"]) == (node_id, "draining", True, 0)
        assert shards.are_with_their_owners([0, 2, 3]), "done is said when it is"
        cluster.nodes[1].kill()
        fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
        assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
        check(readers.stop())
    remaining = (0, 2, 3)
    gained = {node: shards.bytes_of(shards.owned(node) & ~held[node]) for node in remaining}
    assert sum(gained.values()) >= shards.bytes_of(held[1])
    moved_as_the_map_says(cluster, before, gained)


def test_drained_node_that_restarts_owns_nothing_until_it_is_undrained(cluster: DevCluster) -> None:
    node_id = cluster.node_ids[1]
    assert node_command(cluster, "drain", node_id).returncode == 0
    for server in (cluster.nodes[1], cluster.controller):
        server.kill()
        server.start()
    cluster.wait_until_joined()
    shards = Shards(cluster, 1)
    assert not shards.owned(1).any()
    undrained = node_command(cluster, "undrain", node_id)
    assert undrained.stdout == f"node {node_id} owns its share again\n"
    assert shards.owned(1).any()
    wait_for(lambda: shards.are_with_their_owners(range(4)))
    assert Fetched.by(cluster, 1).from_origin == 0
    fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
    assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS


def test_drain_that_finds_no_room_says_so(tmp_path: Path) -> None:
    """Two nodes that can hold a little more than half each: the drain ends with what is left and why."""
    (tmp_path / "origin").mkdir()
    for path, data in OBJECTS.items():
        (tmp_path / "origin" / path).write_bytes(data)
    with DevCluster(nodes=2, data_dir=tmp_path / "cluster", capacity="13MiB") as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", f"file://{tmp_path}/origin", shard_size=0, replicas=1, storage_options="{}")
        warm(cluster, OBJECTS, 1)
        stuck = node_command(cluster, "drain", cluster.node_ids[0], "--timeout", "4")
        assert stuck.returncode == 1
        assert "is not drained after 4 s: " in stuck.stderr
        assert f"node {cluster.node_ids[1]} lacks room for " in stuck.stderr
        assert "'shoal node undrain" in stuck.stderr
        fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
        assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
