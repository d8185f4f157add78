"""A prefetch of the set into an empty cluster, beside the fastest parallel reader of the same origin.

The reader throws the bytes away; Shoal writes, checks and syncs them, and calls itself done only then. So the disk's
own speed is measured in the same turns, because no cache can be filled faster than its disk takes the bytes.
"""

from __future__ import annotations

import os
import tempfile
import time

from benchmarks.harness import Contender, Outcome, always, interleave
from benchmarks.other_node import obstore_variants
from benchmarks.peers import obstore_client, plain_file
from benchmarks.report import Findings
from benchmarks.stage import Stage, prefetch, server_pids, settle
from shoal.cli.control import Control
from shoal.devcluster import DevCluster

TARGET = 0.95
DATASET = "cold-set"
NODES = (1, 3)


def what(nodes: int) -> str:
    return f"prefetch of the set, {nodes} node{'' if nodes == 1 else 's'}"


def run(stage: Stage, findings: Findings) -> None:
    best = findings.best(obstore_client.SETTINGS, "the prefetch", obstore_variants(stage))
    for nodes in NODES:
        with stage.cluster(nodes) as cluster:
            _compare(stage, cluster, nodes, best, findings)
    findings.note(
        "prefetch: job started to job done, sealed and synced, the page cache full before; disk: writes of 8 MiB, then "
        "fdatasync"
    )


def _compare(stage: Stage, cluster: DevCluster, nodes: int, reader: Contender, findings: Findings) -> None:
    size = stage.object_bytes * len(stage.keys)

    def empty(turn: int) -> None:
        """Forget the dataset, wait until its bytes are gone, and register it anew."""
        with Control(cluster.controller_grpc) as control:
            if DATASET in {dataset.name for dataset in control.datasets()}:
                control.remove_dataset(DATASET)
        settle(cluster, is_empty=True)
        stage.add_dataset(cluster, DATASET, "set")
        os.sync()
        stage.fill_page_cache()

    job, disk = stage.worker("shoal, prefetch"), stage.worker("plain file")
    with (
        tempfile.TemporaryDirectory(prefix="disk-", dir=stage.directory) as directory,
    ):
        series = interleave(
            [
                Contender(
                    "shoal",
                    run_job,
                    always(cluster.controller_grpc, size),
                    job,
                    (*server_pids(cluster), stage.weed.pid),
                    before=empty,
                    after=lambda turn: os.sync(),
                ),
                reader,
                Contender("disk write", plain_file.write, always(directory, size), disk, after=lambda turn: os.sync()),
            ],
            stage.scale.runs,
        )
    findings.rate(8, what(nodes), series["shoal"], series["obstore"], TARGET)
    findings.rate(8, what(nodes), series["shoal"], series["disk write"])


def run_job(controller: str, size_bytes: int) -> Outcome:
    """Runs in a worker."""
    started = time.perf_counter()
    job = prefetch(controller, DATASET)
    seconds = time.perf_counter() - started
    if job["state"] != "done" or job["bytes_done"] != size_bytes:
        raise RuntimeError(
            f"the prefetch {job['state']} with {job['bytes_done']} of {size_bytes} bytes: {job['reason']}"
        )
    return Outcome(seconds, size_bytes)
