"""The cluster of a soak: nodes and a guest, an S3 origin that can fail, three datasets, and readers.

    twice    replicas 2
    once     replicas 1
    harmed   replicas 2; the one whose files are damaged on the nodes' drives

The rule: whatever the faults left, `heal` brings it back, and `close` never waits for a process that was stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.devcluster.starting import Startable
from shoal.errors import ShoalError
from shoal.filesystem import ShoalFileSystem
from tests.faults.soak import content
from tests.faults.soak.content import SHARD_SIZE
from tests.faults.soak.origin import Mood, MoodyOrigin
from tests.faults.soak.reader import Spec, arguments, shard_names
from tests.support.weed import Weed

DATASETS = {"twice": 2, "once": 1, "harmed": 2}
HARMED = "harmed"
BUCKET = "soak"
#: Enough for all copies while all nodes are there; with one of them gone some reads pass through.
CAPACITY = "224MiB"
#: Nodes whose data directory is a small file system of its own, so that it can be filled up.
SMALL_DISKS = 2
SMALL_DISK_BYTES = 400 << 20
#: The last round reads everything, and may take so long.
LAST_ROUND_S = 180.0


class Reader:
    """One reader process. What it says is in `said`, in the order of its words."""

    def __init__(self, spec: Spec, log: Path, cwd: Path) -> None:
        self.spec = spec
        self.begun, self.ended = threading.Event(), threading.Event()
        self.reads = self.bytes = 0
        self._on_word: list[Any] = []
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *arguments(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=cwd,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def listen(self, on_word: Any) -> None:
        """Call `on_word` with each error, wrong byte or late read, on a thread of its own, until the process ends."""
        self._on_word.append(on_word)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word = json.loads(line)
            if "reads" in word:
                self.reads, self.bytes = word["reads"], word["bytes"]
            elif "begun" in word:
                self.begun.set()
            elif "ended" in word:
                self.ended.set()
            else:
                self._on_word[0](word | {"reader": self.spec.number})

    def finish(self) -> None:
        """Let it read everything once more, and end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe and pipe.close()


class World(Startable):
    """Everything that runs. A context manager.

    Attributes:
        steady_since: by node, since when nothing is done to it; infinity while something is.
        damaged: (node, name) of files that were damaged on purpose.
        words: what readers said of errors, wrong bytes and late reads, with whether the bytes were held by a node.
        replaced: by path, when each version came to the origin.
    """

    def __init__(self, directory: Path, *, nodes: int, readers: int, threads: int, seed: int) -> None:
        self.directory = directory
        self.seed = seed
        self.node_count = nodes
        self.weed = Weed()
        self.words: list[dict[str, Any]] = []
        self.replaced: dict[str, list[tuple[float, int]]] = {}
        self.served: dict[str, tuple[float, float]] = {}
        self.damaged: set[tuple[int, str]] = set()
        self.mounted: list[Path] = []
        self.readers: list[Reader] = []
        self.killed_readers: list[Reader] = []
        self._reader_count, self._threads = readers, threads
        self._versions: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()  # guards words, readers
        self._disk_reason = self._mount()
        self.cluster = DevCluster(
            nodes=nodes + 1,
            data_dir=directory / "cluster",
            capacity=CAPACITY,
            controller_args=["--lease", "5"],
        )
        self.steady_since = [float("inf")] * (nodes + 1)

    # Beginning and end

    def start(self) -> None:
        self.weed.start()
        self.origin = MoodyOrigin(self.weed.endpoint_url)
        self.origin.__enter__()
        self.weed.create_bucket(BUCKET)
        self.s3 = self.weed.filesystem()
        self.cluster.start()
        self.cluster.nodes[self.node_count].stop()
        self.steady_since[: self.node_count] = [time.monotonic()] * self.node_count
        for name in DATASETS:
            for path, size in content.objects(name).items():
                self.put(path, 0, size)
        self.write_versions()
        options = self.weed.storage_options | {"endpoint_url": self.origin.endpoint_url}
        with Control(self.cluster.controller_grpc) as control:
            for name, replicas in DATASETS.items():
                control.add_dataset(
                    name,
                    f"s3://{BUCKET}/{name}",
                    shard_size=SHARD_SIZE,
                    replicas=replicas,
                    storage_options=json.dumps(options),
                )
        self.note_served()
        for number in range(self._reader_count):
            self.readers.append(self.start_reader(number))
        for reader in self.readers:
            if not reader.begun.wait(60):
                raise AssertionError(f"reader {reader.spec.number} did not begin: see {self.directory}")

    def close(self) -> None:
        for reader in self.readers:
            reader.kill()
        for server in self.cluster.processes.values():
            with contextlib.suppress(ShoalError, ProcessLookupError):  # it does not run: nothing to let go on
                os.kill(server.pid, signal.SIGCONT)
        self.cluster.close()
        if hasattr(self, "origin"):
            self.origin.__exit__(None, None, None)
        self.weed.close()
        for place in self.mounted:
            subprocess.run(["umount", "-l", str(place)], check=False)

    def _mount(self) -> str:
        """Give some nodes a disk of their own; returns why that cannot be, or ""."""
        if os.geteuid() != 0:
            return "only root may mount a small file system"
        for index in range(SMALL_DISKS):
            place = self.directory / "cluster" / f"node-{index}"
            place.mkdir(parents=True)
            options = f"size={SMALL_DISK_BYTES}"
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                return f"no small file system could be mounted: {done.stderr.strip()}"
            self.mounted.append(place)
        return ""

    @property
    def why_no_small_disk(self) -> str:
        return self._disk_reason

    # The origin and its datasets

    def put(self, path: str, version: int, size_bytes: int | None) -> None:
        """Write one version of an object to the origin, behind the proxy."""
        # Told before it is true: a reader that fails in between then finds the reason.
        self.replaced.setdefault(path, []).append((time.monotonic(), version))
        key = f"{BUCKET}/{path}"
        self.s3.pipe_file(key, content.make(path, version, size_bytes))
        e_tag = self.s3.info(key)["ETag"].strip('"')
        self._versions.setdefault(path, {})[e_tag] = version

    def write_versions(self) -> None:
        aside = self.directory / "versions.new"
        aside.write_text(json.dumps(self._versions))
        aside.replace(self.directory / "versions.json")

    def newest_version(self, path: str) -> int:
        return self.replaced[path][-1][1]

    def refresh(self) -> None:
        with Control(self.cluster.controller_grpc) as control:
            for name in DATASETS:
                control.refresh_dataset(name)
        self.note_served()

    def note_served(self) -> None:
        """Remember from when until when a snapshot was served."""
        now = time.monotonic()
        fs = self.filesystem()
        served = {digest for record in fs.cluster.datasets() for digest in record.snapshots}
        for digest, (since, _) in self.served.items():
            if digest not in served:
                self.served[digest] = (since, min(now, self.served[digest][1]))
        for digest in served:
            self.served.setdefault(digest, (now, float("inf")))

    def filesystem(self) -> ShoalFileSystem:
        return ShoalFileSystem(endpoint=self.cluster.endpoint, local=False, skip_instance_cache=True)

    # Readers

    def start_reader(self, number: int, generation: int = 0) -> Reader:
        """Half of them are on the machine of a node, the others on machines without one."""
        is_local = number % 2 == 0
        spec = Spec(
            seed=self.seed * 1000 + generation,
            number=number,
            endpoint=self.cluster.endpoint,
            socket=str(self.cluster.sockets[(number // 2) % self.node_count]) if is_local else "/nowhere/node.sock",
            is_local=is_local,
            datasets=[name for name in DATASETS if name != HARMED],
            harmed=HARMED,
            versions=str(self.directory / "versions.json"),
            times=str(self.directory / f"times-{number}.f64"),
            stacks=str(self.directory / f"stacks-{number}.txt"),
            threads=self._threads,
        )
        reader = Reader(spec, self.directory / f"reader-{number}.log", Path.cwd())
        reader.listen(self._hear)
        return reader

    def replace_reader(self, number: int, generation: int) -> None:
        """Kill a reader with -9 and start another one."""
        reader = self.readers[number]
        reader.kill()
        with self._lock:
            self.killed_readers.append(reader)
            self.readers[number] = self.start_reader(number, generation)

    def _hear(self, word: dict[str, Any]) -> None:
        if "error" in word:
            word["held"] = bool(word.get("names")) and all(self._is_held(name, word["start"]) for name in word["names"])
        with self._lock:
            self.words.append(word)
            with (self.directory / "words.jsonl").open("a") as file:
                file.write(json.dumps(word) + "\n")

    # Files of the nodes

    def sealed_file(self, node: int, name: str) -> Path:
        return self.cluster.data_dir / f"node-{node}" / "shards" / name[:2] / name

    def _is_held(self, name: str, since: float) -> bool:
        """Whether a node to which nothing was done since then has had the shard all the while."""
        began = time.time() - (time.monotonic() - since)
        for node, steady_since in enumerate(self.steady_since):
            if steady_since < since - 3.0 and (node, name) not in self.damaged:
                with contextlib.suppress(FileNotFoundError):
                    if self.sealed_file(node, name).stat().st_ctime < began - 1.0:
                        return True
        return False

    def harmed_files(self, node: int) -> list[Path]:
        """Sealed files of `harmed` on a node, sorted by name."""
        fs = self.filesystem()
        names = [
            name
            for entry in fs.find(HARMED, detail=True).values()
            for name in shard_names(fs, entry["name"], entry["size"])
        ]
        return [path for name in sorted(names) if (path := self.sealed_file(node, name)).exists()]

    # What is done to processes

    @contextlib.contextmanager
    def unsteady(self, node: int) -> Iterator[None]:
        """While something is done to a node."""
        self.steady_since[node] = float("inf")
        yield
        self.steady_since[node] = time.monotonic()

    def heal(self) -> None:
        """Everything that should run runs, and nothing is slow, full or missing."""
        self.origin.set_mood(Mood.WELL)
        for server in (self.cluster.controller, *self.cluster.nodes[: self.node_count]):
            if server.is_running:
                os.kill(server.pid, signal.SIGCONT)
            else:
                server.start()
        guest = self.cluster.nodes[self.node_count]
        if guest.is_running:
            os.kill(guest.pid, signal.SIGCONT)
            guest.stop()
        for index in range(SMALL_DISKS):
            self.filler(index).unlink(missing_ok=True)
        self.cluster.wait_until_joined()
        self.refresh()

    def filler(self, node: int) -> Path:
        return self.cluster.data_dir / f"node-{node}" / "filler"

    def metrics(self, node: int) -> dict[str, float]:
        """Samples without labels of a node's ``/metrics``."""
        with urllib.request.urlopen(f"{self.cluster.node_endpoints[node]}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
        return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2}
