"""A node is added to four under load and one is drained and removed: bytes moved, and what readers notice of it.

    python -m benchmarks.membership [--tiny] [--json PATH]

Four nodes hold a dataset once, and its origin is taken away. Reader processes read ranges of 64 KiB to 1 MiB at random
places over the network, so many a second that some of the processors' time is left. Then: calm; a fifth node starts,
until it holds its share; calm; ``shoal node drain`` of another one, until it ends; the drained node is stopped; calm.

The optimum is what the new map gives to nodes that did not hold it. A read's time is from the moment it was due.

The rule: every byte that is read is compared with what was written.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import click

from benchmarks import machine
from benchmarks.harness import cpu_seconds, percentile, progress
from benchmarks.stage import prefetch
from shoal import sizes
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from tests.support.moves import Fetched, Shards
from tests.support.waiting import wait_for

NODES, DRAINED = 4, 1
DATASET = "set"
READERS = 4
SMALLEST_READ, LARGEST_READ = 64 << 10, 1 << 20
TARGET_MOVED, TARGET_P99 = 1.05, 1.5
TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Scale:
    """`reads_per_s` is of all readers together; `calm_s` the length of each calm phase."""

    sizes: tuple[int, ...]
    reads_per_s: float
    calm_s: float

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


FULL = Scale((64 << 20,) * 32 + (16 << 20,) * 96 + (8 << 20,) * 64 + (256 << 10,) * 512, 240, 20.0)
TINY = Scale((1 << 20,) * 24 + (100 << 10,) * 24, 40, 1.0)


class Objects:
    """What the objects hold: each a stretch of the same random bytes, from a place of its own."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.sums = list(accumulate(lengths))
        self._spare = 100_003 * len(lengths)
        self._pool = memoryview(random.Random(0).randbytes(max(lengths) + self._spare))

    def path(self, number: int) -> str:
        return f"{number:05}"

    def plain(self, number: int, start: int, end: int) -> memoryview:
        at = 100_003 * number
        return self._pool[at + start : at + end]

    def write(self, directory: Path) -> None:
        directory.mkdir()
        for number, length in enumerate(self.lengths):
            (directory / self.path(number)).write_bytes(self.plain(number, 0, length))


@dataclass(frozen=True, slots=True)
class Heard:
    """What a reader did: (due at, seconds until it was answered) of each read, by the clock of all processes."""

    reads: list[tuple[float, float]]
    errors: list[str]
    wrong: int


def read_paced(endpoint: str, scale: Scale, seed: int, wire: Connection) -> None:
    """A reader process: reads until it hears something, then says what it did."""
    objects = Objects(scale.sizes)
    fs = ShoalFileSystem(endpoint=endpoint, local=False, skip_instance_cache=True)
    draw = random.Random(seed)
    interval_s = READERS / scale.reads_per_s
    fs.cat_file(f"{DATASET}/{objects.path(0)}", 0, 1)
    wire.send("reading")
    reads: list[tuple[float, float]] = []
    errors: list[str] = []
    wrong = 0
    due = time.monotonic() + interval_s * draw.random()
    while not wire.poll():
        time.sleep(max(0.0, due - time.monotonic()))
        # By bytes: a reader of samples comes to a large object more often.
        (number,) = draw.choices(range(len(scale.sizes)), cum_weights=objects.sums)
        size = min(int(SMALLEST_READ * (LARGEST_READ / SMALLEST_READ) ** draw.random()), scale.sizes[number])
        start = draw.randrange(scale.sizes[number] - size + 1)
        try:
            data = fs.cat_file(f"{DATASET}/{objects.path(number)}", start, start + size)
            reads.append((due, time.monotonic() - due))
            wrong += data != objects.plain(number, start, start + size)
        except Exception as error:  # noqa: BLE001 - the result has them
            errors.append(f"{type(error).__name__}: {error}")
        due += interval_s * (0.5 + draw.random())
    wire.send(Heard(reads, errors, wrong))


class Readers:
    """The reader processes. A context manager that leaves none behind."""

    def __init__(self, cluster: DevCluster, scale: Scale) -> None:
        context = multiprocessing.get_context("spawn")
        self._wires: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for seed in range(READERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=read_paced, args=(cluster.endpoint, scale, seed, theirs), daemon=True)
            process.start()
            theirs.close()
            self._wires.append(ours)
            self._processes.append(process)
        for wire in self._wires:
            wire.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid]

    def stop(self) -> Heard:
        """What all of them did."""
        for wire in self._wires:
            wire.send("stop")
        heard: list[Heard] = [wire.recv() for wire in self._wires]
        return Heard(
            [read for each in heard for read in each.reads],
            [error for each in heard for error in each.errors],
            sum(each.wrong for each in heard),
        )


class Run:
    """The cluster, its readers, and what came of each phase."""

    def __init__(self, cluster: DevCluster, readers: Readers) -> None:
        self._cluster, self._readers = cluster, readers
        self.phases: list[dict[str, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """What happens within is a phase; more about it may be put in what is yielded."""
        progress(name)
        phase: dict[str, Any] = {"phase": name, "began_s": time.monotonic()}
        servers = [server.pid for server in self._cluster.processes.values() if server.is_running]
        pids = [*servers, *self._readers.pids]
        cpu_s = cpu_seconds(pids)
        yield phase
        phase["seconds"] = time.monotonic() - phase["began_s"]
        # Without the node that joins within it.
        phase["cores_busy"] = (cpu_seconds(pids) - cpu_s) / phase["seconds"]
        self.phases.append(phase)

    def move(self, name: str, change: Callable[[], Sequence[int]]) -> None:
        """A phase in which `change` gives other nodes shards and returns when they hold them, with the nodes left."""
        shards = Shards(self._cluster, 1)
        held = {node: shards.held(node) for node in range(len(self._cluster.nodes))}
        before = {node: Fetched.by(self._cluster, node) for node in held}
        with self.phase(name) as phase:
            nodes = change()
        now = {node: Fetched.by(self._cluster, node) for node in nodes}
        nothing = Fetched(0, 0)
        moved = sum(now[node].from_peers - before.get(node, nothing).from_peers for node in nodes)
        gained = {node: shards.owned(node) & ~held[node] if node in held else shards.owned(node) for node in nodes}
        optimum = sum(shards.bytes_of(mask) for mask in gained.values())
        phase |= {
            "moved_bytes": moved,
            "optimum_bytes": optimum,
            "moved_ratio": moved / optimum,
            "origin_bytes": sum(now[node].from_origin - before.get(node, nothing).from_origin for node in nodes),
        }


def add(cluster: DevCluster) -> list[int]:
    cluster.add_node()
    nodes = list(range(len(cluster.nodes)))
    shards = Shards(cluster, 1)
    wait_for(lambda: shards.are_with_their_owners(nodes), timeout_s=TIMEOUT_S)
    return nodes


def drain(cluster: DevCluster) -> list[int]:
    """As somebody types it."""
    command = [sys.executable, "-m", "shoal.cli", "node", "drain", cluster.node_ids[DRAINED]]
    env = {**os.environ, "SHOAL_ENDPOINT": cluster.endpoint}
    subprocess.run([*command, "--timeout", f"{TIMEOUT_S:g}"], env=env, check=True, stdout=subprocess.DEVNULL)
    return [node for node in range(len(cluster.nodes)) if node != DRAINED]


def times(reads: Sequence[tuple[float, float]], begin_s: float, seconds: float) -> dict[str, Any]:
    """Of the reads that were under way between two moments."""
    found = [took * 1000 for due, took in reads if due < begin_s + seconds and due + took > begin_s]
    told = {"reads": len(found)}
    return told | {f"p{percent:g}_ms": percentile(found, percent) for percent in (50, 99)} | {"max_ms": max(found)}


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    progress("four nodes and the dataset")
    Objects(scale.sizes).write(directory / "origin")
    with DevCluster(nodes=NODES, data_dir=directory / "cluster") as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset(DATASET, f"file://{directory}/origin", shard_size=0, replicas=1, storage_options="{}")
        prefetch(cluster.controller_grpc, DATASET)
        (directory / "origin").rename(directory / "away")
        os.sync()  # what the prefetch wrote is no load of the first phase
        with Readers(cluster, scale) as readers:
            run = Run(cluster, readers)
            with run.phase("calm"):
                time.sleep(scale.calm_s)
            run.move("a node is added", lambda: add(cluster))
            with run.phase("calm, 5 nodes"):
                time.sleep(scale.calm_s)
            run.move("a node is drained", lambda: drain(cluster))
            cluster.nodes[DRAINED].stop()
            with run.phase("it is stopped; calm"):
                time.sleep(scale.calm_s)
            heard = readers.stop()
        for phase in run.phases:
            phase |= times(heard.reads, phase["began_s"], phase["seconds"])
    calm = [phase["p99_ms"] for phase in run.phases if "moved_bytes" not in phase]
    moves = [phase for phase in run.phases if "moved_bytes" in phase]
    return {
        "objects": len(scale.sizes),
        "set_bytes": scale.bytes,
        "readers": READERS,
        "reads_per_s": scale.reads_per_s,
        "phases": run.phases,
        "moved_ratio": max(phase["moved_ratio"] for phase in moves),
        "origin_bytes": sum(phase["origin_bytes"] for phase in moves),
        "p99_ratio": max(phase["p99_ms"] for phase in moves) / statistics.median(calm),
        "target_moved_ratio": TARGET_MOVED,
        "target_p99_ratio": TARGET_P99,
        "wrong_reads": heard.wrong,
        "errors": len(heard.errors),
        "first_errors": heard.errors[:5],
    }


def show(result: dict[str, Any], say: Callable[[str], object] = click.echo) -> None:
    say(
        f"{'':<22}{'SECONDS':>8}{'CORES':>7}{'READS':>7}{'P50 ms':>8}{'P99 ms':>8}{'MAX ms':>8}"
        f"{'MOVED':>10}{'OPTIMUM':>10}{'ORIGIN':>8}"
    )
    for phase in result["phases"]:
        line = f"{phase['phase']:<22}{phase['seconds']:>8.1f}{phase['cores_busy']:>7.2f}{phase['reads']:>7}"
        line += f"{phase['p50_ms']:>8.2f}{phase['p99_ms']:>8.2f}{phase['max_ms']:>8.1f}"
        if "moved_bytes" in phase:
            line += "".join(
                f"{sizes.format(phase[key]):>{width}}"
                for key, width in (("moved_bytes", 10), ("optimum_bytes", 10), ("origin_bytes", 8))
            )
        say(line)
    is_exact = not (result["wrong_reads"] or result["errors"] or result["origin_bytes"])
    for name, key in (("bytes moved / optimum", "moved_ratio"), ("p99 while moving / calm", "p99_ratio")):
        verdict = "met" if is_exact and result[key] <= result[f"target_{key}"] else "MISSED"
        say(f"{verdict}: {name} {result[key]:.3f}, target {result[f'target_{key}']}")
    say(f"wrong reads {result['wrong_reads']}, errors {result['errors']}")


@click.command()
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the result here."
)
@click.option("--tiny", is_flag=True, help="26 MiB instead of 4 GiB: proves that it runs.")
@click.option(
    "--workdir", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Where data lie during the run."
)
def main(json_path: Path | None, tiny: bool, workdir: Path | None) -> None:
    """Bytes moved and reads beside it, when a node joins and when one is drained."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir=workdir, ignore_cleanup_errors=True) as directory:
        result = measure(TINY if tiny else FULL, Path(directory))
        result["machine"] = str(machine.describe(Path(directory)))
    show(result)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
