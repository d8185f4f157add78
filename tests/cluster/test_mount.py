"""A dataset as a mounted file system: real mounts, served by real processes that are killed, replaced and stopped."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import itertools
import json
import mmap
import os
import random
import select
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal_csi import kernel, refusing
from shoal_csi.mount_table import MountTable
from tests.cluster.conftest import filesystem
from tests.support.mounted import DEADLINE_S, Mounted
from tests.support.processes import Child, stopped
from tests.support.waiting import wait_for

SHARD = 4 << 20
#: Objects of one shard, which may be passed through, of several, and small ones.
SIZES = {
    **{f"one/{number}.bin": 3 << 20 for number in range(16)},  # so many that each node owns some
    **{f"several/{number}.bin": 3 * SHARD + 12_345 for number in range(3)},
    **{f"small/{number // 10}/{number}.txt": 37 * number for number in range(60)},
    "small/with space/ü.txt": 5,
    "empty": 0,
}
_names = itertools.count()


class Dataset:
    """A directory as origin, and the dataset over it."""

    def __init__(self, cluster: DevCluster, directory: Path) -> None:
        self.cluster, self.origin = cluster, directory / f"mounted-{next(_names)}"
        self.name = self.origin.name
        self.origin.mkdir()

    def put(self, path: str, data: bytes) -> None:
        target = self.origin / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def add(self) -> None:
        with Control(self.cluster.controller_grpc) as control:
            control.add_dataset(
                self.name, f"file://{self.origin}", shard_size=SHARD, replicas=1, storage_options=json.dumps({})
            )

    def fill(self, mounted: Mounted, path: str) -> None:
        """Have all of an object cached by its owners."""
        filesystem(self.cluster.endpoint).cat_file(f"{self.name}/{path}")

        def is_cached() -> bool:
            have, _, all_of = mounted.xattr(path, "user.shoal.cached").partition("/")
            return have == all_of

        wait_for(is_cached)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="shoal-origin-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def filled(cluster: DevCluster, directory: Path) -> Dataset:
    """A dataset of `SIZES`, random bytes."""
    dataset = Dataset(cluster, directory)
    chance = random.Random(6)
    for path, size in SIZES.items():
        dataset.put(path, chance.randbytes(size))
    dataset.add()
    return dataset


@pytest.fixture
def make(cluster: DevCluster, directory: Path) -> Callable[[dict[str, bytes]], Dataset]:
    """Makes a dataset of its own of some objects."""

    def make(objects: dict[str, bytes]) -> Dataset:
        dataset = Dataset(cluster, directory)
        for path, data in objects.items():
            dataset.put(path, data)
        dataset.add()
        return dataset

    return make


@pytest.fixture(scope="module")
def mounted(cluster: DevCluster, filled: Dataset) -> Iterator[Mounted]:
    """`filled`, mounted; for tests that do nothing to its server."""
    with Mounted(filled.name, cluster.environment()) as mount:
        yield mount


def owned_by(dataset: Dataset, mount: Mounted, node: int, pattern: str = "one/*.bin") -> list[str]:
    """Objects whose first shard is owned by a node of the cluster."""
    wanted = str(dataset.cluster.nodes[node].ready["id"])
    names = sorted(str(path.relative_to(dataset.origin)) for path in dataset.origin.glob(pattern))
    found = [name for name in names if mount.xattr(name, "user.shoal.owner") == wanted]
    assert found, "a dataset of enough objects has some on each node"
    return found


def read_plainly(path: Path) -> bytes:
    """All of a small file, with open, read and close alone: Python's own `open` asks whether it is a terminal."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def state_of(pid: int) -> str:
    """What a process does (proc(5)): "S" where any signal wakes it, "D" where at most the one that kills it does."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def drop_caches(path: Path) -> None:
    """Have the kernel forget the pages of a file, as far as nobody maps them."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# What is there


def test_the_tree_is_the_origin_byte_for_byte(filled: Dataset, mounted: Mounted) -> None:
    assert subprocess.run(["diff", "-r", filled.origin, mounted.path], capture_output=True, check=False).stdout == b""
    found = {str(p.relative_to(mounted.path)): p.stat() for p in mounted.path.rglob("*") if p.is_file()}
    assert {path: stat.st_size for path, stat in found.items()} == SIZES
    assert {stat.st_mode for stat in found.values()} == {0o100444}
    assert {p.stat().st_mode for p in [mounted.path, mounted.path / "small"]} == {0o040555}
    assert len({stat.st_ino for stat in found.values()}) == len(SIZES)


def test_find_and_statfs(filled: Dataset, mounted: Mounted) -> None:
    def find(where: Path) -> set[bytes]:
        command = ["find", ".", "-printf", "%y %p\\n"]
        return set(subprocess.run(command, cwd=where, capture_output=True, check=True).stdout.splitlines())

    assert find(mounted.path) == find(filled.origin)
    stat = os.statvfs(mounted.path)
    assert stat.f_files == len(SIZES)
    assert stat.f_blocks * stat.f_frsize >= sum(SIZES.values())
    assert stat.f_bavail == 0


def test_what_is_not_there_is_remembered(mounted: Mounted) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            (mounted.path / "small/nobody").stat()
    before = mounted.report()["requests"]
    for _ in range(50):
        with pytest.raises(FileNotFoundError):
            (mounted.path / "small/nobody").stat()
        (mounted.path / "small/0/1.txt").stat()
    assert mounted.report()["requests"] - before < 10, "neither names nor attributes expire"


def test_attributes_tell_of_the_object(filled: Dataset, mounted: Mounted) -> None:
    filled.fill(mounted, "several/0.bin")
    info = filesystem(filled.cluster.endpoint).info(f"{filled.name}/several/0.bin")
    assert os.listxattr(mounted.path / "several/0.bin") == ["user.shoal.version"]
    assert mounted.xattr("several/0.bin", "user.shoal.version") == info["version"]
    assert mounted.xattr("several/0.bin", "user.shoal.cached") == "4/4"
    assert mounted.xattr("several/0.bin", "user.shoal.owner") in {n.ready["id"] for n in filled.cluster.nodes}
    with pytest.raises(OSError, match="No data") as refused:
        mounted.xattr("several/0.bin", "user.other")
    assert refused.value.errno == errno.ENODATA


WRITES: dict[str, Callable[[Path], object]] = {
    "create": lambda root: (root / "new").write_bytes(b""),
    "write": lambda root: (root / "empty").open("r+b"),
    "truncate": lambda root: os.truncate(root / "one/0.bin", 0),
    "mkdir": lambda root: (root / "directory").mkdir(),
    "unlink": lambda root: (root / "empty").unlink(),
    "rmdir": lambda root: (root / "small").rmdir(),
    "rename": lambda root: (root / "empty").rename(root / "full"),
    "link": lambda root: os.link(root / "empty", root / "full"),
    "symlink": lambda root: (root / "full").symlink_to("empty"),
    "chmod": lambda root: (root / "empty").chmod(0o777),
    "utime": lambda root: os.utime(root / "empty"),
    "setxattr": lambda root: os.setxattr(root / "empty", "user.x", b"1"),
    "removexattr": lambda root: os.removexattr(root / "empty", "user.shoal.version"),
}


@pytest.mark.parametrize("what", WRITES)
def test_nothing_can_be_written(mounted: Mounted, what: str) -> None:
    with pytest.raises(OSError, match="Read-only") as refused:
        WRITES[what](mounted.path)
    assert refused.value.errno == errno.EROFS


def test_others_may_read(mounted: Mounted) -> None:
    """A pod's process is seldom root."""
    command = [
        "setpriv",
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "cat",
        mounted.path / "small/1/11.txt",
    ]
    mounted.path.parent.chmod(0o755)
    assert len(subprocess.run(command, capture_output=True, check=True).stdout) == 37 * 11


def test_a_pod_with_users_of_its_own_reads(mounted: Mounted) -> None:
    """A kubelet shows it the volume with its owners mapped (mount_setattr(2)), which a file system must allow."""
    library = ctypes.CDLL(None, use_errno=True)
    with subprocess.Popen(["unshare", "--user", "sleep", "600"]) as pod:
        try:
            namespace = Path(f"/proc/{pod.pid}/ns/user")
            wait_for(lambda: namespace.readlink() != Path("/proc/self/ns/user").readlink())
            for kind in ("uid", "gid"):
                Path(f"/proc/{pod.pid}/{kind}_map").write_text("0 100000 65536")
            # open_tree(OPEN_TREE_CLONE), and mount_setattr(AT_EMPTY_PATH) of MOUNT_ATTR_IDMAP.
            tree = library.syscall(428, -100, os.fsencode(mounted.path), 1 | os.O_CLOEXEC)
            users = os.open(namespace, os.O_RDONLY)
            attributes = struct.pack("<4Q", 0x100000, 0, 0, users)
            assert library.syscall(442, tree, b"", 0x1000, attributes, len(attributes)) == 0, ctypes.get_errno()
            os.close(users)
        finally:
            pod.kill()
    assert os.stat("empty", dir_fd=tree).st_uid == 100000
    with os.fdopen(os.open("small/1/11.txt", os.O_RDONLY, dir_fd=tree), "rb") as file:
        assert len(file.read()) == 37 * 11
    os.close(tree)


def test_nobody_makes_a_name_another_directory(make: Callable[[dict[str, bytes]], Dataset]) -> None:
    """What a listing says of a name holds for all who use the mount, and anybody may list from any offset."""
    objects = {"a/x/file": b"right", "a/y/x/file": b"wrong", "b": b"b"}
    dataset = make(objects)

    def list_from_within(root: Path, say: Callable[[object], None]) -> None:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        fd = os.open(root, os.O_RDONLY)
        os.stat("a", dir_fd=fd)  # after a look-up the kernel asks for attributes with the next names, and keeps them
        os.lseek(fd, 3, os.SEEK_SET)  # after the first object, which is in "a"
        say([entry.name for entry in os.scandir(fd)])

    with Mounted(dataset.name, dataset.cluster.environment()) as mount:
        mount.path.parent.chmod(0o755)
        with Child(lambda say: list_from_within(mount.path, say)) as child:
            assert child.heard() == ["b"]
        assert (mount.path / "a/x/file").read_bytes() == b"right"
        assert {name: (mount.path / name).read_bytes() for name in objects} == objects


def test_subpath(filled: Dataset) -> None:
    with Mounted(filled.name, filled.cluster.environment(), ["--subpath", "small/with space"]) as mount:
        assert sorted(p.name for p in mount.path.iterdir()) == ["ü.txt"]
        assert (mount.path / "ü.txt").read_bytes() == (filled.origin / "small/with space/ü.txt").read_bytes()


def test_a_subpath_that_is_not_there_is_said(filled: Dataset) -> None:
    mount = Mounted(filled.name, filled.cluster.environment(), ["--subpath", "nowhere"])
    with pytest.raises(AssertionError, match="error: the snapshot has no directory 'nowhere'"), mount:
        pass


def test_tools(make: Callable[[dict[str, bytes]], Dataset], directory: Path) -> None:
    """A tar, and an SQLite database that is opened read-only and mapped."""
    database = directory / "x.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "create table t as with recursive n(i) as (select 1 union all select i+1 from n limit 9999) "
            "select i, hex(i) h from n"
        )
    dataset = make({"x.db": database.read_bytes(), "pad": bytes(3 << 20)})
    with Mounted(dataset.name, dataset.cluster.environment()) as mount:
        with contextlib.closing(sqlite3.connect(f"file:{mount.path}/x.db?mode=ro&immutable=1", uri=True)) as connection:
            connection.execute("pragma mmap_size=100000000")
            assert connection.execute("select sum(i), count(distinct h) from t").fetchone() == (49995000, 9999)
        with tarfile.open(directory / "all.tar", "w") as tar:
            tar.add(mount.path, arcname="all")
        with tarfile.open(directory / "all.tar") as tar:
            member = tar.extractfile("all/x.db")
            assert member is not None
            assert member.read() == database.read_bytes()


# Passthrough


def test_the_kernel_reads_local_files_by_itself(filled: Dataset) -> None:
    """With its server dead, an open file is read to its end from the drive."""
    with Mounted(filled.name, filled.cluster.environment()) as mount:
        name = owned_by(filled, mount, 0)[0]
        filled.fill(mount, name)
        with (mount.path / name).open("rb") as file:
            report = mount.report()
            assert (report["opens_passthrough"], report["open_inodes"]) == (1, 1)
            mount.kill()
            assert file.read() == (filled.origin / name).read_bytes()
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            assert mapped[:] == (filled.origin / name).read_bytes()
            mapped.close()
            mount.start()
            assert mount.report()["open_inodes"] == 1, "the successor knows what is open"
        wait_for(lambda: mount.report()["open_inodes"] == 0)
        with (mount.path / name).open("rb") as file:
            assert mount.report()["opens_passthrough"] == 1
            assert file.read() == (filled.origin / name).read_bytes()
        wait_for(lambda: mount.numbers()["opens_node"] >= 1)


def test_files_closed_while_requests_fail_are_not_open_any_more(filled: Dataset) -> None:
    """Else the drive's space of a shard that was read by the kernel would never come free."""
    with Mounted(filled.name, filled.cluster.environment()) as mount:
        name = owned_by(filled, mount, 0)[0]
        filled.fill(mount, name)
        with (mount.path / name).open("rb"):
            assert mount.report()["opens_passthrough"] == 1
            mount.kill()
        comes_again = refusing.take_back(mount.fd)
        assert select.select([mount.fd], [], [], DEADLINE_S)[0], "the kernel tells of the end of the open"
        refusing.refuse(mount.fd, comes_again=comes_again)
        mount.start()
        wait_for(lambda: mount.report()["open_inodes"] == 0)


def test_opens_of_a_file_agree(make: Callable[[dict[str, bytes]], Dataset]) -> None:
    """One that was opened before its bytes were here is read through the server until all have closed it."""
    objects = {f"{number}.bin": random.Random(number).randbytes(2 << 20) for number in range(12)}
    dataset = make(objects)
    with Mounted(dataset.name, dataset.cluster.environment()) as mount:
        name = owned_by(dataset, mount, 0, "*.bin")[0]
        path = mount.path / name
        with path.open("rb") as first:
            assert mount.report()["opens_cached"] == 1
            dataset.fill(mount, name)
            with path.open("rb") as second:
                assert second.read() == first.read() == objects[name]
            assert mount.report()["opens_passthrough"] == 0
        wait_for(lambda: mount.report()["open_inodes"] == 0)
        with path.open("rb") as third, path.open("rb") as fourth:
            assert third.read() == fourth.read() == objects[name]
            assert mount.report()["opens_passthrough"] == 2


def test_without_the_right_files_are_read_through_the_server(filled: Dataset) -> None:
    wrapper = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    with Mounted(filled.name, filled.cluster.environment(), wrapper=wrapper) as mount:
        names = owned_by(filled, mount, 0)
        for name in names:
            filled.fill(mount, name)
            assert filecmp.cmp(mount.path / name, filled.origin / name, shallow=False)
        report = mount.report()
        assert not report["passthrough"]
        assert report["opens_passthrough"] == 0
        size_bytes = sum((filled.origin / name).stat().st_size for name in names)
        wait_for(lambda: mount.numbers()["read_bytes"] >= size_bytes)
        counted = mount.numbers()
        assert (counted["opens_node"], counted["opens_read"]) == (0, report["opens_cached"])
        assert counted["received_local_bytes"] >= size_bytes
        assert counted["received_peer_bytes"] == 0
        assert mount.log().count("CAP_SYS_ADMIN") == 1, "it is said once"


def test_small_files_are_opened_without_the_server(make: Callable[[dict[str, bytes]], Dataset]) -> None:
    objects = {f"{number}.txt": random.Random(number).randbytes(5000 + number) for number in range(30)}
    dataset = make(objects)
    with Mounted(dataset.name, dataset.cluster.environment()) as mount:
        assert mount.report()["opens_silently"]
        assert {p.name: read_plainly(p) for p in mount.path.iterdir()} == objects
        mount.kill()
        assert {p.name: read_plainly(p) for p in mount.path.iterdir()} == objects, "the kernel has all of it"
        mount.start()


# Reads


def test_objects_of_several_shards_on_other_nodes(filled: Dataset, mounted: Mounted) -> None:
    for number in range(3):
        name = f"several/{number}.bin"
        with (mounted.path / name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            assert mapped[:] == (filled.origin / name).read_bytes()
            mapped.close()
    assert mounted.report()["read_ahead_bytes"] > SHARD


def test_random_reads_by_several_processes(filled: Dataset) -> None:
    names = [name for name, size in SIZES.items() if size > 1 << 20]

    def read(seed: int, root: Path) -> int:
        chance = random.Random(seed)
        for _ in range(60):
            name = chance.choice(names)
            offset, length = chance.randrange(SIZES[name]), chance.choice([1, 4096, 100_003, 1 << 20])
            with (root / name).open("rb", buffering=0) as file, (filled.origin / name).open("rb") as origin:
                origin.seek(offset)
                assert os.pread(file.fileno(), length, offset) == origin.read(length), (name, offset, length)
        return seed

    # The mount ends first: a reader that waits for it could not be killed.
    with contextlib.ExitStack() as stack, Mounted(filled.name, filled.cluster.environment()) as mount:
        children = [
            stack.enter_context(Child(lambda say, seed=seed: read(seed, mount.path)))  # type: ignore[misc]
            for seed in range(4)
        ]
        assert [child.heard() for child in children] == [0, 1, 2, 3]


def test_what_a_mount_holds_is_bounded(make: Callable[[dict[str, bytes]], Dataset]) -> None:
    """More streams than there is room for windows of: all are read right, and the bound holds."""
    limit = 16 << 20
    objects = {f"{number}.bin": random.Random(number).randbytes((14 << 20) + number) for number in range(5)}
    dataset = make(objects)
    args = ["--window-bytes", str(limit)]
    with ThreadPoolExecutor(5) as pool, Mounted(dataset.name, dataset.cluster.environment(), args) as mount:
        assert all(pool.map(lambda name: (mount.path / name).read_bytes() == objects[name], objects))
        report = mount.report()
        assert 8 << 20 < report["most_window_bytes"] <= limit
        wait_for(lambda: mount.report()["window_bytes"] == 0)


# Servers that end


def test_readers_wait_for_the_next_server(make: Callable[[dict[str, bytes]], Dataset]) -> None:
    """Killed with reads that wait for nodes: its successor is handed them again."""
    cluster = (dataset := make({f"{n}.bin": random.Random(n).randbytes(9 << 20) for n in range(4)})).cluster
    with ThreadPoolExecutor(4) as pool, Mounted(dataset.name, cluster.environment()) as mount:
        with contextlib.ExitStack() as frozen:
            for node in cluster.nodes:
                frozen.enter_context(stopped(node.pid))
            reading = [pool.submit((mount.path / f"{n}.bin").read_bytes) for n in range(4)]
            wait_for(lambda: int(mount.report()["requests"]) > 10)
            mount.kill()
        mount.start()
        assert [future.result(DEADLINE_S) for future in reading] == [
            (dataset.origin / f"{n}.bin").read_bytes() for n in range(4)
        ]


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_servers_are_replaced_while_files_are_read(filled: Dataset, how: str) -> None:
    names = [name for name, size in SIZES.items() if size]

    def read(seed: int, root: Path, say: Callable[[object], None]) -> int:
        chance = random.Random(seed)
        rounds = 0
        while not (root.parent / "enough").exists():
            name = chance.choice(names)
            with (root / name).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                offset = chance.randrange(SIZES[name])
                file.seek(offset)
                with (filled.origin / name).open("rb") as origin:
                    origin.seek(offset)
                    assert file.read(300_000) == origin.read(300_000), name
            rounds += 1
            if rounds == 5:
                say("reading")
        return rounds

    # The mount ends first: a reader that waits for it could not be killed.
    with contextlib.ExitStack() as stack, Mounted(filled.name, filled.cluster.environment()) as mount:
        enough = mount.path.parent / "enough"
        stack.callback(enough.unlink, missing_ok=True)
        children = [
            stack.enter_context(Child(lambda say, seed=seed: read(seed, mount.path, say)))  # type: ignore[misc]
            for seed in range(8)
        ]
        assert {child.heard() for child in children} == {"reading"}
        for number in range(4):
            if how == "kill":
                mount.kill()
            else:
                assert mount.terminate() == 0
            assert mount.start()["starts"] == number + 2
            before = mount.report()["requests"]
            wait_for(lambda before=before: mount.report()["requests"] > before + 20)  # type: ignore[misc]
        enough.touch()
        assert all(child.heard() >= 5 for child in children)
        wait_for(lambda: mount.report()["open_inodes"] == 0)
        assert "Traceback" not in mount.log()


def test_a_successor_serves_the_snapshot_of_its_predecessor(make: Callable[[dict[str, bytes]], Dataset]) -> None:
    dataset = make({"a": b"first"})
    with Mounted(dataset.name, dataset.cluster.environment()) as mount:
        snapshot = mount.report()["snapshot"]
        dataset.put("b", b"second")
        with Control(dataset.cluster.controller_grpc) as control:
            control.refresh_dataset(dataset.name)
        mount.kill()
        assert mount.start()["snapshot"] == snapshot
        assert [p.name for p in mount.path.iterdir()] == ["a"]
    with Mounted(dataset.name, dataset.cluster.environment()) as mount:
        assert sorted(p.name for p in mount.path.iterdir()) == ["a", "b"]


def test_the_server_ends_with_its_mount(filled: Dataset) -> None:
    with Mounted(filled.name, filled.cluster.environment()) as mount:
        with (mount.path / "empty").open("rb"), pytest.raises(OSError, match="busy"):
            kernel.unmount(str(mount.path), lazy=False)
        assert mount.unmount() == 0
        assert MountTable.now().at(str(mount.path)) is None


def test_a_mount_whose_server_is_dead_is_unmounted(filled: Dataset) -> None:
    with Mounted(filled.name, filled.cluster.environment()) as mount:
        mount.kill()
        kernel.unmount(str(mount.path), lazy=False)
        assert MountTable.now().at(str(mount.path)) is None


# When bytes cannot be had


def test_an_object_that_changed_is_stale(make: Callable[[dict[str, bytes]], Dataset]) -> None:
    dataset = make({"kept": b"k" * 2000, "changed": b"a" * (2 << 20)})
    with Mounted(dataset.name, dataset.cluster.environment()) as mount:
        dataset.put("changed", b"b" * (2 << 20))
        with (mount.path / "changed").open("rb") as file, pytest.raises(OSError, match="Stale") as failed:
            file.read()
        assert failed.value.errno == errno.ESTALE
        assert (mount.path / "kept").read_bytes() == b"k" * 2000
        line = next(line for line in mount.log().splitlines() if "'changed' of dataset" in line)
        assert f"shoal dataset refresh {dataset.name}" in line or "shoal dataset refresh" in line
        assert "mount again" in line
        wait_for(lambda: mount.numbers()["errors_estale"] >= 1)
        assert mount.numbers()["errors_eio"] == 0


def begun(program: str, path: Path) -> subprocess.Popen[bytes]:
    """A Python program that has opened `path`, and says so with an empty line."""
    reader = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    with reader.stdout:
        assert reader.stdout.readline() == b"\n"
    return reader


def test_a_reader_that_is_killed_does_not_wait(make: Callable[[dict[str, bytes]], Dataset]) -> None:
    dataset = make({"a.bin": bytes(3 << 20)})
    program = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); print(flush=True); os.pread(fd, 1, 1 << 20)"
    with Mounted(dataset.name, dataset.cluster.environment()) as mount, contextlib.ExitStack() as frozen:
        for node in dataset.cluster.nodes:
            frozen.enter_context(stopped(node.pid))
        reader = begun(program, mount.path / "a.bin")
        wait_for(lambda: state_of(reader.pid) == "D")
        reader.kill()
        assert reader.wait(DEADLINE_S) == -signal.SIGKILL
        assert "cannot be read" not in mount.log(), "nobody answers, and it ends all the same"


def test_a_reader_that_is_killed_after_another_signal_does_not_wait(
    make: Callable[[dict[str, bytes]], Dataset],
) -> None:
    """Whoever is asked to end is often made to, later. Without the page cache the kernel itself does not let go."""
    dataset = make({"a.bin": bytes(3 << 20)})
    program = (
        "import mmap, os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "fd, memory = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)\n"
        "print(flush=True)\n"
        "os.preadv(fd, [memory], 1 << 20)\n"
    )
    with Mounted(dataset.name, dataset.cluster.environment()) as mount, contextlib.ExitStack() as frozen:
        for node in dataset.cluster.nodes:
            frozen.enter_context(stopped(node.pid))
        reader = begun(program, mount.path / "a.bin")
        wait_for(lambda: state_of(reader.pid) == "S")
        reader.terminate()
        wait_for(lambda: state_of(reader.pid) == "D")  # from now on it waits for nothing but its answer, or its end
        for _ in range(8):
            mount.report()  # the server has heard of the signal by now
        reader.kill()
        assert reader.wait(DEADLINE_S) == -signal.SIGKILL
        assert "cannot be read" not in mount.log(), "it did not wait for the read to fail"


def test_readers_that_get_signals_read_on(filled: Dataset, mounted: Mounted) -> None:
    """A timer's signal in the middle of a read is no error, as it is none on a local disk."""
    program = (
        "import signal, sys; signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "data = open(sys.argv[1], 'rb', buffering=0).read(); signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "sys.stdout.buffer.write(data)"
    )
    name = "several/1.bin"
    drop_caches(mounted.path / name)
    read = subprocess.run([sys.executable, "-c", program, mounted.path / name], capture_output=True, check=True)
    assert read.stdout == (filled.origin / name).read_bytes()
