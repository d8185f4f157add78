"""What a cache of half the data is worth over shuffled epochs: hit ratios of a real cluster, beside a simulated LRU.

    python -m benchmarks.retention [--tiny] [--json PATH]

Two nodes have room for half of the data between them. A job reads every object once an epoch, in another order each
time, with two readers; then the nodes are started again and it reads one more epoch. The second part has two jobs on
two datasets at once, with room for half of both.

A hit is a byte that was read and not fetched from the origin. In the first epoch there is none; from the second on half
of all reads can hit at best, because each byte is read once an epoch.

The rule: every byte that is read is compared with what was written.
"""

from __future__ import annotations

import random
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import xxhash
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import command, machine
from benchmarks.harness import progress
from shoal import sizes
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem

NODES, READERS, EPOCHS = 2, 2, 3
TARGET = 0.495
SETTLE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Of all datasets together."""

    objects: int
    object_bytes: int

    @property
    def bytes(self) -> int:
        return self.objects * self.object_bytes


FULL = Scale(1024, 4 << 20)
TINY = Scale(32, 64 << 10)


class Job:
    """A dataset and who trains on it."""

    def __init__(self, cluster: DevCluster, name: str, directory: Path, objects: int, object_bytes: int) -> None:
        self.name = name
        self._endpoint = cluster.endpoint
        self._digests: dict[str, str] = {}
        directory.mkdir()
        for number in range(objects):
            data = random.Random(f"{name} {number}").randbytes(object_bytes)
            (directory / f"{number:04}").write_bytes(data)
            self._digests[f"{name}/{number:04}"] = xxhash.xxh3_128_hexdigest(data)
        with Control(cluster.controller_grpc) as control:
            control.add_dataset(name, f"file://{directory}", shard_size=0, replicas=1, storage_options="{}")

    def order(self, epoch: int) -> list[str]:
        paths = sorted(self._digests)
        random.Random(f"{self.name} {epoch}").shuffle(paths)
        return paths

    def read(self, epoch: int) -> int:
        """Read an epoch. Returns the wrong objects."""
        order = self.order(epoch)
        with ThreadPoolExecutor(READERS) as pool:
            return sum(pool.map(self._read, [order[rank::READERS] for rank in range(READERS)]))

    def _read(self, paths: Sequence[str]) -> int:
        fs = ShoalFileSystem(endpoint=self._endpoint, local=False, skip_instance_cache=True)
        return sum(xxhash.xxh3_128_hexdigest(fs.cat_file(path)) != self._digests[path] for path in paths)


def metrics(cluster: DevCluster) -> dict[tuple[str, str], float]:
    """Samples by name and first label, summed over the nodes."""
    found: dict[tuple[str, str], float] = {}
    for url in cluster.node_endpoints:
        with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name, next(iter(sample.labels.values()), "")
                found[name] = found.get(name, 0.0) + sample.value
    return found


def settle(cluster: DevCluster) -> None:
    """Wait until no node fills."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while metrics(cluster)["shoal_node_fills", ""] and time.monotonic() < deadline:
        time.sleep(0.05)


def epoch(cluster: DevCluster, jobs: Sequence[Job], number: int, total_bytes: int) -> dict[str, Any]:
    """All jobs read an epoch at once."""
    name = "shoal_node_fetched_bytes_total", "origin"
    before = metrics(cluster)[name]
    began = time.monotonic()
    with ThreadPoolExecutor(len(jobs)) as pool:
        wrong = sum(pool.map(lambda job: job.read(number), jobs))
    seconds = time.monotonic() - began
    settle(cluster)
    fetched = int(metrics(cluster)[name] - before)
    return {
        "epoch": number,
        "hit_ratio": 1 - fetched / total_bytes,
        "origin_bytes": fetched,
        "wrong_objects": wrong,
        "seconds": seconds,
    }


def lru(orders: Sequence[Sequence[str]], room: int) -> list[float]:
    """Hit ratios of an LRU with room for so many objects of one size, epoch by epoch."""
    cache: OrderedDict[str, None] = OrderedDict()
    ratios = []
    for order in orders:
        hits = 0
        for path in order:
            hits += path in cache
            cache[path] = None
            cache.move_to_end(path)
            if len(cache) > room:
                cache.popitem(last=False)
        ratios.append(hits / len(order))
    return ratios


def _beside_each_other(orders: Sequence[Sequence[str]]) -> list[str]:
    return [path for paths in zip(*orders, strict=True) for path in paths]


def part(names: Sequence[str], scale: Scale, directory: Path) -> dict[str, Any]:
    """Epochs of one job a name, at once, before and after a restart of the nodes."""
    total_bytes = scale.bytes
    capacity = f"{total_bytes // 2 // NODES}"
    each_objects = scale.objects // len(names)
    args = ["--recent", "0"]  # what is kept on the drive is measured, not what has just passed through
    with DevCluster(nodes=NODES, capacity=capacity, data_dir=directory / "cluster", node_args=args) as cluster:
        jobs = [Job(cluster, name, directory / name, each_objects, scale.object_bytes) for name in names]
        epochs = []
        for number in range(1, EPOCHS + 1):
            progress(f"{' and '.join(names)}: epoch {number}")
            epochs.append(epoch(cluster, jobs, number, total_bytes))
        for node in cluster.nodes:
            node.stop()
            node.start()
        cluster.wait_until_joined()
        progress(f"{' and '.join(names)}: after a restart")
        epochs.append(epoch(cluster, jobs, EPOCHS + 1, total_bytes) | {"after_restart": True})
        orders = [_beside_each_other([job.order(each["epoch"]) for job in jobs]) for each in epochs]
        ratios = lru(orders, scale.objects // 2)
    for each, ratio in zip(epochs, ratios, strict=True):
        each["lru_simulated"] = ratio
    return {"jobs": list(names), "cache_bytes": total_bytes // 2, "set_bytes": total_bytes, "epochs": epochs}


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    parts = []
    for names in (("one",), ("two", "three")):
        (directory / names[0]).mkdir()
        parts.append(part(names, scale, directory / names[0]))
    later = [each for found in parts for each in found["epochs"][1:]]
    return {
        "nodes": NODES,
        "objects": scale.objects,
        "object_bytes": scale.object_bytes,
        "parts": parts,
        "target": TARGET,
        "smallest_hit_ratio_from_the_second_epoch": min(each["hit_ratio"] for each in later),
        "wrong_objects": sum(each["wrong_objects"] for found in parts for each in found["epochs"]),
    }


def show(result: dict[str, Any], say: Callable[[str], object] = click.echo) -> None:
    say(f"{'':<24}{'SET':>10}{'CACHE':>10}{'EPOCH':>16}{'HITS':>8}{'LRU':>8}{'ORIGIN':>11}{'SECONDS':>9}")
    for found in result["parts"]:
        for each in found["epochs"]:
            number = f"{each['epoch']}{', restarted' if each.get('after_restart') else ''}"
            name = "one job" if len(found["jobs"]) == 1 else f"{len(found['jobs'])} jobs, {len(found['jobs'])} datasets"
            say(
                f"{name:<24}{sizes.format(found['set_bytes']):>10}{sizes.format(found['cache_bytes']):>10}{number:>16}"
                f"{each['hit_ratio']:>8.3f}{each['lru_simulated']:>8.3f}{sizes.format(each['origin_bytes']):>11}"
                f"{each['seconds']:>9.1f}"
            )
    smallest = result["smallest_hit_ratio_from_the_second_epoch"]
    verdict = "met" if smallest >= result["target"] and not result["wrong_objects"] else "MISSED"
    say(
        f"{verdict}: at least {smallest:.3f} from the second epoch on, target {result['target']}; "
        f"wrong objects {result['wrong_objects']}"
    )


@click.command()
@command.json_option
@click.option("--tiny", is_flag=True, help="2 MiB instead of 4 GiB: proves that it runs.")
@command.workdir_option
def main(json_path: Path | None, tiny: bool, workdir: Path | None) -> None:
    """Hit ratios over shuffled epochs with a cache of half the data."""
    with command.scratch(workdir) as directory:
        result = measure(TINY if tiny else FULL, directory)
        result["machine"] = str(machine.describe(directory))
    show(result)
    command.save(result, json_path)


if __name__ == "__main__":
    main()
