"""Processes that read without a pause and compare every byte, while a test harms the cluster; and how long they waited.

A stall is one read call, as its caller sees it: from the call to its return. The longest stall is what a training step
waits for at worst.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import re
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from shoal.maps import Maps
from tests.support.processes import Child, Say
from tests.support.waiting import wait_for

RANGE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Read:
    """One read call: when it began (`time.monotonic`, the same clock in all processes) and how long it took."""

    began_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Heard:
    """What one process did. `errors` are tracebacks; `wrong` counts reads with a wrong byte."""

    reads: list[Read]
    errors: list[str]
    wrong: int


@dataclass(frozen=True, slots=True)
class Stalls:
    """How long reads took, in milliseconds."""

    reads: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, reads: Sequence[Read]) -> Self:
        times = np.array([read.seconds for read in reads]) * 1000
        return cls(len(times), *(round(float(v), 1) for v in (*np.percentile(times, [50, 99]), times.max())))


class Readers:
    """`count` processes, each over its own client. A context manager that leaves no process behind.

    Args:
        objects: what the dataset ``set`` holds.
        node: whose socket is the clients' local one; None: they read over the network.
        pause_s: between two reads of a process, as of a training step.
    """

    def __init__(
        self,
        cluster: DevCluster,
        objects: Mapping[str, bytes],
        count: int = 8,
        *,
        node: int | None = None,
        pause_s: float = 0.0,
    ) -> None:
        self._cluster, self._objects, self._node, self._pause_s = cluster, objects, node, pause_s
        self._is_over: Any = multiprocessing.get_context("fork").Event()
        self._children = [Child(lambda say, seed=seed: self._run(say, seed)) for seed in range(count)]  # type: ignore[misc]
        for child in self._children:
            assert child.heard() == "reading"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.kill()

    def stop(self) -> list[Heard]:
        """Let each finish the read it is in, and return what they did."""
        self._is_over.set()
        return [child.heard() for child in self._children]

    def _run(self, say: Say, seed: int) -> Heard:
        faulthandler.cancel_dump_traceback_later()  # a long test is no hang
        fs = ShoalFileSystem(
            endpoint=self._cluster.endpoint,
            socket=None if self._node is None else str(self._cluster.sockets[self._node]),
            local=self._node is not None,
            skip_instance_cache=True,
        )
        if fs.cluster.local is not None:
            fs.cluster.local.maps = Maps(limit=1)  # what is mapped needs no node: let nearly every read need one
        draw = random.Random(seed)
        paths = sorted(self._objects)
        for path in paths:
            fs.cat_file(f"set/{path}", 0, 1)
        say("reading")
        heard = Heard([], [], 0)
        wrong = 0
        while not self._is_over.is_set():
            path = draw.choice(paths)
            plain = self._objects[path]
            began = time.monotonic()
            try:
                is_right = _read(fs, path, plain, draw)
            except Exception:  # noqa: BLE001 - the test asserts that there is none, and shows what there was
                heard.errors.append(traceback.format_exc())
                is_right = True  # counted as an error, and gave no byte that could be wrong
            heard.reads.append(Read(began, time.monotonic() - began))
            wrong += not is_right
            if self._pause_s:
                time.sleep(self._pause_s)
        return Heard(heard.reads, heard.errors, wrong)


def _read(fs: ShoalFileSystem, path: str, plain: bytes, draw: random.Random) -> bool:
    """One read in one of the ways that there are; whether the bytes were right."""
    way = draw.random()
    if way < 0.6:
        start = draw.randrange(len(plain))
        return fs.cat_file(f"set/{path}", start, start + RANGE_BYTES) == plain[start : start + RANGE_BYTES]
    if way < 0.8:
        return bool(fs.open_buffer(f"set/{path}").equals(pa.py_buffer(plain)))
    starts = [draw.randrange(len(plain)) for _ in range(16)]
    found = fs.cat_ranges([f"set/{path}"] * 16, starts, [start + 4096 for start in starts], on_error="raise")
    return found == [plain[start : start + 4096] for start in starts]


def within(heard: Sequence[Heard], begin_s: float, end_s: float) -> list[Read]:
    """Reads that were under way at some moment between two of `time.monotonic`."""
    return [r for each in heard for r in each.reads if r.began_s < end_s and r.began_s + r.seconds > begin_s]


def warm(cluster: DevCluster, objects: Mapping[str, bytes], replicas: int) -> None:
    """Let every owner seal what it owns of the dataset ``set``."""
    fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
    for path, plain in objects.items():
        reader = fs._reader(f"set/{path}")
        owners = list(reader.candidates(0))[:replicas]
        for owner in owners:
            view = memoryview(bytearray(len(plain)))
            fs.cluster.transport.read_into(owner.address, reader.shard(0).target, 0, len(plain), view)
            assert view == plain
    for node in cluster.nodes:
        wait_for(lambda ready=node.ready: gauge(fs, str(ready["http"]), "shoal_node_fills") == 0)  # type: ignore[misc]


def gauge(fs: ShoalFileSystem, address: str, name: str) -> float:
    """A metric without labels, of a node."""
    text = fs.cluster.transport.get(address, "/metrics").body.decode()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))


def report(name: str, **figures: Stalls | float | list[int]) -> None:
    """Print figures, and keep them in the directory ``SHOAL_FAULT_RESULTS`` where that is set."""
    told = {key: asdict(value) if isinstance(value, Stalls) else value for key, value in figures.items()}
    print(name, json.dumps(told))
    directory = os.environ.get("SHOAL_FAULT_RESULTS")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


#: Nothing of this takes so long; a read that does hangs.
SANE_S = 20.0
OBJECT_BYTES = 2 << 20
#: Reads count as those during the harm from it on, for so long; as calm ones for as long before it: that is what the
#: machine does to eight readers by itself.
DURING_S = 2.0
#: Between the healing and the calm before the next harm.
SETTLE_S = 0.5
#: Between two reads of a process where one harm is tried, and nobody wants figures.
PAUSE_S = 0.02

Harm = Callable[[DevCluster, int], None]
"""Does something to one node."""


def harm_under_readers(
    directory: Path,
    name: str,
    harm: Harm,
    heal: Harm,
    *,
    replicas: int,
    times: int = 1,
    local_node: int | None = None,
    is_used_again: bool = False,
) -> None:
    """Three warm nodes and eight readers; `harm` a node, `heal` it `DURING_S` later, `times` over, each node in turn.

    Asserts that no read failed or gave a wrong byte, and that none hung. Reports how long reads took, which says
    something where nodes are harmed many times: then readers do not pause, and there is as much calm as harm.

    Args:
        local_node: as `Readers` has it.
        is_used_again: assert that readers take bytes from the first harmed node after it was healed.
    """
    objects = {f"{n}.bin": random.Random(n).randbytes(OBJECT_BYTES - 1000 * n) for n in range(24)}
    (directory / "origin").mkdir()
    for path, data in objects.items():
        (directory / "origin" / path).write_bytes(data)
    with DevCluster(nodes=3, data_dir=directory / "cluster", capacity="1GiB") as cluster:
        with Control(cluster.controller_grpc) as control:
            origin = f"file://{directory}/origin"
            control.add_dataset("set", origin, shard_size=0, replicas=replicas, storage_options="{}")
        warm(cluster, objects, replicas)
        harmed_at: list[float] = []
        calm_s, pause_s = (DURING_S, 0.0) if times > 1 else (SETTLE_S, PAUSE_S)
        with Readers(cluster, objects, node=local_node, pause_s=pause_s) as readers:
            for number in range(times):
                node = number % 3 if local_node is None else local_node
                time.sleep(SETTLE_S + calm_s)
                harmed_at.append(time.monotonic())
                harm(cluster, node)
                time.sleep(DURING_S)
                heal(cluster, node)
                if is_used_again and not number:
                    sent = served(cluster, node)
                    wait_for(lambda node=node, sent=sent: served(cluster, node) > sent + OBJECT_BYTES)  # type: ignore[misc]
            heard = readers.stop()
    errors = [error for each in heard for error in each.errors]
    assert not errors, errors[0]
    assert sum(each.wrong for each in heard) == 0
    assert all(each.reads for each in heard)
    calm = [within(heard, at - DURING_S, at - 0.5 * SETTLE_S) for at in harmed_at]
    during = [within(heard, at, at + DURING_S) for at in harmed_at]
    report(
        f"{name}-replicas-{replicas}",
        times=times,
        calm=Stalls.of([read for reads in calm for read in reads]),
        calm_worst_ms=worst_ms(calm),
        during=Stalls.of([read for reads in during for read in reads]),
        during_worst_ms=worst_ms(during),
    )
    assert max(read.seconds for reads in during for read in reads) < SANE_S


def worst_ms(windows: Sequence[Sequence[Read]]) -> list[int]:
    """The longest read of each window, sorted."""
    return sorted(round(max((read.seconds for read in reads), default=0.0) * 1000) for reads in windows)


def served(cluster: DevCluster, node: int) -> float:
    """Bytes that a node has sent to readers from sealed files."""
    with urllib.request.urlopen(f"{cluster.node_endpoints[node]}/metrics", timeout=SANE_S) as answer:
        text = answer.read().decode()
    (value,) = re.findall(r'^shoal_node_served_bytes_total{from="sealed"} (\S+)$', text, re.MULTILINE)
    return float(value)
