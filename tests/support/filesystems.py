"""Small file systems of a test's own: they fill up, turn read-only, give errors and hang, without harm to any other.

Needs root and the right to mount; where that is not given the test is skipped with a sentence.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_MIB = 1 << 20


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    except subprocess.CalledProcessError as error:
        raise OSError(errno.EPERM, f"{' '.join(command)}: {error.stderr.strip()}") from error


def _mount(*args: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of its own takes root")
    try:
        _run("mount", *args)
    except OSError as error:
        pytest.skip(f"file systems may not be mounted here: {error}")


def _unmount(path: Path) -> None:
    for _ in range(5):
        if subprocess.run(["umount", str(path)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    _run("umount", "--lazy", str(path))  # a snapshot is still mapped: it goes with the process


@contextlib.contextmanager
def memory(path: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of `size_bytes`, mounted at `path`."""
    path.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size_bytes}", "shoal-test", str(path))
    try:
        yield path
    finally:
        _unmount(path)


@contextlib.contextmanager
def loop(path: Path, image: Path, size_bytes: int) -> Iterator[Path]:
    """An ext4 without a journal over the sparse file `image`, mounted at `path`.

    What of `image` is cut off gives errors when it is read; what cannot be written to it does when it is synced.
    """
    path.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size_bytes)
    _run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard", "-m", "0", str(image))
    _mount("-o", "loop,errors=continue", str(image), str(path))
    try:
        yield path
    finally:
        _unmount(path)


def set_read_only(path: Path, is_read_only: bool) -> None:
    """Remount; waits for files that are just being written."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return _run("mount", "-o", f"remount,{'ro' if is_read_only else 'rw'}", str(path))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def frozen(path: Path) -> Iterator[None]:
    """Whoever writes to the file system hangs in the kernel until this ends."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.ioctl(fd, _FIFREEZE, 0)
        except OSError as error:
            pytest.skip(f"file systems may not be frozen here: {error}")
        try:
            yield
        finally:
            fcntl.ioctl(fd, _FITHAW, 0)
    finally:
        os.close(fd)


def fill_up(path: Path) -> Path:
    """Write a file of another program until nothing more fits. Returns it."""
    filler = path / "other-program"
    with filler.open("wb", buffering=0) as file:
        for step in (_MIB, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(step))
    assert shutil.disk_usage(path).free < 4096
    return filler
