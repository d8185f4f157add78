"""A process killed with -9 before, after and in the middle of every system call of a fill, a seal and an eviction.

Each time a store over what it left counts exactly what lies on the drive, serves nothing wrong and goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal_cachenode.store import Store

PART, SIZE = 64, 200
CAPACITY = 3 * SIZE
CALLS = ("open", "ftruncate", "setxattr", "pwrite", "fchmod", "chmod", "fdatasync", "fsync", "rename", "unlink")


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int) -> bytes:
    return bytes((number * 31 + i) % 251 for i in range(SIZE))


def fill(store: Store, number: int) -> None:
    partial = store.begin(key(number), SIZE)
    for part, known in enumerate(partial.header.checksums):
        start, end = partial.header.part_range(part)
        if known is None:
            partial.write_part(part, content(number)[start:end])
    assert partial.claim_seal()
    partial.seal()


def prepare(directory: Path) -> None:
    """Shard 1 is sealed, shard 2 has a part."""
    store = Store(directory, CAPACITY, part_size=PART)
    fill(store, 1)
    partial = store.begin(key(2), SIZE)
    partial.write_part(1, content(2)[PART : 2 * PART])
    store.suspend(partial)
    store.close()


def work(directory: Path) -> None:
    store = Store(directory, CAPACITY, part_size=PART)
    fill(store, 2)
    fill(store, 3)
    store.evict(key(1))
    fill(store, 4)
    store.verify(key(3))
    store.close()


def killed_at(point: int, how: str, directory: Path) -> bool:
    """Whether `work` in a process of its own was killed at the call number `point`; False: it had fewer calls."""
    child = os.fork()
    if child == 0:
        try:
            _arm(point, how)
            work(directory)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a fork of pytest must not go on as pytest
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _arm(point: int, how: str) -> None:
    count = 0

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count != point:
                return call(*args, **kwargs)
            if how == "within" and name == "pwrite":
                fd, data, offset = args
                call(fd, data[: len(data) // 2], offset)
            elif how == "after":
                call(*args, **kwargs)
            return os.kill(os.getpid(), signal.SIGKILL)

        return counted

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def on_drive(directory: Path) -> dict[bytes, int]:
    """Every file under ``shards`` and ``filling``, whatever it is."""
    files = [path for kind in ("shards", "filling") for path in (directory / kind).rglob("*") if not path.is_dir()]
    return {bytes.fromhex(path.name): path.stat().st_size for path in files}


@pytest.mark.parametrize("how", ["before", "within", "after"])
def test_killed_at_every_call(tmp_path: Path, how: str) -> None:
    # In a new process, whose copies cost little: this one is full of what all tests import.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(kill_at_every_call, tmp_path, how).result() > 40, "the calls are counted"


def kill_at_every_call(root: Path, how: str) -> int:
    """Compare what each kill leaves with what must be there. Returns how many calls there were, and one."""
    point = 0
    while True:
        point += 1
        directory = root / str(point)
        prepare(directory)
        if not killed_at(point, how, directory):
            break
        store = Store(directory, CAPACITY, part_size=PART)
        assert store.sealed_sizes() | store.reserved_sizes() == on_drive(directory), point
        assert store.used_bytes == sum(on_drive(directory).values()) <= CAPACITY
        numbers = [number for number in range(1, 5) if store.is_sealed(key(number))]
        for number in numbers:
            file = store.open_sealed(key(number))
            assert file is not None, (point, number)
            assert os.pread(file.fd, SIZE + 1, 0) == content(number)
            file.release()
        store.evict(key(1))
        for number in range(2, 5):
            if not store.is_sealed(key(number)):
                fill(store, number)
        assert store.sealed_sizes() == on_drive(directory) == {key(n): SIZE for n in range(2, 5)}
        assert (store.used_bytes, store.reserved_bytes) == (CAPACITY, 0)
        store.close()
        shutil.rmtree(directory)
    return point
