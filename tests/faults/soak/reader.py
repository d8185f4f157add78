"""A process that reads at random, in every way there is, and compares every byte with what it must be.

    python -m tests.faults.soak.reader SPEC       # a `Spec` as JSON

It says what happens as JSON lines on stdout, and writes when each read began and how long it took to a file of doubles.
A line on stdin ends it: it then reads every object of the newest snapshots once more, for which there is no excuse.

The rule: nothing is forgiven here. Wrong bytes and errors are told, with all that another process needs to judge them.
"""

from __future__ import annotations

import array
import faulthandler
import itertools
import json
import os
import random
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from shoal import shards
from shoal.arrow import ArrowCopyWarning
from shoal.errors import ShoalError
from shoal.filesystem import ShoalFileSystem
from shoal_cachenode import allocator
from tests.faults.soak.content import SHARD_SIZE, Content

#: Reads with one file system object, and so with one set of snapshots, at most.
READS_PINNED = 600
#: A read that takes longer has its stacks written down.
LATE_S = 60.0
_PAUSE_S = 0.02
_HELD, _HELD_COPY_BYTES = 6, 1 << 20

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Spec:
    """What a reader is started with.

    Attributes:
        socket, is_local: of the node on whose machine it is; of nobody, where it is on a machine without one.
        datasets: those that it reads in every way.
        harmed: the one whose files are damaged; it is read over the network and in whole parts, which is where Shoal
            promises to notice.
        versions: file of the origin's versions by path (`World.put` writes it).
        times, stacks: files that it writes.
    """

    seed: int
    number: int
    endpoint: str
    socket: str
    is_local: bool
    datasets: list[str]
    harmed: str
    versions: str
    times: str
    stacks: str
    threads: int


class Versions:
    """Which version of an object an ETag stands for, as the writer of the origin tells it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, int]] = {}

    def number(self, path: str, e_tag: str) -> int:
        known = self._known.get(path, {}).get(e_tag)
        if known is None:
            self._known = json.loads(self._path.read_text())
            known = self._known[path][e_tag]
        return known


@dataclass(frozen=True, slots=True)
class Found:
    """An object as a file system sees it."""

    path: str
    size_bytes: int
    e_tag: str
    version: int

    @property
    def content(self) -> Content:
        return Content(self.path, self.version)


class Wrong(Exception):
    """Bytes are not what they must be."""


class Reads:
    """The reads of one thread.

    Attributes:
        now: what is being read, since when; for the watchdog.
    """

    def __init__(self, spec: Spec, thread: int, versions: Versions, say: Say, note: Callable[[float, float], None]):
        self._spec, self._versions, self._say, self._note = spec, versions, say, note
        self._rng = random.Random(f"{spec.seed}/{spec.number}/{thread}")
        self._held: deque[tuple[Found, int, pa.Buffer]] = deque()
        self._file_systems: dict[bool, ShoalFileSystem] = {}
        self._left = 0
        self._listed: dict[str, list[Found]] = {}
        self.now: tuple[str, float] | None = None
        self.count = self.bytes = 0

    # What there is

    def connect(self) -> None:
        """Take the newest snapshots. Two file systems, so that both ways to a node see the same ones by luck only."""
        self._file_systems = {
            local: ShoalFileSystem(
                endpoint=self._spec.endpoint, socket=self._spec.socket, local=local, skip_instance_cache=True
            )
            for local in {False, self._spec.is_local}
        }
        self._left, self._listed = self._rng.randrange(1, READS_PINNED), {}

    def _objects(self, fs: ShoalFileSystem, name: str) -> list[Found]:
        key = f"{name}/{id(fs)}"
        if key not in self._listed:
            entries = fs.find(name, detail=True).values()
            self._listed[key] = [
                Found(e["name"], e["size"], e["version"], self._versions.number(e["name"], e["version"]))
                for e in entries
            ]
        return self._listed[key]

    # Reads at random

    def once(self) -> None:
        """One read of something."""
        if self._left <= 0:
            self.connect()
        self._left -= 1
        name = self._rng.choice([*self._spec.datasets, *self._spec.datasets, self._spec.harmed])
        fs = self._file_systems[self._spec.is_local and name != self._spec.harmed and self._rng.random() < 0.8]
        found = self._asked(fs, f"listing of {name}", None, lambda: self._objects(fs, name))
        if found is None:
            self._left = 0
            time.sleep(0.2)
            return
        each = self._rng.choice(found)
        if each.path.endswith(".arrow"):
            self._read(fs, each, "read_arrow", lambda: self._table(fs, each))
        elif name == self._spec.harmed:
            way = self._rng.choice([self._whole, self._by_open, self._buffer, self._buffers])
            self._read(fs, each, way.__name__, lambda: way(fs, each))
        else:
            ways = [self._whole, self._by_open, self._buffer, self._buffers, self._range, self._range, self._seek]
            way = self._rng.choice(ways)
            if self._rng.random() < 0.15:
                self._batch(fs, name)
            else:
                self._read(fs, each, way.__name__, lambda: way(fs, each))
        if self._held and self._rng.random() < 0.2:
            held, start, buffer = self._held[self._rng.randrange(len(self._held))]
            self._compared(held, "held buffer", start, buffer)
        time.sleep(self._rng.uniform(0, _PAUSE_S))

    def _read(self, fs: ShoalFileSystem, each: Found, way: str, read: Callable[[], None]) -> bool:
        return self._asked(fs, way, each, lambda: (read(), True)[1]) is not None

    def _asked(self, fs: ShoalFileSystem, way: str, each: Found | None, read: Callable[[], Any]) -> Any:
        """What `read` gives; None where it failed, which is told."""
        start = time.monotonic()
        self.now = (f"{way} of {each.path if each else ''}", start)
        try:
            return read()
        except Wrong as error:
            self._say({"wrong": str(error), "way": way, "start": start, "end": time.monotonic()})
        except Exception as error:  # noqa: BLE001 - all of them are told
            self._failed(fs, way, each, error, start)
        finally:
            self.now = None
            if each is not None:
                self._note(start, time.monotonic() - start)
                self.count += 1
        return None

    def _failed(self, fs: ShoalFileSystem, way: str, each: Found | None, error: Exception, start: float) -> None:
        self._say(
            {
                "error": type(error).__name__,
                "is_shoal": isinstance(error, ShoalError),
                "message": str(error)[:600],
                "way": way,
                "start": start,
                "end": time.monotonic(),
                "path": each.path if each else "",
                "version": each.version if each else 0,
                "names": shard_names(fs, each.path, each.size_bytes) if each else [],
                "snapshot": fs._pins[each.path.split("/", 1)[0]].snapshot.digest if each else "",
            }
        )

    # The ways

    def _whole(self, fs: ShoalFileSystem, each: Found) -> None:
        self._compare(each, 0, fs.cat_file(each.path), each.size_bytes)

    def _by_open(self, fs: ShoalFileSystem, each: Found) -> None:
        """In pieces that go through the window, by turns with large ones into a buffer of our own."""
        into = bytearray(self._rng.randrange(1, 3 << 20))
        small = self._rng.randrange(10_000, 1 << 20)
        with fs.open(each.path) as file:
            place = 0
            while piece := file.read(small):
                self._compare(each, place, piece)
                place += len(piece)
                count = file.readinto(into)
                self._compare(each, place, memoryview(into)[:count])
                place += count
        if place != each.size_bytes:
            raise Wrong(f"{each.path} (version {each.version}): {place} of {each.size_bytes} bytes")

    def _buffer(self, fs: ShoalFileSystem, each: Found) -> None:
        buffer = fs.open_buffer(each.path)
        self._compare(each, 0, buffer, each.size_bytes)
        self._hold(each, 0, buffer)

    def _buffers(self, fs: ShoalFileSystem, each: Found) -> None:
        place = 0
        for buffer in fs.open_buffers(each.path):
            self._compare(each, place, buffer)
            self._hold(each, place, buffer)
            place += buffer.size
        if place != each.size_bytes:
            raise Wrong(f"{each.path} (version {each.version}): {place} of {each.size_bytes} bytes")

    def _range(self, fs: ShoalFileSystem, each: Found) -> None:
        start, end = self._span(each)
        self._compare(each, start, fs.cat_file(each.path, start, end), end - start)

    def _seek(self, fs: ShoalFileSystem, each: Found) -> None:
        start, end = self._span(each)
        with fs.open(each.path) as file:
            file.seek(start)
            self._compare(each, start, file.read_buffer(end - start), end - start)

    def _table(self, fs: ShoalFileSystem, each: Found) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ArrowCopyWarning)
            table = fs.read_arrow(each.path)
        if not each.content.is_table(table):
            raise Wrong(f"{each.path} (version {each.version}): the table is another one")
        self.bytes += each.size_bytes

    def _batch(self, fs: ShoalFileSystem, name: str) -> None:
        """Many small ranges at once, each of which has its own outcome."""
        found = [each for each in self._objects(fs, name) if each.size_bytes and not each.path.endswith(".arrow")]
        chosen = [self._rng.choice(found) for _ in range(self._rng.randrange(2, 64))]
        spans = [self._span(each, most=64 << 10) for each in chosen]
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        begun = time.monotonic()

        def read() -> None:
            results = fs.cat_ranges([each.path for each in chosen], starts, ends)
            for each, (start, end), result in zip(chosen, spans, results, strict=True):
                if isinstance(result, Exception):
                    self._failed(fs, "cat_ranges", each, result, begun)
                else:
                    self._compare(each, start, result, end - start)

        self._read(fs, chosen[0], "cat_ranges", read)

    def _span(self, each: Found, most: int = 9 << 20) -> tuple[int, int]:
        start = self._rng.randrange(each.size_bytes + 1)
        return start, min(each.size_bytes, start + self._rng.randrange(1, self._rng.choice((4096, 300_000, most)) + 1))

    def _hold(self, each: Found, start: int, buffer: pa.Buffer) -> None:
        """Keep a buffer, to look at it again when its file may be gone; of those that are copies, the small ones."""
        if buffer.is_mutable and buffer.size > _HELD_COPY_BYTES:
            return
        self._held.append((each, start, buffer))
        if len(self._held) > _HELD:
            self._held.popleft()

    def _compare(self, each: Found, start: int, data: Any, length: int | None = None) -> None:
        view = memoryview(data)
        view = view if view.format == "B" else view.cast("B")
        if length is not None and len(view) != length:
            raise Wrong(f"{each.path} (version {each.version}): {len(view)} bytes from {start} on, not {length}")
        place = each.content.first_difference(view, start)
        if place is not None:
            raise Wrong(f"{each.path} (version {each.version}): byte {place} of a read of {len(view)} from {start} on")
        self.bytes += len(view)

    def _compared(self, each: Found, way: str, start: int, buffer: pa.Buffer) -> None:
        try:
            self._compare(each, start, buffer)
        except Wrong as error:
            now = time.monotonic()
            self._say({"wrong": str(error), "way": way, "start": now, "end": now})

    # The last round

    def everything(self) -> None:
        """Every object of the newest snapshots."""
        self._held.clear()
        self.connect()
        for local, fs in self._file_systems.items():
            for name in [*self._spec.datasets, self._spec.harmed]:
                if local and name == self._spec.harmed:
                    continue
                for each in self._objects(fs, name):
                    way = self._table if each.path.endswith(".arrow") else self._whole
                    self._read(fs, each, "last round", lambda way=way, fs=fs, each=each: way(fs, each))  # type: ignore[misc]


def shard_names(fs: ShoalFileSystem, path: str, size_bytes: int) -> list[str]:
    """Names of the files of an object's shards on the nodes."""
    whole = bytes.fromhex(fs.ukey(path))
    return [shards.shard_key(whole, i).hex() for i in range(shards.shard_count(size_bytes, SHARD_SIZE))]


class _Watchdog(threading.Thread):
    """Writes all stacks down once a read takes too long, and tells."""

    def __init__(self, reads: list[Reads], stacks: TextIO, say: Say) -> None:
        super().__init__(daemon=True)
        self._reads, self._stacks, self._say = reads, stacks, say

    def run(self) -> None:
        told: set[float] = set()
        while True:
            time.sleep(1.0)
            for each in self._reads:
                now = each.now
                if now is not None and time.monotonic() - now[1] > LATE_S and now[1] not in told:
                    told.add(now[1])
                    self._stacks.write(f"\n{now[0]} takes {LATE_S:.0f} s\n")
                    self._stacks.flush()
                    faulthandler.dump_traceback(self._stacks, all_threads=True)
                    self._say({"late": now[0], "start": now[1], "stacks": self._stacks.name})


def _connected(reads: Reads, say: Say) -> None:
    """The first connection: the one thing that a reader cannot do while its endpoint is away."""
    while True:
        start = time.monotonic()
        try:
            reads.connect()
            for fs in reads._file_systems.values():
                fs.ls("")
            return
        except ShoalError as error:
            end = time.monotonic()
            say(
                {
                    "error": type(error).__name__,
                    "message": str(error)[:600],
                    "way": "connect",
                    "start": start,
                    "end": end,
                }
            )
            time.sleep(0.5)


def main(spec: Spec) -> None:
    """Read until a line comes on stdin."""
    out = threading.Lock()  # one line at a time

    def say(what: dict[str, Any]) -> None:
        with out:
            print(json.dumps(what), flush=True)

    allocator.share_arenas()
    stop = threading.Event()
    with Path(spec.stacks).open("a") as stacks, Path(spec.times).open("ab") as times:

        def note(start: float, took_s: float) -> None:
            with out:
                times.write(array.array("d", (start, took_s)).tobytes())

        versions = Versions(Path(spec.versions))
        all_reads = [Reads(spec, thread, versions, say, note) for thread in range(spec.threads)]
        _Watchdog(all_reads, stacks, say).start()
        _connected(all_reads[0], say)
        say({"begun": os.getpid()})

        def read(reads: Reads) -> None:
            if reads is not all_reads[0]:
                reads.connect()
            while not stop.is_set():
                reads.once()

        threads = [threading.Thread(target=read, args=(each,), daemon=True) for each in all_reads]
        for thread in threads:
            thread.start()
        teller = threading.Thread(target=_tell, args=(all_reads, say), daemon=True)
        teller.start()
        if not sys.stdin.readline():
            os._exit(1)  # the end of stdin without a word: nobody is there any more
        stop.set()
        for thread in threads:
            thread.join()
        all_reads[0].everything()
        _tell_once(all_reads, say)
        times.flush()
    say({"ended": True})


def _tell(all_reads: list[Reads], say: Say) -> None:
    """Also give free memory back now and then, so that what grows is what is held, and not what allocators keep."""
    for second in itertools.count(1):
        time.sleep(1.0)
        _tell_once(all_reads, say)
        if second % allocator.INTERVAL_S == 0:
            allocator.give_back()


def _tell_once(all_reads: list[Reads], say: Say) -> None:
    say({"reads": sum(r.count for r in all_reads), "bytes": sum(r.bytes for r in all_reads)})


def arguments(spec: Spec) -> list[str]:
    """What a Python interpreter is given to be this reader."""
    return ["-m", "tests.faults.soak.reader", json.dumps(asdict(spec))]


if __name__ == "__main__":
    main(Spec(**json.loads(sys.argv[1])))
