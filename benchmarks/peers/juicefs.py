"""JuiceFS, a POSIX file system over an object store: its mount, with its cache on the same disk.

The volume's data lie in the same S3 server; metadata are in SQLite, which costs nothing once the kernel and
`--open-cache` hold them. The set is copied in through the mount, as JuiceFS stores files in blocks of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Missing
from benchmarks.origin import Origin
from benchmarks.peers import mounting

SETTINGS = (
    "JuiceFS: --cache-size above the set, --buffer-size 1024M, --max-fuse-io 1M, --prefetch 3, --open-cache, "
    "--attr-cache, --entry-cache and --dir-entry-cache 3600s (files never change), --readdir-cache, "
    "--verify-cache-checksum none, SQLite metadata; "
    "warmed with `juicefs warmup`, then read once"
)


def find() -> str:
    """The program: beside the running interpreter, else on PATH."""
    beside = shutil.which("juicefs", path=sysconfig.get_path("scripts"))
    return mounting.require(beside or "juicefs")


@dataclass(frozen=True, slots=True)
class Volume:
    """A file system of JuiceFS's that can be mounted. What it keeps on this machine lies in `directory`."""

    program: str
    directory: Path
    environment: dict[str, str]

    @property
    def metadata(self) -> str:
        return f"sqlite3://{self.directory / 'meta.db'}"


def make(origin: Origin, bucket: str, directory: Path) -> Volume:
    """An empty volume whose data go to `bucket`."""
    directory.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"ACCESS_KEY": origin.access_key, "SECRET_KEY": origin.secret_key, "HOME": str(directory)}
    volume = Volume(find(), directory, environment)
    place = ["--storage", "s3", "--bucket", f"{origin.endpoint_url}/{bucket}"]
    _run([volume.program, "format", volume.metadata, "bench", *place, "--trash-days", "0"], environment)
    return volume


@contextlib.contextmanager
def serve(volume: Volume, name: str, cache_bytes: int) -> Iterator[tuple[Path, int]]:
    """Yields where the volume is mounted, with an empty cache of its own, and the mount's process id."""
    directory = volume.directory
    point = directory / name
    command = [
        *(volume.program, "mount", volume.metadata, str(point), "--cache-dir", f"{point}-cache", "--no-syslog"),
        *("--cache-size", f"{cache_bytes // 2**20}M", "--free-space-ratio", "0.01", "--buffer-size", "1024M"),
        *("--max-fuse-io", "1M", "--prefetch", "3", "--verify-cache-checksum", "none"),
        *("--open-cache", "3600s", "--attr-cache", "3600s", "--entry-cache", "3600s", "--dir-entry-cache", "3600s"),
        *("--readdir-cache", "--no-usage-report", "--no-bgjob", "--backup-meta", "0", "--metrics", "127.0.0.1:0"),
    ]
    with mounting.mounted(command, point, volume.environment, directory / f"{name}.log") as pid:
        yield point, pid


def warm_up(volume: Volume, *paths: Path) -> None:
    """Have the cache of a mount hold everything below `paths`."""
    _run([volume.program, "warmup", *map(str, paths)], volume.environment)


@contextlib.contextmanager
def mount(
    origin: Origin, bucket: str, directory: Path, files: Sequence[str], size_bytes: int
) -> Iterator[tuple[list[str], int]]:
    """Yields the paths of copies of `files` in a mounted volume, all cached, and the mount's process id."""
    volume = make(origin, bucket, directory)
    with serve(volume, "mount", 2 * size_bytes + (1 << 30)) as (point, pid):
        copies = [str(point / f"part-{number:04}.arrow") for number in range(len(files))]
        for source, copy in zip(files, copies, strict=True):
            shutil.copyfile(source, copy)
        warm_up(volume, point)
        yield copies, pid


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"juicefs {command[1]} failed: {done.stderr.strip().splitlines()[-1:]}")
