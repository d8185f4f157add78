"""A synthetic training job: ranks as processes that stream a dataset, compute so long a step, and step together.

Computing is sleeping, so that it takes no processor from the cluster that shares the machine. What a real trainer
does with a batch is done within that time: its rows are gathered into one buffer. The ranks wait for each other after
each step, as an all-reduce makes them.

The rule: every rank tells which samples it got, so that an epoch which is not each sample once is no figure.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import shoal
from shoal.streaming.waits import Waits

ID, PAYLOAD = "id", "payload"
#: No epoch takes so long; one that does hangs.
EPOCH_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Training:
    """What the ranks of a job do.

    Attributes:
        url: of the samples.
        places: of each rank, the endpoint and the socket of the node beside it.
        compute_s: of a step, the gathering of the batch included.
    """

    url: str
    places: tuple[tuple[str, str], ...]
    batch_size: int
    window: int
    seed: int
    compute_s: float

    @property
    def ranks(self) -> int:
        return len(self.places)


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank saw of an epoch, from the first question for a batch to the end.

    Attributes:
        ids: of the samples that it got.
        inside_s: of each step, for how long it waited for the batch.
        outside_s: of each step, how long it computed, and met the others.
        causes: of each step, what for: what the stream's report grew by.
        report: the stream's own words.
    """

    begin_s: float
    end_s: float
    ids: npt.NDArray[np.int64]
    inside_s: tuple[float, ...]
    outside_s: tuple[float, ...]
    causes: tuple[dict[str, float], ...]
    report: str


@dataclass(frozen=True, slots=True)
class Epoch:
    """All ranks of a job.

    Attributes:
        open_s: from the start of the slowest rank's stream until it was open, index included.
        compute_s: that the steps were to take.
        computed_s: that they took, of each step that of the rank that the others waited for: sleep and barriers are not
            exact.
        stalls: seconds by which steps came late, by cause; of each step those of the same rank.
    """

    open_s: float
    begin_s: float
    end_s: float
    steps: int
    compute_s: float
    computed_s: float
    stalls: dict[str, float]
    ids: npt.NDArray[np.int64]
    report: str

    @classmethod
    def of(cls, ranks: Sequence[Rank], compute_s: float, open_s: float) -> Self:
        stalls: dict[str, float] = {}
        steps, computed_s = len(ranks[0].inside_s), 0.0
        for step in range(steps):
            slowest = max(ranks, key=lambda rank: rank.inside_s[step])
            computed_s += slowest.outside_s[step]
            for cause, seconds in slowest.causes[step].items():
                stalls[cause] = stalls.get(cause, 0.0) + seconds
        return cls(
            open_s,
            min(rank.begin_s for rank in ranks),
            max(rank.end_s for rank in ranks),
            steps,
            steps * compute_s,
            computed_s,
            dict(sorted(stalls.items(), key=lambda item: -item[1])),
            np.sort(np.concatenate([rank.ids for rank in ranks])),
            max(ranks, key=lambda rank: sum(rank.inside_s)).report,
        )

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s

    @property
    def late_s(self) -> float:
        """By how much the epoch was longer than its computing took."""
        return self.seconds - self.computed_s

    @property
    def accounted(self) -> float:
        """Of `late_s`, what the stall report names."""
        return sum(self.stalls.values()) / self.late_s if self.late_s > 0 else 1.0


class Ranks:
    """Processes in which the ranks of all jobs run, one after the other. A context manager that leaves none behind.

    Attributes:
        pids: of the processes.
    """

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # this process has used gRPC, which does not fork
        barrier = context.Barrier(count)
        self._ends: list[Connection] = []
        self._processes = []
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, barrier), daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)
        self.pids = tuple(process.pid for process in self._processes if process.pid is not None)
        _hear(self._ends, "ready")

    def job(self, training: Training, first: int = 0) -> Job:
        """A job whose rank 0 runs in process `first`; of one rank, or of as many as there are processes."""
        assert training.ranks in (1, len(self._ends)), "the barrier is for all of them"
        return Job(training, self._ends[first : first + training.ranks])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class Job:
    """One epoch of a job, step by step: `open`, `begin`, `end`."""

    def __init__(self, training: Training, ends: Sequence[Connection]) -> None:
        self._training = training
        self._ends = ends
        self._open_s = 0.0

    def open(self) -> None:
        """Have all ranks open their streams, and wait until the last one is open."""
        for rank, end in enumerate(self._ends):
            end.send((self._training, rank))
        if self._training.ranks > 1:
            words = _hear(self._ends, "gather")
            for end in self._ends:
                end.send(words)
        self._open_s = max(_hear(self._ends, "open"))

    def begin(self) -> None:
        """Let the epoch begin."""
        for end in self._ends:
            end.send("begin")

    def end(self) -> Epoch:
        """Wait until it has ended."""
        return Epoch.of(_hear(self._ends, "epoch"), self._training.compute_s, self._open_s)


def _hear(ends: Sequence[Connection], subject: str) -> list[Any]:
    """What each process says of `subject`."""
    heard = []
    for end in ends:
        if not end.poll(EPOCH_TIMEOUT_S):
            raise TimeoutError(f"a rank says nothing of {subject} for {EPOCH_TIMEOUT_S:g} s")
        about, what = end.recv()
        if about != subject:
            raise RuntimeError(f"a rank failed:\n{what}")
        heard.append(what)
    return heard


def _serve(end: Connection, barrier: Barrier) -> None:
    """A process."""
    end.send(("ready", None))
    try:
        while True:
            training, rank = end.recv()
            end.send(("epoch", _epoch(end, barrier if training.ranks > 1 else None, training, rank)))
    except EOFError:
        pass
    except Exception:  # noqa: BLE001 - the process that measures is told, and fails with it
        barrier.abort()  # or the others would wait for this one
        end.send(("failure", traceback.format_exc()))


def _epoch(end: Connection, barrier: Barrier | None, training: Training, rank: int) -> Rank:
    def gather(mine: bytes) -> list[bytes]:
        end.send(("gather", mine))
        return list(end.recv())

    began = time.monotonic()
    endpoint, socket = training.places[rank]
    options: dict[str, Any] = {"endpoint": endpoint, "socket": socket, "local": True, "skip_instance_cache": True}
    stream = shoal.stream(
        training.url,
        batch_size=training.batch_size,
        shuffle=True,
        shuffle_window=training.window,
        seed=training.seed,
        rank=rank,
        world_size=training.ranks,
        gather=gather,
        storage_options=options,
    )
    end.send(("open", time.monotonic() - began))
    end.recv()
    _meet(barrier)
    ids, inside_s, outside_s, causes = [], [], [], []
    begin_s = time.monotonic()
    before = _Seen.by(stream.waits)
    for batch in stream:
        handed = time.monotonic()
        due = handed + training.compute_s
        now = _Seen.by(stream.waits)
        inside_s.append(now.total_s - before.total_s)
        causes.append({cause: now.causes[cause] - before.causes.get(cause, 0.0) for cause in now.causes})
        before = now
        ids.append(_ids_of(batch))
        del batch  # or it is given back between two steps, which is nobody's time
        time.sleep(max(0.0, due - time.monotonic()))
        _meet(barrier)
        outside_s.append(time.monotonic() - handed)
    end_s = time.monotonic()
    report = stream.report()
    stream.close()
    return Rank(begin_s, end_s, np.concatenate(ids), tuple(inside_s), tuple(outside_s), tuple(causes), report)


def _meet(barrier: Barrier | None) -> None:
    """Wait for the other ranks, where there are any."""
    if barrier is not None:
        barrier.wait(EPOCH_TIMEOUT_S)


def _ids_of(batch: pa.Table) -> npt.NDArray[np.int64]:
    """What samples a batch has, once its payloads lie in one buffer, as a tensor's do; each begins with the id."""
    ids = np.array(batch[ID])
    payloads = batch[PAYLOAD].combine_chunks()
    width = payloads.type.byte_width
    words = np.frombuffer(payloads.buffers()[1], np.uint8, len(payloads) * width, payloads.offset * width)
    firsts = words.reshape(-1, width)[:, : ids.itemsize].copy().view(ids.dtype)[:, 0]
    if not np.array_equal(ids, firsts):
        raise RuntimeError(f"samples {ids[ids != firsts][:5]} have the payloads of others")
    return ids


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a stream's report says."""

    total_s: float
    causes: dict[str, float]

    @classmethod
    def by(cls, waits: Waits) -> Self:
        return cls(waits.total_s, waits.by_cause())
