"""Eight processes that read a dataset's mount and compare every byte, while a test harms what serves it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.mounting import Place
from tests.support.processes import Child, Say
from tests.support.readers import Heard, Read
from tests.support.waiting import wait_for

DAEMON = "shoal_csi.daemon"
READERS = 8
RANGE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class World:
    """A mount of a cluster's dataset, and what is in it."""

    place: Place
    objects: Mapping[str, bytes]

    def mount(self, *words: str) -> None:
        self.place.mount("--dataset", "set", *words, module=DAEMON)

    def wait_until_well(self, other_than: int) -> None:
        """Wait until a daemon serves, has done so for a moment, is not that one, and has a spare."""
        wait_for(lambda: self._is_well(other_than), timeout_s=60)

    def _is_well(self, other_than: int) -> bool:
        record = self.place.record
        pid = None if record.daemon is None else record.daemon.pid
        is_well = (record.state, record.failures) == ("serving", 0) and record.spare_pid is not None
        return is_well and pid not in (None, other_than)


def _read_on(world: World, seed: int, is_over: Any, say: Say) -> Heard:
    """Read ranges of files until it is over, now of one that stays open, now of one opened for it."""
    faulthandler.cancel_dump_traceback_later()  # a long test is no hang
    draw, root = random.Random(seed), Path(world.place.mountpoint)
    names = sorted(world.objects)
    kept = {name: os.open(root / name, os.O_RDONLY) for name in names[:4]}
    heard, wrong, is_first = Heard([], [], 0), 0, True
    while not is_over.is_set():
        name = draw.choice(names)
        start = draw.randrange(len(world.objects[name]))
        began = time.monotonic()
        try:
            fd = kept.get(name) or os.open(root / name, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what the kernel keeps would ask nobody
            found = os.pread(fd, RANGE_BYTES, start)
            if name not in kept:
                os.close(fd)
            wrong += found != world.objects[name][start : start + len(found)] or not found
            os.statvfs(root)
        except OSError:
            heard.errors.append(traceback.format_exc())
        heard.reads.append(Read(began, time.monotonic() - began))
        if is_first:
            say("reading")
            is_first = False
    return Heard(heard.reads, heard.errors, wrong)


@contextmanager
def readers(world: World) -> Iterator[Callable[[], list[Heard]]]:
    """Eight of them; what is given ends them, and returns what they did."""
    is_over = multiprocessing.get_context("fork").Event()
    children = [Child(partial(_read_on, world, seed, is_over)) for seed in range(READERS)]

    def stop() -> list[Heard]:
        is_over.set()
        return [child.heard() for child in children]

    try:
        for child in children:
            assert child.heard() == "reading"
        yield stop
    except BaseException:
        for pid in world.place.processes():  # a reader that waits for a daemon ends by no signal
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for child in children:
            child.kill()


def assert_all_read_all(heard: list[Heard]) -> None:
    errors = [error for each in heard for error in each.errors]
    assert not errors, errors[0]
    assert sum(each.wrong for each in heard) == 0
    assert all(each.reads for each in heard)
