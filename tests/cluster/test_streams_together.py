"""Several jobs on one cold dataset at once: the origin is read once for all of them."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import shoal
from tests.support import streams
from tests.support.minicluster import MiniCluster

JOBS, FILES, BATCHES, ROWS = 4, 8, 4, 50


def test_four_streams_with_different_seeds_read_each_byte_of_the_origin_once(tmp_path: Path) -> None:
    data = streams.arrow_objects(FILES, BATCHES, ROWS)
    with MiniCluster(tmp_path, data, nodes=2, part_size=1 << 12, shard_size=1 << 14) as cluster:
        found: dict[int, list[int]] = {}

        def job(number: int) -> None:
            node = cluster.nodes[number % 2]
            options = {
                "endpoint": node.address,
                "socket": str(cluster._socket(number % 2)),
                "skip_instance_cache": True,
            }
            stream = shoal.stream(
                "shoal://set/train/*.arrow",
                batch_size=50,
                shuffle=True,
                seed=number,
                shuffle_window=100,
                ahead_bytes=1 << 14,
                storage_options=options,
            )
            found[number] = [sample for batch in stream for sample in batch["id"].to_pylist()]
            stream.close()

        threads = [threading.Thread(target=job, args=(number,)) for number in range(JOBS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(found) == list(range(JOBS)), "a job failed or hung"
        for samples in found.values():
            assert sorted(samples) == list(range(FILES * BATCHES * ROWS))
        assert len({tuple(samples) for samples in found.values()}) == JOBS
        reads = sorted(cluster.origin.reads)
        assert sum(end - start for _, start, end in reads) == sum(map(len, data.values()))
        for (path, _, end), (other, start, _) in itertools.pairwise(reads):
            assert path != other or end <= start, f"{path} was read twice from {start} on"
