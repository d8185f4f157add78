"""Look-ups in a snapshot of a million objects, beside a plain Python dict of the same: time, memory, sharing.

    python -m benchmarks.snapshot [--objects 1000000] [--tiny] [--json PATH]

The rule: each contender runs alone in a fresh process, which opens it, asks it everything and measures itself; and all
must give the same answers. Whatever has the four methods of `Catalogue`, a fsspec file system too, is a contender.

Memory is the growth of USS (`Private_*` of smaps_rollup) over the process with its imports done. USS has the mapped
file's clean pages too, as long as nobody else maps them; these are the page cache's and not the process's, so they are
told apart.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import os
import pickle
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec.utils
import psutil
import pyarrow as pa

from shoal import snapshot
from shoal.datasets import DatasetRecord
from shoal.filesystem import ShoalFileSystem

RESULTS = Path(__file__).parent / "results" / "snapshot.json"
CLASSES = 1000
GLOB = "train/c0042*/0*.jpg"
#: Times each question is asked; the median counts.
REPEATS = {"ls": 9, "info": 999, "exists_hit": 999, "exists_miss": 999, "glob": 5}
LABELS = {
    "open": "open",
    "ls": "list one class of {per_class:,} names",
    "info": "info",
    "exists_hit": "exists, hit",
    "exists_miss": "exists, miss",
    "glob": f"glob {GLOB}",
    "memory": "private memory growth",
    "uss": "the same with file pages, if alone",
}
LIMITS = {"ls": 0.050, "memory": 64 << 20}


class Catalogue(Protocol):
    """What is measured: the four look-ups of a fsspec file system."""

    def ls(self, path: str, detail: bool = True) -> list[Any]: ...
    def info(self, path: str) -> Any: ...
    def exists(self, path: str) -> bool: ...
    def glob(self, path: str) -> Sequence[Any]: ...


class SnapshotCatalogue:
    """A snapshot asked directly."""

    def __init__(self, path: Path) -> None:
        self.snapshot = snapshot.Snapshot.open(path)

    def ls(self, path: str, detail: bool = True) -> list[Any]:
        entries, directories = self.snapshot.list_dir(path)
        return [*entries, *directories]

    def info(self, path: str) -> Any:
        row = self.snapshot.find(path)
        return None if row is None else self.snapshot.entry(row)

    def exists(self, path: str) -> bool:
        return self.snapshot.find(path) is not None or self.snapshot.is_dir(path)

    def glob(self, path: str) -> list[str]:
        rows = self.snapshot.rows_under(re.split(r"[*?[]", path, maxsplit=1)[0])
        found = self.snapshot.glob_rows(fsspec.utils.glob_translate(path), rows)
        return [self.snapshot.path(row) for row in found.tolist()]


class FileSystemCatalogue:
    """The file system that users have, over the same snapshot; it has no cluster to ask, and needs none for names."""

    def __init__(self, path: Path) -> None:
        opened = snapshot.Snapshot.open(path)
        digests = (opened.digest,)
        record = DatasetRecord(
            *("set", opened.origin, "", opened.shard_size, 1, opened.digest, digests, len(opened), opened.total_bytes)
        )
        self.fs = ShoalFileSystem(endpoint="127.0.0.1:1", local=False)
        self.fs.pin("set", record, opened)

    def ls(self, path: str, detail: bool = True) -> list[Any]:
        return self.fs.ls(f"set/{path}", detail=detail)

    def info(self, path: str) -> Any:
        return self.fs.info(f"set/{path}")

    def exists(self, path: str) -> bool:
        return self.fs.exists(f"set/{path}")

    def glob(self, path: str) -> list[str]:
        found: list[str] = self.fs.glob(f"set/{path}")
        return found


class DictCatalogue:
    """A dict of path to (size, version), unpickled. A listing goes through all of it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.rows: dict[str, tuple[int, str]] = pickle.load(file)

    def ls(self, path: str, detail: bool = True) -> list[Any]:
        prefix = path + "/"
        return [
            (name, *row)
            for name, row in self.rows.items()
            if name.startswith(prefix) and "/" not in name[len(prefix) :]
        ]

    def info(self, path: str) -> Any:
        return path, *self.rows[path]

    def exists(self, path: str) -> bool:
        return path in self.rows

    def glob(self, path: str) -> list[str]:
        full_match = re.compile(fsspec.utils.glob_translate(path)).fullmatch
        return sorted(name for name in self.rows if full_match(name))


class DirectoryDictCatalogue(DictCatalogue):
    """The same beside a dict of directory to names, as fsspec's listings cache has it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.directories: dict[str, list[str]] = {}
        for name in self.rows:
            self.directories.setdefault(name.rpartition("/")[0], []).append(name)

    def ls(self, path: str, detail: bool = True) -> list[Any]:
        return [(name, *self.rows[name]) for name in self.directories[path]]


class Objects(NamedTuple):
    """The dataset: ``train/c0000/00000.jpg`` and so on, not quite in order."""

    classes: int
    per_class: int

    def path(self, number: int) -> str:
        name = number % self.per_class * 7919 % 100_003  # both prime: no name twice in a class of up to 100,002
        return f"train/c{number // self.per_class:04d}/{name:05d}.jpg"

    def rows(self) -> Iterator[tuple[str, int, str]]:
        for number in range(self.classes * self.per_class):
            yield self.path(number), 90_000 + number % 50_000, f'"{number:032x}"'


def questions(catalogue: Catalogue, objects: Objects, root: str = "") -> dict[str, Callable[[int], Any]]:
    """What is asked of `catalogue`, each a function of a number that picks the class or the object.

    `root` stands before every path: ``dataset/`` where `catalogue` is a file system over several datasets.
    """
    total = objects.classes * objects.per_class

    def name(number: int) -> str:
        return root + objects.path(number * 104_729 % total)

    return {
        "ls": lambda number: catalogue.ls(f"{root}train/c{number * 37 % objects.classes:04d}", detail=True),
        "info": lambda number: catalogue.info(name(number)),
        "exists_hit": lambda number: catalogue.exists(name(number)),
        "exists_miss": lambda number: catalogue.exists(name(number) + ".gone"),
        "glob": lambda number: catalogue.glob(root + GLOB),
    }


def measure(catalogue: Catalogue, objects: Objects, root: str = "") -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds a question, and a number that the answers have in common over all contenders."""
    times: dict[str, float] = {}
    answers: dict[str, int] = {}
    for label, ask in questions(catalogue, objects, root).items():
        samples = []
        for number in range(REPEATS[label]):
            start = time.perf_counter()
            answer = ask(number)
            samples.append(time.perf_counter() - start)
        times[label] = statistics.median(samples)
        answers[label] = len(answer) if label in ("ls", "glob") else bool(answer)
    return times, answers


def unique_bytes() -> int:
    """Memory that this process shares with none: USS."""
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)


def mapping(path: Path) -> Any:
    """psutil's record (bytes: rss, pss, private_clean, anonymous …) of this process's mappings of `path`, if any."""
    return next((m for m in psutil.Process().memory_maps(grouped=True) if m.path == str(path.resolve())), None)


def imported_since(modules: set[str]) -> list[str]:
    """Packages that a look-up brought in; they are memory as well."""
    return sorted({name.partition(".")[0] for name in set(sys.modules) - modules})


def in_a_process(function: Callable[..., dict[str, Any]], processes: int, *arguments: Any) -> list[dict[str, Any]]:
    """Run `function` in so many fresh processes at once; what each returns."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    started = []
    for _ in range(processes):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sending, function, barrier, *arguments))
        process.start()
        sending.close()  # so that a child that dies is the end of the file, not a wait for ever
        started.append((process, receiving))
    results = [receiving.recv() for _, receiving in started]
    for process, _ in started:
        process.join()
    return results


def _send(sending: Connection, function: Callable[..., dict[str, Any]], barrier: Barrier, *arguments: Any) -> None:
    sending.send(function(barrier, *arguments))


def contend(
    barrier: Barrier, opener: Callable[[], Catalogue], file: Path, objects: Objects, root: str = ""
) -> dict[str, Any]:
    """Open a contender in this process and measure it. `file` is what it maps or reads."""
    before, modules = unique_bytes(), set(sys.modules)
    start = time.perf_counter()
    catalogue = opener()
    open_s = time.perf_counter() - start
    times, answers = measure(catalogue, objects, root)
    uss, mapped = unique_bytes() - before, mapping(file)
    return {
        "open_s": open_s,
        "times_s": times,
        "answers": answers,
        "private_bytes": uss - (mapped.private_clean if mapped else 0),
        "uss_bytes": uss,
        "imported": imported_since(modules),
    }


def share(barrier: Barrier, path: Path, objects: Objects) -> dict[str, Any]:
    """Use a snapshot, and read every byte of it, while others do; then look at who pays for it."""
    before, modules = unique_bytes(), set(sys.modules)
    catalogue = SnapshotCatalogue(path)
    measure(catalogue, objects)
    catalogue.snapshot.verify()
    barrier.wait()
    mapped, private_bytes = mapping(path), unique_bytes() - before
    barrier.wait()  # nobody may leave, and make pages another's own, while somebody looks
    return {
        "rss_bytes": mapped.rss,
        "pss_bytes": mapped.pss,
        "private_bytes": private_bytes,
        "imported": imported_since(modules),
    }


def run(objects: Objects, processes: int, directory: Path) -> dict[str, Any]:
    """Write both forms of the dataset into `directory` and measure everything."""
    start = time.perf_counter()
    url = "s3://bucket/imagenet"
    path = snapshot.write(directory, origin=url, identity=url, shard_size=256 << 20, rows=objects.rows())
    write_s = time.perf_counter() - start
    pickled = directory / "rows.pickle"
    pickled.write_bytes(pickle.dumps({name: (size, version) for name, size, version in objects.rows()}))
    openers: dict[str, tuple[Callable[[Path], Catalogue], Path]] = {
        "snapshot": (SnapshotCatalogue, path),
        "shoal:// file system": (FileSystemCatalogue, path),
        "dict": (DictCatalogue, pickled),
        "dict + directories": (DirectoryDictCatalogue, pickled),
    }
    contenders = {
        name: in_a_process(contend, 1, functools.partial(opener, file), file, objects)[0]
        for name, (opener, file) in openers.items()
    }
    answers = {name: contender.pop("answers") for name, contender in contenders.items()}
    if any(answer != answers["snapshot"] for answer in answers.values()):
        raise SystemExit(f"the contenders disagree: {answers}")
    sharing = in_a_process(share, processes, path, objects)
    return {
        "objects": objects.classes * objects.per_class,
        "file_bytes": path.stat().st_size,
        "write_s": write_s,
        "answers": answers["snapshot"],
        "contenders": contenders,
        "sharing": {
            "processes": processes,
            "rss_sum_bytes": sum(s["rss_bytes"] for s in sharing),
            "pss_sum_bytes": sum(s["pss_bytes"] for s in sharing),
            "private_bytes_max": max(s["private_bytes"] for s in sharing),
            "imported": sharing[0]["imported"],
        },
        "machine": {"python": platform.python_version(), "pyarrow": pa.__version__, "cpus": os.cpu_count()},
    }


def report(result: dict[str, Any], objects: Objects) -> str:
    """The table for people."""

    def show(label: str, contender: dict[str, Any]) -> str:
        if label in ("memory", "uss"):
            size_bytes = contender["private_bytes" if label == "memory" else "uss_bytes"]
            return f"{size_bytes / 2**20:,.1f} MiB"
        seconds = contender["open_s"] if label == "open" else contender["times_s"][label]
        return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} us"

    limits = {"ls": f"{LIMITS['ls'] * 1e3:.0f} ms", "memory": f"{int(LIMITS['memory']) >> 20} MiB"}
    contenders = result["contenders"]
    lines = [f"{'':36}" + "".join(f"{name:>22}" for name in contenders) + f"{'limit':>10}"]
    for label, text in LABELS.items():
        cells = "".join(f"{show(label, contender):>22}" for contender in contenders.values())
        lines.append(f"{text.format(per_class=objects.per_class):36}{cells}{limits.get(label, ''):>10}")
    sharing = result["sharing"]
    lines += [
        "",
        f"{result['objects']:,} objects: {result['file_bytes'] / 2**20:,.1f} MiB, written in {result['write_s']:.1f} s",
        f"{sharing['processes']} processes map {sharing['rss_sum_bytes'] / 2**20:,.1f} MiB of it in all, and use "
        f"{sharing['pss_sum_bytes'] / 2**20:,.1f} MiB of memory for that; at most "
        f"{sharing['private_bytes_max'] / 2**20:,.1f} MiB each is private",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time look-ups in a snapshot beside a dict.")
    parser.add_argument("--objects", type=int, default=1_000_000, help="a multiple of 1,000")
    parser.add_argument("--tiny", action="store_true", help="2,000 objects, two processes: only to see that it runs")
    parser.add_argument("--json", type=Path, help=f"where to save the figures; {RESULTS.name} if not tiny")
    chosen = parser.parse_args(arguments)
    objects = Objects(50, 40) if chosen.tiny else Objects(CLASSES, chosen.objects // CLASSES)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as directory:
        result = run(objects, 2 if chosen.tiny else 4, Path(directory))
    print(report(result, objects))
    target = chosen.json or (None if chosen.tiny else RESULTS)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
