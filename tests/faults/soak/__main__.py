"""The soak's command; see the package.

Exit status 0: nothing went wrong that no fault explains. 1: something did; the report says what.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from shoal.errors import ShoalError
from shoal_cachenode.node import HOUSEKEEPING_INTERVAL_S
from shoal_cachenode.room import ABANDONED_AFTER_S
from shoal_cachenode.shard_file import XATTR, ShardHeader
from tests.faults.soak import report as report_module
from tests.faults.soak.chaos import Chaos
from tests.faults.soak.report import Memory, Report
from tests.faults.soak.verdict import Facts, Window, judge
from tests.faults.soak.world import LAST_ROUND_S, SMALL_DISKS, World
from tests.support.processes import files_of, sockets_of, tcp_ends
from tests.support.waiting import wait_for

_SAMPLE_S = 2.0
#: What a soak needs besides its own time: it begins, heals and reads everything once more.
_AROUND_S = 420.0
_SETTLE_S = 3.0
_TRACEBACK = "Traceback (most recent call last)"
#: Gauges that are zero when nobody reads; those that a node does not have yet are left out.
MOST_DESCRIPTORS = 150  # kept connections among nodes and with the controller, and a process's own
GAUGES = ("shoal_node_fills", "shoal_node_fetches", "shoal_node_reserved_bytes")


class Sampler(threading.Thread):
    """Looks at the memory of all processes every now and then."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._ending = threading.Event()
        self.samples: dict[tuple[str, int], list[tuple[float, int]]] = {}

    def run(self) -> None:
        while not self._ending.wait(_SAMPLE_S):
            pids = {}
            for name, server in self._world.cluster.processes.items():
                with contextlib.suppress(ShoalError):  # it does not run now
                    pids[name] = server.pid
            for reader in list(self._world.readers):
                pids[f"reader-{reader.spec.number}"] = reader.pid
            for name, pid in pids.items():
                # It ended in between; one that nobody has waited for yet has a status without that line.
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    kib = int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
                    self.samples.setdefault((name, pid), []).append((time.monotonic(), kib << 10))

    def end(self) -> list[Memory]:
        """Stop, and say what became of each process's memory. Short lives say nothing."""
        self._ending.set()
        self.join()
        return [Memory.of(name, samples) for (name, _), samples in self.samples.items() if len(samples) > 4]


def soak(
    *, minutes: float, seed: int, nodes: int, readers: int, threads: int, directory: Path, log: Callable[[str], None]
) -> Report:
    """Run it and judge it. The directory keeps all logs."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    report = Report(seed, minutes, commit.stdout.strip() or "unknown commit")
    faulthandler.dump_traceback_later(60 * minutes + _AROUND_S, exit=True)
    try:
        with World(directory, nodes=nodes, readers=readers, threads=threads, seed=seed) as world:
            sampler = Sampler(world)
            sampler.start()
            chaos = Chaos(world, seed, 60 * minutes, log)
            log("begun")
            chaos.run()
            log("healing")
            report.defects += [{"heal": sentence} for sentence in _told(_healed(world))]
            log("the last round")
            _last_round(world)
            report.memory = sampler.end()
            report.defects += [{"memory": m.name, "growth_mib": m.growth_mib} for m in report.memory if not m.is_flat]
            windows = [Window(h.action.kind, h.start, h.end) for h in chaos.happenings if not h.skipped]
            facts = Facts(windows, world.replaced, world.served)
            unexplained, explained = judge(world.words, facts)
            report.defects += unexplained
            report.explained = {f"{error}: {reason}": count for (error, reason), count in explained.items()}
            report.defects += [{"failed": failure} for failure in chaos.failures]
            report.defects += [{"left": sentence} for sentence in _told(_left_behind(world))]
            everybody = [*world.readers, *world.killed_readers]
            report.reads, report.bytes = sum(r.reads for r in everybody), sum(r.bytes for r in everybody)
            report.actions = dict(Counter(str(h.action.kind) for h in chaos.happenings if not h.skipped))
            report.skipped = dict(Counter(f"{h.action.kind}: {h.skipped}" for h in chaos.happenings if h.skipped))
            report.durations = report_module.durations(
                *report_module.read_times(directory.glob("times-*.f64")), windows
            )
        report.defects += [{"log": sentence} for sentence in _told(_tracebacks(directory))]
    finally:
        faulthandler.cancel_dump_traceback_later()
    return report


def _healed(world: World) -> Iterator[str]:
    """Heal the world; says nothing, unless that fails."""
    world.heal()
    time.sleep(_SETTLE_S)
    yield from ()


def _last_round(world: World) -> None:
    for reader in world.readers:
        reader.finish()
    deadline = time.monotonic() + LAST_ROUND_S
    for reader in world.readers:
        if not reader.ended.wait(max(0.0, deadline - time.monotonic())):
            code = reader.process.poll()
            how = "hangs" if code is None else f"ended with exit status {code}"
            now = time.monotonic()
            world.words.append({"wrong": f"reader {reader.spec.number} {how}", "way": "", "start": now, "end": now})
        reader.kill()


def _told(sentences: Iterator[str]) -> Iterator[str]:
    """`sentences`, and that no more of them can be had where that is so: half an hour's figures are not lost for it."""
    try:
        yield from sentences
    except Exception:  # noqa: BLE001 - told as a defect, with its traceback
        yield f"could not be looked at: {traceback.format_exc()}"


def _left_behind(world: World) -> Iterator[str]:
    """What the nodes hold, have open or have counted although nobody reads any more."""
    while not world.cluster.deaths.empty():
        yield world.cluster.deaths.get().sentence
    for index in range(world.node_count):
        node = world.cluster.nodes[index]

        def is_idle(index: int = index) -> bool:
            metrics = world.metrics(index)
            found = {name: metrics[name] for name in GAUGES if metrics.get(name)}
            # One connection is the look itself; those among nodes are kept.
            foreign = metrics["shoal_node_connections"] - 1 - _connections_from_nodes(world, index)
            assert not found and foreign <= 0, f"still at work: {found}, {foreign:.0f} connections of readers"
            return True

        try:
            wait_for(is_idle, ABANDONED_AFTER_S + 2 * HOUSEKEEPING_INTERVAL_S)
        except AssertionError as error:
            yield f"{node.name}: {error}"

        def is_exact(index: int = index) -> bool:
            used, on_disk = int(world.metrics(index)["shoal_node_used_bytes"]), sum(_sizes(world, index))
            assert used == on_disk, f"the ledger says {used} bytes, the files {on_disk}"
            return True

        try:
            wait_for(is_exact)  # a copy too many may be dropped between the two looks
        except AssertionError as error:
            yield f"{node.name}: {error}"
        yield from (f"{node.name}: stray file {path}" for path in _strays(world, index))
        opened = files_of(node.pid)
        gone = [path for path in opened if path.endswith("(deleted)") and "/cluster/" in path]
        if gone:
            yield f"{node.name}: {len(gone)} deleted files are still open, such as {gone[0]}"
        others = len(list(Path(f"/proc/{node.pid}/fd").iterdir())) - sum("/shards/" in path for path in opened)
        if others > MOST_DESCRIPTORS:
            yield f"{node.name}: {others} descriptors are open besides those of shards"


def _connections_from_nodes(world: World, index: int) -> int:
    """Connections that other nodes, and this process, keep to a node."""
    (port,) = re.findall(r":(\d+)$", world.cluster.node_endpoints[index])
    pids = [node.pid for node in world.cluster.nodes if node.is_running]
    inodes = sockets_of("self").union(*map(sockets_of, pids))
    ends = tcp_ends()
    return sum(end.peer_port == int(port) and end.inode in inodes for end in ends.values())


def _sizes(world: World, index: int) -> Iterator[int]:
    """Bytes that each shard file was made for: a ledger cannot know of those that were truncated on purpose."""
    for path in (world.cluster.data_dir / f"node-{index}").glob("*/**/*"):
        if path.is_file() and path.relative_to(world.cluster.data_dir).parts[1] in ("shards", "filling"):
            yield ShardHeader.decode(os.getxattr(path, XATTR), bytes.fromhex(path.name)).size_bytes


def _strays(world: World, index: int) -> Iterator[Path]:
    root = world.cluster.data_dir / f"node-{index}"
    known = {"lock", "shards", "filling", "snapshots", "indexes", "unread"}
    known |= {"state.json", "orders.json", "scrub.json", "usage.json"}
    yield from (path for path in root.iterdir() if path.name not in known)
    for path in root.glob("shards/**/*"):
        if path.is_file() and (len(path.name) != 32 or path.parent.name != path.name[:2]):
            yield path
    yield from root.glob("filling/*")
    served = {digest for digest, (_, until) in world.served.items() if until == float("inf")}
    yield from (path for path in root.glob("snapshots/*") if path.stem not in served or path.suffix != ".arrow")


def _tracebacks(directory: Path) -> Iterator[str]:
    for path in [*(directory / "cluster" / "log").glob("*.log"), *directory.glob("reader-*.log")]:
        lines = path.read_text(errors="replace").splitlines()
        ends: Counter[str] = Counter()
        for number, line in enumerate(lines):
            if _TRACEBACK in line:
                after = lines[number + 1 : number + 200]
                last = next((text for text in after if text and not text.startswith((" ", "\t"))), "?")
                ends[last[:200]] += 1
        yield from (f"{count} tracebacks in {path.name}: {last}" for last, count in ends.items())


@click.command()
@click.option("--minutes", default=30.0, show_default=True, help="How long faults come.")
@click.option("--seed", default=1, show_default=True, help="Which faults come when.")
@click.option("--nodes", default=4, show_default=True, type=click.IntRange(SMALL_DISKS), help="Besides the guest.")
@click.option(
    "--readers",
    default=4,
    show_default=True,
    type=click.IntRange(2),
    help="Processes that read; every other one beside a node.",
)
@click.option("--threads", default=2, show_default=True, help="Of each reader.")
@click.option("--json", "json_path", type=Path, help="File for the report.")
@click.option("--keep", type=Path, help="Directory to run in, which stays.")
def main(
    minutes: float, seed: int, nodes: int, readers: int, threads: int, json_path: Path | None, keep: Path | None
) -> None:
    """Read from a cluster on which all faults there are come at random; end with 1 where one of them is felt."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was mounted is unmounted
    with contextlib.ExitStack() as stack:
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-soak-")))
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise click.UsageError(f"{directory} is not empty: give --keep another directory")
        report = soak(
            minutes=minutes,
            seed=seed,
            nodes=nodes,
            readers=readers,
            threads=threads,
            directory=directory,
            log=click.echo,
        )
        click.echo(report.table())
        if json_path is not None:
            json_path.write_text(report.to_json())
        for defect in report.defects:
            click.echo(json.dumps(defect))
    raise SystemExit(1 if report.defects else 0)


if __name__ == "__main__":
    main()
