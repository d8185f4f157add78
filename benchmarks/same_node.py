"""Shoal beside the file system of its own node: scans of mapped shards, opening, and whole reads.

Both sides use the same sealed files from a warm page cache. A scan starts in a fresh process each turn, so that both
map anew; the others keep their process, as a trainer does.
"""

from __future__ import annotations

import contextlib
import tempfile

from benchmarks import shoal_reader
from benchmarks.harness import Contender, Outcome, Series, Turn, Worker, always, cpu_seconds, interleave, progress
from benchmarks.peers import filecache, plain_file
from benchmarks.report import Findings
from benchmarks.stage import BUCKET, MIB, Stage, Warm

SCAN = "Arrow scan, read_arrow"
SCAN_ARROW = "Arrow pool growth while {} processes scan"
SCAN_PRIVATE = "private memory growth while {} processes scan"
OPEN_FIRST = "URL to Arrow buffer, first in a process"
OPEN_AGAIN = "URL to Arrow buffer, again"
WHOLE = "whole objects, open(path).read()"

ARROW_LIMIT_BYTES = MIB
#: "Flat": what an interpreter allocates for itself, whatever the size of what it reads.
PRIVATE_LIMIT_BYTES = 8 * MIB
OPEN_FIRST_LIMIT_US, OPEN_AGAIN_LIMIT_US = 100, 10


def run(stage: Stage, findings: Findings) -> None:
    warm = stage.warm
    findings.note(plain_file.SETTINGS)
    scan_what = (SCAN_ARROW.format(stage.scale.processes), SCAN_PRIVATE.format(stage.scale.processes))
    with findings.unless_missing((1, SCAN, "mmap", 0.98), *((1, what, "limit", 1.0) for what in scan_what)):
        shoal_reader.require("read_arrow")
        _scan(stage, warm, findings)
        _scan_together(stage, warm, findings, *scan_what)
    with findings.unless_missing(*((2, what, "limit", 1.0) for what in (OPEN_FIRST, OPEN_AGAIN))):
        shoal_reader.require("open_buffer")
        _open(stage, warm, findings)
    _whole(stage, warm, findings)


def _scan(stage: Stage, warm: Warm, findings: Findings) -> None:
    access = warm.access(local=True)
    series = interleave(
        [
            Contender(
                "shoal",
                shoal_reader.scan,
                always(access, warm.urls),
                servers=warm.servers,
                prepare=(shoal_reader.connect, access, warm.urls[0]),
            ),
            Contender("mmap", plain_file.scan, always(warm.files), prepare=(plain_file.prepare,)),
        ],
        stage.scale.runs,
    )
    findings.rate(1, SCAN, series["shoal"], series["mmap"], 0.98)


def _scan_together(stage: Stage, warm: Warm, findings: Findings, arrow_what: str, private_what: str) -> None:
    """All processes read all shards at once, and the worst of them counts."""
    access = warm.access(local=True)
    turns = []
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker()) for _ in range(stage.scale.processes)]
        for worker in workers:
            worker.call(shoal_reader.first_scan, access, warm.urls[0])
        pids = (*(worker.pid for worker in workers), *warm.servers)
        for number in range(stage.scale.runs):
            progress(f"  {len(workers)} processes scan: {number + 1} of {stage.scale.runs}")
            started = cpu_seconds(pids)
            futures = [worker.start(shoal_reader.scan_memory, access, warm.urls) for worker in workers]
            outcomes = [future.result() for future in futures]
            turns.append(Turn(_worst(outcomes), cpu_seconds(pids) - started))
    together = Series("shoal", tuple(turns))
    for what, name, limit in (
        (arrow_what, "arrow_growth_bytes", ARROW_LIMIT_BYTES),
        (private_what, "private_growth_bytes", PRIVATE_LIMIT_BYTES),
    ):
        findings.limit(1, what, together.value(name), limit, "bytes", together.cpu_s_per_gb)
    tables = together.value("page_tables_growth_bytes").median
    findings.note(
        "memory: the worst process; private is the larger of anonymous and privately dirty memory, flat means less "
        f"than {PRIVATE_LIMIT_BYTES // MIB} MiB more; the kernel's page tables for the maps, which any map needs, took "
        f"{tables / MIB:.1f} MiB a process"
    )


def _worst(outcomes: list[Outcome]) -> Outcome:
    values = {name: max(o.values[name] for o in outcomes) for name in outcomes[0].values}
    return Outcome(max(o.seconds for o in outcomes), sum(o.size_bytes for o in outcomes), values)


def _open(stage: Stage, warm: Warm, findings: Findings) -> None:
    access = warm.access(local=True)
    series = interleave(
        [
            Contender(
                "shoal",
                shoal_reader.open_latency,
                always(access, warm.urls, 20),
                servers=warm.servers,
                prepare=(shoal_reader.connect, access, warm.urls[0]),
            )
        ],
        stage.scale.runs,
    )
    findings.limit(2, OPEN_FIRST, series["shoal"].value("first_p50_us"), OPEN_FIRST_LIMIT_US, "us")
    findings.limit(2, OPEN_AGAIN, series["shoal"].value("again_p50_us"), OPEN_AGAIN_LIMIT_US, "us")


def _whole(stage: Stage, warm: Warm, findings: Findings) -> None:
    access = warm.access(local=True)
    ours, file, cache = stage.worker("shoal, same node"), stage.worker("plain file"), stage.worker("filecache")
    with tempfile.TemporaryDirectory(prefix="filecache-", dir=stage.directory) as directory:
        paths = tuple(f"{BUCKET}/{key}" for key in stage.keys)
        series = interleave(
            [
                Contender("shoal", shoal_reader.read_whole, always(access, warm.urls), ours, warm.servers),
                Contender("plain file", plain_file.read_whole, always(warm.files), file),
                Contender("fsspec filecache", filecache.read_whole, always(stage.origin, directory, paths), cache),
            ],
            stage.scale.runs,
        )
    findings.note(filecache.SETTINGS)
    findings.rate(3, WHOLE, series["shoal"], series["plain file"], 0.90)
    findings.rate(3, WHOLE, series["shoal"], series["fsspec filecache"])
