"""What daemons of a mount count, from one to the next, and the sums of all mounts of a node."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest

from shoal_csi import numbers, rundir
from shoal_csi.numbers import COUNTERS, GAUGES, Publisher
from shoal_csi.rundir import Daemon, Record
from shoal_csi.state import State
from shoal_csi.totals import Totals
from tests.support.mounting import RECORD


@pytest.fixture
def state_fd() -> Iterator[int]:
    fd = os.memfd_create("state")
    yield fd
    os.close(fd)


def daemon(state_fd: int, **counted: int) -> dict[str, int] | None:
    """A daemon serves, counts and ends; what can be read of the mount then."""
    publisher = Publisher(State(state_fd), lambda: counted)
    publisher.start()
    publisher.close()
    pid = os.getpid()
    return numbers.read(dataclasses.replace(RECORD, daemon=Daemon(pid, rundir.started(pid), 0, state_fd, 0)))


def test_a_successor_counts_on(state_fd: int) -> None:
    seen = daemon(state_fd, reads=3, read_bytes=1 << 40, waiting=2)
    assert seen is not None
    assert (seen["daemon_starts"], seen["reads"], seen["read_bytes"], seen["opens_read"]) == (1, 3, 1 << 40, 0)
    assert seen["waiting"] == 0, "nobody waits for a daemon that has ended in order"
    seen = daemon(state_fd, reads=4, opens_read=1)
    assert seen is not None
    assert (seen["daemon_starts"], seen["reads"], seen["read_bytes"], seen["opens_read"]) == (2, 7, 1 << 40, 1)


def test_they_are_beside_what_a_successor_needs(state_fd: int) -> None:
    first = State(state_fd)
    first.note_backing(7)
    daemon(state_fd, **dict.fromkeys((*COUNTERS, *GAUGES), (1 << 64) - 1))
    assert (State(state_fd).last_backing, State(state_fd).pinned, State(state_fd).journal()) == (7, None, [])


def test_places_are_for_good() -> None:
    """An installed daemon of another version reads and writes the same memory. New names come last."""
    assert COUNTERS[:16:5] == ("requests", "opens_tier", "ahead_bytes", "errors_eio")
    assert (len(COUNTERS), GAUGES) >= (21, ("open_files", "waiting", "window_bytes"))


def test_what_cannot_be_seen_is_none(state_fd: int) -> None:
    pid = os.getpid()
    here = Daemon(pid, rundir.started(pid), 0, state_fd, 0)
    assert numbers.read(dataclasses.replace(RECORD, daemon=None)) is None
    assert numbers.read(dataclasses.replace(RECORD, daemon=dataclasses.replace(here, started=1))) is None
    assert numbers.read(dataclasses.replace(RECORD, daemon=here)) is None, "no state yet"
    assert numbers.read(dataclasses.replace(RECORD, daemon=dataclasses.replace(here, state_fd=9999))) is None


def seen(**counted: int) -> dict[str, int]:
    return {name: counted.get(name, 0) for name in ("daemon_starts", *COUNTERS)}


def mount(place: str = "/m/1", dataset: str = "d", **fields: int) -> Record:
    return dataclasses.replace(RECORD, mountpoint=place, dataset=f"{dataset}@0", **fields)  # type: ignore[arg-type]


def test_sums_are_by_dataset_and_outlive_mounts() -> None:
    totals = Totals()
    totals.add(mount("/m/1"), seen(reads=5))
    totals.add(mount("/m/2"), seen(reads=2))
    totals.add(mount("/m/3", "e"), seen(reads=1))
    totals.keep_only({"/m/2", "/m/3"})
    totals.add(mount("/m/2"), seen(reads=4))
    totals.add(mount("/m/1"), seen(reads=1))  # another mount at that place
    sums = totals.by_dataset()
    assert [(name, sums[name]["reads"]) for name in sums] == [("d", 10), ("e", 1)]


def test_what_was_counted_before_is_not_counted() -> None:
    totals = Totals()
    totals.begin_with(mount("/m/1"), seen(reads=100))
    totals.begin_with(mount("/m/2"), None)  # its daemon is being replaced
    totals.add(mount("/m/2"), None)
    totals.add(mount("/m/2"), seen(reads=50))
    for reads in (101, 101, 103):
        totals.add(mount("/m/1"), seen(reads=reads))
    totals.add(mount("/m/2"), seen(reads=51))
    assert totals.by_dataset()["d"]["reads"] == 4


def test_supervisors_and_restarts() -> None:
    totals = Totals()
    for pid, restarts in ((1, 0), (1, 2), (2, 0), (2, 1)):
        totals.add(mount(supervisor_pid=pid, restarts=restarts), seen(daemon_starts=1))
    totals.add(mount(supervisor_pid=3), None)
    sums = totals.by_dataset()["d"]
    assert (sums["takeovers"], sums["daemon_restarts"], sums["daemon_starts"]) == (2, 3, 1)
