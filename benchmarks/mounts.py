"""Shoal's files on the node that has them, beside mounts that cache on the same disk.

Pairs, one mount after the other: each mount keeps the set twice in the page cache (its own pages and its cache files),
and both mounts together with Shoal's would not fit the memory of a small machine.
"""

from __future__ import annotations

import shutil

from benchmarks import reads, shoal_reader
from benchmarks.harness import Contender, always, interleave
from benchmarks.peers import juicefs, plain_file, rclone
from benchmarks.report import Findings
from benchmarks.stage import BUCKET, Stage

SEQUENTIAL = "same node, sequential reads of 1 MiB"
RANDOM = "same node, random reads of 128 KiB"
SEQUENTIAL_BYTES, RANDOM_BYTES = 1 << 20, 128 << 10
RANDOM_SHARE = 4  # random reads touch a quarter of the set's bytes in a turn
PEERS = ("JuiceFS", "rclone")


def run(stage: Stage, findings: Findings) -> None:
    for peer in PEERS:
        planned = [(6, what, peer, 1.0) for what in (SEQUENTIAL, RANDOM)]
        with findings.unless_missing(*planned):
            directory = stage.directory / peer.lower()
            try:
                if peer == "JuiceFS":
                    juicefs.find()
                    stage.weed.create_bucket("juicefs")
                    size = stage.scale.set_bytes
                    with juicefs.mount(stage.origin, "juicefs", directory, stage.warm.files, size) as (paths, pid):
                        findings.note(juicefs.SETTINGS)
                        _compare(stage, findings, peer, paths, pid)
                else:
                    version = rclone.version()
                    keys = [key.removeprefix("set/") for key in stage.keys]
                    with rclone.mount(stage.origin, f"{BUCKET}/set", directory, keys) as (paths, pid):
                        findings.note(f"{rclone.SETTINGS} ({version})")
                        _compare(stage, findings, peer, paths, pid)
            finally:
                shutil.rmtree(directory, ignore_errors=True)


def _compare(stage: Stage, findings: Findings, peer: str, paths: list[str], pid: int) -> None:
    warm = stage.warm
    access = warm.access(local=True)
    size = min(RANDOM_BYTES, stage.object_bytes // 4)
    count = max(1, stage.object_bytes * len(paths) // size // RANDOM_SHARE)
    theirs = reads.scattered(paths, stage.object_bytes, count, size, seed=3)
    ours = reads.scattered(warm.urls, stage.object_bytes, count, size, seed=3)
    shoal, other = stage.worker("shoal, same node"), stage.worker(peer)
    for what, our_function, our_arguments, their_function, their_arguments in (
        (
            SEQUENTIAL,
            shoal_reader.read_sequential,
            always(access, warm.urls, SEQUENTIAL_BYTES),
            plain_file.read_sequential,
            always(paths, SEQUENTIAL_BYTES),
        ),
        (
            RANDOM,
            shoal_reader.read_seeking,
            always(access, ours),
            plain_file.read_seeking,
            always(theirs),
        ),
    ):
        series = interleave(
            [
                Contender("shoal", our_function, our_arguments, shoal, warm.servers),
                Contender(peer, their_function, their_arguments, other, (pid, stage.weed.pid)),
            ],
            stage.scale.runs,
        )
        findings.rate(6, what, series["shoal"], series[peer], 1.0)
