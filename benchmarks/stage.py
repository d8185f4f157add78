"""What the sections share: the set of Arrow files, the S3 server that holds it, and clusters over that server.

The set is made once a run, written to the origin, and cached by one node by a prefetch; the node's sealed files then
are "the same bytes on this file system" for whatever reads plain files. Each part is made when a section first asks.

The rule: everything lies in one directory that goes when the stage closes, and every process is ended before that.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import psutil
import pyarrow as pa
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import Worker, progress
from benchmarks.machine import PageCacheFiller
from benchmarks.origin import Origin
from benchmarks.shoal_reader import Access
from shoal import sizes
from shoal.cli import records
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.support.weed import Weed

BUCKET = "bench"
COLUMNS = 8
BATCH_ROWS = 128 << 10  # 1 MiB a column, 8 MiB a batch
SETTLE_TIMEOUT_S = 300.0
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cold:
    """Objects that are read for the first time: `per_turn` of them in each turn, since a first time cannot be repeated.
    A tiny run keeps the names and shrinks the bytes."""

    name: str
    size_bytes: int
    per_turn: int


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything. `object_bytes` is at most the default shard size, so that an object is one shard.

    Attributes:
        processes: that scan at once.
        reads, slow_reads: single reads in a turn, of a fast contender and of one that takes milliseconds for each.
        ranges: in one call.
    """

    objects: int
    object_bytes: int
    runs: int
    processes: int = 8
    reads: int = 2000
    slow_reads: int = 300
    ranges: int = 10_000
    cold: tuple[Cold, ...] = (Cold("1 MB", 10**6, 16), Cold("10 MB", 10**7, 6), Cold("256 MB", 256 * 10**6, 1))
    is_tiny: bool = False

    @property
    def set_bytes(self) -> int:
        return self.objects * self.object_bytes


TINY = Scale(
    objects=3,
    object_bytes=MIB,
    runs=1,
    processes=2,
    reads=40,
    slow_reads=10,
    ranges=100,
    cold=(Cold("1 MB", 100_000, 2), Cold("10 MB", 200_000, 1), Cold("256 MB", 400_000, 1)),
    is_tiny=True,
)


def scale(set_bytes: int, runs: int) -> Scale:
    """Objects of just under 256 MiB that make at least `set_bytes` together, three or more."""
    object_bytes = min(256 * MIB, set_bytes // 3)
    objects = -(-set_bytes // (8 * COLUMNS * _rows(object_bytes)))
    return Scale(objects=objects, object_bytes=object_bytes, runs=runs)


@dataclass(frozen=True, slots=True)
class Warm:
    """A cluster of one node that holds the set, sealed.

    Attributes:
        urls: of the objects, as ``shoal://…``.
        files: the sealed files with the same bytes, in no particular order.
        servers: process ids of the node and the controller.
    """

    cluster: DevCluster
    urls: tuple[str, ...]
    files: tuple[str, ...]
    servers: tuple[int, ...]

    def access(self, *, local: bool, verify: bool = True) -> Access:
        return Access(self.cluster.endpoint, str(self.cluster.sockets[0]), local, verify)


class Stage:
    """A context manager.

    Attributes:
        directory: where all data of the run lies.
        keys: of the set's objects in `BUCKET`.
        object_bytes: of each of them, once the set is there.
    """

    def __init__(self, directory: Path, scale: Scale) -> None:
        self.directory = directory
        self.scale = scale
        self.keys: tuple[str, ...] = tuple(f"set/part-{n:04}.arrow" for n in range(scale.objects))
        self.object_bytes = 0
        self._filler = PageCacheFiller(directory)
        self._stack = contextlib.ExitStack()
        self._workers: dict[str, Worker] = {}
        self._weed: Weed | None = None
        self._warm: Warm | None = None

    def __enter__(self) -> Self:
        # Servers that make temporary directories of their own make them on the measured file system too.
        before, tempfile.tempdir = tempfile.tempdir, str(self.directory)
        self._stack.callback(setattr, tempfile, "tempdir", before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def fill_page_cache(self) -> None:
        """See `PageCacheFiller`; not in the tiny form, which measures nothing."""
        if self.scale is not TINY:
            self._filler.fill()

    def worker(self, name: str) -> Worker:
        """The process of the contender `name`, the same in all sections, so that its pools stay warm as a trainer's.

        In the tiny form, which measures nothing, everybody's is the same.
        """
        name = "all" if self.scale.is_tiny else name
        if name not in self._workers:
            self._workers[name] = self._stack.enter_context(Worker())
        return self._workers[name]

    @property
    def weed(self) -> Weed:
        """The S3 server, which holds the set."""
        if self._weed is None:
            progress("starting SeaweedFS and writing the set to it")
            self._weed = self._stack.enter_context(Weed())
            self._weed.create_bucket(BUCKET)
            self._write_set(self._weed)
        return self._weed

    @property
    def origin(self) -> Origin:
        return Origin(self.weed.endpoint_url, self.weed.access_key, self.weed.secret_key)

    @property
    def warm(self) -> Warm:
        if self._warm is None:
            cluster = self._stack.enter_context(self.cluster(1))
            progress("prefetching the set into one node")
            self.add_dataset(cluster, "set", "set")
            job = prefetch(cluster.controller_grpc, "set")
            if job["state"] != "done":
                raise RuntimeError(f"the prefetch of the set {job['state']}: {job['reason']}")
            self._warm = Warm(
                cluster,
                tuple(f"shoal://{key}" for key in self.keys),
                tuple(str(path) for path in sealed_files(cluster)),
                server_pids(cluster),
            )
        return self._warm

    @contextlib.contextmanager
    def cluster(self, nodes: int) -> Iterator[DevCluster]:
        """An empty cluster with room for everything on each node; its data goes with it."""
        capacity = f"{2 * self.scale.set_bytes // MIB + 8192}MiB"
        directory = Path(tempfile.mkdtemp(prefix="cluster-", dir=self.directory))
        try:
            with DevCluster(nodes=nodes, capacity=capacity, data_dir=directory) as cluster:
                yield cluster
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def add_dataset(self, cluster: DevCluster, name: str, prefix: str) -> None:
        """Register ``s3://BUCKET/{prefix}`` as `name`."""
        options = json.dumps(self.origin.storage_options)
        with Control(cluster.controller_grpc) as control:
            control.add_dataset(name, f"s3://{BUCKET}/{prefix}", shard_size=0, replicas=1, storage_options=options)

    def put(self, key: str, path: Path) -> None:
        self.weed.filesystem().put_file(str(path), f"{BUCKET}/{key}")

    def _write_set(self, weed: Weed) -> None:
        s3 = weed.filesystem()
        path = self.directory / "part.arrow"
        for number, key in enumerate(self.keys):
            write_arrow(path, self.scale.object_bytes, seed=number)
            self.object_bytes = path.stat().st_size
            s3.put_file(str(path), f"{BUCKET}/{key}")
        path.unlink()


def write_arrow(path: Path, most_bytes: int, seed: int) -> None:
    """An uncompressed Arrow file of random 64-bit integers, a little smaller than `most_bytes`."""
    random = np.random.default_rng(seed)
    schema = pa.schema([(f"column_{n}", pa.uint64()) for n in range(COLUMNS)])
    rows = _rows(most_bytes)
    with pa.ipc.new_file(str(path), schema) as writer:
        for start in range(0, rows, BATCH_ROWS):
            count = min(BATCH_ROWS, rows - start)
            words = np.frombuffer(random.bytes(8 * count * COLUMNS), np.uint64).reshape(COLUMNS, count)
            writer.write_batch(pa.record_batch([pa.array(column) for column in words], schema=schema))


def _rows(most_bytes: int) -> int:
    """Of an Arrow file of at most `most_bytes`: some room is left for what frames the columns."""
    return (most_bytes - most_bytes // 1024 - 4096) // (8 * COLUMNS)


def prefetch(controller: str, dataset: str) -> records.Json:
    """Start a prefetch of all of `dataset`, wait for its end, and return the job as it then is."""
    with Control(controller) as control:
        job = records.job(control.start_prefetch(dataset, ""))
        while job["state"] not in records.FINISHED:
            for raw in control.watch_prefetch(job["id"]):
                job = records.job(raw)
    return job


def server_pids(cluster: DevCluster) -> tuple[int, ...]:
    return tuple(server.pid for server in cluster.processes.values())


def sealed_files(cluster: DevCluster) -> list[Path]:
    """Of all nodes."""
    return sorted(cluster.data_dir.glob("node-*/shards/*/*"))


def gauges(cluster: DevCluster, name: str) -> float:
    """The sum of a metric over all nodes."""
    total = 0.0
    for node in cluster.nodes:
        address = str(node.ready["http"])
        url = address if "://" in address else f"http://{address}"
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                total += sum(sample.value for sample in family.samples if sample.name == name)
    return total


def settle(cluster: DevCluster, *, is_empty: bool = False) -> None:
    """Wait until the nodes fill nothing (and hold nothing), so that the next contender has the machine to itself."""
    names = ["shoal_node_fills", "shoal_node_fetches", "shoal_node_reserved_bytes"]
    names += ["shoal_node_used_bytes"] if is_empty else []
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while any(gauges(cluster, name) for name in names):
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {SETTLE_TIMEOUT_S:.0f} s the nodes still have {', '.join(names)}")
        time.sleep(0.02)


def check_room(directory: Path, set_bytes: int) -> None:
    """Raise where the disk cannot take what a run leaves there at its worst: the set some eight times."""
    needed = 8 * set_bytes
    free = psutil.disk_usage(str(directory)).free
    if free < needed:
        raise RuntimeError(
            f"{directory} has {sizes.format(free)} free and a run needs {sizes.format(needed)}: "
            "give another --workdir or a smaller --size"
        )
