"""Reading through a cold cache, beside reading the origin directly: what the first epoch pays.

A first time cannot be repeated, so every turn has objects of its own; all contenders read them, the origin's page cache
holds them from the start, and between turns the node finishes what it stores. One node, over the network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from benchmarks import shoal_reader
from benchmarks.harness import Contender, Outcome, Series, interleave, progress
from benchmarks.peers import obstore_client, s3fs_client
from benchmarks.report import Findings
from benchmarks.shoal_reader import Access
from benchmarks.stage import BUCKET, Cold, Stage, server_pids, settle
from shoal.devcluster import DevCluster

WHOLE = "cold object of {}, whole"
FIRST = "cold object of {}, first byte"
WHOLE_TARGET = 0.95
FIRST_TARGET = 1 / 1.2
DATASET = "cold"


def run(stage: Stage, findings: Findings) -> None:
    planned = [(7, WHOLE.format(c.name), "obstore", WHOLE_TARGET) for c in stage.scale.cold]
    planned += [(7, FIRST.format(c.name), "obstore", FIRST_TARGET) for c in stage.scale.cold]
    with findings.unless_missing(*planned):
        shoal_reader.require("open_buffer")
        for cold in stage.scale.cold:
            progress(f"writing cold objects of {cold.name}")
            _write(stage, cold)
        stage.fill_page_cache()
        with stage.cluster(1) as cluster:
            stage.add_dataset(cluster, DATASET, DATASET)
            for cold in stage.scale.cold:
                _compare(stage, cold, cluster, findings)
    findings.note(
        "cold: the page cache full before, one process, one object after the other, medians of one object; obstore as "
        "the faster of its ways: one get and eight ranges of 8 MiB at once, the stream's first chunk and a request for "
        "one byte"
    )


def _key(cold: Cold, use: str, turn: int, number: int) -> str:
    return f"{DATASET}/{cold.name.replace(' ', '')}/{use}/{turn}-{number:03}"


def _keys(cold: Cold, use: str, turn: int) -> tuple[str, ...]:
    return tuple(_key(cold, use, turn, number) for number in range(cold.per_turn))


def _write(stage: Stage, cold: Cold) -> None:
    s3 = stage.weed.filesystem()
    data = os.urandom(cold.size_bytes)
    for use in ("whole", "first"):
        for turn in range(stage.scale.runs + 1):
            for key in _keys(cold, use, turn):
                s3.pipe_file(f"{BUCKET}/{key}", data)
                s3.cat_file(f"{BUCKET}/{key}")


def _compare(stage: Stage, cold: Cold, cluster: DevCluster, findings: Findings) -> None:
    """Whole objects, then first bytes, of one size."""
    shoal, at_obstore, at_s3fs = (stage.worker(name) for name in ("shoal, cold", "obstore", "s3fs"))
    access = Access(cluster.endpoint, str(cluster.sockets[0]), local=False)
    shoal.call(shoal_reader.connect, access, f"shoal://{_key(cold, 'whole', 0, 0)}")
    weed = (stage.weed.pid,)
    servers = (*server_pids(cluster), *weed)
    origin = stage.origin

    def ours(function: Callable[..., Outcome], use: str) -> Contender:
        """After each turn the rest of what was begun comes in and is sealed, outside the clock."""

        def arguments(turn: int) -> tuple[Any, ...]:
            return access, [f"shoal://{key}" for key in _keys(cold, use, turn)]

        def finish(turn: int) -> None:
            shoal.call(shoal_reader.read_whole, *arguments(turn))
            settle(cluster)

        return Contender("shoal", function, arguments, shoal, servers, after=finish)

    def direct(name: str, function: Callable[..., Outcome], use: str, *more: int) -> Contender:
        return Contender(name, function, lambda turn: (origin, BUCKET, _keys(cold, use, turn), *more), at_obstore, weed)

    def paths(turn: int) -> tuple[Any, ...]:
        return origin, [f"{BUCKET}/{key}" for key in _keys(cold, "whole", turn)]

    whole = interleave(
        [
            ours(shoal_reader.cold_whole, "whole"),
            direct("obstore get", obstore_client.cold_whole, "whole"),
            direct("obstore ranges", obstore_client.cold_parallel, "whole", cold.size_bytes),
            Contender("s3fs", s3fs_client.cold_whole, paths, at_s3fs, weed),
        ],
        stage.scale.runs,
    )
    first = interleave(
        [
            ours(shoal_reader.cold_first_byte, "first"),
            direct("obstore stream", obstore_client.cold_first_chunk, "first"),
            direct("obstore byte", obstore_client.cold_first_byte, "first"),
        ],
        stage.scale.runs,
    )
    what = WHOLE.format(cold.name)
    findings.value(7, what, whole["shoal"], _faster(whole, "obstore"), "p50_ms", "ms", WHOLE_TARGET)
    findings.value(7, what, whole["shoal"], whole["s3fs"], "p50_ms", "ms")
    what = FIRST.format(cold.name)
    findings.value(7, what, first["shoal"], _faster(first, "obstore"), "p50_ms", "ms", FIRST_TARGET)


def _faster(series: dict[str, Series], peer: str) -> Series:
    """The quickest of a peer's ways, under the peer's name."""
    ways = [found for name, found in series.items() if name.startswith(peer)]
    best = min(ways, key=lambda found: found.value("p50_ms").median)
    return Series(peer, best.turns)
