"""What a mount's readers and whoever looks after it see when something else breaks: an errno that tells what to do, a
line in the log with the file's name and the remedy, an end to every wait, and an unmount that works.

Mounted as people do it, with `shoal mount`; one node, so that nobody helps; a real S3 origin behind a proxy that can
stall.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.cluster.conftest import S3Dataset
from tests.support.mounting import Place, wants_fuse
from tests.support.origin_faults import Trouble, TroubledOrigin
from tests.support.processes import Child, Say, digest, is_stopped, stopped
from tests.support.waiting import wait_for
from tests.support.weed import Weed

pytestmark = [pytest.mark.long, wants_fuse]  # its processes take minutes of two cores

READERS, MANY = 8, 32
SHARD = 1 << 20
#: ``cached`` and ``cached-large`` are read before anything breaks, the others are not. Most bytes are in large objects.
OBJECTS = {
    "cached": random.Random(1).randbytes(300_000),
    "cached-large": random.Random(2).randbytes(2 * SHARD),
    "several": random.Random(3).randbytes(4 * SHARD + 777),
    **{f"cold/{number}": random.Random(10 + number).randbytes(100_000 + number) for number in range(MANY)},
}
#: The nodes wait longer for the origin than the mounts of these tests do for the nodes.
PATIENCE = {"read_s": 400, "idle_s": 100}
#: What a command may take that should not hang at all.
COMMAND_S = 120.0
#: Of one read, where a test waits for it to be over.
TIMEOUT_S = 5.0
_names = itertools.count()


class World:
    """One node, its dataset, and mounts of it."""

    def __init__(self, cluster: DevCluster, origin: TroubledOrigin, weed: Weed) -> None:
        self.cluster, self.origin = cluster, origin
        self.dataset = S3Dataset(f"troubles-{next(_names)}", weed, origin.endpoint_url)
        self.dataset.options["patience"] = PATIENCE
        self.dataset.put(OBJECTS)
        self.dataset.add(cluster, shard_size=SHARD)

    @contextmanager
    def mounted(self, *words: str, is_local: bool = True) -> Iterator[Place]:
        """A mount of which ``cached`` and ``cached-large`` were read; where it is not local, over the network."""
        own = {} if is_local else {"SHOAL_SOCKET": "/nonexistent"}
        with Place(self.cluster.environment() | own) as place:
            self.mount(place, *words)
            for name in ("cached", "cached-large"):
                assert Path(place.mountpoint, name).read_bytes() == OBJECTS[name]
            yield place

    def mount(self, place: Place, *words: str, has_spare: bool = False) -> None:
        own = [] if has_spare else ["--no-spare"]
        done = place.run("shoal.cli", "mount", self.dataset.name, place.mountpoint, *own, *words)
        assert done.returncode == 0, done.stderr

    def refresh(self) -> None:
        self.dataset.refresh(self.cluster)

    def remove(self) -> None:
        with Control(self.cluster.controller_grpc) as control:
            control.remove_dataset(self.dataset.name)

    def stall(self) -> None:
        self.origin.go_on.clear()
        self.origin.always(Trouble.STALL)

    def flow(self) -> None:
        self.origin.always(Trouble.NONE)
        self.origin.go_on.set()


@pytest.fixture
def world(s3: Weed) -> Iterator[World]:
    with TroubledOrigin(s3.endpoint_url) as origin, DevCluster(nodes=1, capacity="1GiB") as cluster:
        yield World(cluster, origin, s3)


def outcome(path: Path) -> str:
    """Digest of a file's bytes, or the name of the errno; of a process of this one's, which may wait."""

    def read(say: Say) -> str:
        return read_or_errno(path)

    with Child(read) as child:
        return str(child.heard())


def read_or_errno(path: Path) -> str:
    try:
        return digest(path.read_bytes())
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def line_about(place: Place, name: str) -> str:
    """The last line of the log that names a file."""
    lines = [line for line in place.log().splitlines() if f"'{name}' of dataset" in line]
    assert lines, place.log()
    return lines[-1]


def test_an_object_that_was_replaced_and_what_to_do_about_it(world: World) -> None:
    with world.mounted() as place:
        root = Path(place.mountpoint)
        world.dataset.put({"several": OBJECTS["several"][::-1], "cached": b"another"})
        assert outcome(root / "several") == "ESTALE"
        assert Path(root / "cached").read_bytes() == OBJECTS["cached"], "the snapshot's bytes, as they are cached"
        line = line_about(place, "several")
        assert f"shoal dataset refresh {world.dataset.name}" in line, line
        assert "unmount and mount again" in line, line
        # Which is done now.
        world.refresh()
        assert place.run("shoal.cli", "umount", place.mountpoint).returncode == 0
        world.mount(place)
        assert (root / "several").read_bytes() == OBJECTS["several"][::-1]
        assert (root / "cached").read_bytes() == b"another"


def test_an_object_that_was_removed(world: World) -> None:
    with world.mounted() as place:
        world.dataset.s3.rm_file(f"{world.dataset.root}/cold/0")
        assert outcome(Path(place.mountpoint, "cold/0")) == "ESTALE"
        assert "shoal dataset refresh" in line_about(place, "cold/0")


def test_a_map_of_an_object_that_was_replaced_is_a_bus_error(world: World) -> None:
    """As on any file system that fails below a map."""

    def read(say: Say) -> None:
        with (
            Path(place.mountpoint, "several").open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        ):
            signal.signal(signal.SIGBUS, signal.SIG_DFL)  # pytest's would print where it was
            say("mapped")
            sum(mapped[::4096])

    with world.mounted() as place:
        world.dataset.put({"several": bytes(len(OBJECTS["several"]))})
        with Child(read) as child:
            assert child.heard() == "mapped"
            child.process.join(COMMAND_S)
            assert child.process.exitcode == -signal.SIGBUS


def test_a_dataset_that_was_removed(world: World) -> None:
    """What the kernel has is read on, and what is open of a sealed file; the rest is not there any more."""
    with world.mounted() as place:
        root = Path(place.mountpoint)
        with (root / "cached-large").open("rb") as file:
            world.remove()
            wait_for(lambda: outcome(root / "cold/0") == "ENOENT")
            assert (root / "cached").read_bytes() == OBJECTS["cached"]
            assert file.read() == OBJECTS["cached-large"]
            assert {path.name for path in (root / "cold").iterdir()} == {str(number) for number in range(MANY)}
            line = line_about(place, "cold/0")
            assert "ENOENT" in line and "was removed or superseded" in line, line
            assert "mount" in line, line
        assert place.run("shoal.cli", "umount", place.mountpoint).returncode == 0


def test_a_daemon_that_ends_after_its_dataset_was_removed(world: World) -> None:
    """No other one can serve it: `shoal mount` says why, requests fail after a while, and it is unmounted."""
    with world.mounted() as place:
        world.remove()
        wait_for(lambda: outcome(Path(place.mountpoint, "cold/0")) == "ENOENT")
        place.kill_daemon()
        wait_for(lambda: place.record.failures > 1)
        (listed,) = place.listed()
        assert listed["state"] in ("waiting", "starting")
        assert "is served no more" in place.record.reason, place.record.reason
        assert place.run("shoal.cli", "umount", place.mountpoint).returncode == 0
        assert_gone(place)


def test_the_only_node_killed(world: World) -> None:
    """Also in the middle of a read. When it is back, what is open is read on."""
    with ExitStack() as readers, world.mounted() as place:
        world.stall()
        root = Path(place.mountpoint)
        file = readers.enter_context((root / "cold/1").open("rb", buffering=0))
        reading = readers.enter_context(Child(lambda say: read_or_errno(root / "cold/0")))
        wait_for(lambda: is_waiting(reading.pid))
        world.cluster.nodes[0].kill()
        assert reading.heard() == "EIO"
        assert outcome(root / "cold/2") == "EIO"
        line = line_about(place, "cold/2")  # soon, and after the node's lease
        assert "'shoal status' says which nodes are up" in line or "no cache node is up" in line, line
        assert (root / "cached").read_bytes() == OBJECTS["cached"]
        assert (root / "several").stat().st_size == len(OBJECTS["several"])
        world.flow()
        world.cluster.nodes[0].start()
        assert os.read(file.fileno(), 1 << 20) == OBJECTS["cold/1"]
        assert (root / "cold/0").read_bytes() == OBJECTS["cold/0"]


def test_the_controller_killed(world: World) -> None:
    """Nobody who reads notices."""
    with world.mounted() as place:
        world.cluster.controller.kill()
        for name, data in OBJECTS.items():
            assert Path(place.mountpoint, name).read_bytes() == data
        before = place.daemon_pid
        place.kill_daemon()
        assert Path(place.mountpoint, "cached").read_bytes() == OBJECTS["cached"]
        wait_for(lambda: place.record.state == "serving" and place.daemon_pid != before)


def test_a_daemon_killed_while_nobody_of_the_cluster_answers(world: World) -> None:
    """Its spare knows already what the mount is of. Names are served, what is read waits for the cluster, and nobody
    sees an error; a newer daemon that knows nothing yet does not take the place of one that serves."""
    with ExitStack() as readers, Place(world.cluster.environment()) as place:
        world.mount(place, has_spare=True)
        root = Path(place.mountpoint)
        assert (root / "cached").read_bytes() == OBJECTS["cached"]
        file = readers.enter_context((root / "cold/0").open("rb", buffering=0))
        wait_for(lambda: place.record.spare_pid is not None)
        world.cluster.controller.kill()
        world.cluster.nodes[0].kill()
        before = place.daemon_pid
        os.kill(place.record.supervisor_pid, signal.SIGHUP)  # an upgrade: the spare goes, and the next cannot prepare
        wait_for(lambda: "a spare daemon waits for the cluster" in place.log())
        assert place.daemon_pid == before and place.record.state == "serving"
        assert (root / "several").stat().st_size == len(OBJECTS["several"])
        world.cluster.controller.start()
        world.cluster.nodes[0].start()
        wait_for(lambda: place.daemon_pid not in (None, before) and place.record.state == "serving", 60)
        wait_for(lambda: place.record.spare_pid is not None, 60)

        world.cluster.controller.kill()
        world.cluster.nodes[0].kill()
        before = place.daemon_pid
        place.kill_daemon()
        wait_for(lambda: place.daemon_pid not in (None, before) and place.record.state == "serving")
        assert sorted(path.name for path in root.iterdir()) == ["cached", "cached-large", "cold", "several"]
        assert (root / "cold/7").stat().st_size == len(OBJECTS["cold/7"])
        assert place.record.failures == 1, "the next one came up at once"
        world.cluster.controller.start()
        world.cluster.nodes[0].start()
        assert os.read(file.fileno(), 1 << 20) == OBJECTS["cold/0"]
        for name, data in OBJECTS.items():
            assert (root / name).read_bytes() == data


def test_an_origin_that_stalls_for_longer_than_the_timeout(world: World) -> None:
    """Every reader is told when its time is over, once and not twice; what is cached and what is a name is served
    meanwhile; and when the origin flows again, so do reads."""
    with ExitStack() as readers, world.mounted("--timeout", str(TIMEOUT_S)) as place:
        root = Path(place.mountpoint)
        world.stall()

        def read(number: int) -> tuple[str, float]:
            began = time.monotonic()
            return read_or_errno(root / f"cold/{number}"), time.monotonic() - began

        children = [
            readers.enter_context(Child(lambda say, number=number: read(number)))  # type: ignore[misc]
            for number in range(READERS)
        ]
        wait_for(lambda: all(is_waiting(child.pid) for child in children))
        assert sorted(path.name for path in root.iterdir()) == ["cached", "cached-large", "cold", "several"]
        os.statvfs(root)
        drop(root / "cached")
        assert (root / "cached").read_bytes() == OBJECTS["cached"]
        drop(root / "cached-large")
        assert (root / "cached-large").read_bytes() == OBJECTS["cached-large"]
        for child in children:
            told, seconds = child.heard()
            assert told == "ETIMEDOUT"
            assert 0.8 * TIMEOUT_S < seconds < 1.8 * TIMEOUT_S
        line = line_about(place, "cold/0")
        assert f"within {TIMEOUT_S:g} s" in line and "--timeout" in line and "shoal status" in line, line
        world.flow()
        for number in range(READERS):  # the error is told for a second
            path, wanted = root / f"cold/{number}", digest(OBJECTS[f"cold/{number}"])
            wait_for(lambda path=path, wanted=wanted: read_or_errno(path) == wanted)  # type: ignore[misc]


def test_what_is_cached_is_read_while_many_wait_for_the_origin(world: World) -> None:
    """Here every read is the daemon's."""

    def read(say: Say) -> list[str]:
        with ThreadPoolExecutor(MANY) as pool:
            return list(pool.map(lambda number: read_or_errno(root / f"cold/{number}"), range(MANY)))

    with ExitStack() as readers, world.mounted(is_local=False) as place:
        root = Path(place.mountpoint)
        world.stall()
        reading = readers.enter_context(Child(read))
        wait_for(lambda: waiting_threads(reading.pid) == MANY)
        for name in ("cached", "cached-large"):
            drop(root / name)
            assert outcome(root / name) == digest(OBJECTS[name])
        assert waiting_threads(reading.pid) == MANY
        world.flow()
        assert reading.heard() == [digest(OBJECTS[f"cold/{number}"]) for number in range(MANY)], place.log()[-3000:]


def test_a_timeout_outlives_the_daemon_and_the_supervisor(world: World) -> None:
    with world.mounted("--timeout", "7.5") as place:
        assert timeout_of(place) == "7.5"
        before = place.daemon_pid
        place.kill_daemon()
        wait_for(lambda: place.record.state == "serving" and place.daemon_pid != before)
        assert timeout_of(place) == "7.5"
        said = place.run("shoal.cli", "mount", "--upgrade", place.mountpoint)
        assert said.returncode == 0, said.stderr
        assert timeout_of(place) == "7.5"
        said = place.run("shoal.cli", "mount", "--upgrade", "--timeout", "600", place.mountpoint)
        assert said.returncode == 0, said.stderr
        assert timeout_of(place) == "600"
        os.kill(place.record.supervisor_pid, signal.SIGKILL)
        wait_for(lambda: place.listed()[0]["state"] == "unsupervised")
        assert "has a new supervisor" in place.run("shoal_csi.mounts", "recover").stdout
        wait_for(lambda: place.listed()[0]["state"] == "serving")
        before = place.daemon_pid
        place.kill_daemon()
        wait_for(lambda: place.record.state == "serving" and place.daemon_pid != before)
        assert timeout_of(place) == "600"


def timeout_of(place: Place) -> str:
    """As the daemon was told."""
    words = Path(f"/proc/{place.daemon_pid}/cmdline").read_bytes().decode().split("\0")
    return words[words.index("--timeout") + 1]


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def waiting_threads(pid: int) -> int:
    """Threads of a process that wait in the kernel, as those do that read a file whose bytes have not come."""
    tasks = [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(task.read_text().rpartition(")")[2].split()[0] == "D" for task in tasks)


def is_waiting(pid: int) -> bool:
    return waiting_threads(pid) == 1


# Unmounting, whatever is the matter

Harm = Callable[[World, Place], None]

STATES: Mapping[str, Harm] = {
    "well": lambda world, place: None,
    "node killed": lambda world, place: world.cluster.nodes[0].kill(),
    "controller killed": lambda world, place: world.cluster.controller.kill(),
    "all killed": lambda world, place: world.cluster.kill(),
    "origin stalls": lambda world, place: world.stall(),
    "dataset removed": lambda world, place: world.remove(),
    "daemon killed": lambda world, place: place.kill_daemon(),
    "daemon killed where no other one can start": lambda world, place: _kill_all_and_daemon(world, place),
    "daemon stopped": lambda world, place: place.kill_daemon(number=signal.SIGSTOP),
    "supervisor killed": lambda world, place: os.kill(place.record.supervisor_pid, signal.SIGKILL),
    "supervisor and daemon killed": lambda world, place: _kill_both(place),
}
WAYS = {
    "umount": ("umount",),
    "umount -f": ("umount", "-f"),
    "umount -l": ("umount", "-l"),
    "shoal umount": ("shoal", "umount"),
    "shoal umount --lazy": ("shoal", "umount", "--lazy"),
}


def _kill_all_and_daemon(world: World, place: Place) -> None:
    world.cluster.kill()
    place.kill_daemon()


def _kill_both(place: Place) -> None:
    record = place.record
    os.kill(record.supervisor_pid, signal.SIGKILL)
    assert record.daemon is not None
    os.kill(record.daemon.pid, signal.SIGKILL)


def unmount(place: Place, way: str) -> subprocess.CompletedProcess[str]:
    program, *words = WAYS[way]
    if program == "shoal":
        return place.run("shoal.cli", *words, place.mountpoint)
    return subprocess.run(
        [program, *words, place.mountpoint], capture_output=True, text=True, timeout=COMMAND_S, check=False
    )


def assert_gone(place: Place) -> None:
    """Nothing is mounted, nothing runs, and the log alone is left."""
    wait_for(lambda: not place.is_mounted() and place.processes() == [], COMMAND_S)
    wait_for(lambda: [path.suffix for path in place.run_dir.iterdir()] == [".log"])
    assert place.listed() == []


@pytest.mark.parametrize("state", STATES)
@pytest.mark.timeout(600)
def test_unmounts_in_every_way(world: World, state: str) -> None:
    """`umount` asks the mount first: where no daemon answers it waits for the next one, or for an error."""
    for way in WAYS:
        with world.mounted() as place:
            STATES[state](world, place)
            wait_for(lambda way=way, place=place: _is_away(place, way), COMMAND_S)  # type: ignore[misc]
            if state == "daemon stopped" and way == "umount -l":
                os.kill(place.record.supervisor_pid, signal.SIGTERM)
            if state == "supervisor killed" or state == "supervisor and daemon killed":
                wait_for(lambda place=place: place.processes() == [], COMMAND_S)  # type: ignore[misc]
                assert not place.is_mounted() and place.listed() == []
            else:
                assert_gone(place)
        restore(world, state)


def _is_away(place: Place, way: str) -> bool:
    """Unmounted; a request of the supervisor's own makes a mount busy for a moment, and then it is tried again."""
    done = unmount(place, way)
    assert done.returncode == 0 or "busy" in done.stderr or not place.is_mounted(), done
    return not place.is_mounted()


def restore(world: World, state: str) -> None:
    """Have the next mount find everything well."""
    if "killed" in state:
        world.cluster.start()
    if state == "dataset removed":
        world.dataset.add(world.cluster, shard_size=SHARD)
    world.flow()


class Readers:
    """Eight processes, each with a file open whose bytes are not cached; `wait` has them read it. A context manager."""

    def __init__(self, place: Place) -> None:
        self._go = multiprocessing.get_context("fork").Event()
        root = Path(place.mountpoint)
        self.children = [
            Child(lambda say, number=number: self._read(say, root / f"cold/{number}"))  # type: ignore[misc]
            for number in range(READERS)
        ]

    def _read(self, say: Say, path: Path) -> str:
        with path.open("rb", buffering=0) as file:
            say("opened")
            self._go.wait()
            try:
                return digest(os.read(file.fileno(), 1 << 20))
            except OSError as error:
                return errno.errorcode[error.errno or 0]

    def wait(self) -> None:
        """Have them read, until all of them wait."""
        self._go.set()
        wait_for(lambda: all(is_waiting(child.pid) for child in self.children))

    def told(self) -> set[str]:
        """What they got in the end."""
        return {str(child.heard()) for child in self.children}

    def end(self) -> None:
        """Kill them: they end at once, whatever they wait for."""
        for child in self.children:
            child.process.kill()
        for child in self.children:
            child.process.join(COMMAND_S)
            assert child.process.exitcode == -signal.SIGKILL, "a reader that waits can be killed"

    def __enter__(self) -> Self:
        for child in self.children:
            assert child.heard() == "opened"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self.children:
            child.kill()


CUT = {"ECONNABORTED", "ENOTCONN"}


@pytest.mark.parametrize("state", ["origin stalls", "node stopped"])
@pytest.mark.parametrize("way", WAYS)
def test_unmounts_while_eight_readers_wait(world: World, state: str, way: str) -> None:
    with ExitStack() as after, world.mounted() as place:
        readers = after.enter_context(Readers(place))
        if state == "origin stalls":
            world.stall()
        else:
            after.enter_context(stopped(world.cluster.nodes[0].pid))
        readers.wait()
        done = unmount(place, way)
        match way:
            case "umount":
                assert done.returncode and "busy" in done.stderr, done
                readers.end()
                wait_for(lambda: _is_away(place, way))
            case "shoal umount":
                assert done.returncode == 1 and "--lazy" in done.stderr, done
                assert any(f" {child.pid} (" in done.stderr for child in readers.children), done.stderr
                readers.end()
                wait_for(lambda: _is_away(place, way))
            case "umount -f":
                assert readers.told() <= CUT
            case _:
                assert done.returncode == 0, done
                assert not place.is_mounted()
                readers.end()
        assert_gone(place)


DETACHING = ("umount -l", "shoal umount --lazy")


@pytest.mark.parametrize("way", ["umount -f", "shoal umount", *DETACHING])
def test_unmounts_while_eight_readers_wait_for_a_daemon_that_hangs(world: World, way: str) -> None:
    """The connection is cut, and they are told so; of one that is detached by whoever ends its supervisor."""
    with ExitStack() as after, world.mounted() as place:
        readers = after.enter_context(Readers(place))
        supervisor = place.record.supervisor_pid
        place.kill_daemon(number=signal.SIGSTOP)
        wait_for(lambda: is_stopped(place.daemon_pid))
        readers.wait()
        done = unmount(place, way)
        if way == "shoal umount":
            assert done.returncode == 0 and "cut off" in done.stdout, done
        if way in DETACHING:
            assert done.returncode == 0 and not place.is_mounted(), done
            (listed,) = place.listed()
            assert (listed["state"], listed["supervisor_pid"]) == ("detached", supervisor)
            os.kill(supervisor, signal.SIGTERM)
        assert readers.told() <= CUT
        assert_gone(place)


def test_readers_of_a_detached_mount_are_told_when_its_processes_end(world: World) -> None:
    with ExitStack() as after, world.mounted() as place:
        readers = after.enter_context(Readers(place))
        world.stall()
        readers.wait()
        assert unmount(place, "umount -l").returncode == 0
        for pid in place.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert readers.told() <= CUT
