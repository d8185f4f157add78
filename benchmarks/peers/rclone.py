"""rclone mount over the same objects, with its full cache on the same disk.

Its documentation recommends, with `--vfs-cache-mode full`, a small `--buffer-size` (memory) beside a large
`--vfs-read-ahead` (disk), and `--vfs-fast-fingerprint` for S3.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.origin import Origin
from benchmarks.peers import mounting

SETTINGS = (
    "rclone mount: --vfs-cache-mode full, --vfs-read-ahead 256M, --buffer-size 16M, --max-read-ahead 1M, "
    "--vfs-fast-fingerprint, --read-only, --attr-timeout 1h; every file read once before"
)


def version() -> str:
    done = subprocess.run([mounting.require("rclone"), "version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0].removeprefix("rclone ")


@contextlib.contextmanager
def serve(origin: Origin, prefix: str, directory: Path) -> Iterator[tuple[Path, int]]:
    """Yields where the objects below `prefix` are mounted, with an empty cache, and the mount's process id."""
    program = mounting.require("rclone")
    directory.mkdir()
    point = directory / "mount"
    # Nothing of the user's may reach it: AWS_* would change how it connects. The keys stay off the command line.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}
    environment |= {
        "RCLONE_CONFIG": str(directory / "rclone.conf"),
        "RCLONE_CONFIG_ORIGIN_TYPE": "s3",
        "RCLONE_CONFIG_ORIGIN_PROVIDER": "Other",
        "RCLONE_CONFIG_ORIGIN_ENDPOINT": origin.endpoint_url,
        "RCLONE_CONFIG_ORIGIN_ACCESS_KEY_ID": origin.access_key,
        "RCLONE_CONFIG_ORIGIN_SECRET_ACCESS_KEY": origin.secret_key,
    }
    command = [
        *(program, "mount", f"origin:{prefix}", str(point), "--cache-dir", str(directory / "cache")),
        *("--vfs-cache-mode", "full", "--vfs-cache-max-age", "24h", "--vfs-read-ahead", "256M", "--buffer-size", "16M"),
        *("--max-read-ahead", "1M", "--vfs-fast-fingerprint", "--read-only", "--no-modtime"),
        *("--attr-timeout", "1h", "--dir-cache-time", "24h"),
    ]
    with mounting.mounted(command, point, environment, directory / "mount.log") as pid:
        yield point, pid


@contextlib.contextmanager
def mount(origin: Origin, prefix: str, directory: Path, keys: Sequence[str]) -> Iterator[tuple[list[str], int]]:
    """Yields the paths of the objects ``{prefix}/{key}``, and the mount's process id."""
    with serve(origin, prefix, directory) as (point, pid):
        yield [str(point / key) for key in keys], pid
