"""A mount's daemon killed with -9, upgraded, stopped, and its supervisor killed, under eight readers.

They compare every byte. No read fails, none gives a wrong byte; the longest one is reported. What is read comes from
the daemon or, where the kernel reads sealed files by itself, from a descriptor that the daemon gave it.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from shoal.devcluster import DevCluster
from tests.faults.conftest import add_directory
from tests.support.mount_readers import World, assert_all_read_all, readers
from tests.support.mounting import Place, wants_fuse
from tests.support.readers import SANE_S, Stalls, report, within, worst_ms

pytestmark = [pytest.mark.long, wants_fuse]  # its processes take minutes of two cores


@pytest.fixture(params=["remote", "local"])
def world(request: pytest.FixtureRequest, tmp_path: Path, directory_origin: dict[str, bytes]) -> Iterator[World]:
    """Remote: every read is the daemon's. Local: the kernel's, from the node's sealed files."""
    with DevCluster(nodes=1, capacity="1GiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        socket = str(cluster.sockets[0]) if request.param == "local" else str(tmp_path / "none")
        with Place(cluster.environment() | {"SHOAL_SOCKET": socket}) as place:
            yield World(place, directory_origin)


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
    assert_all_read_all(heard)
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
    assert_all_read_all(heard)
