"""Loads what steps want before they come: the plan is the future, so what is loaded ahead is exact, never guessed.

Steps are begun as far ahead as the bytes that they want fit into the window. What one of them wants stays. A whole run
that none wants yet stays as long as there is room, the least recently used going first, because the shuffle brings it
back within its own window; what no other step can want goes at once.

The rule: the bytes held and on their way stay within the limit, except that the step that is due is always loaded.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from shoal import provenance
from shoal.streaming.plan import Reads
from shoal.streaming.runs import Loaded, Rows, Want
from shoal.streaming.waits import Trace, shares_of
from shoal.threads import Threads

#: Loads under way.
THREADS = 8
#: Steps planned ahead at most: where everything is at hand the window would never be full. At first it is two, and one
#: more with every step that was taken: while the first step waits for a cold cache the later ones would only share with
#: it what the origin gives. Nodes know what comes after it all the same (`shoal.streaming.announce`).
FIRST_STEPS, MAX_STEPS = 2, 64
#: What is loaded together goes up to so many, and so many bytes.
GROUP_WANTS, GROUP_BYTES = 256, 8 << 20


class Waiting(Protocol):
    """Is told of waits for loads: from when to when (`time.perf_counter`), and what the load did."""

    def waited(self, begin: float, end: float, trace: Trace) -> None: ...


class Loader(Protocol):
    """Loads what is wanted (`shoal.streaming.runs.Runs`). `load` runs in threads."""

    def wants(self, reads: Reads) -> list[Want]: ...

    def bytes_of(self, want: Want) -> int: ...

    def is_shared(self, want: Want) -> bool: ...

    def is_batched(self, want: Want) -> bool: ...

    def load(self, wants: Sequence[Want], trace: Trace) -> list[Loaded]: ...


@dataclass(slots=True, eq=False)
class _Load:
    """What is loaded, or on its way: `future` is that of its group.

    Attributes:
        is_shared: other steps may want it.
        needs: how many of the begun steps want it.
        table: set before the future is, so that whoever finds it needs no lock.
    """

    future: Future[None]
    trace: Trace
    held_bytes: int
    is_shared: bool
    needs: int = 0
    table: Rows | None = None


class LookAhead:
    """The steps of an iterator, each with what it wants loaded. For one consumer thread.

    Args:
        steps: in the order in which they are consumed.
        limit_bytes: held and on their way.
    """

    def __init__(
        self,
        steps: Iterator[Reads],
        loader: Loader,
        limit_bytes: int,
        waits: Waiting,
    ) -> None:
        self._steps, self._loader, self._limit_bytes, self._waits = steps, loader, limit_bytes, waits
        self._next: tuple[Reads, list[Want]] | None = None  # planned, and not begun for want of room
        self._begun: deque[tuple[Reads, list[Want]]] = deque()
        self._loads: OrderedDict[Want, _Load] = OrderedDict()
        self._needed = 0  # loads that begun steps want
        self._depth = FIRST_STEPS
        self._is_over = False
        self._lock = threading.Lock()  # guards held_bytes, and that of each load
        self.held_bytes = 0
        self._threads = Threads(THREADS, "shoal-stream")

    def __iter__(self) -> Iterator[tuple[Reads, dict[Want, Rows]]]:
        return self

    def __next__(self) -> tuple[Reads, dict[Want, Rows]]:
        """The next step and what it wants. Raises what a load raised; then there is nothing more to have."""
        self._begin()
        if not self._begun:
            raise StopIteration
        reads, wants = self._begun[0]
        loads = [self._loads[want] for want in wants]
        tables = {want: self._await(load) for want, load in zip(wants, loads, strict=True)}
        self._begun.popleft()
        self._depth = min(self._depth + 1, MAX_STEPS)
        for want, load in zip(wants, loads, strict=True):
            load.needs -= 1
            if load.needs:
                continue
            self._needed -= 1
            if load.is_shared:
                self._loads.move_to_end(want)
            else:
                self._forget(want)
        self._begin()
        return reads, tables

    def stop(self) -> None:
        """Begin no load any more; those that are queued fail. From any thread, before `close`."""
        self._is_over = True

    def close(self) -> None:
        """Let go of what is loaded; loads under way end by themselves."""
        self._threads.close()
        self._loads.clear()
        self._begun.clear()

    def _await(self, load: _Load) -> Rows:
        if load.table is None:
            begin = time.perf_counter()
            concurrent.futures.wait([load.future])
            self._waits.waited(begin, time.perf_counter(), load.trace)
            load.future.result()
        return load.table

    def _begin(self) -> None:
        """Begin the loads of as many steps as there is room for."""
        while len(self._begun) < self._depth and not self._is_over:
            if self._next is None:
                reads = next(self._steps, None)
                if reads is None:
                    return
                self._next = reads, self._loader.wants(reads)
            reads, wants = self._next
            new = {want: self._loader.bytes_of(want) for want in wants if want not in self._loads}
            if not self._make_room(sum(new.values()), wants) and self._begun:
                return
            self._next = None
            for group in self._groups(new):
                self._submit(group)
            for want in wants:
                load = self._loads[want]
                self._needed += not load.needs
                load.needs += 1
            self._begun.append((reads, wants))

    def _make_room(self, wanted_bytes: int, wants: Sequence[Want]) -> bool:
        """Drop what no begun step wants, until so many more bytes fit; False: they do not."""
        if self.held_bytes + wanted_bytes > self._limit_bytes and len(self._loads) > self._needed:
            kept = set(wants)
            for want in [want for want, load in self._loads.items() if not load.needs and want not in kept]:
                self._forget(want)
                if self.held_bytes + wanted_bytes <= self._limit_bytes:
                    break
        return self.held_bytes + wanted_bytes <= self._limit_bytes

    def _forget(self, want: Want) -> None:
        load = self._loads.pop(want)
        with self._lock:
            self.held_bytes -= load.held_bytes
            load.held_bytes = 0

    def _groups(self, wants: Mapping[Want, int]) -> Iterator[dict[Want, int]]:
        """What is loaded together, with the bytes of each."""
        group: dict[Want, int] = {}
        size_bytes = 0
        for want, more in wants.items():
            if not self._loader.is_batched(want):
                yield {want: more}
                continue
            if group and (len(group) == GROUP_WANTS or size_bytes + more > GROUP_BYTES):
                yield group
                group, size_bytes = {}, 0
            group[want] = more
            size_bytes += more
        if group:
            yield group

    def _submit(self, group: Mapping[Want, int]) -> None:
        trace = Trace()
        future: Future[None] = Future()
        is_shared = self._loader.is_shared
        loads = [_Load(future, trace, size_bytes, is_shared(want)) for want, size_bytes in group.items()]
        with self._lock:
            self.held_bytes += sum(group.values())
        self._loads.update(zip(group, loads, strict=True))
        self._threads.submit(self._run, list(group), loads, future, trace)

    def _run(self, group: list[Want], loads: list[_Load], future: Future[None], trace: Trace) -> None:
        """In a thread."""
        if self._is_over:
            future.set_exception(RuntimeError("nobody wants it any more"))
            return
        begin = time.perf_counter()
        try:
            with provenance.observed() as seen:
                loaded = self._loader.load(group, trace)
        except BaseException as error:  # noqa: BLE001 - told to the consumer, whatever it is
            future.set_exception(error)
            return
        trace.reading(begin, time.perf_counter(), shares_of(seen))
        with self._lock:
            for load, each in zip(loads, loaded, strict=True):
                if load.held_bytes:  # else it was forgotten meanwhile
                    self.held_bytes += each.held_bytes - load.held_bytes
                    load.held_bytes = each.held_bytes
                load.table = each.table
        future.set_result(None)
