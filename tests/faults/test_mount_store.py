"""What serves a mount ends all at once, as a container does: the descriptor store keeps the mount, and readers wait.

The daemon is a small one of these tests (`tests.support.fuse_stand_in`) but for the last tests, where it is real.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from shoal.devcluster import DevCluster
from shoal_csi import fdstore, kernel
from tests.faults.conftest import add_directory
from tests.support import fuse_stand_in
from tests.support.mount_readers import World, assert_all_read_all, readers
from tests.support.mounting import STAND_IN, Place, wants_fuse
from tests.support.processes import Child, Say, is_stopped
from tests.support.readers import SANE_S, Stalls, report, within, worst_ms
from tests.support.waiting import wait_for

pytestmark = wants_fuse

FIRST = fuse_stand_in.content(0)
#: A container of its own: it ends with its first process, and its mounts are everybody's.
CONTAINER = ("unshare", "--mount", "--propagation", "unchanged", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.fixture
def place() -> Iterator[Place]:
    with Place() as place:
        yield place


@pytest.fixture
def seen_by_all(place: Place) -> Iterator[Place]:
    """What is mounted in its directory in one container is there in all."""
    subprocess.run(["mount", "--bind", place.directory, place.directory], check=True)
    subprocess.run(["mount", "--make-shared", place.directory], check=True)
    try:
        yield place
    finally:
        place.kill_all()
        subprocess.run(["umount", "-l", "-R", place.directory], check=True)


def read(place: Place, number: int = 0) -> bytes:
    """A file's bytes, read by a process that may be killed where it hangs."""

    def run(say: Say) -> bytes:
        return Path(place.mountpoint, f"f{number}").read_bytes()

    with Child(run) as child:
        return bytes(child.heard())


class Reader:
    """A process that has a file open, or `is_late` opens it then, and reads it when it is told to.

    It is there before anything hangs: one that is forked by a thread while another starts a process would have that
    wait for it.
    """

    def __init__(self, place: Place, number: int, *, is_late: bool = False) -> None:
        reads, self._writes = os.pipe()
        path = Path(place.mountpoint, f"f{number}")

        def run(say: Say) -> bytes | str:
            file = None if is_late else path.open("rb", buffering=0)
            say("open")
            os.read(reads, 1)
            try:
                return path.read_bytes() if file is None else file.readall()
            except OSError as error:
                return errno.errorcode[error.errno or 0]

        self._child = Child(run)
        os.close(reads)

    def __enter__(self) -> Self:
        assert self._child.heard() == "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._writes)
        if kind is None:
            self._child.kill()

    def read(self) -> None:
        os.write(self._writes, b"g")

    def heard(self) -> bytes | str:
        """What it read, or the name of the error."""
        found: bytes | str = self._child.heard()
        return found


@contextmanager
def opened(place: Place, number: int) -> Iterator[int]:
    fd = os.open(Path(place.mountpoint, f"f{number}"), os.O_RDONLY)
    try:
        yield fd
    finally:
        with suppress(OSError):  # it may outlive the mount
            os.close(fd)


def recover(place: Place) -> str:
    done = place.run("shoal_csi.mounts", "recover")
    assert done.returncode == 0, done.stderr
    return done.stdout


def state_of(place: Place) -> str:
    (listed,) = place.listed()
    return str(listed["state"])


def kill_all_but_the_store(place: Place) -> None:
    """In one go: none sees the end of another. Returns when they are gone."""
    place.kill_all(but=place.stores)


def test_supervisor_spare_and_daemon_are_killed_in_one_go(place: Place) -> None:
    """Who had a file open waits and reads on, and so does who comes meanwhile."""
    store = place.store()
    place.mount()
    place.wait_for_spare()
    device = place.record.device
    assert place.stored() == {device: fdstore.SUPERVISED}
    with Reader(place, 1) as child, Reader(place, 2, is_late=True) as later:
        kill_all_but_the_store(place)
        child.read()
        later.read()
        assert state_of(place) == "kept" and place.stored() == {device: fdstore.WAITING}
        assert "has a new supervisor" in recover(place)
        assert child.heard() == fuse_stand_in.content(1)
        assert later.heard() == fuse_stand_in.content(2)
    place.wait_for_state("serving")
    assert place.record.device == device and place.stored() == {device: fdstore.SUPERVISED}
    assert place.unmount().returncode == 0
    wait_for(lambda: place.stored() == {} and place.processes() == [store.pid])
    assert place.listed() == []


def test_what_keeps_descriptors_is_light() -> None:
    heavy = "{'pyarrow', 'grpc', 'numpy', 'click', 'fsspec', 'asyncio', 'logging', 'dataclasses', 'subprocess', 'json'}"
    code = f"import sys, shoal_csi.fdstore; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=Place.paths(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.long
def test_requests_wake_the_daemon_alone(place: Place) -> None:
    """Who waits for a connection is woken for each of them, also where only its end is waited for."""
    store = place.store()
    supervisor = place.mount()
    place.wait_for_spare()
    watchers = (store.pid, supervisor.pid)
    with opened(place, 1) as fd:
        before = [_switches(pid) for pid in watchers]
        for number in range(2000):
            assert len(os.pread(fd, 100, number)) == 100
        assert all(_switches(pid) - earlier < 500 for pid, earlier in zip(watchers, before, strict=True))


def _switches(pid: int) -> int:
    """How often a process waited for something."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])


@pytest.mark.long
def test_the_same_command_again_takes_a_kept_mount_over(place: Place) -> None:
    place.store()
    place.mount()
    with Reader(place, 1) as child:
        kill_all_but_the_store(place)
        child.read()
        said = place.ready(place.supervise())
        assert "from the descriptor store" in said["notes"][0]
        assert child.heard() == fuse_stand_in.content(1)
    place.kill_daemon()  # and all is as ever
    assert read(place) == FIRST


@pytest.mark.long
def test_a_request_that_was_taken_and_not_answered_is_answered_by_whoever_comes(place: Place) -> None:
    place.store()
    place.mount()
    (place.steps / "stop-read").touch()
    with Reader(place, 0) as child:
        child.read()
        wait_for(lambda: is_stopped(place.daemon_pid))
        kill_all_but_the_store(place)
        recover(place)
        assert child.heard() == FIRST


@pytest.mark.long
def test_the_container_of_a_mount_ends_again_and_again(seen_by_all: Place) -> None:
    """Its first process is killed, and the kernel ends the rest; the next one has pids of its own."""
    place = seen_by_all
    place.store()
    container = place.supervise(wrapper=CONTAINER)
    place.ready(container)
    with opened(place, 3) as fd:
        for _ in range(3):
            with Reader(place, 1) as child:
                container.kill()
                wait_for(lambda: len(place.processes()) == 1)  # the store
                child.read()
                container = place.supervise(wrapper=CONTAINER)
                place.ready(container)
                assert child.heard() == fuse_stand_in.content(1)
            assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(3)


@pytest.mark.long
def test_a_daemon_in_another_container_is_left_alone_until_it_ends(seen_by_all: Place) -> None:
    """It lives where it cannot be seen; two of them would each have half of the requests."""
    place = seen_by_all
    place.store()
    place.ready(place.supervise(wrapper=(*CONTAINER, "sh", "-c", '"$@" & wait; sleep 600', "sh")))
    (supervisor,) = (pid for pid in place.processes() if _runs(pid, "shoal_csi.supervisor"))
    (daemon,) = (pid for pid in place.processes() if _runs(pid, "shoal_csi.spare") and _is_daemon(place, pid))
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: place.stored() == {place.record.device: fdstore.SERVED})
    assert recover(place) == "[]\n" and state_of(place) == "unsupervised"
    assert "serves on in another container" in place.run(*_mount_words(place)).stderr
    assert read(place) == FIRST and place.is_mounted()
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: place.stored() == {place.record.device: fdstore.WAITING})
    recover(place)
    assert read(place) == FIRST


def _mount_words(place: Place) -> tuple[str, ...]:
    own = ("--mountpoint", place.mountpoint, "--dataset", "set@1234", "--daemon-module", STAND_IN)
    return ("shoal_csi.supervisor", *own)


def _runs(pid: int, module: str) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:3] == [b"-m", module.encode()]
    return False


def _is_daemon(place: Place, pid: int) -> bool:
    """Whether its pid in its own namespace is the daemon's."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].split()[1]) == place.daemon_pid


# The store ends.


def test_the_store_is_killed_and_is_told_everything_again(place: Place) -> None:
    place.mount("--watch", "0.2")  # how often a supervisor looks for one
    assert read(place) == FIRST
    for _ in range(2):
        store = place.store()
        wait_for(lambda: place.stored() == {place.record.device: fdstore.SUPERVISED})
        store.kill()
        store.wait()
        assert read(place) == FIRST
    place.store()
    wait_for(lambda: place.stored() != {})
    kill_all_but_the_store(place)
    recover(place)
    assert read(place) == FIRST


@pytest.mark.long
def test_the_store_and_the_supervisor_are_killed_and_the_daemon_goes_on(place: Place) -> None:
    store = place.store()
    place.mount().kill()
    daemon = place.daemon_pid
    store.kill()
    store.wait()
    assert read(place) == FIRST and state_of(place) == "unsupervised"
    place.store()
    said = place.ready(place.supervise())
    assert said["daemon_pid"] == daemon and "with its daemon" in said["notes"][0]
    assert place.stored() == {place.record.device: fdstore.SUPERVISED}


@pytest.mark.long
def test_everything_is_killed_at_once(place: Place) -> None:
    """Then the mount is dead as without a store."""
    place.store()
    place.mount()
    place.kill_all()
    with pytest.raises(AssertionError, match=os.strerror(errno.ENOTCONN)):
        read(place)
    place.store()
    assert state_of(place) == "dead"
    assert "whose daemon was gone" in recover(place)
    assert not place.is_mounted() and place.listed() == []


@pytest.mark.long
def test_a_second_store_waits_for_the_end_of_the_first(place: Place) -> None:
    first, second = place.store(), place.store()
    place.mount("--watch", "0.2")
    first.terminate()
    assert first.wait(20) == 0
    wait_for(lambda: place.stored() == {place.record.device: fdstore.SUPERVISED})
    assert second.poll() is None


@pytest.mark.long
def test_a_store_that_is_stopped_keeps_nobody_waiting(place: Place) -> None:
    store = place.store()
    os.kill(store.pid, signal.SIGSTOP)
    supervisor = place.mount("--watch", "0.2")
    assert read(place) == FIRST
    assert place.unmount().returncode == 0
    assert supervisor.wait(20) == 0
    os.kill(store.pid, signal.SIGCONT)
    wait_for(lambda: place.stored() == {})


# The mount ends.


def test_what_is_unmounted_with_files_open_ends_though_the_store_lives(place: Place) -> None:
    """Told twice, the supervisor does not wait for open files: they end with the last descriptor."""
    store = place.store()
    supervisor = place.mount()
    with opened(place, 1) as fd:
        supervisor.terminate()
        place.wait_for_state("stopping")
        supervisor.terminate()
        assert supervisor.wait(20) == 0
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.pread(fd, 10, 0)
    wait_for(lambda: place.stored() == {} and place.processes() == [store.pid])


@pytest.mark.long
@pytest.mark.parametrize("how", ["umount", "umount -f", "umount -l", "shoal umount", "shoal umount --lazy"])
def test_a_kept_mount_is_unmounted(place: Place, how: str) -> None:
    """By whatever means: the store lets go, and who waits in it is told."""
    store = place.store()
    place.mount()
    if how == "umount":
        kill_all_but_the_store(place)
        kernel.unmount(place.mountpoint, lazy=False)
    else:
        with Reader(place, 1) as child:
            kill_all_but_the_store(place)
            child.read()
            if how == "umount -f":
                with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
                    kernel.unmount(place.mountpoint, lazy=False, force=True)
                kernel.unmount(place.mountpoint, lazy=True)
            elif how == "umount -l":
                kernel.unmount(place.mountpoint, lazy=True)
                assert recover(place) == "[]\n"  # which finds that nobody will come
            else:
                assert place.unmount(*how.split()[2:]).returncode == 0
            assert child.heard() in ("ECONNABORTED", "ENOTCONN")
    wait_for(lambda: place.stored() == {})
    wait_for(lambda: place.processes() == [store.pid])
    assert not place.is_mounted() and place.listed() == []


@pytest.mark.long
def test_a_mount_that_nobody_serves_for_long_is_let_go(place: Place) -> None:
    store = place.store("--keep-for", "0.5")
    place.mount()
    with Reader(place, 1) as child:
        kill_all_but_the_store(place)
        child.read()
        assert child.heard() in ("ECONNABORTED", "ENOTCONN")
    assert place.stored() == {} and state_of(place) == "dead"
    assert store.poll() is None


@pytest.mark.long
def test_another_dataset_at_the_place_of_a_kept_mount(place: Place) -> None:
    place.store()
    place.mount()
    kill_all_but_the_store(place)
    said = place.ready(place.supervise("--dataset", "other@5678"))
    assert "that answered nothing" in said["notes"][0]
    assert read(place) == FIRST
    wait_for(lambda: place.stored() == {place.record.device: fdstore.SUPERVISED})


@pytest.mark.long
def test_nonsense_harms_nobody(place: Place) -> None:
    place.store()
    place.mount()
    key = place.record.device
    null = os.open(os.devnull, os.O_RDONLY)
    draw = random.Random(0)
    words = [b"deposit", b"deposit x", b"fetch", b"withdraw", b"withdraw x y", b"\xff\xfe", b"list all", b"fetch x"]
    for text in [*words, *(draw.randbytes(draw.randrange(1, 400)) for _ in range(50))]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(place.run_dir / "fdstore.socket"))
            socket.send_fds(sock, [text], [null] * draw.randrange(6))
            sock.settimeout(20)
            assert sock.recv(100) in (b"", fdstore.NONE)
    os.close(null)
    assert place.stored() == {key: fdstore.SUPERVISED}
    kill_all_but_the_store(place)
    recover(place)
    assert read(place) == FIRST


# A newer container takes over while the older one lives.


@pytest.mark.long
def test_a_supervisor_hands_over_to_one_in_another_container(seen_by_all: Place) -> None:
    """Neither sees the other's processes: all goes through the socket, without a store."""
    place = seen_by_all
    old = place.supervise(wrapper=CONTAINER)
    place.ready(old)
    is_over = multiprocessing.get_context("fork").Event()
    with opened(place, 1) as fd, Child(partial(_read_on, place, is_over)) as child:
        assert child.heard() == "reading"
        said = place.ready(place.supervise("--take-over", wrapper=CONTAINER))
        is_over.set()
        assert child.heard() > 0
        assert old.wait(20) == 0
        assert "from the supervisor that was there" in said["notes"][0]
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
        assert place.wait_for_state("serving").restarts == 0
    assert place.unmount().returncode == 0
    wait_for(lambda: place.processes() == [])


def _read_on(place: Place, is_over: Any, say: Say) -> int:
    say("reading")
    count = 0
    while not is_over.is_set():
        assert Path(place.mountpoint, f"f{count % 8}").read_bytes() == fuse_stand_in.content(count % 8)
        count += 1
    return count


@pytest.mark.long
def test_a_daemon_that_does_not_load_in_the_newer_container_leaves_the_old_one(seen_by_all: Place) -> None:
    place = seen_by_all
    old = place.supervise(wrapper=CONTAINER)
    place.ready(old)
    before = place.daemon_pid
    (place.steps / "broken").touch()
    new = place.supervise("--take-over", wrapper=CONTAINER)
    _, err = new.communicate(timeout=60)
    assert new.returncode == 1 and "the one that serves stays" in err
    assert old.poll() is None and place.daemon_pid == before and read(place) == FIRST


# The real daemon.


@pytest.fixture(params=["remote", "local"])
def world(request: pytest.FixtureRequest, tmp_path: Path, directory_origin: dict[str, bytes]) -> Iterator[World]:
    """Remote: every read is the daemon's. Local: the kernel's, from the node's sealed files."""
    with DevCluster(nodes=1, capacity="1GiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        socket = str(cluster.sockets[0]) if request.param == "local" else str(tmp_path / "none")
        with Place(cluster.environment() | {"SHOAL_SOCKET": socket}) as place:
            yield World(place, directory_origin)


@pytest.mark.long
def test_everything_but_the_store_is_killed_under_eight_readers(world: World, request: pytest.FixtureRequest) -> None:
    place = world.place
    place.store()
    world.mount()
    world.wait_until_well(0)
    at: list[float] = []
    with readers(world) as stop:
        for _ in range(3):
            time.sleep(1)
            before = place.daemon_pid
            at.append(time.monotonic())
            kill_all_but_the_store(place)
            recover(place)
            world.wait_until_well(before)
        heard = stop()
    assert_all_read_all(heard)
    assert set(place.stored().values()) == {fdstore.SUPERVISED}
    during = [within(heard, moment, next_one) for moment, next_one in itertools.pairwise([*at, time.monotonic()])]
    name = str(request.node.callspec.params["world"])
    figures = Stalls.of([each for reads in during for each in reads])
    report(f"mount-store-{name}", times=len(at), during=figures, during_worst_ms=worst_ms(during))
    assert max(each.seconds for reader in heard for each in reader.reads) < SANE_S
