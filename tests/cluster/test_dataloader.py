"""What training does with processes and threads: forked and spawned workers, epochs, forks in the middle of reads.

The parent uses the file system before it forks, so that workers inherit connections, maps, threads and locks in use.
"""

from __future__ import annotations

import itertools
import os
import pickle
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shoal import errors, snapshot, transport
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import ShoalError
from shoal.filesystem import ShoalFileSystem
from shoal.snapshot import ShardTable, Snapshot
from tests.support.processes import (
    DEADLINE_S,
    WAYS,
    Child,
    Footprint,
    Reads,
    Say,
    cycle,
    files_of,
    link_tree,
    sockets_of,
    source_digest,
)
from tests.support.waiting import wait_for

torch_data = pytest.importorskip("torch.utils.data", reason="PyTorch is not installed")

WORKERS = 8
BATCH = 3
SHARD_SIZE = 1 << 20
#: Odd on purpose: no size is a multiple of a shard or a page.
RAW_BYTES = (0, 1, 70_001, 999_983, 1_500_007, 2_000_003, 3_000_017, 5_000_011)
_numbers = itertools.count()

Jobs = list[tuple[str, str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 MB: raw files and Arrow files of several record batches."""
    directory = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(9)
    for name in ("raw", "arrow"):
        (directory / name).mkdir()
    for number, size_bytes in enumerate(RAW_BYTES):
        (directory / "raw" / f"{number}.bin").write_bytes(random.bytes(size_bytes))
    for number in range(4):
        with pa.ipc.new_file(
            directory / "arrow" / f"{number}.arrow", pa.schema({"n": pa.int64(), "x": pa.binary()})
        ) as f:
            for _ in range(3):
                texts = [random.bytes(1003) for _ in range(999)]
                f.write_batch(pa.record_batch({"n": random.integers(1 << 60, size=999), "x": pa.array(texts)}))
    return directory


class Made:
    """A dataset over files that no node has cached, and what reading them in each way must come to."""

    def __init__(self, cluster: DevCluster, origin: Path, *, shard_size: int = SHARD_SIZE) -> None:
        self.name = f"loader-{next(_numbers)}"
        self._cluster = cluster
        with Control(cluster.controller_grpc) as control:
            control.add_dataset(self.name, f"file://{origin}", shard_size=shard_size, replicas=1, storage_options="{}")
        self.expected = {
            (f"{self.name}/{path.relative_to(origin)}", way): source_digest(path, way)
            for path in sorted(origin.rglob("*"))
            for way in WAYS
            if path.is_file() and (path.suffix == ".arrow" or way != "arrow")
        }
        self.jobs: Jobs = list(self.expected)

    def warm(self, prefix: str = "") -> None:
        with Control(self._cluster.controller_grpc) as control:
            *_, job = control.watch_prefetch(control.start_prefetch(self.name, prefix).id)
        assert job.state == "done", job.reason

    def filesystem(self, *, local: bool = True) -> ShoalFileSystem:
        """A client on the machine of node 0; the other nodes are elsewhere.

        A process has one connection pool, one set of maps and so on for each way to write an endpoint, so each is new.
        """
        endpoint = self._cluster.endpoint + "/" * next(_numbers)
        return ShoalFileSystem(
            endpoint=endpoint, socket=str(self._cluster.sockets[0]), local=local, skip_instance_cache=True
        )

    def check(self, job: tuple[str, str], found: str) -> None:
        assert found == self.expected[job], f"wrong bytes: {job}"


@pytest.fixture
def dataset(cluster: DevCluster, source: Path, tmp_path: Path) -> Made:
    """Arrow files cold, raw files warm."""
    made = Made(cluster, link_tree(source, tmp_path / "origin"))
    made.warm("raw/")
    return made


def check_epoch(loader: Any, dataset: Made) -> set[int]:
    """One epoch: everything is read once and right. Returns the processes that read."""
    items = [item for batch in loader for item in batch]
    assert sorted(index for index, _, _ in items) == list(range(len(dataset.jobs)))
    for index, found, _ in items:
        dataset.check(dataset.jobs[index], found)
    return {pid for _, _, pid in items}


def loader(dataset: Any, method: str | None, *, workers: int = WORKERS, **more: Any) -> Any:
    return torch_data.DataLoader(
        dataset,
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context=method,
        timeout=DEADLINE_S,
        collate_fn=list,
        **more,
    )


def use_by_threads(dataset: Made, fs: ShoalFileSystem, threads: int = 4) -> None:
    """Leave connections, maps and a pool of threads behind."""
    raw = [job for job in dataset.jobs if "/raw/" in job[0]]
    with ThreadPoolExecutor(threads) as pool:
        for job, found in zip(raw, pool.map(lambda job: WAYS[job[1]](fs, job[0]), raw), strict=True):
            dataset.check(job, found)


#: Spawned ones share nothing that more of them could spoil, and each takes a second to import torch.
@pytest.mark.parametrize(("method", "workers"), [("fork", 8), ("spawn", 3)])
def test_workers_read_everything_once(dataset: Made, method: str, workers: int) -> None:
    fs = dataset.filesystem()
    use_by_threads(dataset, fs)
    assert any("/shards/" in path for path in files_of(os.getpid())), "nothing is mapped: no read was local"
    readers = check_epoch(loader(Reads(fs, dataset.jobs), method, workers=workers), dataset)
    assert len(readers) == workers and os.getpid() not in readers
    use_by_threads(dataset, fs)


def test_workers_that_live_for_several_epochs(dataset: Made, cluster: DevCluster, tmp_path: Path) -> None:
    """Later epochs have the same workers, and cost the nodes nothing more; in the end all is given back."""
    fs = dataset.filesystem()
    dataset.warm()  # nodes that fill ask each other, and keep those connections
    use_by_threads(dataset, fs)
    before = Footprint.of(cluster, tmp_path / "none")
    persistent = loader(Reads(fs, dataset.jobs), "fork", workers=4, persistent_workers=True)
    first, *later = [check_epoch(persistent, dataset) for _ in range(4)]
    assert len(first) == 4 and later == [first] * 3
    del persistent
    Footprint.wait_for_return(cluster, tmp_path / "none", before)


class Broken(Reads):
    """Reads of item 0 fail, with its file open."""

    def __getitem__(self, index: int) -> tuple[int, str, int]:
        with self.fs.open(self.jobs[index][0]) as file:
            file.read(1000)
            if index == 0:
                self.fs.cat_file(f"{self.jobs[0][0]}/is not there")
        return super().__getitem__(index)


def test_worker_that_raises(dataset: Made, cluster: DevCluster, tmp_path: Path) -> None:
    """The error arrives as what it is, with its sentence, and costs one batch; then all is given back."""
    fs = dataset.filesystem()
    dataset.warm()
    use_by_threads(dataset, fs)
    before = Footprint.of(cluster, tmp_path / "none")
    batches = iter(loader(Broken(fs, dataset.jobs), "fork"))
    raised: list[ShoalError] = []
    items = []
    while True:  # a loop over `batches` would end at the error
        try:
            items += next(batches)
        except StopIteration:
            break
        except ShoalError as error:
            raised.append(error)
    assert [type(error) for error in raised] == [errors.NotFound]
    assert "is not there is not in snapshot" in str(raised[0]) and "in DataLoader worker process" in str(raised[0])
    assert 0 <= len(dataset.jobs) - len(items) - 1 < BATCH
    for index, found, _ in items:
        dataset.check(dataset.jobs[index], found)
    Footprint.wait_for_return(cluster, tmp_path / "none", before)
    use_by_threads(dataset, fs)


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
def test_thirty_two_threads_share_one_file_system(dataset: Made, local: bool) -> None:
    fs = dataset.filesystem(local=local)
    threads = 32
    together = threading.Barrier(threads)

    def read(number: int) -> int:
        together.wait(DEADLINE_S)  # the first use too is concurrent: connecting, pinning, mapping
        jobs = list(itertools.islice(cycle(dataset.jobs, number * 5), 20))
        for job in jobs:
            dataset.check(job, WAYS[job[1]](fs, job[0]))
        return len(jobs)

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(read, range(threads))) == 20 * threads


@contextmanager
def readers(dataset: Made, fs: ShoalFileSystem, threads: int) -> Iterator[Callable[[], int]]:
    """Threads that read without a pause. Gives how many reads were right so far; raises what went wrong in a thread."""
    stop = threading.Event()
    counts = [0] * threads

    def run(number: int) -> None:
        for job in cycle(dataset.jobs, number * 7):
            if stop.is_set():
                return
            dataset.check(job, WAYS[job[1]](fs, job[0]))
            counts[number] += 1

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run, number) for number in range(threads)]
        try:
            yield lambda: sum(counts)
        finally:
            stop.set()
        for future in futures:
            future.result(DEADLINE_S)


def test_forks_in_the_middle_of_reads(dataset: Made) -> None:
    """Whatever lock a thread of the parent holds at the fork, the child reads, and the parent reads on.

    The first fork of each round meets the first use: connecting, pinning, placing, mapping.
    """
    numbers = iter(range(20))
    for _ in range(4):
        fs, unused = dataset.filesystem(), dataset.filesystem(local=False)
        with readers(dataset, fs, 6) as count:
            for number in itertools.islice(numbers, 5):
                jobs = list(itertools.islice(cycle(dataset.jobs, number * 11), 6))
                reads = count()
                with Child(partial(read_by_two_threads, fs, unused, jobs)) as child:
                    for job, found in zip([*jobs, jobs[0]], child.heard(), strict=True):
                        dataset.check(job, found)
                    child.process.join(DEADLINE_S)
                    assert child.process.exitcode == 0, "it read, but did not end in good order"
                wait_for(lambda reads=reads, count=count: count() > reads)  # type: ignore[misc]


def read_by_two_threads(fs: ShoalFileSystem, other: ShoalFileSystem, jobs: Jobs, say: Say) -> list[str]:
    """What a child does: `jobs` on threads of its own, meanwhile the first of them by another file system."""
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(WAYS[way], fs, path) for path, way in jobs]
        path, way = jobs[0]
        other_found = WAYS[way](other, path)
        return [*(each.result() for each in found), other_found]


def test_fork_while_a_thread_numbers_the_shards_of_a_snapshot(tmp_path: Path) -> None:
    """That takes long where there are millions, at the first read of a process: just when its workers are forked."""
    rows = [(f"{number}", 5000, "1") for number in range(10)]
    path = snapshot.write(tmp_path, origin="file:///", identity="file:", key_prefix="", shard_size=4096, rows=rows)
    begun, may_go_on = threading.Event(), threading.Event()

    class Slow(Snapshot):
        def _table(self, start: int, stop: int) -> ShardTable:
            begun.set()
            assert may_go_on.wait(DEADLINE_S)
            return super()._table(start, stop)

    with ThreadPoolExecutor(1) as pool:
        table = pool.submit(Slow.open(path).shard_table)
        assert begun.wait(DEADLINE_S)
        try:
            with Child(lambda say: len(Snapshot.open(path).shard_table())) as child:
                assert child.heard(DEADLINE_S / 3) == 20
        finally:
            may_go_on.set()
        assert len(table.result(DEADLINE_S)) == 20


def test_child_keeps_none_of_its_parents_connections(dataset: Made) -> None:
    """Else a connection that the parent closes stays open at the node until the last child ends."""
    others = sockets_of("self")  # of gRPC, of other tests
    fs = dataset.filesystem()
    use_by_threads(dataset, fs)
    with readers(dataset, fs, 6):
        for _ in range(10):
            with Child(lambda say: sockets_of("self")) as child:
                assert child.heard() <= others


def test_child_that_never_reads_lets_the_parents_connection_end() -> None:
    """The same from the server's side, to the letter: in the middle of a request is where a fork must find it."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(DEADLINE_S)
        fs = ShoalFileSystem(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}", local=False)
        request = pool.submit(fs.ls, "")
        connection, _ = server.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            assert connection.recv(1 << 16).startswith(b"GET ")

            def idle(say: Say) -> None:
                say("forked")
                done.wait()

            with Child(idle) as child:
                child.heard()
                connection.sendall(b"nonsense\r\n\r\n")
                with pytest.raises(ShoalError):
                    request.result(DEADLINE_S)
                connection.settimeout(DEADLINE_S / 10)
                assert connection.recv(1) == b""


def test_maps_cost_no_descriptors(cluster: DevCluster, tmp_path: Path) -> None:
    """A process may map more shards than it may have files open: 1,024 is a common limit, for the trainer's own."""
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "x").write_bytes(np.random.default_rng(1).bytes(10_000_000))
    made = Made(cluster, tmp_path / "origin", shard_size=32 << 10)
    made.warm()
    fs = made.filesystem()

    def read(say: Say) -> tuple[list[str], int]:
        open_now = len(list(Path("/proc/self/fd").iterdir()))
        before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, hard))
        found = [WAYS[way](fs, path) for path, way in made.jobs]
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
        return found, sum("/shards/" in path for path in files_of(os.getpid()))

    with Child(read) as child:
        found, mapped = child.heard()
    assert found == list(made.expected.values())
    assert mapped > 60, "node 0 owns a third of the 306 shards"


ERRORS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ShoalError)]


@pytest.mark.parametrize("error", [*(c("why") for c in ERRORS), transport.Interrupted("why", 7)], ids=repr)
def test_errors_survive_the_way_from_a_worker(error: ShoalError) -> None:
    """A pool whose result cannot be unpickled waits for it for ever."""
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), "why", vars(error))


def test_pickled_file_system_reads_the_same(dataset: Made) -> None:
    fs = dataset.filesystem()
    for path, way in dataset.jobs[-len(WAYS) :]:
        dataset.check((path, way), WAYS[way](pickle.loads(pickle.dumps(fs)), path))


def test_pickled_file_system_keeps_its_snapshot(cluster: DevCluster, tmp_path: Path) -> None:
    """A worker that is spawned after a refresh reads what its parent reads, as a forked one does."""
    path = tmp_path / "origin" / "x"
    path.parent.mkdir()
    path.write_bytes(b"before")
    made = Made(cluster, path.parent)
    made.warm()
    fs = made.filesystem()
    assert fs.cat_file(f"{made.name}/x") == b"before"
    path.write_bytes(b"after, longer")
    with Control(cluster.controller_grpc) as control:
        control.refresh_dataset(made.name)
    assert made.filesystem().cat_file(f"{made.name}/x") == b"after, longer"
    spawned = pickle.loads(pickle.dumps(fs))
    assert spawned is not fs
    assert spawned.cat_file(f"{made.name}/x") == b"before"
