"""A node and its drive are lost for good: what had two holders has two again, made from the other one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from tests.support.moves import Fetched, Shards
from tests.support.readers import SANE_S, Readers, warm
from tests.support.waiting import wait_for

OBJECTS = {f"{n}.bin": random.Random(n).randbytes((256 << 10) - 1000 * n) for n in range(60)}


def test_lost_replicas_are_made_again_from_the_others(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    for path, data in OBJECTS.items():
        (origin / path).write_bytes(data)
    lease = ["--lease", "2"]
    with DevCluster(nodes=4, data_dir=tmp_path / "cluster", capacity="1GiB", controller_args=lease) as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", f"file://{origin}", shard_size=0, replicas=2, storage_options="{}")
        warm(cluster, OBJECTS, 2)
        origin.rename(tmp_path / "away")  # who asks it gets an error
        shards = Shards(cluster, 2)
        left = (0, 2, 3)
        lost_bytes = shards.bytes_of(shards.held(1))
        before = {node: Fetched.by(cluster, node) for node in left}
        with Readers(cluster, OBJECTS, 3, pause_s=0.005) as readers:
            cluster.nodes[1].kill()
            shutil.rmtree(cluster.data_dir / "node-1")
            wait_for(lambda: bool((np.sum([shards.held(node) for node in left], axis=0) >= 2).all()), 2 * SANE_S)
            fetched = [Fetched.by(cluster, node).from_peers - before[node].from_peers for node in left]
            assert lost_bytes <= sum(fetched), "what was lost came from peers"
            cluster.nodes[2].kill()
            fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
            assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
            heard = readers.stop()
        errors = [error for each in heard for error in each.errors]
        assert not errors, errors[0]
        assert sum(each.wrong for each in heard) == 0
        assert [Fetched.by(cluster, node).from_origin for node in (0, 3)] == [
            before[node].from_origin for node in (0, 3)
        ]
