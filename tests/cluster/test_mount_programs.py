"""Programs that people read data with, run on a mounted dataset and on a copy of its origin: they find the same.

A real S3 origin, and the ways that programs read by themselves: maps, `O_DIRECT`, `sendfile(2)`, locks. What would
write is refused with EROFS, whoever asks. Programs that are not installed are said to be missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import mmap
import os
import random
import shutil
import socket
import sqlite3
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from shoal.devcluster import DevCluster
from tests.cluster.conftest import S3Dataset
from tests.support.mounted import Mounted
from tests.support.processes import Child
from tests.support.weed import Weed

NOBODY = 65534
KIB = 1 << 10
WORDS = ("shoal", "herring", "sprat", "mackerel")
#: Each is an object's name, and a file's in the mount.
ODD_NAMES = (
    *(" leading", "trailing ", "-rf", "a b  c", "quote'\"", "star*?[x]"),
    *("percent%2F", "plus+and&", "hash#", "colon:semi;", "ünïcödé", "u\N{COMBINING DIAERESIS}", "魚群.txt", "🐟"),
    *("Case", "case", "...", ".hidden", "~tilde", "x" * 255, "é" * 127),
)
#: Those that not every reader of S3 takes.
CONTROL_NAMES = ("tab\there", "line\nbreak")
_names = itertools.count()


class Library:
    """A tree of files that programs read, its copy at an S3 origin, and the dataset over that.

    Args:
        is_small: most bytes in small objects, which a mount opens without asking its server. Else there are large
            ones, some of one shard, which the kernel may read by itself.

    Attributes:
        copy: the tree as plain files.
        large: the name of the largest, an object of several shards.
    """

    large = "large.bin"

    def __init__(self, directory: Path, weed: Weed, *, is_small: bool) -> None:
        self.is_small = is_small
        self.copy = directory / "copy"
        self.dataset = S3Dataset(f"programs-{next(_names)}", weed, weed.endpoint_url)
        if is_small:
            self.dataset.options["reader"] = "s3fs"
        self._directory = directory
        self._chance = random.Random(4)
        self._large_size = (500 * KIB if is_small else 6 << 20) + 123
        self.shard_size = 128 * KIB if is_small else 2 << 20
        self._write_files()
        self._write_text()
        self._write_database()
        self._write_repository()
        self._write_photos()
        tar = ["tar", "--create", "--file", self.copy / "text.tar", "--directory", self.copy, "text"]
        subprocess.run(tar, check=True)
        files = {str(path.relative_to(self.copy)): path.read_bytes() for path in self.files()}
        self.dataset.s3.pipe({f"{self.dataset.root}/{name}": data for name, data in files.items()})

    def files(self) -> list[Path]:
        return sorted(path for path in self.copy.rglob("*") if path.is_file())

    def put(self, name: str, data: bytes) -> None:
        path = self.copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def _write_files(self) -> None:
        self.put(self.large, self._chance.randbytes(self._large_size))
        self.put("one.bin", self._chance.randbytes(self.shard_size - 1))
        self.put("empty", b"")
        self.put("byte", b"b")
        self.put("page", self._chance.randbytes(4096))
        self.put("zeros", bytes(200 * KIB))
        self.put("run.sh", b'#!/bin/sh\necho "ran with $1 in ${0##*/}"\n')
        self.put("/".join(["deep"] + [f"level{level}" for level in range(20)] + ["down"]), b"here")
        for name in ODD_NAMES + (CONTROL_NAMES if self.is_small else ()):
            self.put(f"names/{name}", name.encode())

    def _write_text(self) -> None:
        for number in range(40):
            words = [self._chance.choice(WORDS) for _ in range(200)]
            self.put(f"text/{number % 5}/{number}.txt", "\n".join(words).encode())

    def _write_database(self) -> None:
        for name, mode in (("data.db", "delete"), ("wal.db", "wal")):
            with contextlib.closing(sqlite3.connect(self.copy / name)) as connection:
                connection.execute(f"pragma journal_mode={mode}")
                with connection:
                    connection.execute("create table fish (id integer primary key, kind text, weight real)")
                    rows = [(self._chance.choice(WORDS), self._chance.random()) for _ in range(3000)]
                    connection.executemany("insert into fish (kind, weight) values (?, ?)", rows)
                    connection.execute("create index by_kind on fish (kind, weight)")

    def _write_repository(self) -> None:
        """Bare, packed, with one loose branch: an origin has no empty directories, and git wants one named refs."""
        if shutil.which("git") is None:
            return
        work = self._directory / "work"
        git("init", "--quiet", "--initial-branch", "main", work)
        for number in range(6):
            (work / f"{number}.txt").write_text("\n".join(WORDS * (number + 20)))
            git("-C", work, "add", "--all")
            git("-C", work, "commit", "--quiet", "--message", f"Catch number {number}")
        git("clone", "--quiet", "--bare", work, self.copy / "repository.git")
        git("-C", self.copy / "repository.git", "repack", "-a", "-d", "-f", "--quiet")
        git("-C", self.copy / "repository.git", "update-ref", "refs/heads/loose", "main~2")
        shutil.rmtree(self.copy / "repository.git/hooks", ignore_errors=True)
        for name in ("branches", "refs/tags", "objects/info"):
            with contextlib.suppress(OSError):  # where it is there, and empty
                (self.copy / "repository.git" / name).rmdir()

    def _write_photos(self) -> None:
        for number in range(24):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), dtype=np.uint8)
            path = self.copy / "photos" / WORDS[number % 3] / f"{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(path)


def git(*words: str | Path) -> bytes:
    """What git says. Nobody's configuration has a word in it."""
    environment = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "HOME": "/nonexistent",
    }
    identity = ["-c", "user.name=Shoal", "-c", "user.email=shoal@localhost", "-c", "safe.directory=*"]
    done = subprocess.run(["git", *identity, *words], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def wants(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"'{program}' is not installed")


def said(*words: str | Path, cwd: Path | None = None) -> bytes:
    """What a program says that succeeds."""
    done = subprocess.run(words, cwd=cwd, capture_output=True, check=False)
    assert done.returncode == 0, (words, done.returncode, done.stdout[-1000:], done.stderr[-1000:])
    return done.stdout


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory of a drive's file system, for what programs write."""
    made = Path(tempfile.mkdtemp(prefix="shoal-programs-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module", params=["asks", pytest.param("silent", marks=pytest.mark.long)])
def library(request: pytest.FixtureRequest, s3: Weed, cluster: DevCluster) -> Iterator[Library]:
    """Of large objects, whose opens ask the mount's server; and of small ones, whose opens do not."""
    directory = Path(tempfile.mkdtemp(prefix="shoal-library-", dir="/tmp"))
    made = Library(directory, s3, is_small=request.param == "silent")
    made.dataset.add(cluster, shard_size=made.shard_size)
    yield made
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def root(library: Library, cluster: DevCluster) -> Iterator[Path]:
    """The mount of `library`, for tests that do nothing to its server."""
    with Mounted(library.dataset.name, cluster.environment()) as mount:
        mount.path.parent.chmod(0o755)  # for other users
        assert mount.report()["opens_silently"] is library.is_small
        yield mount.path
        assert "Traceback" not in mount.log() and " ERROR " not in mount.log(), mount.log()


def forget(path: Path) -> None:
    """Have the kernel forget a file's pages, as far as nobody maps them: the next read asks."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# The whole tree


def test_diff_and_cmp(library: Library, root: Path) -> None:
    said("diff", "--recursive", "--no-dereference", library.copy, root)
    names = [path.relative_to(library.copy) for path in library.files()]
    assert len(names) > 100
    for name in (library.large, "one.bin", "empty", *(f"names/{odd}" for odd in ODD_NAMES)):
        forget(root / name)
        said("cmp", library.copy / name, root / name)
    assert {p.relative_to(root) for p in root.rglob("*")} == {
        p.relative_to(library.copy) for p in library.copy.rglob("*")
    }


def test_rsync_finds_no_difference_and_copies(library: Library, root: Path, scratch: Path) -> None:
    wants("rsync")
    look = ["rsync", "--recursive", "--checksum", "--dry-run", "--itemize-changes", "--delete"]
    assert said(*look, f"{root}/", library.copy) == b""
    assert said(*look, f"{library.copy}/", root) == b"", "a mount is a target where nothing is to be done"
    said("rsync", "--archive", "--xattrs", "--omit-dir-times", f"{root}/", scratch / "new")
    said("diff", "--recursive", library.copy, scratch / "new")
    (library.copy / "text/0/0.txt").write_bytes(changed := (library.copy / "text/0/0.txt").read_bytes() + b"\n")
    try:
        assert b"text/0/0.txt" in said(*look, f"{root}/", library.copy), "rsync would have said so"
    finally:
        (library.copy / "text/0/0.txt").write_bytes(changed[:-1])


def test_tar(library: Library, root: Path, scratch: Path) -> None:
    def digest(where: Path) -> str:
        same = ["--sort=name", "--mtime=@0", "--mode=a=r", "--owner=0", "--group=0", "--numeric-owner"]
        return hashlib.sha256(said("tar", "--create", *same, ".", cwd=where)).hexdigest()

    assert digest(root) == digest(library.copy)
    said("tar", "--extract", "--file", root / "text.tar", "--directory", scratch)
    said("diff", "--recursive", scratch / "text", root / "text")
    said("tar", "--create", "--file", scratch / "all.tar", "--directory", root, ".")
    assert said("tar", "--compare", "--file", scratch / "all.tar", "--directory", root) == b"", "times, modes, owners"


def test_grep_find_and_du(library: Library, root: Path) -> None:
    for command in (
        ["grep", "--recursive", "--count", "herring", "."],
        ["grep", "-r", "-n", "--include=*.txt", "^mackerel$", "text"],
        ["find", ".", "-printf", "%y %s %P\\n"],
        ["du", "--apparent-size", "--bytes", "--all", "names"],
        ["sha256sum", library.large, "one.bin", "empty", "zeros"],
    ):
        found, wanted = (sorted(said(*command, cwd=where).splitlines()) for where in (root, library.copy))
        if command[0] == "find":  # a directory has no size of its own here
            found, wanted = ([line for line in each if not line.startswith(b"d")] for each in (found, wanted))
        if command[0] == "du":
            found, wanted = ([line for line in each if b"\tnames/" in line] for each in (found, wanted))
        assert found == wanted and found, command


def test_cp(library: Library, root: Path, scratch: Path) -> None:
    """Which tries to clone and to have the kernel copy, and finds that neither goes from one file system to another."""
    for how in ("--reflink=auto", "--sparse=always", "--archive"):
        forget(root / library.large)
        said("cp", how, root / library.large, root / "zeros", root / "empty", scratch)
        for name in (library.large, "zeros", "empty"):
            said("cmp", library.copy / name, scratch / name)
            (scratch / name).unlink()
    refused = subprocess.run(["cp", "--reflink=always", root / "page", scratch], capture_output=True, check=False)
    assert refused.returncode == 1


# Programs with formats of their own


def test_git(library: Library, root: Path, scratch: Path) -> None:
    """Maps its packs, reads loose and packed refs, and clones."""
    wants("git")
    for words in (
        ("fsck", "--full", "--strict"),
        ("log", "--stat", "--all"),
        ("cat-file", "--batch-all-objects", "--batch-check"),
        ("cat-file", "blob", "main:5.txt"),
        ("for-each-ref",),
        ("grep", "-c", "sprat", "main"),
    ):
        assert git("--git-dir", root / "repository.git", *words) == git(
            "--git-dir", library.copy / "repository.git", *words
        ), words
    git("clone", "--quiet", root / "repository.git", scratch / "clone")
    assert sorted(path.name for path in (scratch / "clone").glob("*.txt")) == [f"{number}.txt" for number in range(6)]
    assert git("-C", scratch / "clone", "status", "--porcelain") == b""


QUERY = (
    "pragma integrity_check; select kind, count(*), sum(id) from fish group by kind order by kind;"
    "select count(*) from fish indexed by by_kind where kind = 'sprat' and weight < 0.5"
)


def test_sqlite3_command(library: Library, root: Path) -> None:
    wants("sqlite3")
    wanted = said("sqlite3", library.copy / "data.db", QUERY)
    assert wanted.startswith(b"ok\n")
    for words in (
        ["-readonly", root / "data.db"],
        [root / "data.db"],  # which opens it read-only where it may not write
        [f"file:{root}/data.db?mode=ro"],
        [f"file:{root}/data.db?immutable=1"],
    ):
        assert said("sqlite3", *words, QUERY) == wanted, words
    refused = subprocess.run(
        ["sqlite3", root / "data.db", "delete from fish"], capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0 and "readonly database" in refused.stderr


@pytest.mark.parametrize("options", ["mode=ro", "mode=ro&immutable=1"])
def test_sqlite_mapped(library: Library, root: Path, options: str) -> None:
    def ask(where: Path) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(f"file:{where}/data.db?{options}", uri=True)) as connection:
            connection.execute("pragma mmap_size=100000000")
            return connection.execute("select kind, count(*), sum(weight) from fish group by kind").fetchall()

    assert ask(root) == ask(library.copy)


def test_sqlite_of_a_database_in_wal_mode(library: Library, root: Path) -> None:
    """Its index of the log is a file that SQLite would make: where nothing can be made, it wants to be told."""

    def count(options: str) -> int:
        with contextlib.closing(sqlite3.connect(f"file:{root}/wal.db?{options}", uri=True)) as connection:
            return int(connection.execute("select count(*) from fish").fetchone()[0])

    assert count("immutable=1") == 3000
    with pytest.raises(sqlite3.OperationalError, match=r"unable to open|readonly"):
        count("mode=ro")


class ImageFolder:
    """As torchvision's `ImageFolder`: a directory a class, its name the label."""

    def __init__(self, root: Path) -> None:
        with os.scandir(root) as entries:
            self.classes = sorted(entry.name for entry in entries if entry.is_dir())
        self.samples = [
            (path, label) for label, name in enumerate(self.classes) for path in sorted((root / name).iterdir())
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        path, label = self.samples[index]
        with path.open("rb") as file, PIL.Image.open(file) as image:
            return np.array(image.convert("RGB")), label


@pytest.mark.long  # torch takes its time to be loaded
def test_image_folder_of_a_data_loader(library: Library, root: Path) -> None:
    from torch.utils.data import DataLoader  # the other tests need none of it

    def epoch(where: Path) -> list[tuple[npt.NDArray[np.uint8], list[int]]]:
        loader: Any = DataLoader(ImageFolder(where / "photos"), batch_size=4, num_workers=2)  # type: ignore[arg-type]
        return [(images.numpy(), labels.tolist()) for images, labels in loader]

    found, wanted = epoch(root), epoch(library.copy)
    assert len(found) == 6
    assert [labels for _, labels in found] == [labels for _, labels in wanted]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(found, wanted, strict=True))


# fio: each block carries a checksum and its own place


FIO_SIZE = 4 << 20


@pytest.fixture(scope="module")
def written_by_fio(s3: Weed, cluster: DevCluster) -> Iterator[tuple[Path, Path]]:
    """A file that fio wrote, and the same object in a mount of its own."""
    wants("fio")
    directory = Path(tempfile.mkdtemp(prefix="shoal-fio-", dir="/tmp"))
    path = directory / "fio.bin"
    fio(path, "--rw=write", "--do_verify=0", "--ioengine=psync")
    dataset = S3Dataset(f"programs-{next(_names)}", s3, s3.endpoint_url)
    dataset.put({"fio.bin": path.read_bytes(), "one.bin": path.read_bytes()[: 2 << 20]})
    dataset.add(cluster, shard_size=3 << 20)
    with Mounted(dataset.name, cluster.environment()) as mount:
        yield path, mount.path
    shutil.rmtree(directory)


def fio(path: Path, *words: str, size: int = FIO_SIZE) -> subprocess.CompletedProcess[bytes]:
    command = ["fio", "--name=x", f"--filename={path}", f"--size={size}", "--bs=16k", "--verify=crc32c"]
    command += ["--verify_fatal=1", "--verify_state_save=0", "--thread", *words]
    return subprocess.run(
        command, cwd=path.parent if "--readonly" not in words else "/tmp", capture_output=True, check=False
    )


def test_fio_finds_a_wrong_byte(written_by_fio: tuple[Path, Path], scratch: Path) -> None:
    """Else what follows would show nothing."""
    plain, _ = written_by_fio
    data = bytearray(plain.read_bytes())
    data[FIO_SIZE // 2 + 5000] ^= 1
    (scratch / "damaged").write_bytes(data)
    done = fio(scratch / "damaged", "--rw=randread", "--readonly", "--ioengine=psync")
    assert done.returncode != 0 and b"verify" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("engine", "direct"),
    [
        *(("mmap", 0), ("io_uring", 1)),
        *(pytest.param(engine, 0, marks=pytest.mark.long) for engine in ("psync", "libaio", "io_uring")),
        *(pytest.param(engine, 1, marks=pytest.mark.long) for engine in ("psync", "libaio")),
    ],
)
def test_fio_verifies_random_reads(written_by_fio: tuple[Path, Path], engine: str, direct: int) -> None:
    plain, root = written_by_fio
    words = ["--rw=randread", "--readonly", f"--ioengine={engine}", f"--direct={direct}", "--iodepth=8"]
    control = fio(plain, *words)
    if control.returncode:
        pytest.skip(f"this machine has no {engine} with direct={direct}: {control.stderr.decode()[-200:]}")
    for name, size in (("fio.bin", FIO_SIZE), ("one.bin", 2 << 20)):
        done = fio(root / name, *words, size=size)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert b"err= 0" in done.stdout


# What programs ask of the kernel


def test_maps(library: Library, root: Path) -> None:
    """Private and shared ones; a private one may be written to, and nobody else sees that."""
    wanted = (library.copy / library.large).read_bytes()
    for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED, mmap.MAP_SHARED | mmap.MAP_POPULATE):
        forget(root / library.large)
        with (
            (root / library.large).open("rb") as file,
            mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped,
        ):
            mapped.madvise(mmap.MADV_RANDOM)
            for start in random.Random(flags).sample(range(0, len(wanted), 4096), 20):
                assert mapped[start : start + 4096] == wanted[start : start + 4096]
            assert mapped[:] == wanted
    with (root / "page").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            mapped[:4] = b"mine"
            assert os.pread(file.fileno(), 4, 0) == (library.copy / "page").read_bytes()[:4]
        with pytest.raises(PermissionError):
            mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _by_sendfile(source: int, target: int, size: int) -> None:
    done = 0
    while done < size:
        done += (count := os.sendfile(target, source, done, size - done))
        assert count


def _by_splice(source: int, target: int, size: int) -> None:
    reads, writes = os.pipe()
    try:
        done = 0
        while done < size:
            count = os.splice(source, writes, min(64 * KIB, size - done), offset_src=done)
            assert count
            done += count
            while count:
                count -= os.splice(reads, target, count)
    finally:
        os.close(reads)
        os.close(writes)


@pytest.mark.parametrize("way", [_by_sendfile, _by_splice], ids=["sendfile", "splice"])
@pytest.mark.parametrize("name", ["large.bin", "one.bin", "text/0/0.txt"])
def test_bytes_that_the_kernel_moves_by_itself(
    library: Library, root: Path, scratch: Path, way: Callable[[int, int, int], None], name: str
) -> None:
    forget(root / name)
    with (root / name).open("rb") as source, (scratch / "out").open("wb") as target:
        way(source.fileno(), target.fileno(), (root / name).stat().st_size)
    said("cmp", library.copy / name, scratch / "out")


def test_copy_file_range_is_refused_as_between_any_two_file_systems(root: Path, scratch: Path) -> None:
    with (
        (root / "page").open("rb") as source,
        (scratch / "out").open("wb") as target,
        pytest.raises(OSError, match="cross-device") as refused,
    ):
        os.copy_file_range(source.fileno(), target.fileno(), 4096)
    assert refused.value.errno == errno.EXDEV  # whoever calls it copies by itself then, as cp does


def test_advice(library: Library, root: Path) -> None:
    """`readahead(2)`, `posix_fadvise(2)`, `madvise(2)`: taken, and the bytes are the same."""
    wanted = (library.copy / library.large).read_bytes()
    library_c = ctypes.CDLL(None, use_errno=True)
    with (root / library.large).open("rb") as file:
        for advice in ("SEQUENTIAL", "RANDOM", "NOREUSE", "WILLNEED", "DONTNEED", "NORMAL"):
            os.posix_fadvise(file.fileno(), 0, 0, getattr(os, f"POSIX_FADV_{advice}"))
            assert os.pread(file.fileno(), 100_003, 77) == wanted[77 : 77 + 100_003]
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert library_c.readahead(file.fileno(), ctypes.c_int64(0), ctypes.c_size_t(len(wanted))) == 0
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for hint in (mmap.MADV_WILLNEED, mmap.MADV_SEQUENTIAL, mmap.MADV_DONTNEED):
                mapped.madvise(hint)
                assert mapped[:] == wanted


@pytest.mark.parametrize("name", ["large.bin", "one.bin", "text/0/0.txt", "empty"])
def test_direct_reads(library: Library, root: Path, name: str) -> None:
    """Of pages always; of odd places and sizes as the file system below allows, or more, and then the right bytes."""
    wanted = (library.copy / name).read_bytes()
    chance = random.Random(name)
    end = len(wanted) + 5000
    aligned = [(0, 4096), (4096, 128 * KIB), (len(wanted) // 4096 * 4096, 4096), (-(-end // 4096) * 4096, 4096)]
    odd = [(1, 1), (511, 513), (len(wanted) + 1, 10)]
    odd += [(chance.randrange(end), chance.randrange(1, 200_000)) for _ in range(20)]
    fd = os.open(root / name, os.O_RDONLY | os.O_DIRECT)
    try:
        for offset, length in aligned:
            assert _direct(fd, offset, length) == wanted[offset : offset + length], (offset, length)
        for offset, length in odd:
            with contextlib.suppress(_NotAligned):
                assert _direct(fd, offset, length) == wanted[offset : offset + length], (offset, length)
    finally:
        os.close(fd)


class _NotAligned(Exception):
    pass


def _direct(fd: int, offset: int, length: int) -> bytes:
    """A read into memory that begins with a page."""
    with mmap.mmap(-1, length + 1) as memory, memoryview(memory)[:length] as view:
        try:
            return bytes(view[: os.preadv(fd, [view], offset)])
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise _NotAligned from None
            raise


def test_vectors_and_odd_reads(library: Library, root: Path) -> None:
    wanted = (library.copy / library.large).read_bytes()
    forget(root / library.large)
    with (root / library.large).open("rb", buffering=0) as file:
        buffers = [bytearray(size) for size in (1, 4095, 70_001, 0, 3)]
        assert os.preadv(file.fileno(), buffers, 4097) == 74_100
        assert b"".join(buffers) == wanted[4097 : 4097 + 74_100]
        assert os.lseek(file.fileno(), -5, os.SEEK_END) == len(wanted) - 5
        assert file.read(100) == wanted[-5:] and file.read(100) == b""
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == len(wanted), "no file has holes"
    directory = os.open(root / "text", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(IsADirectoryError):
            os.read(directory, 1)
        os.fsync(directory)
    finally:
        os.close(directory)


def test_locks_are_this_machines(root: Path) -> None:
    """Shared and exclusive `flock(2)`, and read locks of `fcntl(2)`; a write lock takes a file that may be written."""
    with (root / "page").open("rb") as one, (root / "page").open("rb") as other:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_UN)
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(OSError, match="Bad file descriptor"):
            fcntl.lockf(one, fcntl.LOCK_EX | fcntl.LOCK_NB)


IN_ACCESS, IN_CLOSE_NOWRITE, IN_OPEN = 1, 0x10, 0x20


def test_inotify_sees_what_is_read_on_this_machine(root: Path) -> None:
    library_c = ctypes.CDLL(None, use_errno=True)
    fd = library_c.inotify_init1(os.O_CLOEXEC)
    assert fd >= 0
    try:
        mask = IN_OPEN | IN_ACCESS | IN_CLOSE_NOWRITE
        assert library_c.inotify_add_watch(fd, os.fsencode(root / "text/1"), mask) > 0
        (root / "text/1/1.txt").read_bytes()
        events, seen = os.read(fd, 4096), {}
        while events:
            _, what, _, length = struct.unpack_from("<iIII", events)
            name = events[16 : 16 + length].rstrip(b"\0")
            seen[name] = seen.get(name, 0) | what
            events = events[16 + length :]
    finally:
        os.close(fd)
    assert seen[b"1.txt"] & mask == mask


def test_a_script_is_run_by_its_interpreter_and_nothing_is_executable(root: Path) -> None:
    """An origin keeps no modes, so no file says that it is a program."""
    assert said("sh", root / "run.sh", "bait") == b"ran with bait in run.sh\n"
    with pytest.raises(PermissionError):
        subprocess.run([root / "run.sh"], check=False)


# Writing


def _opens(flags: int, mode: int = 0o600) -> Callable[[Path], object]:
    return lambda path: os.close(os.open(path, flags, mode))


def _on_descriptor(call: Callable[[int], object]) -> Callable[[Path], object]:
    def run(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            call(fd)
        finally:
            os.close(fd)

    return run


#: Each is given the path of a file that is there, of one that is not, and of a directory.
WRITES: Mapping[str, Callable[[Path, Path, Path], object]] = {
    "open for writing": lambda file, new, folder: _opens(os.O_WRONLY)(file),
    "open for both": lambda file, new, folder: _opens(os.O_RDWR)(file),
    "open to append": lambda file, new, folder: _opens(os.O_WRONLY | os.O_APPEND)(file),
    "open to truncate": lambda file, new, folder: _opens(os.O_RDONLY | os.O_TRUNC)(file),
    "create": lambda file, new, folder: _opens(os.O_RDONLY | os.O_CREAT)(new),
    "create for writing": lambda file, new, folder: _opens(os.O_WRONLY | os.O_CREAT | os.O_EXCL)(new),
    "unnamed file": lambda file, new, folder: _opens(os.O_RDWR | os.O_TMPFILE)(folder),
    "truncate": lambda file, new, folder: os.truncate(file, 0),
    "mkdir": lambda file, new, folder: new.mkdir(),
    "rmdir": lambda file, new, folder: folder.rmdir(),
    "unlink": lambda file, new, folder: file.unlink(),
    "rename": lambda file, new, folder: file.rename(new),
    "rename of a directory": lambda file, new, folder: folder.rename(new),
    "link": lambda file, new, folder: os.link(file, new),
    "symlink": lambda file, new, folder: new.symlink_to(file),
    "mkfifo": lambda file, new, folder: os.mkfifo(new),
    "mknod": lambda file, new, folder: os.mknod(new, stat.S_IFREG | 0o600),
    "bind": lambda file, new, folder: _bind(new),
    "chmod": lambda file, new, folder: file.chmod(0o777),
    "chmod of a directory": lambda file, new, folder: folder.chmod(0o777),
    "fchmod": lambda file, new, folder: _on_descriptor(lambda fd: os.fchmod(fd, 0o777))(file),
    "chown": lambda file, new, folder: os.chown(file, os.getuid(), os.getgid()),
    "fchown": lambda file, new, folder: _on_descriptor(lambda fd: os.fchown(fd, os.getuid(), os.getgid()))(file),
    "utime": lambda file, new, folder: os.utime(file),
    "utime, given": lambda file, new, folder: os.utime(file, (1, 1)),
    "futime": lambda file, new, folder: _on_descriptor(lambda fd: os.utime(fd))(file),
    "setxattr": lambda file, new, folder: os.setxattr(file, "user.mine", b"1"),
    "setxattr of ours": lambda file, new, folder: os.setxattr(file, "user.shoal.version", b"1"),
    "fsetxattr": lambda file, new, folder: _on_descriptor(lambda fd: os.setxattr(fd, "user.mine", b"1"))(file),
    "removexattr": lambda file, new, folder: os.removexattr(file, "user.shoal.version"),
}


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def outcomes(root: Path, user: int) -> dict[str, str]:
    """The errno of each call, made by a process of that user."""

    def run() -> dict[str, str]:
        if user:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        found = {}
        for what, call in WRITES.items():
            try:
                call(root / "text/0/0.txt", root / "new", root / "text")
                found[what] = "done"
            except OSError as error:
                found[what] = errno.errorcode[error.errno or 0]
        return found

    with Child(lambda say: run()) as child:
        return dict(child.heard())


@pytest.mark.parametrize("user", [0, NOBODY], ids=["root", "nobody"])
def test_nothing_can_be_written(library: Library, root: Path, user: int) -> None:
    assert outcomes(root, user) == dict.fromkeys(WRITES, "EROFS")
    assert not os.access(root / "page", os.W_OK)
    said("diff", "--recursive", library.copy / "text", root / "text")


def test_another_user_reads_all_of_it(library: Library, root: Path) -> None:
    command = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    found = said(*command, "tar", "--create", "--sort=name", "--file", "-", ".", cwd=root)
    assert (
        hashlib.sha256(found).digest()
        == hashlib.sha256(said("tar", "-c", "--sort=name", "-f-", ".", cwd=root)).digest()
    )
    assert b"herring" in said(*command, "cat", root / "text/0/0.txt")


@pytest.mark.long
def test_remounted_for_writing_by_root_its_server_refuses(library: Library, cluster: DevCluster) -> None:
    """The kernel asks then, and is told the same."""
    with Mounted(library.dataset.name, cluster.environment()) as mount:
        said("mount", "--internal-only", "-o", "remount,rw", mount.path)  # no helper of FUSE
        # Which one may be opened and not written to, where opens ask nobody; what is truncated is asked.
        opened = (
            {what for what in WRITES if what.startswith(("open for", "open to app"))} if library.is_small else set()
        )
        found = outcomes(mount.path, 0)
        assert {what for what, outcome in found.items() if outcome not in ("EROFS",)} <= opened, found
        if library.is_small:
            with pytest.raises(OSError, match="Read-only"), (mount.path / "page").open("r+b", buffering=0) as file:
                file.write(b"x")
        said("diff", "--recursive", library.copy, mount.path)
