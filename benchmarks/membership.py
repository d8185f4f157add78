"""What a map change costs: a node joins four others under load, then one of the five drains and goes.

    python -m benchmarks.membership [--tiny] [--rebalance-rate 200MiB] [--json PATH]

Reader processes draw ranges of 64 KiB to 1 MiB from all of the set at a fixed pace and compare every byte; the origin
is taken away first, so that a node that asked it would fail a read. Told of each change:

    moved       bytes that all nodes brought in, beside two figures: what the new map gives to nodes that lack it, and
                the least that makes the loads before those after (half the sum of the differences; a node still has
                some of what it gets back, so moved may be less)
    origin      bytes that came from there
    foreground  p99 of the reads while shards move, beside that of the calm seconds just before

The start of the new process, which on a machine of its own costs the others nothing, is a window apart.

Here all nodes and readers share one machine, on which whoever moves bytes takes processors from the readers. How much
of it is the machine's: after each change as many bytes a second as had moved are copied by plain processes, one for
each node that took some over, which read files of the set and write and sync others at the lowest priority.

The rule: readers are paced by the clock, so a slow cluster gets no lighter load.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import psutil

from benchmarks import command, machine
from benchmarks.harness import percentile, progress
from benchmarks.stage import prefetch
from shoal import sizes
from shoal.cli.control import Control
from shoal.cli.output import SizeType
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from shoal_cachenode.pace import waited_s
from tests.support.moves import Fetched, Shards
from tests.support.readers import Heard, Read, within

NODES, DRAINED = 4, 0
MOVED_TARGET, LATENCY_TARGET = 1.05, 1.5
RANGES = (64 << 10, 256 << 10, 1 << 20)
WARM_UP_READS = 100
MOVE_TIMEOUT_S = 600.0
POLL_S = 0.2
#: The longest control, the pause between its start and its begin, and its priority (`os.nice`).
MAX_COPY_S, SETTLE_S, LOWEST = 15.0, 1.0, 19

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Scale:
    """`calm_s`: seconds of load before each change."""

    objects: int
    object_bytes: int
    readers: int
    reads_per_s: float
    calm_s: float

    @property
    def bytes(self) -> int:
        return self.objects * self.object_bytes


FULL = Scale(1024, 2 << 20, readers=4, reads_per_s=120, calm_s=15.0)
TINY = Scale(96, 96 << 10, readers=2, reads_per_s=50, calm_s=0.5)


class Load:
    """Reader processes. A context manager that leaves none behind."""

    def __init__(self, cluster: DevCluster, plain: Path, scale: Scale) -> None:
        context = multiprocessing.get_context("spawn")  # this process has used gRPC, which does not fork
        self._is_over = context.Event()
        self._ends: list[Connection] = []
        self._processes = []
        for seed in range(scale.readers):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_read_for_ever, args=(there, self._is_over, cluster.endpoint, plain, scale, seed), daemon=True
            )
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)
        for end in self._ends:
            assert end.recv() == "reading"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def stop(self) -> list[Heard]:
        self._is_over.set()
        return [end.recv() for end in self._ends]


def _read_for_ever(say: Connection, is_over: Any, endpoint: str, plain: Path, scale: Scale, seed: int) -> None:
    """A reader process."""
    fs = ShoalFileSystem(endpoint=endpoint, local=False, skip_instance_cache=True)
    draw = random.Random(seed)
    heard = Heard([], [], 0)
    wrong = reads = 0
    due = time.monotonic()
    while not is_over.is_set():
        name, length = f"{draw.randrange(scale.objects):04}", min(draw.choice(RANGES), scale.object_bytes)
        start = draw.randrange(scale.object_bytes - length + 1)
        began = time.monotonic()
        try:
            found = fs.cat_file(f"set/{name}", start, start + length)
        except Exception:  # noqa: BLE001 - told, and the exit status
            heard.errors.append(traceback.format_exc())
            found = b""
        seconds = time.monotonic() - began
        reads += 1
        if reads > WARM_UP_READS:
            heard.reads.append(Read(began, seconds))
        elif reads == WARM_UP_READS:
            say.send("reading")
        with (plain / name).open("rb") as file:
            wrong += bool(found) and found != os.pread(file.fileno(), length, start)
        due = max(due + 1 / scale.reads_per_s, time.monotonic() - 1.0)  # after a stall it catches up, for a second
        time.sleep(max(0.0, due - time.monotonic()))
    say.send(Heard(heard.reads, heard.errors, wrong))


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time (`time.monotonic`).

    Attributes:
        cpu_share: of all processors, how much was busy.
        waited_share: of the time, in how much of it somebody waited for a processor (PSI); 0 where it is not counted.
    """

    begin_s: float
    end_s: float
    cpu_share: float
    waited_share: float

    @classmethod
    def of(cls, work: Callable[[], object]) -> Self:
        psutil.cpu_percent()
        begin, waited = time.monotonic(), waited_s() or 0.0
        work()
        end, waited = time.monotonic(), (waited_s() or 0.0) - waited
        return cls(begin, end, psutil.cpu_percent() / 100, waited / (end - begin))

    def figures(self, heard: Sequence[Heard]) -> dict[str, float]:
        """Of the reads that were under way in it; milliseconds."""
        times = [1000 * read.seconds for read in within(heard, self.begin_s, self.end_s)]
        known = times or [0.0]
        return {
            "seconds": self.end_s - self.begin_s,
            "cpu_share": self.cpu_share,
            "waited_share": self.waited_share,
            "reads": len(times),
            "p50_ms": percentile(known, 50),
            "p99_ms": percentile(known, 99),
            "max_ms": max(known),
        }


@dataclass(frozen=True, slots=True)
class Change:
    """A map change as it was: bytes, and the windows in which to look at the readers."""

    what: str
    given_bytes: int
    least_bytes: int
    moved_bytes: int
    origin_bytes: int
    calm: Window
    moving: Window
    starting: Window
    copying: Window

    def figures(self, heard: Sequence[Heard]) -> dict[str, Any]:
        windows = {name: getattr(self, name).figures(heard) for name in ("calm", "starting", "moving", "copying")}
        calm, moving, copying = (windows[name]["p99_ms"] or math.inf for name in ("calm", "moving", "copying"))
        return {
            "what": self.what,
            "moved_bytes": self.moved_bytes,
            "map_gives_bytes": self.given_bytes,
            "least_bytes": self.least_bytes,
            "moved_over_given": self.moved_bytes / self.given_bytes,
            "moved_over_least": self.moved_bytes / self.least_bytes,
            "origin_bytes": self.origin_bytes,
            **windows,
            "p99_ratio": moving / calm,
            "copying_ratio": copying / calm,
        }


def change(
    cluster: DevCluster,
    shards: Shards,
    plain: Path,
    scale: Scale,
    what: str,
    begin: Callable[[], object],
    rest: Sequence[int],
) -> Change:
    """Let readers read in calm, change the map, and wait until all shards are with the nodes `rest`; then copy."""
    calm = Window.of(lambda: time.sleep(scale.calm_s))
    count = len(cluster.nodes)
    held = {node: shards.held(node) for node in range(count)}
    loads = {node: shards.bytes_of(shards.owned(node)) for node in range(count)}
    before = {node: Fetched.by(cluster, node) for node in range(count)}
    starting = Window.of(begin)
    # Worked out once: to do so at each look would cost the readers more than the move does.
    owned = {node: shards.owned(node) for node in range(len(cluster.nodes))}
    moving = Window.of(lambda: _wait_for(lambda: not any((owned[n] & ~shards.held(n)).any() for n in rest)))
    after = {node: Fetched.by(cluster, node) for node in owned}
    nothing = Fetched(0, 0)
    moved = [now.from_peers - before.get(node, nothing).from_peers for node, now in after.items()]
    seconds = moving.end_s - moving.begin_s
    rates = [each / seconds for each in moved if each]
    copying = _copy(plain, rates, min(seconds, MAX_COPY_S))
    return Change(
        what,
        sum(shards.bytes_of(owned[node] & ~held[node] if node in held else owned[node]) for node in after),
        sum(abs(shards.bytes_of(owned[node]) - loads.get(node, 0)) for node in after) // 2,
        sum(moved),
        sum(now.from_origin - before.get(node, nothing).from_origin for node, now in after.items()),
        calm,
        moving,
        starting,
        copying,
    )


def _copy(plain: Path, rates: Sequence[float], seconds: float) -> Window:
    """Have a process for each of `rates`, bytes a second, copy files for so long; their start is not in the window."""
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(len(rates) + 1)
    processes = [context.Process(target=_copy_for, args=(begin, plain, rate, seconds), daemon=True) for rate in rates]
    for process in processes:
        process.start()
    time.sleep(SETTLE_S)
    begin.wait(MOVE_TIMEOUT_S)

    def join() -> None:
        for process in processes:
            process.join()

    window = Window.of(join)
    if any(process.exitcode for process in processes):
        raise RuntimeError("a copying process failed")
    return window


def _copy_for(begin: Barrier, plain: Path, bytes_per_s: float, seconds: float) -> None:
    """A copying process."""
    os.nice(LOWEST)
    begin.wait(MOVE_TIMEOUT_S)
    with tempfile.TemporaryDirectory(dir=plain.parent) as into:
        began, copied = time.monotonic(), 0
        for source in itertools.cycle(sorted(plain.iterdir())):
            data = source.read_bytes()
            with (Path(into) / source.name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fdatasync(file.fileno())
            copied += len(data)
            ahead_s = began + copied / bytes_per_s - time.monotonic()
            if time.monotonic() - began > seconds:
                return
            time.sleep(max(0.0, ahead_s))


def _wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MOVE_TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not done after {MOVE_TIMEOUT_S:g} s")
        time.sleep(POLL_S)


def drain(cluster: DevCluster, node: int) -> None:
    with Control(cluster.controller_grpc) as control:
        control.drain_node(cluster.node_ids[node])


def is_drained(cluster: DevCluster, node: int) -> bool:
    with Control(cluster.controller_grpc) as control:
        return any(each.drained for each in control.status().nodes if each.node.id == cluster.node_ids[node])


def measure(scale: Scale, rebalance_rate: int, directory: Path) -> dict[str, Any]:
    origin, plain = directory / "origin", directory / "plain"
    origin.mkdir()
    for number in range(scale.objects):
        (origin / f"{number:04}").write_bytes(random.Random(number).randbytes(scale.object_bytes))
    args = ["--rebalance-rate", str(rebalance_rate), "--scrub-rate", "0"]
    with DevCluster(
        nodes=NODES, data_dir=directory / "cluster", capacity=str(2 * scale.bytes), node_args=args
    ) as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", f"file://{origin}", shard_size=0, replicas=1, storage_options="{}")
        progress("filling")
        job = prefetch(cluster.controller_grpc, "set")
        if job["state"] != "done":
            raise RuntimeError(f"the prefetch {job['state']}: {job['reason']}")
        origin.rename(plain)
        os.sync()
        shards = Shards(cluster, 1)
        with Load(cluster, plain, scale) as load:
            progress("a node joins")
            joins = change(cluster, shards, plain, scale, "a fifth node joins", cluster.add_node, range(NODES + 1))
            progress("a node drains")
            rest = [node for node in range(NODES + 1) if node != DRAINED]
            drains = change(cluster, shards, plain, scale, "one of five drains", lambda: drain(cluster, DRAINED), rest)
            _wait_for(lambda: is_drained(cluster, DRAINED))
            cluster.nodes[DRAINED].stop()
            gone = Window.of(lambda: time.sleep(scale.calm_s / 3))
            heard = load.stop()
    errors = [error for each in heard for error in each.errors]
    return {
        "nodes": NODES,
        "shards": scale.objects,
        "shard_bytes": scale.object_bytes,
        "rebalance_rate": rebalance_rate,
        "readers": scale.readers,
        "reads_per_s": scale.readers * scale.reads_per_s,
        "changes": [each.figures(heard) for each in (joins, drains)],
        "after_it_is_gone": gone.figures(heard),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "wrong": sum(each.wrong for each in heard),
    }


def is_met(result: dict[str, Any]) -> bool:
    return (
        not result["errors"]
        and not result["wrong"]
        and all(
            each["moved_over_least"] <= MOVED_TARGET
            and not each["origin_bytes"]
            and each["p99_ratio"] <= LATENCY_TARGET
            for each in result["changes"]
        )
    )


def show(result: dict[str, Any], say: Say = click.echo) -> None:
    say(
        f"{'':<20}{'MOVED':>10}{'/GIVEN':>8}{'/LEAST':>8}{'ORIGIN':>8}{'SECONDS':>9}"
        f"{'P99 CALM':>10}{'MOVING':>8}{'RATIO':>8}{'COPYING':>9}{'RATIO':>8}"
    )
    for each in result["changes"]:
        say(
            f"{each['what']:<20}{sizes.format(each['moved_bytes']):>10}{each['moved_over_given']:>8.3f}"
            f"{each['moved_over_least']:>8.3f}{sizes.format(each['origin_bytes']):>8}{each['moving']['seconds']:>9.1f}"
            f"{each['calm']['p99_ms']:>7.1f} ms{each['moving']['p99_ms']:>5.1f} ms{each['p99_ratio']:>6.2f} x"
            f"{each['copying']['p99_ms']:>6.1f} ms{each['copying_ratio']:>6.2f} x"
        )
    for each in result["changes"]:
        for name in ("calm", "starting", "moving", "copying"):
            found = each[name]
            say(
                f"- {each['what']}, {name}: {found['seconds']:.1f} s, {found['reads']} reads, "
                f"p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.1f} ms, longest {found['max_ms']:.0f} ms, "
                f"CPU {100 * found['cpu_share']:.0f} %, waited for {100 * found['waited_share']:.0f} % of the time"
            )
    say(
        f"{'met' if is_met(result) else 'MISSED'}: moved at most {MOVED_TARGET} x the least, nothing from the origin, "
        f"p99 at most {LATENCY_TARGET} x; errors {result['errors']}, wrong reads {result['wrong']}"
    )
    if result["first_error"]:
        say(result["first_error"])


@click.command()
@command.json_option
@click.option("--tiny", is_flag=True, help="9 MiB instead of 2 GiB: proves that it runs, measures nothing.")
@click.option("--rebalance-rate", type=SizeType(), default="200MiB", show_default=True, help="As of the nodes.")
@command.workdir_option
def main(json_path: Path | None, tiny: bool, rebalance_rate: int, workdir: Path | None) -> None:
    """Bytes and latency of map changes under load."""
    with command.scratch(workdir) as directory:
        result = measure(TINY if tiny else FULL, rebalance_rate, directory)
        result["machine"] = str(machine.describe(directory))
    show(result)
    command.save(result, json_path)


if __name__ == "__main__":
    main()
