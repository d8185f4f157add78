"""A cache node killed with -9 under eight readers: no error, no wrong byte, and how long the longest read took.

Run with ``-m long`` for figures over many kills; docs/failures.md has the last ones.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.support.readers import Readers, Stalls, report, warm, within

#: Nothing of this takes so long; a read that does hangs.
SANE_S = 20.0
OBJECT_BYTES = 2 << 20
#: From the kill on, reads count as those during it: until after the map has lost the node.
DURING_S = 3.0


def make_objects(directory: Path, count: int = 24) -> dict[str, bytes]:
    import random

    objects = {f"{n}.bin": random.Random(n).randbytes(OBJECT_BYTES - 1000 * n) for n in range(count)}
    directory.mkdir()
    for path, data in objects.items():
        (directory / path).write_bytes(data)
    return objects


def add(cluster: DevCluster, directory: Path, replicas: int) -> None:
    with Control(cluster.controller_grpc) as control:
        control.add_dataset("set", f"file://{directory}", shard_size=0, replicas=replicas, storage_options="{}")


def run_kills(tmp_path: Path, replicas: int, kills: int, name: str) -> None:
    objects = make_objects(tmp_path / "origin")
    with DevCluster(nodes=3, data_dir=tmp_path / "cluster", capacity="1GiB") as cluster:
        add(cluster, tmp_path / "origin", replicas)
        warm(cluster, objects, replicas)
        killed_at: list[float] = []
        with Readers(cluster, objects) as readers:
            time.sleep(1.0)
            for number in range(kills):
                node = cluster.nodes[number % 3]
                killed_at.append(time.monotonic())
                node.kill()
                time.sleep(DURING_S)
                node.start()
                cluster.wait_until_joined()
                time.sleep(1.0)
            heard = readers.stop()
    errors = [error for each in heard for error in each.errors]
    assert not errors, errors[0]
    assert sum(each.wrong for each in heard) == 0
    assert all(each.reads for each in heard)
    before = Stalls.of(within(heard, 0.0, killed_at[0] - 0.01))
    worst = [max(r.seconds for r in within(heard, at, at + DURING_S)) * 1000 for at in killed_at]
    during = Stalls.of([r for at in killed_at for r in within(heard, at, at + DURING_S)])
    report(name, kills=kills, before=before, during=during, median_worst_ms=round(sorted(worst)[len(worst) // 2], 1))
    assert during.max_ms < SANE_S * 1000


@pytest.mark.parametrize("replicas", [2, 1])
def test_killed_under_eight_readers(tmp_path: Path, replicas: int) -> None:
    """With a replica the bytes come from it; without, through another node from the origin."""
    run_kills(tmp_path, replicas, 1, f"node-killed-replicas-{replicas}")
