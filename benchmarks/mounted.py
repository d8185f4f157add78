"""A mounted dataset beside the same bytes as plain files: warm, on the same node, in one run.

    python -m benchmarks.mounted [--tiny] [--workdir DIR] [--json PATH]

    sequential, random, map     of one large object, which the kernel reads by itself (passthrough)
    opens                       open, read 4 KiB, close of small objects, each for the second time
    find                        over a tree of them, for the second time

The two take turns, in turn the first; what is told is the median of each. Before that both are dropped from the page
cache and read once: pages that came in by being written, as the node wrote its file, lie in smaller pieces, and reading
them takes longer with or without a mount. Needs root, because it mounts.

The rule: what is compared is what a program gets from either; nothing here knows how the mount does it.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import command, machine
from benchmarks.harness import cpu_seconds
from shoal import sizes
from shoal.cli import output
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from tests.support.mounted import Mounted
from tests.support.waiting import wait_for

#: What each line is to reach beside the plain files.
TARGETS = {
    "sequential 1 MiB": 0.95,
    "random 128 KiB": 0.95,
    "map, scanned": 0.95,
    "open, read, close": 0.3,
    "find": 0.5,
}
SMALL_BYTES = 4096
SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Scale:
    large_bytes: int
    small_files: int
    random_reads: int
    opens: int
    turns: int


TINY = Scale(4 << 20, 200, 20, 50, 1)
FULL = Scale(512 << 20, 100_000, 4000, 5000, 7)


def sequential(path: Path, scale: Scale) -> int:
    buffer, total = bytearray(1 << 20), 0
    fd = os.open(path / "large.bin", os.O_RDONLY)
    while count := os.readv(fd, [buffer]):
        total += count
    os.close(fd)
    return total


def scattered(path: Path, scale: Scale) -> int:
    buffer, chance = bytearray(128 << 10), random.Random(1)
    fd = os.open(path / "large.bin", os.O_RDONLY)
    for _ in range(scale.random_reads):
        os.preadv(fd, [buffer], chance.randrange(0, scale.large_bytes - len(buffer)) & ~4095)
    os.close(fd)
    return scale.random_reads * len(buffer)


def scanned(path: Path, scale: Scale) -> int:
    fd = os.open(path / "large.bin", os.O_RDONLY)  # Python's own `open` asks whether it is a terminal
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        os.close(fd)
        words = np.frombuffer(mapped, np.uint64)
        total = words.nbytes
        int(words.max())
        del words
    return total


def opened(path: Path, scale: Scale) -> int:
    for number in range(scale.opens):
        fd = os.open(path / small_name(number), os.O_RDONLY)
        os.read(fd, SMALL_BYTES)
        os.close(fd)
    return scale.opens


def found(path: Path, scale: Scale) -> int:
    names = subprocess.run(["find", path, "-type", "f"], capture_output=True, check=True).stdout
    assert names.count(b"\n") == scale.small_files
    return scale.small_files


def small_name(number: int) -> str:
    return f"{number // 1000:03d}/{number:06d}.bin"


LARGE: dict[str, Callable[[Path, Scale], int]] = {
    "sequential 1 MiB": sequential,
    "random 128 KiB": scattered,
    "map, scanned": scanned,
}
SMALL: dict[str, Callable[[Path, Scale], int]] = {"open, read, close": opened, "find": found}


def make_origin(directory: Path, scale: Scale) -> None:
    chance = random.Random(7)
    (directory / "large").mkdir(parents=True)
    with (directory / "large/large.bin").open("wb") as file:
        for _ in range(scale.large_bytes >> 20):
            file.write(chance.randbytes(1 << 20))
    for number in range(scale.small_files):
        path = directory / "small" / small_name(number)
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(number.to_bytes(8, "little") * (SMALL_BYTES // 8))


def forget(path: Path) -> None:
    """Drop a file's pages from the cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def compare(what: str, function: Callable[[Path, Scale], int], plain: Path, mount: Mounted, scale: Scale) -> Any:
    """One line: what either gave a second, in bytes, opens or entries, and the servers' CPU time for the mount."""
    rates: dict[str, list[float]] = {"plain": [], "mount": []}
    cpu_s = 0.0
    for turn in range(scale.turns + 1):
        for name, path in (("plain", plain), ("mount", mount.path))[:: 1 if turn % 2 else -1]:
            before, began = cpu_seconds([mount.pid]), time.perf_counter()
            amount = function(path, scale)
            seconds = time.perf_counter() - began
            if turn:
                rates[name].append(amount / seconds)
                cpu_s += cpu_seconds([mount.pid]) - before if name == "mount" else 0.0
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "what": what,
        "plain_per_s": medians["plain"],
        "mount_per_s": medians["mount"],
        "ratio": medians["mount"] / medians["plain"],
        "target": TARGETS[what],
        "server_cpu_s": cpu_s / scale.turns,
    }


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    origin = directory / "origin"
    make_origin(origin, scale)
    lines = []
    with DevCluster(nodes=1, data_dir=directory / "cluster", capacity="4GiB") as cluster, ExitStack() as stack:
        with Control(cluster.controller_grpc) as control:
            for name in ("large", "small"):
                url = f"file://{origin / name}"
                control.add_dataset(name, url, shard_size=SHARD_BYTES, replicas=1, storage_options=json.dumps({}))
        fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
        fs.cat_file("large/large.bin")
        mounts = {name: stack.enter_context(Mounted(name, cluster.environment())) for name in ("large", "small")}
        wait_for(lambda: mounts["large"].xattr("large.bin", "user.shoal.cached") == "1/1", 60)
        (sealed,) = (directory / "cluster/node-0/shards").glob("*/*")
        for path in (sealed, origin / "large/large.bin"):
            forget(path)
        for path in (mounts["large"].path, origin / "large"):
            sequential(path, scale)
        for name, functions in (("large", LARGE), ("small", SMALL)):
            for what, function in functions.items():
                lines.append(compare(what, function, origin / name, mounts[name], scale))
        reports = {name: mount.report() for name, mount in mounts.items()}
    return {"lines": lines, "reports": reports}


HEADERS = ("WHAT", "PLAIN FILES>", "MOUNT>", "RATIO>", "TARGET>", "", "SERVER'S CPU>")


def show(result: dict[str, Any], *, is_judged: bool) -> None:
    rows = []
    for line in result["lines"]:
        is_bytes = line["what"] in LARGE
        told = [
            f"{rate / 1e9:.2f} GB/s" if is_bytes else f"{rate:,.0f} /s"
            for rate in (line["plain_per_s"], line["mount_per_s"])
        ]
        verdict = ("met" if line["ratio"] >= line["target"] else "MISSED") if is_judged else ""
        ratio, target = f"{line['ratio']:.2f} x", f"{line['target']:.2f} x"
        rows.append((line["what"], *told, ratio, target, verdict, f"{line['server_cpu_s']:.3f} s"))
    click.echo(output.table(HEADERS, rows))
    click.echo(f"one object of {sizes.format(result['large_bytes'])}; {result['small_files']:,} of 4 KiB")


@click.command()
@command.json_option
@click.option("--tiny", is_flag=True, help="4 MiB: proves that it runs, measures nothing.")
@command.workdir_option
def main(json_path: Path | None, tiny: bool, workdir: Path | None) -> None:
    """A mount beside plain files."""
    scale = TINY if tiny else FULL
    with command.scratch(workdir) as directory:
        result = measure(scale, directory)
        result |= {"large_bytes": scale.large_bytes, "small_files": scale.small_files}
        result["machine"] = str(machine.describe(directory))
    show(result, is_judged=not tiny)
    command.save(result, json_path)


if __name__ == "__main__":
    main()
