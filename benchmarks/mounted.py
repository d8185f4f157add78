"""A mounted dataset beside the same bytes as plain files, the fsspec client and other caches' mounts, in one run.

    python -m benchmarks.mounted [--tiny] [--peers | --no-peers] [--workdir DIR] [--json PATH]

    plain files   four objects of 1 GiB, warm on the mount's own node, which the kernel reads by itself (passthrough):
                  in order, at random, mapped; 100,000 objects of 4 KiB: open, read and close; `find`
    first read    objects that lie on another node, each read once: through a mount that has no node of its own, and by
                  the fsspec client, in steps of 1 MiB and whole; through mounts of JuiceFS and rclone, whose caches are
                  empty, from SeaweedFS; and through a mount of a dataset that nobody has read, from the same server
    peers         one of the large objects and 2,000 of the small ones, warm, through JuiceFS's and rclone's mounts too

All of a line take turns in one reading process, but for the fsspec client, which has its own; told is the median of
each, its cost (`benchmarks.contest`), and the mount's rate to it. "The node's file" is the sealed file below the mount
itself: the same pages, so what differs from it is the mount's doing, where a copy of it also lies elsewhere in memory.

Before the first turn the large files and the node's are dropped from the page cache and read once in order: pages that
came in by being written, as the node wrote its file, lie in smaller pieces, and reading them takes longer with or
without a mount. Needs root, because it mounts.

The rule: what is compared is what a program gets from either; nothing here knows how the mount does it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import command, contest, machine, mount_peers, path_reads, shoal_reader
from benchmarks.contest import Line
from benchmarks.harness import Contender, Outcome, Worker, always, progress
from benchmarks.mount_peers import Peers
from benchmarks.path_reads import SMALL_BYTES
from benchmarks.shoal_reader import Access
from benchmarks.stage import prefetch, sealed_files, server_pids
from shoal import sizes
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.support.mounted import Mounted

MOUNT, PLAIN, SEALED = "mount", "plain files", "the node's file"
STEPS, WHOLE, COLD = "fsspec, read(1 MiB)", "fsspec, cat_file", "mount, from the origin"
SEQUENTIAL, RANDOM, MAP = "sequential 1 MiB", "random 128 KiB", "map, scanned"
OPENS, FIND = "open, read 4 KiB, close", "find"
FIRST = "first read, 1 MiB"
#: What the mount is to reach beside plain files, and beside the fsspec client.
TARGETS = {SEQUENTIAL: 0.95, RANDOM: 0.95, MAP: 0.95, OPENS: 0.3, FIND: 0.5}
FIRST_TARGETS = {STEPS: 0.8, WHOLE: 0.8}
#: Beside other mounts: ahead.
PEER_TARGETS = {"JuiceFS": 1.0, "rclone": 1.0}
Targets = Callable[[str], Mapping[str, float]]
"""Of a line, by contender."""
SHARD_BYTES = 1 << 30
PIECE_BYTES = 8 << 20
#: Before a first read so many times its bytes are used and freed: it takes memory for itself and for its servers.
TOUCHED = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything; `peer_files` are the small ones that are compared with peers, `first_bytes` is the size
    of an object that is read once."""

    objects: int
    object_bytes: int
    random_reads: int
    small_files: int
    opens: int
    first_bytes: int
    peer_files: int
    turns: int
    peer_turns: int


TINY = Scale(2, 2 << 20, 20, 200, 50, 1 << 20, 20, 1, 1)
FULL = Scale(4, 1 << 30, 16_000, 100_000, 5000, 64 << 20, 2000, 7, 5)


@dataclass(frozen=True, slots=True)
class Place:
    """A directory that has some of the bytes, under the name that lines give it, and who serves them."""

    name: str
    path: Path
    servers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """Lines by section, the mounts' reports by dataset, and how peers were set up or why they were not."""

    sections: dict[str, list[Line]]
    reports: dict[str, Any]
    settings: list[str]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        lines = {
            name: [asdict(line) | {"is_met": line.is_met} for line in each] for name, each in self.sections.items()
        }
        return {"sections": lines, "reports": self.reports, "settings": self.settings, "left_out": self.left_out}


# What there is to read.


def make_origin(directory: Path, scale: Scale) -> None:
    """Directories: ``large``, ``one`` of those, ``small``, ``few`` of those, and ``first`` and ``once``, which have a
    directory for each reader with an object for each turn."""
    random = np.random.default_rng(7)
    for number in range(scale.objects):
        _write(directory / "large" / f"{number}.bin", random, scale.object_bytes)
    _link(directory / "large/0.bin", directory / "one/0.bin")
    for name, count in (("small", scale.small_files), ("few", scale.peer_files)):
        for number in range(count):
            path = directory / name / small_name(number)
            if number % 1000 == 0:
                path.parent.mkdir(parents=True)
            path.write_bytes(number.to_bytes(8, "little") * (SMALL_BYTES // 8))
    # Names of one file here; copies wherever they are cached.
    _write(directory / "first.bin", random, scale.first_bytes)
    for name, readers in (("first", (MOUNT, *FIRST_TARGETS)), ("once", (COLD, *PEER_TARGETS))):
        for reader in readers:
            for turn in range(scale.peer_turns + 1):
                _link(directory / "first.bin", directory / name / folder_of(reader) / once_name(turn))


def small_name(number: int) -> str:
    return f"{number // 1000:03d}/{number:06d}.bin"


def folder_of(reader: str) -> str:
    """Of what `reader` reads once, and nobody else ever."""
    return "".join(filter(str.isalnum, reader))


def once_name(turn: int) -> str:
    return f"{turn}.bin"


def _write(path: Path, random: np.random.Generator, size_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, size_bytes, PIECE_BYTES):
            file.write(random.bytes(min(PIECE_BYTES, size_bytes - start)))


def _link(path: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, new)


def forget(paths: Sequence[str]) -> None:
    """Drop files' pages from the cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# Who takes turns.


@dataclass(frozen=True, slots=True)
class Reading:
    """The process that reads whatever is read by path, and how much of it."""

    scale: Scale
    worker: Worker

    def contender(self, place: Place, function: Callable[..., Outcome], *args: Any) -> Contender:
        """One who reads the same in every turn."""
        return Contender(place.name, function, always(*args), self.worker, place.servers)

    def large(self, files: Sequence[tuple[Place, Sequence[str]]], runs: int, targets: Targets) -> list[Line]:
        """Lines about large files, as many in each place."""
        scale, lines = self.scale, []
        reads = max(1, scale.random_reads * len(files[0][1]) // scale.objects)
        kinds: list[tuple[str, Callable[..., Outcome], tuple[int, ...]]] = [
            (SEQUENTIAL, path_reads.sequential, ()),
            (RANDOM, path_reads.scattered, (scale.object_bytes, reads)),
            (MAP, path_reads.scanned, ()),
        ]
        for what, function, more in kinds:
            contenders = [self.contender(place, function, paths, *more) for place, paths in files]
            lines += contest.compare(what, contenders, runs, targets(what))
        return lines

    def small(self, places: Sequence[Place], count: int, runs: int, targets: Targets) -> list[Line]:
        """Lines about the `count` small files of each place."""
        names = [small_name(number) for number in range(min(self.scale.opens, count))]
        opening = [self.contender(p, path_reads.opened, [str(p.path / name) for name in names]) for p in places]
        finding = [self.contender(p, path_reads.found, str(p.path), count) for p in places]
        return [
            *contest.compare(OPENS, opening, runs, targets(OPENS)),
            *contest.compare(FIND, finding, runs, targets(FIND)),
        ]

    def once(self, place: Place) -> Contender:
        """One who reads another object in each turn."""

        def arguments(turn: int) -> tuple[list[str]]:
            return ([str(place.path / once_name(turn))],)

        return Contender(place.name, path_reads.sequential, arguments, self.worker, place.servers)


class Cluster:
    """A cluster of one node with datasets of the directories in `origin`, and mounts of them, until `stack` closes."""

    def __init__(self, stack: ExitStack, directory: Path, origin: Path) -> None:
        self._stack = stack
        self._origin = origin
        self._dev = stack.enter_context(DevCluster(nodes=1, data_dir=directory / "cluster", capacity="32GiB"))
        self._nowhere = str(directory / "no-node.sock")
        self.servers = server_pids(self._dev)
        self._mounts: dict[str, Mounted] = {}

    @property
    def remote(self) -> Access:
        """Of a client on a machine without a node."""
        return Access(self._dev.endpoint, self._nowhere, local=False)

    @property
    def sealed_files(self) -> list[str]:
        return [str(path) for path in sealed_files(self._dev)]

    def reports(self) -> dict[str, Any]:
        """What the mounts' servers say of themselves, by dataset."""
        return {dataset: mounted.report() for dataset, mounted in self._mounts.items()}

    def add(self, name: str, url: str = "", options: Mapping[str, Any] | None = None) -> None:
        """Make a dataset of the directory of its name, or of `url`."""
        url, stored = url or f"file://{self._origin / name}", json.dumps(options or {})
        with Control(self._dev.controller_grpc) as control:
            control.add_dataset(name, url, shard_size=SHARD_BYTES, replicas=1, storage_options=stored)

    def prefetch(self, name: str) -> None:
        job = prefetch(self._dev.controller_grpc, name)
        if job["state"] != "done":
            raise RuntimeError(f"the prefetch of {name} {job['state']}: {job['reason']}")

    def prefetched(self, name: str, *, has_node: bool = True) -> Place:
        """Make a dataset that the node has, and mount it."""
        self.add(name)
        self.prefetch(name)
        return self.mount(name, has_node=has_node)

    def mount(self, dataset: str, *, name: str = MOUNT, has_node: bool = True) -> Place:
        """Mount a dataset as on a machine that has the node, or as on one without any."""
        environment = self._dev.environment() | ({} if has_node else {"SHOAL_SOCKET": self._nowhere})
        mounted = self._mounts[dataset] = self._stack.enter_context(Mounted(dataset, environment))
        return Place(name, mounted.path, (mounted.pid, *self.servers))


# The run.


def measure(scale: Scale, directory: Path, *, has_peers: bool) -> Result:
    origin = directory / "origin"
    progress("writing the origin")
    make_origin(origin, scale)
    with ExitStack() as stack:
        cluster = Cluster(stack, directory, origin)
        reading = Reading(scale, stack.enter_context(Worker()))
        large = cluster.prefetched("large")
        sections = {"beside plain files": beside_plain_files(cluster, reading, origin, large)}
        peers = Peers((), None, {})
        if has_peers:
            progress("setting up peers")
            folders = {reader: f"once/{folder_of(reader)}" for reader in (*PEER_TARGETS, COLD)}
            peers = mount_peers.start(stack, directory, origin, ("one", "few"), folders)
        sections["first read"] = first_read(cluster, reading, stack.enter_context(Worker()), peers)
        if peers.running:
            sections["beside peers"] = beside_peers(cluster, reading, origin, large, peers)
        return Result(sections, cluster.reports(), [peer.settings for peer in peers.running], peers.left_out)


def beside_plain_files(cluster: Cluster, reading: Reading, origin: Path, mount: Place) -> list[Line]:
    """Everything is in the page cache, where the large files came in by being read."""
    scale = reading.scale
    sealed, names = cluster.sealed_files, [f"{number}.bin" for number in range(scale.objects)]
    plain = Place(PLAIN, origin / "large")
    through, plainly = ([str(place.path / name) for name in names] for place in (mount, plain))
    forget([*sealed, *plainly])
    path_reads.sequential(through)
    path_reads.sequential(plainly)
    files = [(mount, through), (plain, plainly), (Place(SEALED, plain.path), sealed)]
    lines = reading.large(files, scale.turns, lambda what: {PLAIN: TARGETS[what]})
    forget([*sealed, *plainly])  # peers need the memory
    cluster.add("small")
    places = [cluster.mount("small"), Place(PLAIN, origin / "small")]
    return lines + reading.small(places, scale.small_files, scale.turns, lambda what: {PLAIN: TARGETS[what]})


def first_read(cluster: Cluster, reading: Reading, client: Worker, peers: Peers) -> list[Line]:
    """Everybody's objects are read once, and lie in the page cache of whoever sends them.

    Nobody pays for memory that the machine never used, which would be measured of whoever takes new memory.
    """

    def of_client(name: str, function: Callable[..., Outcome], *more: int) -> Contender:
        def arguments(turn: int) -> tuple[Any, ...]:
            return (cluster.remote, [f"shoal://first/{folder_of(name)}/{once_name(turn)}"], *more)

        return Contender(name, function, arguments, client, cluster.servers)

    mount = cluster.prefetched("first", has_node=False)
    contenders = [
        reading.once(replace(mount, path=mount.path / folder_of(MOUNT))),
        of_client(STEPS, shoal_reader.read_steps, path_reads.SEQUENTIAL_BYTES),
        of_client(WHOLE, shoal_reader.cat),
    ]
    places = (Place(peer.name, peer.path / "once" / folder_of(peer.name), peer.servers) for peer in peers.running)
    contenders += [reading.once(place) for place in places]
    if peers.weed is not None:
        cluster.add("once", f"s3://{mount_peers.BUCKET}/once/{folder_of(COLD)}", peers.weed.storage_options)
        cold = cluster.mount("once", name=COLD, has_node=False)
        contenders.append(reading.once(replace(cold, servers=(*cold.servers, peers.weed.pid))))
    touched = partial(machine.touch_memory, TOUCHED * reading.scale.first_bytes)
    return contest.compare(FIRST, contenders, reading.scale.peer_turns, FIRST_TARGETS | PEER_TARGETS, touched)


def beside_peers(cluster: Cluster, reading: Reading, origin: Path, mount: Place, peers: Peers) -> list[Line]:
    """Everything is in everybody's cache, and in the page cache as far as it stays there."""
    scale = reading.scale
    others = [Place(peer.name, peer.path / "one", peer.servers) for peer in peers.running]
    places = [mount, Place(PLAIN, origin / "one"), *others]
    lines = reading.large([(p, [str(p.path / "0.bin")]) for p in places], scale.peer_turns, lambda what: PEER_TARGETS)
    others = [Place(peer.name, peer.path / "few", peer.servers) for peer in peers.running]
    places = [cluster.prefetched("few"), Place(PLAIN, origin / "few"), *others]
    return lines + reading.small(places, scale.peer_files, scale.peer_turns, lambda what: PEER_TARGETS)


def show(result: Result, scale: Scale, *, is_judged: bool) -> None:
    for name, lines in result.sections.items():
        click.echo(f"{name}\n{contest.table(lines, is_judged=is_judged)}\n")
    click.echo(
        f"{scale.objects} objects of {sizes.format(scale.object_bytes)}, {scale.small_files:,} of 4 KiB; first read: "
        f"one of {sizes.format(scale.first_bytes)} a turn; beside peers: 1 object and {scale.peer_files:,} of 4 KiB"
    )
    for note in result.settings:
        click.echo(f"- {note}")
    for name, reason in result.left_out.items():
        click.echo(f"- left out: {name}: {reason}")


@click.command()
@click.option("--tiny", is_flag=True, help="A few MiB, without peers: proves that it runs, measures nothing.")
@click.option("--peers/--no-peers", "has_peers", default=None, help="JuiceFS and rclone; default: unless --tiny.")
@command.json_option
@command.workdir_option
def main(tiny: bool, has_peers: bool | None, json_path: Path | None, workdir: Path | None) -> None:
    """A mount beside plain files, the fsspec client and other mounts."""
    scale = TINY if tiny else FULL
    # Whoever ends this run has what it mounted unmounted.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with command.scratch(workdir) as directory:
        host = machine.describe(directory)
        result = measure(scale, directory, has_peers=not tiny if has_peers is None else has_peers)
        load = (host.load_average[0], os.getloadavg()[0])
        # Here, because removing a hundred thousand files takes a while.
        show(result, scale, is_judged=not tiny)
        click.echo(f"- machine: {host}; load {load[1]:.1f} at the end")
        command.save(result.to_json() | {"scale": asdict(scale), "machine": str(host), "load_average": load}, json_path)


if __name__ == "__main__":
    main()
