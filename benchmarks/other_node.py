"""Shoal over the network, beside the wire's own limit and beside what else moves bytes between machines.

The other node is this machine's, over loopback (``local=False``), so both ends share its cores and its memory. All
contenders read the same set, warm in the page cache of whatever serves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from benchmarks import reads, shoal_reader
from benchmarks.harness import Contender, Missing, Series, Worker, always, fastest, interleave
from benchmarks.peers import flight, grpc_streaming, iperf, obstore_client, s3fs_client
from benchmarks.report import Findings
from benchmarks.stage import BUCKET, Stage

SHOAL = "shoal, other node, checksums on"
FRESH, REUSED = "fresh buffers (open_buffer)", "one buffer (readinto)"
ON, OFF = "checksums on", "checksums off"
STREAM = "one process, {}, {}"
STREAM_CPU = "CPU of both ends, fresh buffers, {}"
CPU_LIMIT_S_PER_GB = 0.5
WIRE_TARGETS = {OFF: 0.90, ON: 0.80}

RANDOM_P50, RANDOM_P99 = "64 KiB random reads, p50", "64 KiB random reads, p99"
RANDOM_RATE = "64 KiB random reads"
SEEKING_P50 = "64 KiB random reads of open files (seek, readinto), p50"
RANGES = "{:,} ranges of 4 KiB in one cat_ranges"
RANDOM_BYTES, RANGE_BYTES = 64 << 10, 4 << 10
RANDOM_LIMIT_US = 150

WARM = "the set from a warm cache"
WARM_PER_CPU = "the set from a warm cache, bytes for a CPU-second"


def run(stage: Stage, findings: Findings) -> None:
    _wire(stage, findings)
    _random(stage, findings)
    _ranges(stage, findings)
    _peers(stage, findings)


# Claim 4: the wire.


def _wire(stage: Stage, findings: Findings) -> None:
    planned = [
        (4, STREAM.format(kind, mode), "iperf3", WIRE_TARGETS[mode]) for kind in (FRESH, REUSED) for mode in (OFF, ON)
    ]
    planned += [(4, STREAM_CPU.format(mode), "limit", 1.0) for mode in (OFF, ON)]
    with findings.unless_missing(*planned), contextlib.ExitStack() as stack:
        shoal_reader.require("open_buffer", "verify")
        warm = stage.warm
        ours = []
        for mode in (OFF, ON):
            access = warm.access(local=False, verify=mode == ON)
            worker = stage.worker(f"shoal, other node, {mode}")
            for kind, function, arguments in (
                (FRESH, shoal_reader.read_buffers, always(access, warm.urls)),
                (REUSED, shoal_reader.read_into, always(access, warm.urls, stage.object_bytes)),
            ):
                ours.append(Contender(STREAM.format(kind, mode), function, arguments, worker, warm.servers))
        try:
            port, server = stack.enter_context(iperf.server())
            findings.note(iperf.SETTINGS)
            theirs = [
                Contender(
                    name,
                    iperf.send,
                    always(port, stage.object_bytes * len(warm.urls), options),
                    stage.worker("iperf3"),
                    (server,),
                )
                for name, options in iperf.variants()
            ]
        except Missing as reason:
            theirs, absent = [], reason
        series = interleave([*ours, *theirs], stage.scale.runs)
        _wire_rows(findings, series, [contender.name for contender in theirs])
        for mode in (OFF, ON):
            cost = series[STREAM.format(FRESH, mode)]
            findings.cost(4, STREAM_CPU.format(mode), cost, CPU_LIMIT_S_PER_GB)
        if not theirs:
            raise absent


def _wire_rows(findings: Findings, series: dict[str, Series], peers: Sequence[str]) -> None:
    """Each of ours beside each iperf3; judged against the fastest of those that write as a program does."""
    judged = [name for name in peers if name != iperf.SENDFILE]
    if not judged:
        return
    best = max(judged, key=lambda name: series[name].rate.median)
    for kind in (FRESH, REUSED):
        for mode, target in WIRE_TARGETS.items():
            what = STREAM.format(kind, mode)
            for name in peers:
                findings.rate(4, what, series[what], series[name], target if name == best else None)


# Claim 5: small reads.


def _random(stage: Stage, findings: Findings) -> None:
    warm, scale = stage.warm, stage.scale
    size = min(RANDOM_BYTES, stage.object_bytes // 4)
    keyed = reads.scattered(stage.keys, stage.object_bytes, scale.reads, size)
    pathed = tuple(reads.Range(f"{BUCKET}/{r.path}", r.start, r.end) for r in keyed)
    ours = tuple(reads.Range(f"shoal://{r.path}", r.start, r.end) for r in keyed)
    access = warm.access(local=False)
    few = scale.slow_reads
    shoal_worker, s3, ob = stage.worker(SHOAL), stage.worker("s3fs"), stage.worker("obstore")
    series = interleave(
        [
            Contender("shoal", shoal_reader.read_each, always(access, ours), shoal_worker, warm.servers),
            Contender("shoal, open files", shoal_reader.read_seeking, always(access, ours), shoal_worker, warm.servers),
            Contender("s3fs", s3fs_client.read_each, always(stage.origin, pathed[:few]), s3, (stage.weed.pid,)),
            Contender(
                "obstore",
                obstore_client.read_each,
                always(stage.origin, BUCKET, keyed[:few]),
                ob,
                (stage.weed.pid,),
            ),
        ],
        scale.runs,
    )
    shoal = series["shoal"]
    findings.limit(5, RANDOM_P50, shoal.value("p50_us"), RANDOM_LIMIT_US, "us", shoal.cpu_s_per_gb)
    seeking = series["shoal, open files"]
    findings.limit(5, SEEKING_P50, seeking.value("p50_us"), RANDOM_LIMIT_US, "us", seeking.cpu_s_per_gb)
    for name, target in (("s3fs", 15.0), ("obstore", None)):
        findings.value(5, RANDOM_RATE, shoal, series[name], "per_s", "reads/s", target, is_rate=True)
        findings.value(5, RANDOM_P99, shoal, series[name], "p99_us", "us")
    findings.note(
        f"random reads: one at a time by cat_file or its like; {scale.reads} by Shoal, {few} by the others, a turn"
    )


def _ranges(stage: Stage, findings: Findings) -> None:
    warm = stage.warm
    keyed = reads.scattered(stage.keys, stage.object_bytes, stage.scale.ranges, RANGE_BYTES, seed=2)
    pathed = tuple(reads.Range(f"{BUCKET}/{r.path}", r.start, r.end) for r in keyed)
    ours = tuple(reads.Range(f"shoal://{r.path}", r.start, r.end) for r in keyed)
    shoal, s3, ob = stage.worker(SHOAL), stage.worker("s3fs"), stage.worker("obstore")
    weed = (stage.weed.pid,)
    at_obstore = fastest(
        [
            Contender("obstore", function, always(stage.origin, BUCKET, keyed), ob, weed)
            for function in (obstore_client.read_ranges_single, obstore_client.read_ranges_coalesced)
        ]
    )
    series = interleave(
        [
            Contender("shoal", shoal_reader.read_ranges, always(warm.access(local=False), ours), shoal, warm.servers),
            Contender("s3fs", s3fs_client.read_ranges, always(stage.origin, pathed), s3, weed),
            at_obstore,
        ],
        stage.scale.runs,
    )
    what = RANGES.format(stage.scale.ranges)
    findings.value(5, what, series["shoal"], series["s3fs"], "per_s", "ranges/s", 20.0, is_rate=True)
    findings.value(5, what, series["shoal"], series["obstore"], "per_s", "ranges/s", is_rate=True)
    findings.note(f"obstore's ranges: {at_obstore.function.__name__} was the fastest tried")


# Claim 6: whole sets.


def _peers(stage: Stage, findings: Findings) -> None:
    planned = [
        (6, WARM_PER_CPU, "Flight", 2.0),
        (6, WARM, "Flight", None),
        (6, WARM, "grpcio", None),
        (6, WARM_PER_CPU, "grpcio", None),
        (6, WARM, "s3fs", 5.0),
        (6, WARM, "obstore", 1.5),
    ]
    with findings.unless_missing(*planned), contextlib.ExitStack() as stack:
        shoal_reader.require("open_buffer")
        warm = stage.warm
        worker = stage.worker(SHOAL)
        ours = Contender(
            "shoal", shoal_reader.read_buffers, always(warm.access(local=False), warm.urls), worker, warm.servers
        )
        contenders = [ours, _flight(stage, stack), _grpc(stage, stack, findings)]
        contenders += [_s3fs(stage, findings), _obstore(stage, findings)]
        series = interleave(contenders, stage.scale.runs)
        findings.note(flight.SETTINGS)
        for claim, what, peer, target in planned:
            compare = findings.per_cpu if what == WARM_PER_CPU else findings.rate
            compare(claim, what, series["shoal"], series[peer], target)
        findings.note(
            "the set from a warm cache: Shoal with checksums on, its default; no other checks what it receives"
        )


def _flight(stage: Stage, stack: contextlib.ExitStack) -> Contender:
    server, client = stack.enter_context(Worker()), stage.worker("Flight")
    port = server.call(flight.serve)
    return Contender("Flight", flight.read, always(port, stage.warm.files), client, (server.pid,))


def _grpc(stage: Stage, stack: contextlib.ExitStack, findings: Findings) -> Contender:
    server = stack.enter_context(Worker())
    port = server.call(grpc_streaming.serve)
    best = fastest(
        [
            Contender("grpcio", function, always(port, stage.warm.files), stage.worker("grpcio"), (server.pid,))
            for function in (grpc_streaming.read, grpc_streaming.read_asyncio)
        ]
    )
    kind = "asyncio" if best.function is grpc_streaming.read_asyncio else "synchronous"
    findings.note(f"{grpc_streaming.SETTINGS}: the {kind} one")
    return best


def _s3fs(stage: Stage, findings: Findings) -> Contender:
    worker = stage.worker("s3fs")
    paths = tuple(f"{BUCKET}/{key}" for key in stage.keys)
    weed = (stage.weed.pid,)
    return findings.best(
        s3fs_client.SETTINGS,
        WARM,
        {
            f"objects one by one in concurrent ranges of {block >> 20} MiB": Contender(
                "s3fs", s3fs_client.read_whole, always(stage.origin, paths, block), worker, weed
            )
            for block in (8 << 20, 50 << 20)
        }
        | {
            f"{at_once} whole objects at once": Contender(
                "s3fs", s3fs_client.read_together, always(stage.origin, paths, at_once), worker, weed
            )
            for at_once in (1, 4)
        },
    )


def _obstore(stage: Stage, findings: Findings) -> Contender:
    return findings.best(obstore_client.SETTINGS, WARM, obstore_variants(stage))


def obstore_variants(stage: Stage) -> dict[str, Contender]:
    """Ways to read the whole set from the origin, for the fastest to be chosen."""
    weed, worker = (stage.weed.pid,), stage.worker("obstore")
    one = Contender("obstore", obstore_client.read_whole, always(stage.origin, BUCKET, stage.keys), worker, weed)
    return {"one get at a time": one} | {
        f"{at_once} ranges of 8 MiB at once": Contender(
            "obstore",
            obstore_client.read_parallel,
            always(stage.origin, BUCKET, stage.keys, stage.object_bytes, at_once),
            worker,
            weed,
        )
        for at_once in (4, 8, 16, 32)
    }
