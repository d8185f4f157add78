"""Processes that read, and a look at what they have open and leave behind.

Light on purpose: a spawned worker imports it, and eight of them start at once.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import re
import signal
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pyarrow as pa
import xxhash

from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from tests.support.waiting import wait_for

#: No read of these tests takes more than a second or two. Who has not ended by then hangs.
DEADLINE_S = 60.0
_RANGE_BYTES = 100_003
_GAUGES = ("shoal_node_connections", "shoal_node_fills", "shoal_node_fetches")

Say = Callable[[Any], None]
"""Sends one picklable thing from a child to its parent."""


def digest(data: Any) -> str:
    """Digest of anything that speaks the buffer protocol."""
    return str(xxhash.xxh3_128_hexdigest(data))


def table_digest(table: pa.Table) -> str:
    """Digest of a table's content, whatever memory it lies in and however it is cut."""
    sink = pa.BufferOutputStream()
    table = table.combine_chunks()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return digest(sink.getvalue())


def source_digest(path: Path, way: str) -> str:
    """What `Reads` must give for a file, read with neither Shoal nor fsspec."""
    if way == "arrow":
        with pa.ipc.open_file(path) as file:
            return table_digest(file.read_all())
    return digest(path.read_bytes())


def _by_open(fs: ShoalFileSystem, path: str) -> str:
    with fs.open(path) as file:
        return digest(file.read())


def _by_pieces(fs: ShoalFileSystem, path: str) -> str:
    """Small reads, which go through the window, by turns with large ones into a buffer of the caller's."""
    whole = xxhash.xxh3_128()
    large = bytearray(1 << 20)
    with fs.open(path) as file:
        while small := file.read(10_007):
            whole.update(small)
            whole.update(memoryview(large)[: file.readinto(large)])
    return whole.hexdigest()


def _by_cat(fs: ShoalFileSystem, path: str) -> str:
    return digest(fs.cat_file(path))


def _by_ranges(fs: ShoalFileSystem, path: str) -> str:
    starts = range(0, fs.info(path)["size"], _RANGE_BYTES)
    ends = [start + _RANGE_BYTES for start in starts]
    found = fs.cat_ranges([path] * len(starts), list(reversed(starts)), ends[::-1], on_error="raise")
    return digest(b"".join(reversed(found)))


def _by_buffer(fs: ShoalFileSystem, path: str) -> str:
    return digest(fs.open_buffer(path))


def _by_arrow(fs: ShoalFileSystem, path: str) -> str:
    return table_digest(fs.read_arrow(path))


WAYS: Mapping[str, Callable[[ShoalFileSystem, str], str]] = {
    "open": _by_open,
    "pieces": _by_pieces,
    "cat": _by_cat,
    "ranges": _by_ranges,
    "buffer": _by_buffer,
    "arrow": _by_arrow,  # of Arrow files only
}


@dataclass(frozen=True, slots=True)
class Reads:
    """A map-style data set for a DataLoader: item i is what `jobs[i]`, a path and a way to read it, came to.

    An item is (i, digest of what was read, process that read it).
    """

    fs: ShoalFileSystem
    jobs: Sequence[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[int, str, int]:
        path, way = self.jobs[index]
        return index, WAYS[way](self.fs, path), os.getpid()


class Child:
    """A process that runs `function` and has a deadline. A context manager that leaves no process behind.

    What `function` says, and at last what it returns, is `heard` here in that order.
    """

    def __init__(self, function: Callable[[Say], Any], *, has_children: bool = False) -> None:
        context: Any = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_run, args=(function, theirs), daemon=not has_children)
        self.process.start()
        theirs.close()  # so that the end of the child is the end of the pipe

    def heard(self, timeout_s: float = DEADLINE_S) -> Any:
        """The next thing that the child says. Fails where it raised, died or says nothing for `timeout_s`."""
        if not self._connection.poll(timeout_s):
            raise AssertionError(f"process {self.pid} hangs: it said nothing for {timeout_s:.0f} s")
        try:
            kind, said = self._connection.recv()
        except EOFError:
            self.process.join()
            raise AssertionError(f"process {self.pid} ended without a word: {self.process.exitcode}") from None
        assert kind != "raised", said
        return said

    @property
    def has_said_more(self) -> bool:
        """Whether `heard` would return at once."""
        return bool(self._connection.poll(0))

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        """End it as the kernel's out-of-memory killer would, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._connection.close()


def _run(function: Callable[[Say], Any], connection: Connection) -> None:
    def send(kind: str, said: Any) -> None:
        connection.send((kind, said))

    faulthandler.dump_traceback_later(0.8 * DEADLINE_S)  # where it hangs, before it is killed for it
    try:
        send("said", function(partial(send, "said")))
    except BaseException:  # noqa: BLE001 - the parent raises it
        send("raised", traceback.format_exc())


def sockets_of(pid: int | str = "self") -> set[str]:
    """Inodes of the sockets that a process has open. Two processes that share a connection share the number."""
    return {text[8:-1] for text in _links(pid) if text.startswith("socket:")}


def files_of(pid: int) -> set[str]:
    """Paths of the files that a process has open or mapped, with " (deleted)" after those that have no name."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {text for text in _links(pid) if text.startswith("/")} | {line[73:] for line in maps if line[73:74] == "/"}


def _links(pid: int | str) -> Iterator[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield str(entry.readlink())
        except FileNotFoundError:
            pass  # closed meanwhile, or the listing's own


@dataclass(frozen=True, slots=True)
class TcpEnd:
    """One end of an established TCP connection of this machine; `inode` is that of its socket.

    `to_send` counts the bytes that the other end has not acknowledged, `to_read` those that the process has not taken.
    """

    port: int
    peer_port: int
    to_send: int
    to_read: int
    inode: str


def tcp_ends() -> dict[tuple[int, int], TcpEnd]:
    """All of them by their two ports (proc(5), /proc/net/tcp)."""
    ends = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, waiting, _, _, _, _, inode, *_ = line.split()
        if state == "01":
            to_send, to_read = (int(count, 16) for count in waiting.split(":"))
            port, peer_port = int(local[-4:], 16), int(remote[-4:], 16)
            ends[port, peer_port] = TcpEnd(port, peer_port, to_send, to_read, inode)
    return ends


def bytes_under_way(pid: int, port: int) -> tuple[int, int]:
    """Bytes in the buffers of a process's connections to a TCP port of this machine: those for it, those from it."""
    ends, inodes = tcp_ends(), sockets_of(pid)
    inward = outward = 0
    for end in ends.values():
        if end.peer_port == port and end.inode in inodes:
            other = ends.get((end.peer_port, end.port))
            inward += end.to_read + (other.to_send if other else 0)
            outward += end.to_send + (other.to_read if other else 0)
    return inward, outward


def is_running(pid: int) -> bool:
    """Whether a process does something; one that only waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped (SIGSTOP reaches them one after the other)."""
    try:
        tasks = [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
        return all(task.read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)
    except FileNotFoundError:
        return False


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile: stopped from the first line of the block on, and going on after it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: is_stopped(pid))
        yield
    finally:
        with suppress(ProcessLookupError):  # killed meanwhile
            os.kill(pid, signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a cluster has open on behalf of its readers, and the files that lie about, at one moment.

    Attributes:
        counts: a node's gauges, its sockets and its other descriptors. Those of sealed shards, which it keeps open on
            purpose, do not count, nor do the connections that nodes keep with each other.
        files: partial shards, and whatever lies in the directory for temporary files.
    """

    counts: Counter[str]
    files: frozenset[str]

    @classmethod
    def of(cls, cluster: DevCluster, temporary: Path) -> Self:
        counts: Counter[str] = Counter()
        files = {str(path) for path in temporary.rglob("*") if not path.is_dir()}
        among_nodes = _among_nodes(cluster)
        inodes = {end.inode for end in among_nodes}
        for node, url in zip(cluster.nodes, cluster.node_endpoints, strict=True):
            with urllib.request.urlopen(f"{url}/metrics", timeout=DEADLINE_S) as answer:
                text = answer.read().decode()
            for name in _GAUGES:
                (value,) = re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)
                counts[f"{node.name} {name}"] = int(float(value))
            from_nodes = sum(url.endswith(f":{end.port}") for end in among_nodes)
            counts[f"{node.name} shoal_node_connections"] -= from_nodes
            links = [link for link in _links(node.pid) if "/shards/" not in link and link[8:-1] not in inodes]
            counts.update(f"{node.name} {_kind(link)}" for link in links)
            files.update(map(str, (cluster.data_dir / node.name / "filling").iterdir()))
        return cls(counts, frozenset(files))

    def surplus(self, before: Footprint) -> dict[str, object]:
        """What there is now and was not then. Fewer connections are none: a server closes those that idle."""
        more: dict[str, object] = {name: f"+{count}" for name, count in (self.counts - before.counts).items()}
        return more | dict.fromkeys(self.files - before.files, "a new file")

    @classmethod
    def wait_for_return(cls, cluster: DevCluster, temporary: Path, before: Footprint) -> None:
        """Wait until there is no surplus over `before`; fail with what there is."""

        def is_gone() -> bool:
            surplus = cls.of(cluster, temporary).surplus(before)
            assert not surplus, surplus
            return True

        wait_for(is_gone)


def _among_nodes(cluster: DevCluster) -> list[TcpEnd]:
    """Both ends of the connections between two cache nodes."""
    inodes = set().union(*(sockets_of(node.pid) for node in cluster.nodes))
    ends = tcp_ends()
    pairs = ((end, ends.get((end.peer_port, end.port))) for end in ends.values())
    return [end for end, other in pairs if other and end.inode in inodes and other.inode in inodes]


def _kind(link: str) -> str:
    return "sockets" if link.startswith("socket:") else link


def link_tree(source: Path, target: Path) -> Path:
    """The files of `source` under another name: the same bytes, which no node has cached. Returns `target`."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)
    return target


def cycle(jobs: Sequence[tuple[str, str]], start: int) -> Iterator[tuple[str, str]]:
    """`jobs` over and over, from one of them on."""
    return itertools.cycle([*jobs[start % len(jobs) :], *jobs[: start % len(jobs)]])
