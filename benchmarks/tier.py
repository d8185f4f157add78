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

import json
import os
import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import command, machine, path_reads
from benchmarks.harness import Outcome
from benchmarks.mounted import forget
from shoal import sizes
from shoal.cli import output
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.support.mounted import Mounted
from tests.support.waiting import wait_for

NODES = 3
SHARDS = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """One object of `large_bytes`, and `count` of `many_bytes`."""

    large_bytes: int
    random_reads: int
    count: int
    many_bytes: int
    turns: int


TINY = Scale(4 << 20, 20, 8, 3 << 19, 1)
FULL = Scale(512 << 20, 4000, 64, 8 << 20, 5)


def _ways(scale: Scale) -> dict[str, Callable[[str], Outcome]]:
    return {
        "sequential 1 MiB": lambda path: path_reads.sequential([path]),
        "random 128 KiB": lambda path: path_reads.scattered([path], scale.large_bytes, scale.random_reads),
        "map, scanned": lambda path: path_reads.scanned([path]),
    }


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    origin, tier = directory / "origin", directory / "tier"
    (origin / "large").mkdir(parents=True)
    (origin / "large/large.bin").write_bytes(np.random.default_rng(7).bytes(scale.large_bytes))
    tier.mkdir()
    with DevCluster(nodes=NODES, data_dir=directory / "cluster", capacity="4GiB") as cluster, ExitStack() as stack:
        _add(cluster, "large", origin, scale.large_bytes // SHARDS)
        words = ["--local-tier", str(tier), "--local-tier-size", str(2 * scale.large_bytes)]
        without = stack.enter_context(Mounted("large", cluster.environment()))
        having = stack.enter_context(Mounted("large", cluster.environment(), words))
        for mount in (without, having):
            path_reads.sequential([str(mount.path / "large.bin")])
        wait_for(lambda: having.report()["local_tier"]["files"] == 1, 120)
        paths = {"plain": origin / "large", "without": without.path, "with": having.path}
        lines = [_compare(what, read, paths, scale.turns) for what, read in _ways(scale).items()]
        report = having.report()
        first = _first_readings(cluster, directory, scale)
    assert report["local_tier"]["hits"] > 0, "it was read from the tier"
    return {"lines": lines, "first_reading": first, "report": report}


def _add(cluster: DevCluster, name: str, origin: Path, shard_size: int) -> None:
    with Control(cluster.controller_grpc) as control:
        url = f"file://{origin / name}"
        control.add_dataset(name, url, shard_size=shard_size, replicas=1, storage_options=json.dumps({}))


def _compare(what: str, read: Callable[[str], Outcome], places: dict[str, Path], turns: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in places}
    for turn in range(turns + 1):
        for name, place in list(places.items())[:: 1 if turn % 2 else -1]:
            path = str(place / "large.bin")
            if name != "plain":
                forget([path])
            outcome = read(path)
            if turn:
                rates[name].append(outcome.size_bytes / outcome.seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"what": what, **medians, "ratio": medians["with"] / medians["without"]}


def _first_readings(cluster: DevCluster, directory: Path, scale: Scale) -> dict[str, float]:
    """Bytes a second of the first reading through a new mount, whose objects the nodes have."""
    origin = directory / "origin/many"
    origin.mkdir()
    for number in range(scale.count):
        (origin / f"{number:02}.bin").write_bytes(random.Random(number).randbytes(scale.many_bytes))
    _add(cluster, "many", origin.parent, scale.many_bytes)
    names = sorted(path.name for path in origin.iterdir())
    rates: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(scale.turns + 1):
        for name in list(rates)[:: 1 if turn % 2 else -1]:
            tier = directory / f"tier-{turn}"
            tier.mkdir(exist_ok=True)
            limit = str(2 * scale.count * scale.many_bytes)
            words = ["--local-tier", str(tier), "--local-tier-size", limit] if name == "with" else []
            with Mounted("many", cluster.environment(), words) as mount:
                outcome = path_reads.sequential([str(mount.path / each) for each in names])
            if turn:
                rates[name].append(outcome.size_bytes / outcome.seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


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
    scale = TINY if tiny else FULL
    with command.scratch(workdir) as directory:
        result = measure(scale, directory)
        result |= {"large_bytes": scale.large_bytes, "cores": len(os.sched_getaffinity(0))}
        result["machine"] = str(machine.describe(directory))
    show(result)
    command.save(result, json_path)


if __name__ == "__main__":
    main()
