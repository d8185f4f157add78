"""How even placement is, how little it moves, and how fast it answers, beside the schemes it was chosen over.

    python -m benchmarks.placement [--tiny] [--json PATH]

Everything but the times is deterministic: node names and shard keys come from seeded hashes.

The rule: every scheme sees the same shards, nodes and events, and "moved" counts the bytes whose first owner changes.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import xxhash

from benchmarks import command
from shoal import placement, shards
from shoal.cluster_map import ClusterMap, Node
from shoal.rendezvous import Contest

GIB = 1 << 30
DRIVES = tuple(size * 1024 * GIB for size in (1, 1, 1, 1, 2, 2, 4, 4))
SHARD_BYTES = 256 << 20
RING_POINTS = 200  # a TiB of weight
TARGET_BALANCE, TARGET_MOVED = 1.06, 1.01

Sizes = npt.NDArray[np.int64]
Owners = npt.NDArray[np.intp]
Weights = dict[str, int]


@dataclass(frozen=True, slots=True)
class ShardSet:
    keys: npt.NDArray[np.uint64]
    sizes: Sizes


Scheme = Callable[[ShardSet, tuple[Node, ...]], npt.NDArray[Any]]


def mod_n(shard_set: ShardSet, nodes: tuple[Node, ...]) -> npt.NDArray[Any]:
    return shard_set.keys[:, 0] % np.uint64(len(nodes))


def unweighted(shard_set: ShardSet, nodes: tuple[Node, ...]) -> npt.NDArray[Any]:
    return Contest(tuple(Node(n.id, n.address, 1) for n in nodes)).winners(shard_set.keys[:, 0])


def ring(shard_set: ShardSet, nodes: tuple[Node, ...]) -> npt.NDArray[Any]:
    """Consistent hashing: the owner is the next point on the circle."""
    points, owners = [], []
    for index, node in enumerate(nodes):
        count = RING_POINTS * node.weight // (1024 * GIB)
        points += [xxhash.xxh3_64_intdigest(f"{node.id}#{point}".encode()) for point in range(count)]
        owners += [index] * count
    circle = np.array(points, np.uint64)
    sort = np.argsort(circle)
    return np.array(owners)[sort][np.searchsorted(circle[sort], shard_set.keys[:, 0]) % len(circle)]


def weighted(shard_set: ShardSet, nodes: tuple[Node, ...]) -> npt.NDArray[Any]:
    return Contest(nodes).winners(shard_set.keys[:, 0])


def v1(shard_set: ShardSet, nodes: tuple[Node, ...]) -> npt.NDArray[Any]:
    return placement.primaries(shard_set.keys, shard_set.sizes, nodes)


SCHEMES: dict[str, Scheme] = {
    "mod N": mod_n,
    "unweighted rendezvous": unweighted,
    f"ring, {RING_POINTS} virtual nodes": ring,
    "weighted rendezvous": weighted,
    "v1 (weighted rendezvous, bounded)": v1,
}
#: They ignore weights, so a resized drive changes nothing.
WEIGHTLESS = ("mod N", "unweighted rendezvous")
KINDS = ("loss", "join", "double", "halve", "resize")


def cluster(weights: Weights) -> tuple[Node, ...]:
    return tuple(Node(name, f"{name}:7450", weight) for name, weight in sorted(weights.items()))


def shard_set(seed: int, count: int, *, equal: bool = True) -> ShardSet:
    """Keys that look random, and sizes of `SHARD_BYTES` or, unless `equal`, anything from nothing to that."""
    counters = np.arange(3 * count, dtype=np.uint64) + np.uint64((seed + 1) << 32)
    words = shards.mix64(counters)
    sizes = np.full(count, SHARD_BYTES, np.int64) if equal else (words[2 * count :] % SHARD_BYTES + 1).astype(np.int64)
    return ShardSet(words[: 2 * count].reshape(count, 2), sizes)


def drives(seed: int) -> Weights:
    return {f"set{seed}-node{index}": weight for index, weight in enumerate(DRIVES)}


def events(seed: int, before: Weights) -> Iterator[tuple[str, Weights]]:
    """Each node lost in turn; a node of each drive size joining; each node's drive doubled, and halved."""
    for name, weight in before.items():
        yield "loss", {other: w for other, w in before.items() if other != name}
        yield "double", before | {name: weight * 2}
        yield "halve", before | {name: weight // 2}
    for weight in sorted(set(DRIVES)):
        yield "join", before | {f"set{seed}-joins": weight}


def loads(weights: Weights, owners: Owners, sizes: Sizes) -> dict[str, float]:
    counted = np.bincount(owners, weights=sizes, minlength=len(weights))
    return dict(zip(sorted(weights), counted.tolist(), strict=True))


def fair(weights: Weights, total: float) -> dict[str, float]:
    return {name: total * weight / sum(weights.values()) for name, weight in weights.items()}


def least(before: dict[str, float], after: dict[str, float]) -> float:
    """The fewest bytes that can turn loads `before` into loads `after`: half of all that changes."""
    return sum(abs(after.get(n, 0) - before.get(n, 0)) for n in before.keys() | after.keys()) / 2


@dataclass(slots=True)
class Moves:
    """Bytes, summed over the events of one kind in one set of nodes."""

    moved: float = 0
    optimum: float = 0  #: the least that leads from the scheme's loads before to its loads after the event
    optimum_fair: float = 0  #: the same for the fair loads

    def __add__(self, other: Moves) -> Moves:
        return Moves(self.moved + other.moved, self.optimum + other.optimum, self.optimum_fair + other.optimum_fair)


def judge(scheme: Scheme, seed: int, shard_set: ShardSet) -> tuple[float, dict[str, Moves]]:
    """Largest load over fair load, and the bytes each kind of event moves."""
    before, total = drives(seed), float(shard_set.sizes.sum())
    old = scheme(shard_set, cluster(before))
    old_names = np.array(sorted(before))[old]
    old_loads = loads(before, old, shard_set.sizes)
    old_fair = fair(before, total)
    moves = {kind: Moves() for kind in ("loss", "join", "double", "halve")}
    for kind, after in events(seed, before):
        new = scheme(shard_set, cluster(after))
        moved = float(shard_set.sizes[np.array(sorted(after))[new] != old_names].sum())
        optimum = least(old_loads, loads(after, new, shard_set.sizes))
        moves[kind] += Moves(moved, optimum, least(old_fair, fair(after, total)))
    moves["resize"] = moves["double"] + moves["halve"]
    return max(old_loads[name] / old_fair[name] for name in before), moves


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "worst": max(values)}


def table(seeds: range, count: int, *, equal: bool = True) -> dict[str, Any]:
    """For each scheme the balance and the movement, over `seeds` sets of node names and keys."""
    result: dict[str, Any] = {}
    for name, scheme in SCHEMES.items():
        runs = [judge(scheme, seed, shard_set(seed, count, equal=equal)) for seed in seeds]
        row: dict[str, Any] = {"max_over_fair": summary([balance for balance, _ in runs])}
        for kind in KINDS:
            if name in WEIGHTLESS and kind in ("double", "halve", "resize"):
                row[kind] = None
                continue
            sets = [moves[kind] for _, moves in runs]
            everything = sum(sets, Moves())
            row[kind] = {
                "aggregate": everything.moved / everything.optimum,
                "aggregate_of_fair": everything.moved / everything.optimum_fair,
                **summary([m.moved / m.optimum for m in sets]),
            }
        result[name] = row
    return result


def seconds(call: Callable[[], object], times: int) -> float:
    """The median of some runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def exact_argmin(words: npt.NDArray[np.uint64], contest: Contest, rows: int = 1310) -> None:
    for start in range(0, len(words), rows):
        contest.scores(words[start : start + rows]).argmin(axis=1)


def speeds(count: int, node_count: int) -> dict[str, float]:
    """Seconds of `count` owner look-ups over `node_count` nodes, and of single ones in microseconds."""
    many, bounded = shard_set(0, count), shard_set(0, min(count, placement.BOUND_MAX_SHARDS))
    nodes = cluster({f"node{index}": DRIVES[index % len(DRIVES)] for index in range(node_count)})
    held = placement.Placement(lambda: bounded, len(bounded.keys), ClusterMap(1, nodes), replicas=2)
    held.primaries()
    sample = range(min(1000, len(bounded.keys)))
    return {
        "look_ups": count,
        "nodes": node_count,
        "primaries_s": seconds(lambda: placement.primaries(many.keys, many.sizes, nodes), 3),
        "exact_scores_argmin_s": seconds(lambda: exact_argmin(many.keys[:, 0], Contest(nodes)), 1),
        "bounded_look_ups": len(bounded.keys),
        "bounded_primaries_s": seconds(lambda: placement.primaries(bounded.keys, bounded.sizes, nodes), 3),
        "bounded_owned_by_two_replicas_s": seconds(lambda: held.owned_by("node3"), 3),
        "single_order_first_us": seconds(lambda: [held.order(i) for i in sample], 1) / len(sample) * 1e6,
        "single_order_again_us": seconds(lambda: [held.order(i) for i in sample], 3) / len(sample) * 1e6,
    }


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each target under both optima, because which one is meant decides whether a resize meets it."""
    ours = result["balance"]["many"][list(SCHEMES)[-1]]
    found = {"max/fair, worst set": (ours["max_over_fair"]["worst"], TARGET_BALANCE)}
    for kind in KINDS:
        found[f"moved on {kind} / least for the loads reached"] = (ours[kind]["aggregate"], TARGET_MOVED)
        found[f"moved on {kind} / change of the fair loads"] = (ours[kind]["aggregate_of_fair"], TARGET_MOVED)
    return {
        name: {"value": value, "at_most": limit, "is_met": value <= limit} for name, (value, limit) in found.items()
    }


def measure(tiny: bool) -> dict[str, Any]:
    sets, many, few = (2, 400, 50) if tiny else (100, 4000, 200)
    look_ups, nodes = (2000, 10) if tiny else (1_000_000, 100)
    result: dict[str, Any] = {
        "scheme": "v1",
        "load_bound": placement.LOAD_BOUND,
        "drives": "1:1:1:1:2:2:4:4",
        "sets": sets,
        "shards": {"many": many, "few": few},
        "definitions": {
            "set": "one seeded set of node names and shard keys; median and worst are over the sets",
            "loss": "each node goes in turn",
            "join": "a ninth node of weight 1, 2 or 4 comes",
            "double, halve": "each node's drive becomes twice, or half, as large",
            "resize": "double and halve together",
            "optimum": "the least that leads from the scheme's loads before to its loads after: half the sum of "
            "|change of load|; on a loss, where no survivor shrinks, what the lost node held",
            "aggregate": "bytes moved in all events of all sets / their optima",
            "aggregate_of_fair": "the same, with the change of the fair loads as optimum",
        },
        "balance": {
            "many": table(range(sets), many),
            "few": table(range(sets), few),
            "many_of_unequal_size": table(range(sets), many, equal=False),
        },
        "speed": speeds(look_ups, nodes),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__},
    }
    return result | {"targets": {} if tiny else targets(result)}


def show(result: dict[str, Any]) -> None:
    many, few = result["balance"]["many"], result["balance"]["few"]
    counts, speed = result["shards"], result["speed"]
    click.echo(
        f"drives {result['drives']}, {result['sets']} sets of nodes and keys; median (worst); moved: aggregate\n"
    )
    heads = [f"max/fair, {counts['many']:,}", f"max/fair, {counts['few']:,}", *KINDS]
    widths = (16, 16, *(10 for _ in KINDS))
    click.echo(f"{'':<34}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for name, row in many.items():
        cells = [f"{r['max_over_fair']['median']:.3f} ({r['max_over_fair']['worst']:.3f})" for r in (row, few[name])]
        cells += ["ignored" if row[k] is None else f"{row[k]['aggregate']:.3f} x" for k in KINDS]
        click.echo(f"{name:<34}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    click.echo()
    click.echo(f"{speed['look_ups']:,} look-ups over {speed['nodes']} nodes: {speed['primaries_s']:.2f} s")
    click.echo(f"  by exact scores alone: {speed['exact_scores_argmin_s']:.2f} s")
    click.echo(f"{speed['bounded_look_ups']:,} with the load bound: {speed['bounded_primaries_s']:.2f} s")
    click.echo(f"  which of them a node owns, two replicas: {speed['bounded_owned_by_two_replicas_s']:.2f} s")
    click.echo(f"one order: {speed['single_order_first_us']:.0f} us, again {speed['single_order_again_us']:.1f} us")
    for name, target in result["targets"].items():
        verdict = "met" if target["is_met"] else "MISSED"
        click.echo(f"{verdict:<7}{name}: {target['value']:.4f}, at most {target['at_most']}")


@click.command()
@command.json_option
@click.option("--tiny", is_flag=True, help="Seconds instead of minutes: proves that it runs, measures nothing.")
def main(json_path: Path | None, tiny: bool) -> None:
    """Balance, movement and speed of placement v1."""
    result = measure(tiny)
    show(result)
    command.save(result, json_path)


if __name__ == "__main__":
    main()
