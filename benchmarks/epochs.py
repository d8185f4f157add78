"""How long an epoch takes beside the least that it could take: with an origin held to a rate, cold, half there, warm.

    python -m benchmarks.epochs [--tiny] [--rate 128MB] [--size 2GiB] [--json PATH]

A job of four ranks (`benchmarks.trainer`) streams a shuffled dataset, two ranks beside each of two nodes. No epoch can
end before its steps are computed, nor before the origin has sent what was missing:

    bound      the larger of the computing and the missed bytes at the origin's rate
    missed     bytes that the origin's proxy let pass during the epoch
    rate       what the fastest S3 client gets through that proxy, measured in the same run
    accounted  of what the epoch took beyond its computing (as measured: sleep is late, and ranks meet), how much the
               streams' own reports name

The cluster has the index of the samples beforehand; what it read to build it is told apart.

Then four jobs, each with a seed of its own, start one after the other on the same cold dataset.

The rule: every sample of every epoch comes exactly once and with its own bytes, or the run fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa

import shoal
from benchmarks import command, machine
from benchmarks.harness import Outcome, Worker, cpu_seconds, progress
from benchmarks.origin import Origin
from benchmarks.peers import obstore_client
from benchmarks.stage import BUCKET, server_pids, settle
from benchmarks.trainer import ID, PAYLOAD, Epoch, Ranks, Training
from shoal import sizes
from shoal.cli import output, records
from shoal.cli.control import Control
from shoal.cli.output import SizeType
from shoal.devcluster import DevCluster
from tests.support.proxy import PacedProxy
from tests.support.weed import Weed

NODES, RANKS, JOBS = 2, 4, 4
EPOCH_TARGET, ACCOUNTED_TARGET, ORIGIN_TARGET = 1.05, 0.95, 1.05
DATASET = "train"
#: Halves of the objects by the first letter of their names.
HALVES = ("a", "b")
#: Requests at a time with which the origin's rate is measured.
AT_ONCE = 16
#: What the report names is judged where steps came late by more than this share of the epoch: sleep is not that exact.
LEAST_LATE = 0.01
GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Scale:
    """Attributes:
    runs: record batches an object.
    run_samples: samples a record batch.
    rate: bytes a second of the origin.
    job_gap_s: from the start of one of the four jobs to that of the next.
    """

    objects: int
    runs: int
    run_samples: int
    sample_bytes: int
    batch_size: int
    window: int
    rate: int
    job_gap_s: float

    @property
    def samples(self) -> int:
        return self.objects * self.runs * self.run_samples

    @property
    def steps(self) -> int:
        return -(-self.samples // (self.batch_size * RANKS))


def full(size_bytes: int, rate: int) -> Scale:
    """Objects of 64 MiB in record batches of 1 MiB, samples of 64 KiB; a window of a 32nd of the data."""
    objects = max(2, size_bytes // (64 << 20))
    return Scale(objects, 64, 16, 64 << 10, batch_size=64, window=objects * 64 * 16 // 32, rate=rate, job_gap_s=3.0)


TINY = Scale(8, 4, 16, 4 << 10, batch_size=8, window=32, rate=8 << 20, job_gap_s=0.1)


@dataclass(frozen=True, slots=True)
class Case:
    """One epoch.

    Attributes:
        compute: of all steps, as a share of the time in which the origin sends the whole dataset.
        held: what the nodes have of the dataset before, as a share.
    """

    name: str
    compute: float
    held: float


COLD_ORIGIN = Case("cold, origin-bound", 0.5, 0.0)
COLD_COMPUTE = Case("cold, compute-bound", 1.25, 0.0)
WARM = Case("warm", 0.6, 1.0)
HALF_ORIGIN = Case("half there, origin-bound", 0.25, 0.5)
HALF_COMPUTE = Case("half there, compute-bound", 0.65, 0.5)
SMALL_ORIGIN = Case("room for half, 2nd epoch, origin-bound", 0.25, 0.5)
SMALL_COMPUTE = Case("room for half, 3rd epoch, compute-bound", 0.65, 0.5)


@dataclass(frozen=True, slots=True)
class Measured:
    """Attributes:
    open_bytes, missed_bytes: from the origin, while the streams were opened and in the epoch.
    cpu_s: of nodes, controller and ranks.
    """

    case: Case
    epoch: Epoch
    open_bytes: int
    missed_bytes: int
    rate: float
    cpu_s: float
    size_bytes: int

    @property
    def bound_s(self) -> float:
        return max(self.epoch.compute_s, self.missed_bytes / self.rate)

    @property
    def ratio(self) -> float:
        return self.epoch.seconds / self.bound_s

    @property
    def is_met(self) -> bool:
        is_told = self.epoch.accounted >= ACCOUNTED_TARGET or self.epoch.late_s < LEAST_LATE * self.epoch.seconds
        return self.ratio <= EPOCH_TARGET and is_told

    def figures(self) -> dict[str, Any]:
        epoch = self.epoch
        return {
            **asdict(self.case),
            "epoch_s": epoch.seconds,
            "compute_s": epoch.compute_s,
            "computed_s": epoch.computed_s,
            "origin_s": self.missed_bytes / self.rate,
            "bound_s": self.bound_s,
            "ratio": self.ratio,
            "missed_bytes": self.missed_bytes,
            "late_s": epoch.late_s,
            "stalls_s": epoch.stalls,
            "accounted": epoch.accounted,
            "open_s": epoch.open_s,
            "open_bytes": self.open_bytes,
            "cpu_s_per_gb": self.cpu_s / self.size_bytes * GIGA,
            "report": epoch.report,
            "is_met": self.is_met,
        }


class Source:
    """The dataset in an S3 server behind a proxy that holds it to a rate. A context manager.

    Attributes:
        keys: of its objects.
        size_bytes: of all objects.
    """

    def __init__(self, scale: Scale, directory: Path) -> None:
        self.scale = scale
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self.size_bytes = 0
        self.keys: list[str] = []
        self.proxy: PacedProxy

    def __enter__(self) -> Source:
        with contextlib.ExitStack() as stack:
            weed = stack.enter_context(Weed())
            weed.create_bucket(BUCKET)
            self._write(weed)
            self.proxy = stack.enter_context(PacedProxy(weed.endpoint_url, self.scale.rate))
            self._origin = Origin(self.proxy.endpoint_url, weed.access_key, weed.secret_key)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def sent_bytes(self) -> int:
        return self.proxy.bytes_from_origin

    def measured_rate(self) -> float:
        """Bytes a second that a client gets which wants nothing else."""
        keys = self.keys[: max(2, len(self.keys) // 4)]
        with Worker() as worker:
            arguments = self._origin, BUCKET, keys, self.size_bytes // len(self.keys), AT_ONCE
            worker.call(obstore_client.read_parallel, *arguments[:2], keys[:1], *arguments[3:])
            found: Outcome = worker.call(obstore_client.read_parallel, *arguments)
        return found.size_bytes / found.seconds

    def make_cold(self, cluster: DevCluster) -> None:
        """Have the cluster know the dataset and hold nothing of it."""
        with Control(cluster.controller_grpc) as control:
            if DATASET in {dataset.name for dataset in control.datasets()}:
                control.remove_dataset(DATASET)
                settle(cluster, is_empty=True)
            options = json.dumps(self._origin.storage_options)
            control.add_dataset(DATASET, f"s3://{BUCKET}/set", shard_size=0, replicas=1, storage_options=options)
        os.sync()

    def _write(self, weed: Weed) -> None:
        scale, s3 = self.scale, weed.filesystem()
        schema = pa.schema([(ID, pa.int64()), (PAYLOAD, pa.binary(scale.sample_bytes))])
        random, first = np.random.default_rng(1), 0
        path = self._directory / "part.arrow"
        for number in range(scale.objects):
            with pa.ipc.new_file(str(path), schema) as writer:
                for _ in range(scale.runs):
                    ids = np.arange(first, first + scale.run_samples)
                    first += scale.run_samples
                    payloads = np.frombuffer(random.bytes(scale.sample_bytes * len(ids)), np.uint8)
                    payloads = payloads.reshape(len(ids), -1).copy()
                    payloads[:, : ids.itemsize] = ids.view(np.uint8).reshape(len(ids), -1)
                    buffers = [None, pa.py_buffer(payloads.reshape(-1))]
                    column = pa.Array.from_buffers(pa.binary(scale.sample_bytes), len(ids), buffers)
                    writer.write_batch(pa.record_batch([pa.array(ids), column], schema=schema))
            key = f"set/{HALVES[number * len(HALVES) // scale.objects]}-{number:04}.arrow"
            s3.put_file(str(path), f"{BUCKET}/{key}")
            self.keys.append(key)
            self.size_bytes += path.stat().st_size
        path.unlink()


@contextlib.contextmanager
def cluster_of(directory: Path, capacity: int) -> Iterator[DevCluster]:
    with DevCluster(
        nodes=NODES, capacity=str(capacity), data_dir=directory, node_args=["--scrub-rate", "0"]
    ) as cluster:
        yield cluster


def training(cluster: DevCluster, scale: Scale, ranks: Sequence[int], seed: int, compute_s: float) -> Training:
    """A job with a rank beside each of these nodes."""
    places = tuple((cluster.endpoint, str(cluster.sockets[node])) for node in ranks)
    return Training(f"shoal://{DATASET}/*.arrow", places, scale.batch_size, scale.window, seed, compute_s)


def build_index(cluster: DevCluster, source: Source) -> dict[str, Any]:
    """Have the cluster build the index of the samples, which it keeps."""
    source.make_cold(cluster)
    before, began = source.sent_bytes, time.monotonic()
    options = {"endpoint": cluster.endpoint, "local": False, "skip_instance_cache": True}
    shoal.stream(f"shoal://{DATASET}/*.arrow", batch_size=1, storage_options=options).close()
    return {"seconds": time.monotonic() - began, "origin_bytes": source.sent_bytes - before}


def check(epoch: Epoch, scale: Scale) -> None:
    if not np.array_equal(epoch.ids, np.arange(scale.samples)):
        raise RuntimeError(f"{len(epoch.ids)} samples came in an epoch of {scale.samples}, or not each of them once")


def run(case: Case, cluster: DevCluster, ranks: Ranks, source: Source, rate: float, seed: int) -> Measured:
    """One epoch on a cluster that holds what the case says."""
    progress(case.name)
    scale = source.scale
    compute_s = case.compute * source.size_bytes / rate / scale.steps
    pids = (*server_pids(cluster), *ranks.pids)
    job = ranks.job(training(cluster, scale, [rank % NODES for rank in range(RANKS)], seed, compute_s))
    before = source.sent_bytes
    job.open()
    opened, cpu_s = source.sent_bytes, cpu_seconds(pids)
    job.begin()
    epoch = job.end()
    ended, cpu_s = source.sent_bytes, cpu_seconds(pids) - cpu_s
    check(epoch, scale)
    settle(cluster)
    return Measured(case, epoch, opened - before, ended - opened, rate, cpu_s, source.size_bytes)


def prefetch(cluster: DevCluster, prefix: str) -> None:
    with Control(cluster.controller_grpc) as control:
        job = records.job(control.start_prefetch(DATASET, prefix))
        while job["state"] not in records.FINISHED:
            for raw in control.watch_prefetch(job["id"]):
                job = records.job(raw)
    if job["state"] != "done":
        raise RuntimeError(f"the prefetch of {prefix} {job['state']}: {job['reason']}")


def four_jobs(cluster: DevCluster, ranks: Ranks, source: Source, rate: float) -> dict[str, Any]:
    """Jobs with a rank each, one after the other on a cold dataset, all of them faster than the origin."""
    progress("four jobs")
    scale = source.scale
    compute_s = 0.5 * source.size_bytes / rate / (scale.samples // scale.batch_size)
    jobs = [
        ranks.job(training(cluster, scale, [number % NODES], 100 + number, compute_s), number) for number in range(JOBS)
    ]
    source.make_cold(cluster)
    before, began = source.sent_bytes, time.monotonic()

    def work(number: int) -> Epoch:
        time.sleep(number * scale.job_gap_s)
        jobs[number].open()
        jobs[number].begin()
        return jobs[number].end()

    with ThreadPoolExecutor(JOBS) as pool:
        epochs = list(pool.map(work, range(JOBS)))
    seconds = time.monotonic() - began
    settle(cluster)
    for epoch in epochs:
        check(epoch, scale)
    return {
        "jobs": JOBS,
        "gap_s": scale.job_gap_s,
        "origin_bytes": source.sent_bytes - before,
        "epochs_s": [epoch.seconds for epoch in epochs],
        "seconds": seconds,
    }


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    with Source(scale, directory) as source, Ranks(RANKS) as ranks:
        rate = source.measured_rate()
        found = []
        with cluster_of(directory / "full", 2 * source.size_bytes + (8 << 30)) as cluster:
            index = build_index(cluster, source)
            for seed, case in enumerate((COLD_ORIGIN, COLD_COMPUTE, WARM, HALF_ORIGIN, HALF_COMPUTE)):
                if case.held < 1:
                    source.make_cold(cluster)
                if case.held:
                    prefetch(cluster, HALVES[0] if case.held < 1 else "")
                found.append(run(case, cluster, ranks, source, rate, seed))
            together = four_jobs(cluster, ranks, source, rate)
        with cluster_of(directory / "small", source.size_bytes // 2 // NODES) as cluster:
            build_index(cluster, source)
            source.make_cold(cluster)
            run(COLD_ORIGIN, cluster, ranks, source, rate, 10)
            for seed, case in enumerate((SMALL_ORIGIN, SMALL_COMPUTE), 11):
                found.append(run(case, cluster, ranks, source, rate, seed))
        after = source.measured_rate()
    one = found[0].open_bytes + found[0].missed_bytes
    return {
        "nodes": NODES,
        "ranks": RANKS,
        "scale": asdict(scale),
        "dataset_bytes": source.size_bytes,
        "origin_bytes_per_s": rate,
        "origin_bytes_per_s_afterwards": after,
        "index": index,
        "cases": [each.figures() for each in found],
        "four_jobs": together | {"one_job_bytes": one, "over_one_job": together["origin_bytes"] / one},
    }


HEADERS = ("", "EPOCH>", "COMPUTE>", "ORIGIN>", "RATIO>", "", "MISSED>", "STALLED>", "NAMED>", "CPU-S/GB>", "OPEN>")


def show(result: dict[str, Any], *, is_judged: bool, say: Callable[[str], object] = click.echo) -> None:
    rows = [
        (
            each["name"],
            f"{each['epoch_s']:.2f} s",
            f"{each['compute_s']:.2f} s",
            f"{each['origin_s']:.2f} s",
            f"{each['ratio']:.3f} x",
            ("met" if each["is_met"] else "MISSED") if is_judged else "",
            sizes.format(each["missed_bytes"]),
            f"{each['late_s']:.2f} s",
            f"{100 * each['accounted']:.1f} %",
            f"{each['cpu_s_per_gb']:.2f}",
            f"{each['open_s']:.2f} s",
        )
        for each in result["cases"]
    ]
    say(output.table(HEADERS, rows))
    for each in result["cases"]:
        causes = ", ".join(
            f"{cause} {seconds:.2f} s" for cause, seconds in each["stalls_s"].items() if seconds >= 0.005
        )
        say(f"- {each['name']}: stalled for {causes or 'nothing'}")
    jobs = result["four_jobs"]
    verdict = ("met: " if jobs["over_one_job"] <= ORIGIN_TARGET else "MISSED: ") if is_judged else ""
    say(
        f"{verdict}{jobs['jobs']} jobs, {jobs['gap_s']:g} s apart, read {sizes.format(jobs['origin_bytes'])} of the "
        f"origin, {jobs['over_one_job']:.3f} x one job's (target {ORIGIN_TARGET})"
    )
    index = result["index"]
    say(
        f"the index was built in {index['seconds']:.2f} s, in which the origin sent "
        f"{sizes.format(index['origin_bytes'])}"
    )
    say(
        f"dataset {sizes.format(result['dataset_bytes'])}, origin {result['origin_bytes_per_s'] / 1e6:.1f} MB/s; "
        f"targets: epoch at most {EPOCH_TARGET} x the bound, at least {100 * ACCOUNTED_TARGET:.0f} % of the stall named"
    )


@click.command()
@command.json_option
@click.option("--tiny", is_flag=True, help="2 MiB: proves that it runs, measures nothing.")
@click.option("--rate", type=SizeType(), default="128MiB", show_default=True, help="Bytes a second of the origin.")
@click.option("--size", type=SizeType(), default="4GiB", show_default=True, help="Bytes of the dataset.")
@command.workdir_option
def main(json_path: Path | None, tiny: bool, rate: int, size: int, workdir: Path | None) -> None:
    """Epoch times beside their bound, with an origin that is held to a rate."""
    with command.scratch(workdir) as directory:
        result = measure(TINY if tiny else full(size, rate), directory)
        result["machine"] = str(machine.describe(directory))
    show(result, is_judged=not tiny)
    command.save(result, json_path)


if __name__ == "__main__":
    main()
