"""Warm epochs of torch's DataLoader over Shoal, over the same files on the local disk, and over other loaders' formats.

    python -m benchmarks.loaders [--tiny] [--workers 2] [--epochs 3] [--origin path|s3] [--peers PYTHON] [--json PATH]

    tokens    1 GiB of sequences of 2,048 16-bit numbers in Arrow files
    images    20,000 JPEG pictures of 256 x 256 in a folder, decoded and cropped to 224 x 224 by the same code

Each contender is a DataLoader in a process of its own, with as many workers, samples a batch, and shuffled. They take
turns, an epoch each; the first turn is not counted. What Shoal reads is on its one node, and everything in the page
cache. Other loaders come with dependencies of their own, so another interpreter runs them: `--peers`, where
mosaicml-streaming, webdataset, datasets, torch and pillow are installed.

The rule: every epoch gives each sample once and with its own content, or the run fails.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks import command, machine
from benchmarks.harness import Spread, cpu_seconds, progress
from benchmarks.loading import data
from benchmarks.loading.data import Written
from benchmarks.loading.job import IMAGES, TOKENS, Job, paths
from benchmarks.stage import server_pids, settle
from shoal import sizes
from shoal.cli import output, records
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.support.weed import Weed

ROOT = Path(__file__).parents[1]
#: Told beside `BASE`; and the least that `OURS` may be of it.
BASE, OURS, TARGET = "files", "stream", 1.0
BUCKET = "loaders"
#: By contender: what it is called; and those that are Shoal's, and those that another interpreter runs.
NAMES = {
    "files": "local files",
    "gathered": "local files, whole batches by hand",
    "stream": "shoal.torch.IterableStream",
    "samples": "shoal.torch.Samples",
    "mosaic": "MosaicML Streaming (MDS)",
    "webdataset": "WebDataset (tar)",
    "datasets": "HF datasets, streaming",
}
SHOAL, PEERS = ("stream", "samples"), ("mosaic", "webdataset", "datasets")


@dataclass(frozen=True, slots=True)
class Scale:
    """Attributes:
    tokens, images: samples.
    """

    tokens: int
    images: int
    batch_size: int
    epochs: int
    workers: int

    def samples(self, kind: str) -> int:
        return self.tokens if kind == TOKENS else self.images


FULL = Scale(262_144, 20_000, batch_size=64, epochs=3, workers=2)
TINY = Scale(600, 70, batch_size=16, epochs=1, workers=2)


@dataclass(frozen=True, slots=True)
class Turn:
    """An epoch. `cpu_s` is that of the trainer, its workers and, of Shoal's, the node."""

    seconds: float
    cpu_s: float


class Loader:
    """A contender's process (`benchmarks.loading.child`), which takes one job after the other. A context manager.

    Attributes:
        job: the one that it has.
    """

    def __init__(self, python: str) -> None:
        self.job: Job
        self._servers: tuple[int, ...] = ()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.loading.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            text=True,
        )

    def prepare(self, job: Job, servers: tuple[int, ...]) -> dict[str, Any]:
        """Take a job, whose bytes `servers` send. Returns the ``versions`` of its packages, or what is ``missing``."""
        self.job, self._servers = job, servers
        return self._ask(json.dumps(asdict(job)))

    def epoch(self, number: int, samples: int) -> Turn:
        pids = (self._process.pid, *self._servers)
        before = cpu_seconds(pids)
        word = self._ask(str(number))
        if word["samples"] != samples:
            raise RuntimeError(f"{self.job.contender} gave {word['samples']} samples of {samples}")
        return Turn(word["seconds"], cpu_seconds(pids) - before)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._log.seek(0)
            told = self._log.read().decode(errors="replace")[-4000:]
            raise RuntimeError(f"{self.job.contender} ended with {code}:\n{told}")
        word: dict[str, Any] = json.loads(answer)
        return word

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


@contextlib.contextmanager
def origin_of(written: Written, kind: str) -> Iterator[tuple[str, str]]:
    """The dataset's URL at its origin and the storage options, as JSON, with which nodes read it."""
    if kind == "path":
        yield str(written.files), "{}"
        return
    with Weed() as weed:
        weed.create_bucket(BUCKET)
        s3 = weed.filesystem()
        for path in paths(written.files):
            s3.put_file(str(path), f"{BUCKET}/{path.relative_to(written.files.parent)}")
        options = {"endpoint_url": weed.endpoint_url, "key": weed.access_key, "secret": weed.secret_key}
        yield f"s3://{BUCKET}/{written.files.name}", json.dumps(options)


@contextlib.contextmanager
def warm_cluster(directory: Path, written: Written, origin: str) -> Iterator[DevCluster]:
    """One node that holds all of the data, as a dataset of its directory's name."""
    capacity = str(2 * written.size_bytes + (1 << 30))
    arguments = ["--scrub-rate", "0"]
    with (
        origin_of(written, origin) as (url, options),
        DevCluster(nodes=1, capacity=capacity, data_dir=directory, node_args=arguments) as cluster,
        Control(cluster.controller_grpc) as control,
    ):
        name = written.files.name
        control.add_dataset(name, url, shard_size=0, replicas=1, storage_options=options)
        job = records.job(control.start_prefetch(name, ""))
        while job["state"] not in records.FINISHED:
            for raw in control.watch_prefetch(job["id"]):
                job = records.job(raw)
        if job["state"] != "done":
            raise RuntimeError(f"the prefetch of {name} {job['state']}: {job['reason']}")
        settle(cluster)
        yield cluster


def measure(
    kind: str, scale: Scale, directory: Path, origin: str, peers: str | None, process: Callable[[str], Loader]
) -> dict[str, Any]:
    """All contenders over one kind of data; `process` is each one's, by name."""
    progress(f"{kind}: writing the data")
    written = data.write(kind, scale.samples(kind), directory)
    contenders = [name for name in NAMES if peers or name not in PEERS]
    skipped = {} if peers else dict.fromkeys(PEERS, "no --peers PYTHON was given")
    turns: dict[str, list[Turn]] = {}
    versions: dict[str, str] = {}
    with warm_cluster(directory / f"{kind}-node", written, origin) as cluster:
        loaders = []
        for name in contenders:
            progress(f"{kind}: {name} prepares")
            scratch = directory / f"{kind}-{name}"
            scratch.mkdir()
            job = Job(
                name,
                kind,
                str(written.files),
                str(scratch),
                scale.batch_size,
                scale.workers,
                seed=1,
                url=f"shoal://{written.files.name}" + ("/*.arrow" if kind == TOKENS else ""),
                endpoint=cluster.endpoint,
                socket=str(cluster.sockets[0]),
            )
            loader = process(name)
            word = loader.prepare(job, server_pids(cluster) if name in SHOAL else ())
            if "missing" in word:
                skipped[name] = word["missing"]
                continue
            versions |= {package: number for package, number in word["versions"].items() if package != "torch"}
            turns[name] = []
            loaders.append(loader)
        for number in range(scale.epochs + 1):
            for loader in loaders:
                progress(f"{kind}: {loader.job.contender}, " + (f"epoch {number}" if number else "to warm up"))
                turn = loader.epoch(number, written.samples)
                if number:
                    turns[loader.job.contender].append(turn)
    return {
        "samples": written.samples,
        "bytes": written.size_bytes,
        "batch_size": scale.batch_size,
        "workers": scale.workers,
        "epochs": scale.epochs,
        "origin": origin,
        "versions": versions,
        "contenders": _figures(turns, written),
        "skipped": skipped,
    }


def _figures(turns: dict[str, list[Turn]], written: Written) -> dict[str, Any]:
    def rate(name: str) -> Spread:
        return Spread.of(written.samples / turn.seconds for turn in turns[name])

    def over(name: str, base: str) -> Spread:
        """Of epochs that followed each other."""
        pairs = zip(turns[name], turns[base], strict=True)
        return Spread.of(theirs.seconds / mine.seconds for mine, theirs in pairs)

    return {
        name: {
            "samples_per_s": asdict(rate(name)),
            "over_files": asdict(over(name, BASE)),
            "cpu_s_per_1e6_samples": Spread.of(each.cpu_s for each in taken).median / written.samples * 1e6,
            "cpu_s_per_gb": Spread.of(each.cpu_s for each in taken).median / written.size_bytes * 1e9,
            "turns": [asdict(each) for each in taken],
        }
        for name, taken in turns.items()
    }


HEADERS = ("", "SAMPLES/S>", "LEAST>", "MOST>", "OF FILES>", "", "CPU-S/1E6>", "CPU-S/GB>")


def show(kind: str, found: dict[str, Any], *, is_judged: bool, say: Callable[[str], object] = click.echo) -> None:
    say(
        f"{kind}: {found['samples']:,} samples, {sizes.format(found['bytes'])}, batches of {found['batch_size']}, "
        f"{found['workers']} workers, {found['epochs']} epochs, origin {found['origin']}"
    )
    rows = []
    for name, each in found["contenders"].items():
        rate, share = each["samples_per_s"], each["over_files"]["median"]
        verdict = ("met" if share >= TARGET else "MISSED") if is_judged and name == OURS else ""
        rows.append(
            (
                NAMES[name],
                f"{rate['median']:,.0f}",
                f"{rate['least']:,.0f}",
                f"{rate['most']:,.0f}",
                f"{share:.2f} x",
                verdict,
                f"{each['cpu_s_per_1e6_samples']:,.1f}",
                f"{each['cpu_s_per_gb']:.2f}",
            )
        )
    say(output.table(HEADERS, rows))
    for name, reason in found["skipped"].items():
        say(f"- {NAMES[name]}: skipped, {reason}")


@click.command()
@command.json_option
@click.option("--tiny", is_flag=True, help="Some hundred samples: proves that it runs, measures nothing.")
@click.option("--workers", type=click.IntRange(1), default=FULL.workers, show_default=True, help="Of each DataLoader.")
@click.option("--epochs", type=click.IntRange(1), help="That are counted, of each contender; default: 3, or 1 if tiny.")
@click.option(
    "--origin",
    type=click.Choice(["path", "s3"], case_sensitive=False),
    default="path",
    show_default=True,
    help="What Shoal's node fetches the data from: the directory they lie in, or an S3 server.",
)
@click.option("--peers", metavar="PYTHON", help="Interpreter with mosaicml-streaming, webdataset and datasets.")
@click.option(
    "--data",
    "kinds",
    type=click.Choice([TOKENS, IMAGES]),
    multiple=True,
    default=[TOKENS, IMAGES],
    help="Only these; figures of others stay in the JSON file.",
)
@command.workdir_option
def main(
    json_path: Path | None,
    tiny: bool,
    workers: int,
    epochs: int | None,
    origin: str,
    peers: str | None,
    kinds: tuple[str, ...],
    workdir: Path | None,
) -> None:
    """Samples a second of warm epochs: Shoal, local files, other loaders."""
    scale = replace(TINY if tiny else FULL, workers=workers)
    scale = replace(scale, epochs=epochs or scale.epochs)
    result = json.loads(json_path.read_text()) if json_path is not None and json_path.exists() else {}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def process(name: str) -> Loader:
            return stack.enter_context(Loader(str(peers) if name in PEERS else sys.executable))

        for kind in dict.fromkeys(kinds):
            with command.scratch(workdir) as directory:
                result[kind] = measure(kind, scale, directory, origin, peers, process)
                result[kind]["machine"] = str(machine.describe(directory))
            show(kind, result[kind], is_judged=not tiny)
    command.save(result, json_path)


if __name__ == "__main__":
    main()
