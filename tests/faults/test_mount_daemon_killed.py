"""A mount's daemon killed with -9, upgraded, stopped, and its supervisor killed, under eight readers.

They compare every byte. No read fails, none gives a wrong byte; the longest one is reported. What is read comes from
the daemon or, where the kernel reads sealed files by itself, from a descriptor that the daemon gave it.
"""

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

import pytest

from shoal.devcluster import DevCluster
from tests.faults.conftest import add_directory
from tests.support.mounting import Place, wants_fuse
from tests.support.processes import Child, Say
from tests.support.readers import SANE_S, Heard, Read, Stalls, report, within, worst_ms
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.long, wants_fuse]  # its processes take minutes of two cores

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


@pytest.fixture(params=["remote", "local"])
def world(request: pytest.FixtureRequest, tmp_path: Path, directory_origin: dict[str, bytes]) -> Iterator[World]:
    """Remote: every read is the daemon's. Local: the kernel's, from the node's sealed files."""
    with DevCluster(nodes=1, capacity="1GiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        socket = str(cluster.sockets[0]) if request.param == "local" else str(tmp_path / "none")
        with Place(cluster.environment() | {"SHOAL_SOCKET": socket}) as place:
            yield World(place, directory_origin)


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


def _assert_all_read_all(heard: list[Heard]) -> None:
    errors = [error for each in heard for error in each.errors]
    assert not errors, errors[0]
    assert sum(each.wrong for each in heard) == 0
    assert all(each.reads for each in heard)


def _harm(world: World, name: str, harm: Callable[[], None], times: int) -> None:
    """`harm` the daemon again and again under readers, each time when its successor is well."""
    draw, at = random.Random(0), []
    world.wait_until_well(0)
    with readers(world) as stop:
        for _ in range(times):
            time.sleep(draw.uniform(0.5, 1.0))
            before = world.place.daemon_pid
            at.append(time.monotonic())
            harm()
            world.wait_until_well(before)
        time.sleep(0.5)
        heard = stop()
    _assert_all_read_all(heard)
    during = [within(heard, moment, moment + 1.0) for moment in at]
    before_it = [(moment, within(heard, moment - 0.5, moment)) for moment in at]
    calm = [[read for read in reads if read.began_s + read.seconds < moment] for moment, reads in before_it]
    everything = [read for each in heard for read in each.reads]
    report(
        f"mount-{name}",
        times=times,
        calm=Stalls.of([read for reads in calm for read in reads]),
        during=Stalls.of([read for reads in during for read in reads]),
        during_worst_ms=worst_ms(during),
    )
    assert max(read.seconds for read in everything) < SANE_S


def _kind(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["world"])


def _killed_under_readers(world: World, request: pytest.FixtureRequest, times: int) -> None:
    world.mount()
    _harm(world, f"daemon-killed-{_kind(request)}", world.place.kill_daemon, times)
    assert world.place.record.restarts == times


def _upgraded_under_readers(world: World, request: pytest.FixtureRequest, times: int) -> None:
    world.mount()
    supervisor = world.place.supervisors[0]
    _harm(world, f"upgraded-{_kind(request)}", lambda: supervisor.send_signal(signal.SIGHUP), times)
    assert world.place.record.restarts == 0


def test_daemon_killed_under_eight_readers(world: World, request: pytest.FixtureRequest) -> None:
    _killed_under_readers(world, request, 3)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_daemon_killed_twenty_times(world: World, request: pytest.FixtureRequest) -> None:
    _killed_under_readers(world, request, 21)


def test_upgraded_under_eight_readers(world: World, request: pytest.FixtureRequest) -> None:
    _upgraded_under_readers(world, request, 2)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_upgraded_twenty_times(world: World, request: pytest.FixtureRequest) -> None:
    _upgraded_under_readers(world, request, 21)


def test_daemon_stopped_under_eight_readers(world: World, request: pytest.FixtureRequest) -> None:
    """Found by the requests that the supervisor makes, here every half second and not every ten."""
    world.mount("--watch", "0.5")
    _harm(world, f"daemon-stopped-{_kind(request)}", partial(world.place.kill_daemon, number=signal.SIGSTOP), 1)


def test_supervisor_killed_under_eight_readers_then_the_daemon(world: World) -> None:
    """Nobody notices the first; the second is replaced by the supervisor that took over."""
    world.mount()
    with readers(world) as stop:
        before = world.place.daemon_pid
        world.place.supervisors[0].kill()
        time.sleep(0.5)
        world.mount()
        assert world.place.daemon_pid == before
        world.place.kill_daemon()
        world.wait_until_well(before)
        heard = stop()
    _assert_all_read_all(heard)
