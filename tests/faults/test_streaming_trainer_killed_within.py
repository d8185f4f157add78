"""A trainer killed with -9 where it is neither here nor there: the next one goes on at once, and nothing of it stays.

`test_streaming_trainer_killed.py` kills it in the middle of an epoch. Here it opens the stream, meets others, waits
for an origin that hangs, writes a checkpoint, begins an epoch with workers, or ends. No moment is left to chance: each
one is held by an origin that gives nothing, a rank that does not come, or a process that stops itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import functools
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

import shoal  # noqa: E402
from shoal.origin import Sink  # noqa: E402
from shoal.shards import Key  # noqa: E402
from shoal.streaming import stream as streaming  # noqa: E402
from shoal.streaming import trainer as trainers  # noqa: E402
from shoal.streaming import world as worlds  # noqa: E402
from shoal.streaming.announce import Announcer  # noqa: E402
from shoal.streaming.order import Order  # noqa: E402
from shoal.streaming.stream import Stream  # noqa: E402
from shoal.torch import IterableStream, Samples, merged  # noqa: E402
from shoal.torch.epochs import Epochs  # noqa: E402
from shoal_cachenode import indexes, needs  # noqa: E402
from shoal_cachenode.library import ShardSpec  # noqa: E402
from shoal_cachenode.scheduler import Urgency  # noqa: E402
from tests.support import streams  # noqa: E402
from tests.support.minicluster import DictOrigin, MiniCluster  # noqa: E402
from tests.support.processes import (  # noqa: E402
    DEADLINE_S,
    Child,
    Say,
    files_of,
    is_running,
    is_stopped,
    sockets_of,
    tcp_ends,
)
from tests.support.waiting import wait_for  # noqa: E402

FILES, RUNS, ROWS = 4, 6, 118
SAMPLES, BATCH, SEED, WINDOW = FILES * RUNS * ROWS, 16, 7, 300
URL = "shoal://set/train/*.arrow"

#: Of two nodes one that is short of processors is taken for dead, and then the other one asks the origin as well.
one_node = pytest.mark.parametrize("job", [1], indirect=True, ids=["one node"])

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class HeldOrigin(DictOrigin):
    """Gives nothing while it is held."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self._go = threading.Event()
        self._go.set()

    def hold(self) -> None:
        self._go.clear()

    def let_go(self) -> None:
        self._go.set()

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        assert self._go.wait(DEADLINE_S)
        super().stream(path, version, start, end, sink)


class Job:
    """A training job over nodes that have nothing yet, and a directory of our own for temporary files."""

    def __init__(self, directory: Path, objects: dict[str, bytes], nodes: int) -> None:
        self.directory, self.temporary = directory, directory / "t"
        self.temporary.mkdir()
        self.cluster = MiniCluster(directory / "c", objects, nodes=nodes, part_size=1 << 13, shard_size=1 << 14)
        self.cluster.origin = self.origin = HeldOrigin(objects)
        self.options = {"endpoint": self.cluster.nodes[0].address, "socket": str(self.cluster._socket(0))}
        self._silence_s = 0.0
        for node in self.cluster.nodes:  # they keep it open
            self.cluster.run(node.holdings_of(self.cluster.snapshot.digest))

    # What trainers do, in processes of their own

    def arguments(self, **more: Any) -> dict[str, Any]:
        settings = {"batch_size": BATCH, "shuffle": True, "seed": SEED, "shuffle_window": WINDOW}
        return settings | {"storage_options": self.options} | more

    def open(self, state: Any = None, **more: Any) -> Stream:
        stream = shoal.stream(URL, **self.arguments(**more))
        if state is not None:
            stream.load_state_dict(state)
        return stream

    def train(self, say: Say, state: Any = None, ahead_bytes: int = streaming.AHEAD_BYTES) -> None:
        """Say that the stream is open, the ids of each batch that is left of its epoch, and that it is closed."""
        stream = self.open(state, ahead_bytes=ahead_bytes)
        say("open")
        for batch in stream:
            say(batch["id"].to_pylist())
        stream.close()
        say("closed")

    def loader(self, **more: Any) -> Any:
        return loader_of(IterableStream(URL, **self.arguments()), **more)

    def stop_one_worker(self, say: Say, *, loop: int) -> None:
        """One of a loader's workers that begin its loop number `loop` says who it is and stops, with the lock."""
        write, flag = Epochs._write, self.directory / "one has stopped"

        def slow_write(epochs: Epochs, content: list[Any]) -> None:
            if torch.utils.data.get_worker_info() is not None and len(content[1]) > loop and not flag.exists():
                flag.touch()
                say(os.getpid())
                os.kill(os.getpid(), signal.SIGSTOP)
            write(epochs, content)

        Epochs._write = slow_write  # type: ignore[method-assign, assignment]

    def assert_goes_on(self, state: Any, ids: list[int]) -> None:
        """A new trainer opens its stream at once, and reads these."""
        with process(self.train, state) as trainer:
            assert trainer.heard() == "open"
            assert heard_rest(trainer) == ids

    # What is left of them

    @property
    def builds(self) -> int:
        return sum(node.indexes.builds for node in self.cluster.nodes)

    @property
    def announced(self) -> int:
        """Streams that nodes know of."""
        return sum(node.streams.count for node in self.cluster.nodes)

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for bytes that are on their way from the origin."""
        fills = [fill for node in self.cluster.nodes for _, fill in node.fills.all()]
        return any(fill.is_awaited(part) for fill in fills for part in range(len(fill.partial.header.checksums)))

    def be_cold(self) -> None:
        """The nodes lose all shards, and keep the index."""
        for node in self.cluster.nodes:
            self.cluster.run(node.fills.settle())
            for key in node.store.sealed_sizes():
                node.store.evict(key)
                node.inventory.gone(key)
        self.origin.reads.clear()

    def left_over(self) -> Counter[str]:
        """What nodes have under way and open, and the files that lie about."""
        found: Counter[str] = Counter()
        ends, mine = tcp_ends(), sockets_of("self")
        others = {end: ends.get((end.peer_port, end.port)) for end in ends.values()}
        ours = [end for end, other in others.items() if end.inode in mine and other is not None and other.inode in mine]
        inodes = {end.inode for end in ours}
        for number, (node, server) in enumerate(zip(self.cluster.nodes, self.cluster.servers, strict=True)):
            port = int(node.address.rpartition(":")[2])
            counts = {
                "fills": node.fills.count,
                "fetches": node.fills.fetches_in_flight + node.fills.fetches_waiting,
                "builds": len(node.indexes._building),
                "streams": node.streams.count,
                "shards for streams": sum(int(mask.sum()) for mask in node.inventory.needed.values()),
                "connections": server.open_connections - sum(end.port == port for end in ours),
            }
            found.update({f"{what} of node {number}": count for what, count in counts.items()})
            places = [self.cluster.data_dir(number) / "filling", *self.cluster.data_dir(number).rglob("*.new")]
            found.update(str(path) for place in places for path in (place, *place.glob("*")) if path.is_file())
        for entry in Path("/proc/self/fd").iterdir():  # the nodes are in this process
            try:
                link = str(entry.readlink())
            except FileNotFoundError:
                continue  # closed meanwhile, or the listing's own
            # Sealed shards stay open on purpose, pipes are those of the test's processes.
            if "/shards/" not in link and not link.startswith("pipe:") and link[8:-1] not in inodes:
                found["sockets" if link.startswith("socket:") else link] += 1
        # Of `pymp-*`, see test_streaming_trainer_killed.py.
        found.update(str(path) for path in self.temporary.rglob("*") if "pymp-" not in str(path))
        shared = {str(path) for path in Path("/dev/shm").rglob("*")}
        found.update(shared - (held_files() if shared else set()))
        return found

    def fall_silent(self) -> None:
        """Let pass the time for which nodes wait for a word of a stream."""
        self._silence_s += needs.SILENCE_S
        for node in self.cluster.nodes:
            node.streams._clock = lambda: time.monotonic() + self._silence_s
            self.cluster._loop.call_soon_threadsafe(node.streams._wake)

    def wait_for_return(self, before: Counter[str]) -> None:
        """Wait until nothing is left of the dead, of which nodes hear nothing any more."""

        def is_gone() -> bool:
            self.fall_silent()  # again and again: a last word may be heard late
            surplus = self.left_over() - before
            assert not surplus, surplus
            return True

        wait_for(is_gone)

    def assert_read_once(self) -> None:
        """The origin gave every byte that it gave once."""
        reads = sorted(self.origin.reads)
        for (path, _, end), (other, start, _) in itertools.pairwise(reads):
            assert path != other or end <= start, f"{path} was read twice from {start} on"


def held_files() -> set[str]:
    """What running processes have open or mapped: in memory that all share, others than ours have files too."""
    found: set[str] = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # it has ended
            found |= files_of(pid)
    return found


def loader_of(dataset: Any, *, workers: int = 2, **more: Any) -> Any:
    return stateful.StatefulDataLoader(
        dataset, num_workers=workers, multiprocessing_context="fork", timeout=DEADLINE_S, **{"batch_size": None} | more
    )


def expected(epoch: int = 0) -> list[int]:
    """The ids of an epoch, in their order."""
    files = np.repeat(np.arange(FILES), RUNS)  # each is small: a segment
    order = Order(np.full(FILES * RUNS, ROWS), seed=SEED, epoch=epoch, window=WINDOW, segments=files)
    return [int(each) for each in order.samples(0, SAMPLES)]


def heard_rest(child: Child) -> list[int]:
    """Ids of what a trainer reads to the end of its epoch."""
    read: list[int] = []
    while (said := child.heard()) != "closed":
        read += said
    return read


def wait_for_ever() -> None:
    threading.Event().wait()


def process(function: Callable[..., Any], *arguments: Any) -> Child:
    """A process that does ``function(say, *arguments)`` and may have children; `pause` and `resume` are for it."""

    def run(say: Say) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # also of the threads that it will start
        function(say, *arguments)

    return Child(run, has_children=True)


def pause(say: Say, word: Any) -> None:
    """Say a word, and go on when `resume` says so."""
    say(word)
    signal.sigwait({signal.SIGUSR1})


def resume(child: Child) -> None:
    os.kill(child.pid, signal.SIGUSR1)


@pytest.fixture
def job(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Job]:
    directory = tmp_path_factory.mktemp("j")  # torch makes sockets below it, whose paths must be short
    job = Job(directory, streams.arrow_objects(FILES, RUNS, ROWS), getattr(request, "param", 2))
    monkeypatch.setattr("tempfile.tempdir", str(job.temporary))
    monkeypatch.setattr(trainers, "LOOK_S", 0.1)
    with job.cluster:
        try:
            yield job
        finally:
            job.origin.let_go()


# While it opens the stream


@one_node
@pytest.mark.parametrize("is_restarted", ["within", "after"])
def test_while_a_node_builds_the_index(job: Job, monkeypatch: pytest.MonkeyPatch, is_restarted: str) -> None:
    """The build is the node's: it goes on, and whoever comes next takes it, or what has come of it."""
    monkeypatch.setattr(indexes, "WAIT_S", 0.1)
    before = job.left_over()
    job.origin.hold()
    with process(job.train) as trainer:
        wait_for(lambda: job.builds == 1 and job.is_awaited)
        trainer.kill()
    if is_restarted == "within":
        asked = threading.Event()
        for node in job.cluster.nodes:
            monkeypatch.setattr(node.indexes, "get", functools.partial(tell_and_get, asked, node.indexes.get))
        with process(job.train) as trainer:
            assert asked.wait(DEADLINE_S)
            job.origin.let_go()
            assert trainer.heard() == "open"
            assert heard_rest(trainer) == expected()
    else:
        wait_for(lambda: not job.left_over()["connections of node 0"])  # nobody is there who asked
        job.origin.let_go()
        wait_for(lambda: not any(node.indexes._building for node in job.cluster.nodes))
        job.assert_goes_on(None, expected())
    assert job.builds == 1
    job.assert_read_once()
    job.wait_for_return(before)


def tell_and_get(asked: threading.Event, get: Callable[..., Any], *which: str) -> Any:
    asked.set()
    return get(*which)


@pytest.mark.parametrize(
    ("victim", "has_spoken"),
    [(0, False), (1, False), (0, True)],
    ids=["rank 0 before its word", "rank 1 before its word", "rank 0 after its word"],
)
def test_while_ranks_meet(job: Job, victim: int, has_spoken: bool) -> None:
    """The others are told by what they meet with, torch.distributed, and a job that is started anew opens at once."""
    before = job.left_over()

    def meet(say: Say, rank: int, group: str, late: int) -> None:
        """Open the stream; rank `late` comes when it is let."""
        join_group(job.directory / group, rank, 3)

        def gather(mine: bytes) -> list[bytes]:
            if rank == late:
                pause(say, "late")
            else:
                say("meets")
            return worlds._torch_gather(mine)

        try:
            stream = job.open(gather=gather)
        except RuntimeError as error:
            say(str(error))
            return
        say(next(iter(stream))["id"].to_pylist())
        stream.close()

    late = 2 if has_spoken else victim
    with ExitStack() as ranks:
        children = [ranks.enter_context(process(meet, rank, "first", late)) for rank in range(3)]
        assert [child.heard() for child in children] == ["late" if rank == late else "meets" for rank in range(3)]
        children[victim].kill()
        if late != victim:
            resume(children[late])
        for rank in {0, 1, 2} - {victim}:
            assert "onnection" in children[rank].heard(), "of the process group"
    with ExitStack() as ranks:
        children = [ranks.enter_context(process(meet, rank, "second", -1)) for rank in range(3)]
        assert [child.heard() for child in children] == ["meets"] * 3
        read = itertools.chain.from_iterable(child.heard() for child in children)
        assert sorted(read) == sorted(expected()[: 3 * BATCH])
        for child in children:
            child.process.join(DEADLINE_S)
    job.wait_for_return(before)


def join_group(path: Path, rank: int, size: int) -> None:
    """Of torch's process groups, the one that meets at the file `path`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=DEADLINE_S),
    )


# While it reads


@one_node
@pytest.mark.parametrize("is_restarted", ["within", "after"])
def test_while_it_waits_for_an_origin_that_hangs(job: Job, monkeypatch: pytest.MonkeyPatch, is_restarted: str) -> None:
    """The next one waits for the same bytes, which come once. What nobody needs any more is let go."""
    job.assert_goes_on(None, expected())
    job.be_cold()
    before = job.left_over()
    job.origin.hold()
    (node,) = job.cluster.nodes
    awaited: dict[Key, int] = {}  # shards that a reader asked for, and their bytes
    monkeypatch.setattr(node, "fill", functools.partial(note_and_fill, awaited, node.fill))
    with process(job.train, None, 1) as trainer:  # which reads nothing ahead, but tells what it will read
        assert trainer.heard() == "open"
        wait_for(lambda: job.is_awaited and not all(fill.is_kept for _, fill in node.fills.all()))
        trainer.kill()
    total_bytes = sum(map(len, job.origin.objects.values()))
    if is_restarted == "within":
        with process(job.train) as trainer:
            assert trainer.heard() == "open"
            wait_for(lambda: job.announced == 2)
            job.origin.let_go()
            assert heard_rest(trainer) == expected()
    else:
        job.fall_silent()
        wait_for(lambda: job.announced == 0 and all(fill.is_kept or fill.has_failed for _, fill in node.fills.all()))
        under_way_bytes = node.fills.fetches_in_flight * node.config.part_size
        job.origin.let_go()
        wait_for(lambda: node.fills.count == 0)  # of those let go the parts that came are kept, for whoever reads them
        assert 0 < job.origin.bytes_read <= sum(awaited.values()) + under_way_bytes < total_bytes
        job.assert_goes_on(None, expected())
    job.assert_read_once()
    assert job.origin.bytes_read == total_bytes
    job.wait_for_return(before)


def note_and_fill(
    awaited: dict[Key, int],
    fill: Callable[..., Any],
    spec: ShardSpec,
    order: Any,
    urgency: Urgency,
    *more: Any,
    **due: Any,
) -> Any:
    if urgency is not Urgency.NEED:
        awaited[spec.key] = spec.size_bytes
    return fill(spec, order, urgency, *more, **due)


@pytest.mark.parametrize("place", ["within the batch", "before its state", "before the checkpoint", "within it"])
def test_between_a_batch_and_its_checkpoint(job: Job, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """From the last checkpoint that was written, every sample after it comes once."""
    before = job.left_over()
    checkpoint, steps = job.directory / "checkpoint", 5

    def train(say: Say) -> None:
        stream, taken, made = job.open(), 0, 0
        batch_of = streaming.batch_of

        def slow_batch_of(*parts: Any) -> pa.Table:
            nonlocal made
            made += 1
            if place == "within the batch" and made == steps + 1:
                wait_for(lambda: taken == steps)  # the trainer waits for this one
                pause(say, "here")
            return batch_of(*parts)

        monkeypatch.setattr(streaming, "batch_of", slow_batch_of)
        for batch in stream:
            ids = batch["id"].to_pylist()
            if place == "before its state" and taken == steps:
                pause(say, "here")
            state = json.dumps(stream.state_dict())
            if place == "before the checkpoint" and taken == steps:
                pause(say, "here")
            new = checkpoint.with_suffix(".new")
            new.write_text(state)
            if place == "within it" and taken == steps:
                pause(say, "here")
            new.replace(checkpoint)
            taken += 1
            say(ids)

    with process(train) as trainer:
        read = [each for _ in range(steps) for each in trainer.heard()]
        assert trainer.heard() == "here"
        trainer.kill()
    assert read == expected()[: steps * BATCH]
    job.assert_goes_on(json.loads(checkpoint.read_text()), expected()[steps * BATCH :])
    job.wait_for_return(before)


def test_a_rank_within_a_step(job: Job) -> None:
    """All are started anew, as another number of ranks, and again: the epoch is whole, step by step in its order."""
    before = job.left_over()
    checkpoint = job.directory / "checkpoint"

    def train(say: Say, rank: int, size: int, victim: int, steps: int) -> None:
        """Steps as a training has them: each ends for all ranks together, then rank 0 writes the checkpoint."""
        join_group(job.directory / f"group of {size}", rank, size)
        stream = job.open(json.loads(checkpoint.read_text()) if checkpoint.exists() else None)
        try:
            for step, batch in enumerate(stream):
                if rank == victim and step == steps:
                    pause(say, "within a step")
                torch.distributed.all_reduce(torch.zeros(1))
                state = stream.state_dict()
                if rank == 0:
                    new = checkpoint.with_suffix(".new")
                    new.write_text(json.dumps(state))
                    new.replace(checkpoint)
                torch.distributed.barrier()
                say((state["position"] or SAMPLES, batch["id"].to_pylist()))
        except RuntimeError as error:
            say(str(error))
            return
        stream.close()
        say("closed")

    position, order = 0, expected()
    for size, victim, steps in [(3, 2, 5), (2, 0, 7), (4, -1, -1)]:  # samples of a step: 48, 32, 64
        with ExitStack() as ranks:
            children = [ranks.enter_context(process(train, r, size, victim, steps)) for r in range(size)]
            for _ in range(steps if victim >= 0 else (SAMPLES - position) // (size * BATCH)):
                heard = [child.heard() for child in children]
                first, position = position, heard[0][0]
                assert {said for said, _ in heard} == {first + size * BATCH}
                read = itertools.chain.from_iterable(ids for _, ids in heard)
                assert sorted(read) == sorted(order[first:position])
            if victim < 0:
                assert [child.heard() for child in children] == ["closed"] * size
                continue
            assert children[victim].heard() == "within a step"
            children[victim].kill()
            for rank in set(range(size)) - {victim}:
                assert "onnection" in children[rank].heard(), "of the process group"
    assert position == SAMPLES
    job.wait_for_return(before)


# With workers of a DataLoader


@pytest.mark.parametrize("victim", ["trainer", "worker"])
def test_from_one_epoch_into_the_next(job: Job, victim: str) -> None:
    """Persistent workers agree which epoch is next: one is stopped while it writes that down, with the lock."""
    before = job.left_over()

    def train(say: Say) -> None:
        job.stop_one_worker(say, loop=1)
        loader = job.loader(persistent_workers=True)
        batches = iter(loader)
        say(pids_of(batches))
        read = [each for batch in batches for each in batch["id"].tolist()]
        state = merged(loader.state_dict())
        say((read, state))
        with pytest.raises(RuntimeError, match=r"killed by signal: Killed|exited unexpectedly"):
            iter(loader)
            wait_for_ever()
        dataset = loader.dataset  # whose lock the dead one had
        del batches, loader
        dataset.load_state_dict(state)
        say([each for batch in loader_of(dataset) for each in batch["id"].tolist()])
        wait_for_ever()

    with process(train) as trainer:
        workers = trainer.heard()
        read, state = trainer.heard()
        assert read == expected()
        holder = trainer.heard()
        assert holder in workers
        wait_for(lambda: is_stopped(holder))
        if victim == "worker":
            os.kill(holder, signal.SIGKILL)
            assert trainer.heard() == expected(1)
        trainer.kill()
        if victim == "trainer":
            os.kill(holder, signal.SIGCONT)
        wait_for_end(workers)
    job.assert_goes_on(state, expected(1))
    job.wait_for_return(before)


def test_before_a_worker_has_begun(job: Job) -> None:
    """It never had its trainer for a parent while torch's own look for that could have seen it go."""
    before = job.left_over()

    def train(say: Say) -> None:
        job.stop_one_worker(say, loop=0)
        iter(job.loader(workers=1))

    with process(train) as trainer:
        worker = trainer.heard()
        wait_for(lambda: is_stopped(worker))
        trainer.kill()
        os.kill(worker, signal.SIGCONT)
        wait_for_end([worker])
    job.assert_goes_on(None, expected())
    job.wait_for_return(before)


@one_node
def test_while_workers_wait_for_an_origin_that_hangs(job: Job) -> None:
    """They go at once, and do not wait for the bytes."""
    job.assert_goes_on(None, expected())
    job.be_cold()
    before = job.left_over()

    def train(say: Say) -> None:
        batches = iter(job.loader())
        say(pids_of(batches))
        next(batches)

    job.origin.hold()
    with process(train) as trainer:
        workers = trainer.heard()
        wait_for(lambda: job.is_awaited and job.announced == 2)
        trainer.kill()
        wait_for_end(workers)
    job.origin.let_go()
    job.assert_goes_on(None, expected())
    job.assert_read_once()
    job.wait_for_return(before)


@pytest.mark.parametrize("kind", [IterableStream, Samples])
def test_while_batches_fill_the_pipe_of_its_workers(job: Job, kind: type[IterableStream] | type[Samples]) -> None:
    """Nobody will take them."""
    before = job.left_over()

    def large(table: pa.Table) -> str:
        return "x" * (1 << 18)

    def train(say: Say) -> None:
        if kind is Samples:
            loader = loader_of(Samples(URL, transform=large, storage_options=job.options), batch_size=1)
        else:
            loader = loader_of(IterableStream(URL, transform=large, **job.arguments()))
        batches = iter(loader)
        next(batches)
        pipe = batches._worker_result_queue._reader.fileno()
        wait_for(lambda: struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0] > 1 << 12)
        say(pids_of(batches))
        wait_for_ever()

    with process(train) as trainer:
        workers = trainer.heard()
        trainer.kill()
    wait_for_end(workers)
    job.assert_goes_on(None, expected())
    job.wait_for_return(before)


def pids_of(batches: Any) -> list[int]:
    return [worker.pid for worker in batches._workers]


def wait_for_end(workers: list[int]) -> None:
    """Wait until they are gone, and leave none to whoever reads what the tests print."""
    try:
        wait_for(lambda: not any(map(is_running, workers)))
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)


# While it ends


@pytest.mark.parametrize("is_heard", [False, True], ids=["before it is told", "while it is told"])
def test_within_close(job: Job, monkeypatch: pytest.MonkeyPatch, is_heard: bool) -> None:
    """The nodes are told that a stream is over, or they find out."""
    before = job.left_over()
    leaves, go = threading.Event(), threading.Event()
    if not is_heard:
        leaves.set()
    for node in job.cluster.nodes:
        monkeypatch.setattr(node.streams, "hear", functools.partial(hear_slowly, node.streams.hear, leaves, go))

    def train(say: Say) -> None:
        stream = job.open()
        batches = iter(stream)
        say(next(batches)["id"].to_pylist())
        if not is_heard:
            monkeypatch.setattr(Announcer, "announce", lambda announcer, *, is_over: pause(say, is_over))
        stream.close()

    with process(train) as trainer:
        assert trainer.heard() == expected()[:BATCH]
        assert leaves.wait(DEADLINE_S) if is_heard else trainer.heard()
        trainer.kill()
    job.assert_goes_on(None, expected())
    go.set()
    job.wait_for_return(before)


async def hear_slowly(
    hear: Callable[..., Awaitable[bytes]], leaves: threading.Event, go: threading.Event, *post: Any
) -> bytes:
    """As `hear`, but the first stream that leaves has to wait for `go`."""
    if post[-1].is_leaving and not leaves.is_set():
        leaves.set()
        await asyncio.to_thread(go.wait, DEADLINE_S)
    return await hear(*post)


@one_node
@pytest.mark.parametrize("first", [True, False], ids=["before what Shoal does then", "after it"])
def test_within_the_exit_of_the_interpreter(job: Job, first: bool) -> None:
    """A script that ends in the middle of an epoch, with loads under way that the origin does not give."""
    job.assert_goes_on(None, expected())
    job.be_cold()
    before = job.left_over()
    job.origin.hold()
    script = SCRIPT.format(deadline_s=DEADLINE_S, arguments=job.arguments(), url=URL, first=first)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as trainer:
        assert trainer.stdin is not None and trainer.stdout is not None
        assert trainer.stdout.readline() == b"iterates\n"
        wait_for(lambda: job.is_awaited and job.announced == 1)
        trainer.stdin.write(b"end\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == b"ends\n"
        trainer.kill()
    with process(job.train) as restarted:
        assert restarted.heard() == "open"
        job.origin.let_go()
        assert heard_rest(restarted) == expected()
    job.assert_read_once()
    job.wait_for_return(before)


#: Functions that are registered last are called first at the exit.
SCRIPT = """
import atexit, faulthandler, threading

faulthandler.dump_traceback_later({deadline_s}, exit=True)

def end():
    print("ends", flush=True)
    threading.Event().wait()

first = {first}
if not first:
    atexit.register(end)
import shoal
if first:
    atexit.register(end)
stream = shoal.stream({url!r}, **{arguments!r})
threading.Thread(target=next, args=(iter(stream),), daemon=True).start()
print("iterates", flush=True)
input()
"""
