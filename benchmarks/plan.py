"""How well a stream's plan shuffles, how much of it is local, and what it costs to compute.

    python -m benchmarks.plan [--tiny] [--peers PYTHON] [--json PATH]

Nothing is read: the plan is a pure function, so these figures hold for any cluster of such a shape.

    shuffle    two figures beside those of a full shuffle, for the same data: the entropy of the distances between
               neighbours of the order (the measure that MosaicML Streaming's simulator uses), and how many different
               record batches a global batch draws from. Peers: no shuffle, and MosaicML's py1e, where the interpreter
               that --peers names has it installed.
    local      the share of samples that a rank's own node owns, by number of nodes, beside 1/N; that the order is the
               same with and without nodes; that all ranks have equally many
    cost       microseconds that a rank spends on the plan of one step

The rule: everything but the times is deterministic.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks import machine
from benchmarks.harness import Missing
from shoal.cli import output
from shoal.cluster_map import ClusterMap, Node
from shoal.placement import Placement
from shoal.streaming import plan as plans
from shoal.streaming.formats.source import Extent
from shoal.streaming.index import Index
from shoal.streaming.plan import Homes, Plan
from shoal.streaming.steps import Schedule

Samples = npt.NDArray[np.int64]
RESULTS = Path(__file__).parent / "results"
NODES = (4, 16, 64)
RANKS_PER_NODE = 4
BATCH_SIZE = 64
#: What is run by the interpreter that has the peer.
PY1E = """
import sys, numpy as np
from streaming.base.shuffle.py1e import get_shuffle_py1e
lengths = np.frombuffer(sys.stdin.buffer.read(), np.int64)
order = get_shuffle_py1e(lengths, 1, 7, 0, int(sys.argv[1]))
sys.stdout.buffer.write(np.asarray(order, np.int64).tobytes())
"""


@dataclass(frozen=True, slots=True)
class Data:
    """A dataset of images in Arrow files: `files` of `batches` record batches of `rows` samples of `sample_bytes`."""

    files: int
    batches: int
    rows: int
    sample_bytes: int

    @property
    def samples(self) -> int:
        return self.files * self.batches * self.rows

    def index(self) -> Index:
        size = self.rows * self.sample_bytes
        extents = [[Extent(n, self.rows, n * size, (n + 1) * size) for n in range(self.batches)]] * self.files
        return Index.of_runs(range(self.files), extents)


FULL = Data(files=1280, batches=10, rows=100, sample_bytes=110_000)
TINY = Data(files=64, batches=4, rows=10, sample_bytes=110_000)


def entropy(order: Samples) -> float:
    """Bits of the distances between neighbours."""
    _, counts = np.unique(np.abs(np.diff(order)), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def batches_drawn_from(order: Samples, rows: int, step: int) -> float:
    """Mean number of different record batches in a global batch."""
    whole = order[: len(order) // step * step].reshape(-1, step) // rows
    return float(np.mean([len(np.unique(each)) for each in whole]))


def py1e(lengths: Samples, window: int, python: str | None) -> Samples:
    """MosaicML's order of shards of these lengths. Raises Missing."""
    if python is None:
        raise Missing("no --peers interpreter was given")
    done = subprocess.run(
        [python, "-c", PY1E, str(window)], input=lengths.tobytes(), capture_output=True, timeout=600, check=False
    )
    if done.returncode:
        reason = done.stderr.decode().strip().splitlines()[-1:]
        raise Missing(f"{python} does not run MosaicML's py1e: {' '.join(reason)}")
    return np.frombuffer(done.stdout, np.int64)


def shuffles(data: Data, python: str | None) -> list[dict[str, Any]]:
    index = data.index()
    step = BATCH_SIZE * NODES[0] * RANKS_PER_NODE
    default, wide = plans.window_of(index), 1 << 16
    file_lengths = np.full(data.files, data.batches * data.rows)

    def ours(window: int) -> Callable[[], Samples]:
        return lambda: plans.order_of(index, seed=7, epoch=0, window=window).samples(0, data.samples)

    contenders: dict[str, Callable[[], Samples]] = {
        "no shuffle": lambda: np.arange(data.samples),
        f"shoal, window {default:,} (default)": ours(default),
        f"shoal, window {wide:,}": ours(wide),
        f"py1e, block {default:,}": lambda: py1e(file_lengths, default, python),
        "py1e, block 262,144 (default)": lambda: py1e(file_lengths, 1 << 18, python),
        "full shuffle": lambda: np.random.default_rng(7).permutation(data.samples),
    }
    rows: list[dict[str, Any]] = []
    for name, make in contenders.items():
        try:
            order = make()
        except Missing as reason:
            rows.append({"order": name, "skipped": str(reason)})
            continue
        assert len(order) == data.samples and len(np.unique(order)) == data.samples, f"{name} is no order"
        drawn = batches_drawn_from(order, data.rows, step)
        rows.append({"order": name, "entropy_bits": entropy(order), "batches_drawn_from": drawn})
    full = rows[-1]
    for row in rows:
        if "skipped" not in row:
            row["entropy_of_full"] = row["entropy_bits"] / full["entropy_bits"]
            row["batches_of_full"] = row["batches_drawn_from"] / full["batches_drawn_from"]
    return rows


def homes_of(index: Index, files: int, nodes: int, world_size: int) -> Homes:
    """Homes of files of one shard each on nodes that are only imagined."""
    rng = np.random.default_rng(5)
    table = SimpleNamespace(keys=rng.integers(0, 1 << 63, (files, 2)).astype(np.uint64), sizes=np.full(files, 1 << 27))
    members = tuple(Node(f"node-{number:03}", f"imagined:{number}", 1) for number in range(nodes))
    placement = Placement(lambda: table, files, ClusterMap(1, members), 1)
    snapshot: Any = SimpleNamespace(shards_at=lambda rows, offsets: rows)
    return Homes(snapshot, index, placement, [members[rank * nodes // world_size].id for rank in range(world_size)])


def locality(data: Data, nodes: int, most_steps: int) -> dict[str, Any]:
    index = data.index()
    world_size = nodes * RANKS_PER_NODE
    homes = homes_of(index, data.files, nodes, world_size)
    order = plans.order_of(index, seed=7, epoch=0, window=plans.window_of(index))
    schedule = Schedule(data.samples, 0, BATCH_SIZE, world_size, drop_last=True)
    steps = min(schedule.steps, most_steps)
    placed, plain = Plan(index, order, schedule, homes), Plan(index, order, schedule, None)
    local = counted = 0
    is_same, is_even, seconds = True, True, 0.0
    for step in range(steps):
        samples, runs = placed.step(step)
        begin = time.perf_counter()
        hands = placed.assigned(step)
        seconds += time.perf_counter() - begin
        is_same &= bool(np.array_equal(samples, plain.step(step)[0]))
        is_even &= hands.shape == (world_size, BATCH_SIZE) and len(np.unique(hands)) == len(samples)
        owners = homes.of(runs)[:, 0]
        local += int(sum(np.count_nonzero(owners[hand] == homes.ranks[rank]) for rank, hand in enumerate(hands)))
        counted += len(samples)
    begin = time.perf_counter()
    for step in range(steps):
        placed.reads(step, 0)
    return {
        "nodes": nodes,
        "ranks": world_size,
        "local_share": local / counted,
        "by_chance": 1 / nodes,
        "is_order_unchanged": is_same,
        "is_balance_exact": is_even,
        "plan_us_a_step": 1e6 * (time.perf_counter() - begin) / steps,
        "steps": steps,
    }


@click.command()
@click.option("--tiny", is_flag=True, help="A small dataset: proves that it runs.")
@click.option("--peers", "python", metavar="PYTHON", help="An interpreter with mosaicml-streaming installed.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where the figures go.")
def main(tiny: bool, python: str | None, json_path: Path | None) -> None:
    """Measure the plan of a stream. Without --tiny the figures go to benchmarks/results/plan.json."""
    data = TINY if tiny else FULL
    orders = shuffles(data, python)
    places = [locality(data, nodes, most_steps=20 if tiny else 200) for nodes in NODES[: 2 if tiny else None]]
    click.echo(f"{data.samples:,} samples of {data.sample_bytes:,} bytes, {data.rows} a record batch")
    click.echo(
        output.table(
            ("ORDER", "ENTROPY>", "OF FULL>", "BATCHES IN A STEP>", "OF FULL>"),
            [
                [row["order"], row["skipped"], "", "", ""]
                if "skipped" in row
                else [
                    row["order"],
                    f"{row['entropy_bits']:.2f} bits",
                    f"{row['entropy_of_full']:.3f}",
                    f"{row['batches_drawn_from']:.0f}",
                    f"{row['batches_of_full']:.3f}",
                ]
                for row in orders
            ],
        )
    )
    click.echo(
        "\n"
        + output.table(
            ("NODES>", "RANKS>", "LOCAL>", "1/N>", "ORDER", "BALANCE", "PLAN A STEP>"),
            [
                [
                    str(row["nodes"]),
                    str(row["ranks"]),
                    f"{row['local_share']:.1%}",
                    f"{row['by_chance']:.1%}",
                    "unchanged" if row["is_order_unchanged"] else "CHANGED",
                    "exact" if row["is_balance_exact"] else "UNEVEN",
                    f"{row['plan_us_a_step']:,.0f} us",
                ]
                for row in places
            ],
        )
    )
    json_path = json_path or (None if tiny else RESULTS / "plan.json")
    if json_path:
        host = machine.describe(Path(__file__).parent)
        document = {"machine": asdict(host), "data": asdict(data), "orders": orders, "places": places}
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    if not all(row["is_order_unchanged"] and row["is_balance_exact"] for row in places):
        sys.exit("error: nodes changed the order, or ranks are uneven")


if __name__ == "__main__":
    main()
