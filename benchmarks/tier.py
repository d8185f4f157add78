"""A mount with a local tier beside one without: an object of several shards, most of them other nodes', in one run.

    python -m benchmarks.tier [--tiny] [--workdir DIR] [--json PATH]

    sequential, random, map     as benchmarks.mounted has them
    first reading               of many objects, one after the other, while the tier is being filled with them

Plain files, mount without and mount with the tier take turns; what is told is the median of each. Before each turn the
mount's own pages are dropped, so that the bytes come from where the mount has them: the nodes' files, or the tier's,
which both stay in the page cache. All nodes are on one machine here: a network between them makes the difference
larger. Needs root, because it mounts.

The rule: the three read the same bytes with the same calls.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from benchmarks import command, machine
from benchmarks.mounted import FULL, LARGE, TINY, Scale, forget, make_origin, sequential
from shoal import sizes
from shoal.cli import output
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.support.mounted import Mounted
from tests.support.waiting import wait_for

NODES = 3
SHARDS = 8


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    origin, tier = directory / "origin", directory / "tier"
    make_origin(origin, scale)
    tier.mkdir()
    with DevCluster(nodes=NODES, data_dir=directory / "cluster", capacity="4GiB") as cluster, ExitStack() as stack:
        with Control(cluster.controller_grpc) as control:
            url, shard_size = f"file://{origin / 'large'}", scale.large_bytes // SHARDS
            control.add_dataset("large", url, shard_size=shard_size, replicas=1, storage_options=json.dumps({}))
        words = ["--local-tier", str(tier), "--local-tier-size", str(2 * scale.large_bytes)]
        without = stack.enter_context(Mounted("large", cluster.environment()))
        having = stack.enter_context(Mounted("large", cluster.environment(), words))
        for mount in (without, having):
            sequential(mount.path, scale)
        wait_for(lambda: having.report()["local_tier"]["files"] == 1, 120)
        paths = {"plain": origin / "large", "without": without.path, "with": having.path}
        lines = [_compare(what, paths, scale) for what in LARGE]
        report = having.report()
        first = _first_readings(cluster, directory, scale)
    assert report["local_tier"]["hits"] > 0, "it was read from the tier"
    return {"lines": lines, "first_reading": first, "report": report}


def _first_readings(cluster: DevCluster, directory: Path, scale: Scale) -> dict[str, float]:
    """Bytes a second of the first reading through a new mount, whose objects the nodes have."""
    origin, count, size = directory / "origin/many", 64 if scale.turns > 1 else 8, max(scale.large_bytes // 64, 3 << 19)
    origin.mkdir()
    for number in range(count):
        (origin / f"{number:02}.bin").write_bytes(random.Random(number).randbytes(size))
    with Control(cluster.controller_grpc) as control:
        control.add_dataset("many", f"file://{origin}", shard_size=size, replicas=1, storage_options=json.dumps({}))
    names = sorted(path.name for path in origin.iterdir())
    rates: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(scale.turns + 1):
        for name in list(rates)[:: 1 if turn % 2 else -1]:
            tier = directory / f"tier-{turn}"
            tier.mkdir(exist_ok=True)
            words = ["--local-tier", str(tier), "--local-tier-size", str(2 * count * size)] if name == "with" else []
            with Mounted("many", cluster.environment(), words) as mount:
                began = time.perf_counter()
                assert sum(len((mount.path / each).read_bytes()) for each in names) == count * size
                seconds = time.perf_counter() - began
            if turn:
                rates[name].append(count * size / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def _compare(what: str, paths: dict[str, Path], scale: Scale) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(scale.turns + 1):
        for name, path in list(paths.items())[:: 1 if turn % 2 else -1]:
            if name != "plain":
                forget(path / "large.bin")
            began = time.perf_counter()
            amount = LARGE[what](path, scale)
            seconds = time.perf_counter() - began
            if turn:
                rates[name].append(amount / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"what": what, **medians, "ratio": medians["with"] / medians["without"]}


def show(result: dict[str, Any]) -> None:
    rows = [
        (
            line["what"],
            *(f"{line[name] / 1e9:.2f} GB/s" for name in ("plain", "without", "with")),
            f"{line['ratio']:.1f} x",
        )
        for line in result["lines"]
    ]
    click.echo(output.table(("WHAT", "PLAIN FILE>", "WITHOUT>", "WITH TIER>", "RATIO>"), rows))
    first = result["first_reading"]
    rates = " and ".join(f"{first[name] / 1e9:.2f} GB/s {name}" for name in ("without", "with"))
    click.echo(f"first reading of many objects: {rates} the tier, {first['with'] / first['without']:.2f} x")
    click.echo(f"one object of {sizes.format(result['large_bytes'])} in {SHARDS} shards on {NODES} nodes")


@click.command()
@command.json_option
@click.option("--tiny", is_flag=True, help="4 MiB: proves that it runs, measures nothing.")
@command.workdir_option
def main(json_path: Path | None, tiny: bool, workdir: Path | None) -> None:
    """A mount with a local tier beside one without."""
    scale = dataclasses.replace(TINY if tiny else FULL, small_files=0)
    with command.scratch(workdir) as directory:
        result = measure(scale, directory)
        result |= {"large_bytes": scale.large_bytes, "cores": len(os.sched_getaffinity(0))}
        result["machine"] = str(machine.describe(directory))
    show(result)
    command.save(result, json_path)


if __name__ == "__main__":
    main()
