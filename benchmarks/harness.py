"""How a comparison is measured, whatever it compares.

A shared machine drifts by more than the differences we look for. So contenders take turns (A B C A B C …) in one run,
the first turn of each is not counted, and what is told is the median with the smallest and the largest beside it. Each
contender works in a process of its own, kept from turn to turn as a trainer keeps its pools and connections, or made
anew for every turn where what is measured is a first time.

The rule: CPU time is that of every process that took part, client and servers together, children included; a rate
without its price is half a result.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import click
import psutil

#: No single turn takes so long; one that does hangs.
CALL_TIMEOUT_S = 1800.0
#: Of a turn whose CPU time for a GB is told.
LEAST_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1


class Missing(Exception):
    """Something this machine or this version does not have: the comparison is skipped, and says so."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One turn, as the contender's own clock saw it.

    Attributes:
        values: further figures by name, in the unit that the name ends with.
    """

    seconds: float
    size_bytes: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = sorted(values)
        return cls(statistics.median(known), known[0], known[-1])


@dataclass(frozen=True, slots=True)
class Turn:
    """`cpu_s` is everybody's; `servers_cpu_s` the servers' part of it."""

    outcome: Outcome
    cpu_s: float
    servers_cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Series:
    """All counted turns of one contender."""

    name: str
    turns: tuple[Turn, ...]

    @property
    def rate(self) -> Spread:
        """Bytes a second."""
        return Spread.of(t.outcome.size_bytes / t.outcome.seconds for t in self.turns)

    @property
    def cpu_s_per_gb(self) -> float | None:
        """None where next to nothing was moved, as by the reads of single bytes."""
        costs = [t.cpu_s / t.outcome.size_bytes * 1e9 for t in self.turns if t.outcome.size_bytes >= LEAST_BYTES]
        return statistics.median(costs) if costs else None

    def value(self, name: str) -> Spread:
        return Spread.of(t.outcome.values[name] for t in self.turns)


class Worker:
    """A process that runs one contender's calls, or one of its servers. A context manager; it dies with its maker."""

    def __init__(self) -> None:
        # spawn: nothing of this process, least of all another contender's libraries, is in it.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=_die_with, initargs=(os.getpid(),))
        self.pid: int = self._pool.submit(os.getpid).result(60)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run an importable function there and return what it returns."""
        return self.start(function, *args).result(CALL_TIMEOUT_S)

    def start(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._pool.submit(function, *args)

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)  # a server's threads would keep it from ending by itself
        except ProcessLookupError:
            pass
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def always(*args: Any) -> Callable[[int], tuple[Any, ...]]:
    """The same arguments in every turn."""
    return lambda turn: args


@dataclass(frozen=True, slots=True)
class Contender:
    """What takes turns.

    Attributes:
        function: importable; runs in the worker and returns an `Outcome`.
        arguments: of the turn; turn 0 is the warm-up.
        worker: None makes a fresh process for each turn.
        servers: process ids whose CPU time counts, with all their children.
        prepare: function and arguments to run in the worker before the turn, neither timed nor counted.
        before, after: run here around the turn, neither timed nor counted.
    """

    name: str
    function: Callable[..., Outcome]
    arguments: Callable[[int], tuple[Any, ...]]
    worker: Worker | None = None
    servers: tuple[int, ...] = ()
    prepare: tuple[Any, ...] = ()
    before: Callable[[int], None] | None = None
    after: Callable[[int], None] | None = None

    def take(self, turn: int) -> Turn:
        if self.before:
            self.before(turn)
        worker = self.worker or Worker()
        try:
            if self.prepare:
                worker.call(*self.prepare)
            client, servers = cpu_seconds([worker.pid]), cpu_seconds(self.servers)
            outcome: Outcome = worker.call(self.function, *self.arguments(turn))
            client, servers = cpu_seconds([worker.pid]) - client, cpu_seconds(self.servers) - servers
        finally:
            if self.worker is None:
                worker.close()
        if self.after:
            self.after(turn)
        return Turn(outcome, client + servers, servers)


def interleave(
    contenders: Sequence[Contender],
    runs: int,
    *,
    alternates: bool = False,
    before: Callable[[], object] | None = None,
) -> dict[str, Series]:
    """Let all contenders take turns, `runs` counted ones each after one that is not.

    Args:
        alternates: every other round goes backwards (A B C C B A), where it matters who came before.
        before: called before each turn, whoever's it is; not counted.
    """
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
    for number in range(runs + 1):
        for contender in contenders[:: -1 if alternates and number % 2 else 1]:
            progress(f"  {contender.name}: " + (f"{number} of {runs}" if number else "warm-up"))
            if before is not None:
                before()
            taken = contender.take(number)
            if number:
                turns[contender.name].append(taken)
    return {name: Series(name, tuple(taken)) for name, taken in turns.items()}


def fastest(variants: Sequence[Contender]) -> Contender:
    """The variant with the highest rate in one turn, after one to warm up: how a peer gets its best settings here."""

    def rate(variant: Contender) -> float:
        progress(f"  trying {variant.name}: {variant.function.__name__}")
        variant.take(0)
        outcome = variant.take(1).outcome
        return outcome.size_bytes / outcome.seconds

    return max(variants, key=rate)


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time so far of these processes, their children, and the children that they have reaped."""
    total = 0.0
    for pid in pids:
        try:
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in family:
            try:
                reaped = process.cpu_times()
                total += _own_cpu_seconds(process.pid) + reaped.children_user + reaped.children_system
            except (psutil.NoSuchProcess, OSError):
                continue
    return total


def _own_cpu_seconds(pid: int) -> float:
    """To the nanosecond, where /proc tells hundredths: the clock that clock_getcpuclockid(3) names."""
    return time.clock_gettime((~pid << 3) | 2)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile."""
    known = sorted(values)
    return known[min(len(known) - 1, int(len(known) * percent / 100))]


def progress(text: str) -> None:
    """A line for somebody who waits; nothing in a pipe."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


def _die_with(parent: int) -> None:
    """In a worker: end when the process that made it ends, however that ends, and leave Ctrl-C to it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:
        os._exit(1)
