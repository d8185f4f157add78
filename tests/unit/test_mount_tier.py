"""The local tier: whole files or none, never more than its limit, and what goes when room is needed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.datasets import DatasetRecord
from shoal.errors import InvalidRequest, NodeUnavailable, StoreUnusable
from shoal.shards import PART_SIZE
from shoal_csi import keeping as keepings
from shoal_csi import tier_room
from shoal_csi.keeping import Keeping, steps
from shoal_csi.tier import Tier
from shoal_csi.tier_file import XATTR, Trust
from shoal_csi.tier_ledger import SLACK_BYTES, NoRoom
from shoal_csi.tier_room import FORGOTTEN_S, IDLE_S, Kept
from tests.support import filesystems
from tests.support.processes import Child, Say
from tests.support.waiting import wait_for

KIB, MIB = 1 << 10, 1 << 20
FOLDER, OTHER = "a" * 16, "b" * 16
NS = 1_000_000_000


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int, size_bytes: int = 100 * KIB) -> bytes:
    return random.Random(number).randbytes(size_bytes)


def fill(tier: Tier, number: int, size_bytes: int = 100 * KIB, folder: str = FOLDER) -> bool:
    """Bring an object in; whether it was not there."""
    filling = tier.begin(folder, key_of(number), size_bytes)
    if filling is None:
        return False
    with filling:
        data = memoryview(content(number, size_bytes))
        for start in range(0, size_bytes, 30_000):
            filling.write(data[start : start + 30_000])
        filling.seal()
    return True


def read(tier: Tier, number: int, size_bytes: int = 100 * KIB, folder: str = FOLDER) -> bytes | None:
    fd, _ = tier.find(folder, key_of(number), size_bytes)
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read()


def path_of(tier: Tier, number: int, folder: str = FOLDER) -> Path:
    return tier.directory / "objects" / folder / key_of(number).hex()


def files_of(tier: Tier) -> list[Path]:
    return [path for path in tier.directory.glob("objects/*/*") if path.name != "used"]


def used_bytes(directory: Path) -> int:
    """What everything below a directory has allocated."""
    found = (os.lstat(os.path.join(where, name)) for where, a, b in os.walk(directory) for name in (*a, *b))
    return sum(each.st_blocks * 512 for each in found)


def measured(directory: Path) -> int:
    """The same at one moment of a tier that others change."""
    with (directory / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return used_bytes(directory)


def go_on() -> bool:
    return True


class Clock:
    def __init__(self) -> None:
        self.now_s = time.time()  # the kernel notes some uses, too

    def __call__(self) -> int:
        return int(self.now_s * NS)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    made = tmp_path / "tier"
    made.mkdir()
    return made


@pytest.fixture
def tier(place: Path, clock: Clock) -> Iterator[Tier]:
    with contextlib.closing(Tier(place, 4 * MIB, now_ns=clock)) as made:
        yield made


# In and out


def test_what_came_in_is_found_by_every_process(tier: Tier, place: Path) -> None:
    assert read(tier, 1) is None
    assert fill(tier, 1)
    assert read(tier, 1) == content(1)
    assert not fill(tier, 1), "it is there"
    with contextlib.closing(Tier(place, 4 * MIB)) as other:
        assert read(other, 1) == content(1)
        assert fill(other, 2)
    assert read(tier, 2) == content(2)
    assert tier.counts() == (measured(place), 2)


def test_only_its_owner_gets_at_the_files(tier: Tier, place: Path) -> None:
    fill(tier, 1)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in place.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_what_is_not_sealed_is_not_there_and_leaves_nothing(tier: Tier, place: Path) -> None:
    before = measured(place)
    filling = tier.begin(FOLDER, key_of(1), 100 * KIB)
    assert filling is not None
    with filling:
        filling.write(memoryview(content(1)))
        assert read(tier, 1) is None
        assert measured(place) >= before + 100 * KIB, "all of its space is taken from the beginning"
        with contextlib.closing(Tier(place, 4 * MIB)) as other:
            assert not fill(other, 1), "one process brings it"
    assert read(tier, 1) is None
    assert [*(place / "filling").iterdir()] == []
    assert fill(tier, 1)


def test_what_a_killed_process_left_goes(tier: Tier, place: Path) -> None:
    def begin(say: Say) -> None:
        with contextlib.closing(Tier(place, 4 * MIB)) as own:
            filling = own.begin(FOLDER, key_of(1), 2 * MIB)
            assert filling is not None
            filling.write(memoryview(content(1, MIB)))
            say("half of it")
            signal.pause()

    with Child(begin) as child:
        assert child.heard() == "half of it"
        assert not fill(tier, 1, 2 * MIB), "somebody is at it"
        child.kill()
    assert read(tier, 1, 2 * MIB) is None
    assert used_bytes(place) > 2 * MIB
    assert fill(tier, 2, 3 * MIB), "its room is given to others"
    assert used_bytes(place) <= 4 * MIB
    assert [*(place / "filling").iterdir()] == []


# Damage


def flip(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(60_000)
        byte = file.read(1)[0]
        file.seek(60_000)
        file.write(bytes([byte ^ 1]))


def flip_unseen(path: Path) -> None:
    """As a drive does."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 99 * KIB)


def cut_and_lengthened(path: Path) -> None:
    os.truncate(path, 99 * KIB)
    os.truncate(path, 100 * KIB)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def tear_attribute(path: Path) -> None:
    raw = os.getxattr(path, XATTR)
    os.setxattr(path, XATTR, raw[:20] + bytes(len(raw) - 20))


def take_attribute(path: Path) -> None:
    os.removexattr(path, XATTR)


def empty(path: Path) -> None:
    """As a power failure leaves a file whose bytes never came to the drive."""
    before = path.stat()
    os.truncate(path, 0)
    os.truncate(path, 100 * KIB)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGE = (flip, cut, cut_and_lengthened, lengthen, tear_attribute, take_attribute)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_never_given_out(tier: Tier, damage: Callable[[Path], None]) -> None:
    fill(tier, 1)
    damage(path_of(tier, 1))
    assert read(tier, 1) is None
    assert tier.verify(FOLDER, key_of(1), 100 * KIB, go_on) is False
    assert not path_of(tier, 1).exists()
    assert fill(tier, 1)
    assert read(tier, 1) == content(1)


@pytest.mark.parametrize("damage", [*DAMAGE, flip_unseen, empty])
def test_damage_after_the_machine_went_down(tier: Tier, place: Path, damage: Callable[[Path], None]) -> None:
    """Also such as no time of the file tells of."""
    fill(tier, 1)
    damage(path_of(tier, 1))
    with contextlib.closing(Tier(place, 4 * MIB, boot=b"another start...")) as after:
        assert read(after, 1) is None
        assert after.verify(FOLDER, key_of(1), 100 * KIB, go_on) is False
        assert not path_of(after, 1).exists()
        assert after.counts()[1] == 0


def test_after_a_start_of_the_machine_each_file_is_read_once(tier: Tier, place: Path) -> None:
    fill(tier, 1)
    with contextlib.closing(Tier(place, 4 * MIB, boot=b"another start...")) as after:
        assert after.find(FOLDER, key_of(1), 100 * KIB) == (None, Trust.UNSURE)
        assert after.verify(FOLDER, key_of(1), 100 * KIB, go_on) is True
        assert read(after, 1) == content(1)


def test_verifying_can_be_stopped(place: Path) -> None:
    size = PART_SIZE + MIB
    with contextlib.closing(Tier(place, 2 * size)) as tier:
        fill(tier, 1, size)
        os.utime(path_of(tier, 1))
        for beat, trust in ((lambda: False, Trust.UNSURE), (go_on, Trust.WHOLE)):
            assert tier.find(FOLDER, key_of(1), size) == (None, Trust.UNSURE)
            assert tier.verify(FOLDER, key_of(1), size, beat) is True
            assert tier.find(FOLDER, key_of(1), size)[1] is trust


def test_a_file_of_another_object_is_none(tier: Tier) -> None:
    fill(tier, 1)
    path_of(tier, 1).rename(path_of(tier, 2))
    assert read(tier, 2) is None
    assert tier.verify(FOLDER, key_of(2), 100 * KIB, go_on) is False


def test_whoever_reads_a_file_keeps_it(tier: Tier, place: Path, clock: Clock) -> None:
    """Also where another process has the descriptor, as the kernel will have it."""
    for number in range(3):
        fill(tier, number, MIB)
    fd, _ = tier.find(FOLDER, key_of(0), MIB)
    assert fd is not None
    with subprocess.Popen(["sleep", "infinity"], pass_fds=[fd]) as holder:
        os.close(fd)
        clock.now_s += 2 * FORGOTTEN_S
        assert fill(tier, 3, 2 * MIB)
        assert path_of(tier, 0).exists()
        assert not path_of(tier, 1).exists()
        holder.kill()
    clock.now_s += 2 * FORGOTTEN_S
    assert fill(tier, 4, 3 * MIB)
    assert not path_of(tier, 0).exists()
    assert used_bytes(place) <= 4 * MIB


# What goes


def test_the_first_come_stay_while_their_dataset_is_read(tier: Tier, place: Path, clock: Clock) -> None:
    for number in range(3):
        assert fill(tier, number, MIB)
        clock.now_s += 10
    for number in range(3, 12):
        clock.now_s += IDLE_S / 2
        tier.mark_used(FOLDER)
        with pytest.raises(NoRoom):
            fill(tier, number, MIB)
        with pytest.raises(NoRoom):
            fill(tier, number, MIB, OTHER)
    assert [read(tier, number, MIB) == content(number, MIB) for number in range(3)] == [True] * 3


def test_idle_datasets_go_the_file_first_that_was_used_longest_ago(tier: Tier, clock: Clock) -> None:
    for number in range(3):
        fill(tier, number, MIB)
        clock.now_s += 120
    read(tier, 0, MIB)
    clock.now_s += IDLE_S + 120
    assert fill(tier, 9, MIB, OTHER)
    assert [path_of(tier, number).exists() for number in range(3)] == [True, False, True]


def test_a_use_by_another_process_counts(tier: Tier, place: Path, clock: Clock) -> None:
    for number in range(3):
        fill(tier, number, MIB)
        clock.now_s += 120
    with contextlib.closing(Tier(place, 4 * MIB, now_ns=clock)) as other:
        clock.now_s += IDLE_S
        assert read(other, 0, MIB) is not None
        clock.now_s += 120
        assert fill(tier, 9, MIB, OTHER)
    assert [path_of(tier, number).exists() for number in range(3)] == [True, False, True]


def test_what_a_newer_snapshot_has_no_more_goes_in_the_end(tier: Tier, clock: Clock) -> None:
    for number in range(3):
        fill(tier, number, MIB)
    for _ in range(26):
        clock.now_s += FORGOTTEN_S / 25
        tier.mark_used(FOLDER)
        assert read(tier, 0, MIB) is not None
    assert fill(tier, 3, MIB)
    assert [path_of(tier, number).exists() for number in range(3)].count(True) == 2
    assert path_of(tier, 0).exists()


def test_where_there_would_be_no_room_nothing_goes(tier: Tier, clock: Clock) -> None:
    fill(tier, 0, MIB)
    clock.now_s += 2 * FORGOTTEN_S
    fill(tier, 1, 2 * MIB, OTHER)
    with pytest.raises(NoRoom):
        fill(tier, 2, 3 * MIB)
    assert read(tier, 0, MIB) is not None


def test_a_lower_limit_holds_from_the_start(tier: Tier, place: Path) -> None:
    for number in range(3):
        fill(tier, number, MIB)
    with contextlib.closing(Tier(place, 2 * MIB)) as lower:
        assert used_bytes(place) <= 2 * MIB
        assert lower.counts() == (measured(place), 1)


@given(st.data())
def test_victims_are_the_least_recently_used_of_those_that_may_go(data: st.DataObject) -> None:
    """What another process has used since, too."""
    now = 1000 * FORGOTTEN_S
    ages = st.integers(0, 2 * FORGOTTEN_S)
    names = [f"{folder}/{number}" for folder in "ab" for number in range(4)]
    datasets = {folder: (now - data.draw(ages)) * NS for folder in "ab"}
    known = {name: Kept(name[0], 1, (now - data.draw(ages)) * NS) for name in names}
    real = {
        name: data.draw(st.one_of(st.just(kept.used_ns), st.none(), st.integers(kept.used_ns, now * NS)))
        for name, kept in known.items()
    }
    found = list(tier_room.victims(known, datasets, now * NS, real.__getitem__))
    expected = [
        (used, name)
        for name, used in real.items()
        if used is not None
        and tier_room.may_go(known[name].used_ns, datasets[name[0]], now * NS)
        and tier_room.may_go(used, datasets[name[0]], now * NS)
    ]
    assert found == [name for _, name in sorted(expected)]


@pytest.mark.parametrize(
    ("unused_s", "dataset_unused_s", "goes"),
    [
        (IDLE_S + 1, IDLE_S + 1, True),
        (IDLE_S - 1, 9 * IDLE_S, False),
        (9 * IDLE_S, IDLE_S - 1, False),
        (FORGOTTEN_S + 1, 0, True),
        (-5, -5, False),
    ],
)
def test_what_may_go(unused_s: int, dataset_unused_s: int, goes: bool) -> None:
    now = 10**18
    assert tier_room.may_go(now - unused_s * NS, now - dataset_unused_s * NS, now) is goes


# The bound


def test_several_processes_share_the_limit(place: Path) -> None:
    """Each brings objects in and opens others, as fast as it can; some die in the middle of one."""
    limit = 2 * MIB
    Tier(place, limit).close()
    began = time.time_ns()

    def work(seed: int, say: Say) -> int:
        chance = random.Random(seed)
        right = 0
        hours = [0]
        with contextlib.closing(Tier(place, limit, now_ns=lambda: began + hours[0] * 3600 * NS)) as own:
            for step in range(60):
                hours[0] += 13
                number, size = chance.randrange(12), 150 * KIB
                with contextlib.suppress(NoRoom):
                    fill(own, number, size)
                found = read(own, number, size)
                assert found in (None, content(number, size))
                right += found is not None
                if step == 30:
                    filling = own.begin(FOLDER, key_of(100 + seed), size)
                    say("half-way")
                    if seed == 0 and filling is not None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if filling is not None:
                        filling.__exit__()
        return right

    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(lambda say, seed=seed: work(seed, say))) for seed in range(3)]  # type: ignore[misc]
        assert {child.heard() for child in children} == {"half-way"}
        most = 0
        while not all(child.has_said_more for child in children):
            most = max(most, measured(place))
        assert all(child.heard() > 30 for child in children[1:])
    assert limit / 2 < most <= limit
    with contextlib.closing(Tier(place, limit)) as after:
        assert [*(place / "filling").iterdir()] == []
        assert after.counts()[0] == measured(place)


# Where it cannot be


def test_limits_that_hold_nothing(place: Path) -> None:
    with pytest.raises(InvalidRequest, match="--local-tier-size"):
        Tier(place, 0)


def test_directories_that_will_not_do(tmp_path: Path, place: Path) -> None:
    with pytest.raises(StoreUnusable, match=f"does not exist.*mkdir -m 700 {tmp_path}/none"):
        Tier(tmp_path / "none", MIB)
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match="is not a directory"):
        Tier(tmp_path / "file", MIB)
    place.chmod(0o777)
    with pytest.raises(StoreUnusable, match="chmod go-w"):
        Tier(place, MIB)
    place.chmod(0o755)
    (place / "objects").mkdir(mode=0o755)
    with pytest.raises(StoreUnusable, match="no folder of a local tier"):
        Tier(place, MIB)
    if os.geteuid() != 0:
        pytest.skip("giving a directory to another user takes root")
    os.chown(place, 12345, 12345)
    with pytest.raises(StoreUnusable, match=f"another user's.*chown 0 {place}"):
        Tier(place, MIB)


def test_a_full_and_a_read_only_file_system(tmp_path: Path) -> None:
    with filesystems.memory(tmp_path / "drive", 2 * MIB) as drive:
        drive.chmod(0o755)
        filler = filesystems.fill_up(drive)
        with pytest.raises(StoreUnusable, match="is full: free space"):
            Tier(drive, 4 * MIB)
        filler.unlink()
        with contextlib.closing(Tier(drive, 4 * MIB)) as tier:
            assert fill(tier, 1)
            with pytest.raises(OSError, match="space") as failed:
                fill(tier, 2, 3 * MIB)
            assert failed.value.errno == errno.ENOSPC
            assert [*(drive / "filling").iterdir()] == []
            filesystems.set_read_only(drive, True)
            assert read(tier, 1) == content(1), "what is there is read all the same"
            with pytest.raises(OSError, match="Read-only"):
                fill(tier, 3)
            with pytest.raises(StoreUnusable, match="is read-only: mount it writable"):
                Tier(drive, 4 * MIB)


def test_a_stacked_file_system(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in ("lower", "upper", "work", "merged")]
    for part in parts:
        part.mkdir()
    lower, upper, work, merged = parts
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    done = subprocess.run(["mount", "-t", "overlay", "-o", options, "none", merged], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"overlayfs cannot be mounted here: {done.stderr.decode()}")
    try:
        with pytest.raises(StoreUnusable, match="lies on overlayfs"):
            Tier(merged, MIB)
    finally:
        subprocess.run(["umount", merged], check=True)


def test_a_directory_that_was_emptied(tier: Tier, place: Path) -> None:
    fill(tier, 1)
    subprocess.run(["rm", "-r", *place.iterdir()], check=True)
    assert read(tier, 1) is None
    with pytest.raises(FileNotFoundError):
        fill(tier, 2)
    with contextlib.closing(Tier(place, 4 * MIB)) as anew:
        assert fill(anew, 1)
        with pytest.raises(FileNotFoundError, match="replaced"):
            fill(tier, 2)


# What a mount keeps


class Reader:
    """Of one object; `fails` is raised by the next read."""

    def __init__(self, number: int, size_bytes: int) -> None:
        self.data = content(number, size_bytes)
        self.fails: Exception | None = None
        self.is_local = False
        self.reads: list[tuple[int, int]] = []

    def is_for_local_node(self) -> bool:
        return self.is_local

    def read_into(self, start: int, end: int, view: memoryview) -> int:
        if self.fails is not None:
            raise self.fails
        self.reads.append((start, end))
        view[:] = self.data[start:end]
        return end - start


class Objects:
    """A snapshot of objects, and their readers."""

    shard_size = 256 * KIB

    def __init__(self, *size_bytes: int) -> None:
        self.readers = [Reader(number, size) for number, size in enumerate(size_bytes)]

    def size(self, row: int) -> int:
        return len(self.readers[row].data)

    def key(self, row: int) -> bytes:
        return key_of(row)

    def path(self, row: int) -> str:
        return f"{row}.bin"


@contextmanager
def kept_in(tier: Tier, objects: Objects, is_busy: Callable[[], bool] = lambda: False) -> Iterator[Keeping]:
    record = DatasetRecord("set", "s3://b/p", "", 1 << 28, 1, "0" * 32, ("0" * 32,), 1, 10)
    snapshot: Any = objects
    reader_of: Any = objects.readers.__getitem__
    keeping = Keeping(tier, record, snapshot, reader_of, from_bytes=64 * KIB, is_busy=is_busy)
    try:
        yield keeping
        wait_for(lambda: keeping.report()["waiting"] == 0)
    finally:
        keeping.close()


def through(keeping: Keeping, row: int, size_bytes: int) -> None:
    """A reader opens an object, reads so much of it and closes it."""
    fd = keeping.open(row)
    if fd is not None:
        os.close(fd)
        return
    keeping.has_read(row, size_bytes)
    keeping.released(row)


def is_kept(keeping: Keeping, objects: Objects, row: int) -> bool:
    fd = keeping.open(row)
    if fd is None:
        return False
    with os.fdopen(fd, "rb") as file:
        assert file.read() == objects.readers[row].data
    return True


def test_an_object_that_was_read_is_kept(tier: Tier) -> None:
    objects = Objects(700 * KIB, 700 * KIB)
    with kept_in(tier, objects) as keeping:
        assert keeping.open(0) is None
        keeping.has_read(0, 700 * KIB)
        assert keeping.report()["waiting"] == 0, "not while it is open"
        keeping.released(0)
        wait_for(lambda: is_kept(keeping, objects, 0))
        assert not is_kept(keeping, objects, 1)
        assert objects.readers[0].reads == [(0, 700 * KIB)]
        report = keeping.report()
        assert (report["brought"], report["brought_bytes"], report["files"]) == (1, 700 * KIB, 1)


def test_who_looks_at_heads_has_nothing_fetched_until_a_quarter_was_read(tier: Tier) -> None:
    objects = Objects(800 * KIB)
    with kept_in(tier, objects) as keeping:
        for _ in range(3):
            through(keeping, 0, 60 * KIB)
        assert keeping.report()["waiting"] == 0
        assert objects.readers[0].reads == []
        through(keeping, 0, 60 * KIB)
        wait_for(lambda: is_kept(keeping, objects, 0))


def test_what_is_not_kept(tier: Tier) -> None:
    """Small objects, too large ones, and what this machine's node has as a file by itself."""
    objects = Objects(60 * KIB, 4 * MIB, 200 * KIB, 200 * KIB)
    objects.readers[2].is_local = True
    with kept_in(tier, objects) as keeping:
        for row in range(4):
            through(keeping, row, objects.size(row))
        wait_for(lambda: is_kept(keeping, objects, 3))
        assert [bool(reader.reads) for reader in objects.readers] == [False, False, False, True]


def test_an_object_that_cannot_be_read_is_not_kept(tier: Tier, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    objects = Objects(200 * KIB)
    objects.readers[0].fails = NodeUnavailable("no cache node gave bytes")
    with kept_in(tier, objects) as keeping, caplog.at_level("INFO"):
        through(keeping, 0, 200 * KIB)
        wait_for(lambda: keeping.report()["waiting"] == 0)
        assert "'0.bin' is not kept in the local tier: no cache node gave bytes" in caplog.text
        assert [*(place / "filling").iterdir()] == []
        objects.readers[0].fails = None
        through(keeping, 0, 200 * KIB)
        wait_for(lambda: is_kept(keeping, objects, 0))
        assert keeping.report()["fault"] is None


def test_damage_is_found_counted_and_repaired(tier: Tier) -> None:
    objects = Objects(200 * KIB)
    with kept_in(tier, objects) as keeping:
        through(keeping, 0, 200 * KIB)
        wait_for(lambda: is_kept(keeping, objects, 0))
        (path,) = files_of(tier)
        flip(path)
        assert keeping.open(0) is None
        wait_for(lambda: is_kept(keeping, objects, 0))
        assert keeping.report()["damaged"] == 1


def _tier_of(drive: Path) -> Tier:
    drive.chmod(0o755)
    return Tier(drive, 8 * MIB)


def test_a_drive_that_fails_is_said_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(*[400 * KIB] * 8)
    with (
        filesystems.memory(tmp_path / "drive", 2 * MIB) as drive,
        contextlib.closing(_tier_of(drive)) as tier,
        kept_in(tier, objects) as keeping,
    ):
        through(keeping, 0, 400 * KIB)
        wait_for(lambda: is_kept(keeping, objects, 0))
        filler = filesystems.fill_up(drive)
        for row in range(1, 8):
            through(keeping, row, 400 * KIB)
            wait_for(lambda: keeping.report()["waiting"] == 0)
        assert caplog.text.count("is full: free space") == 1
        assert "is full" in str(keeping.report()["fault"])
        assert is_kept(keeping, objects, 0)
        filler.unlink()
        monkeypatch.setattr(keeping, "_paused_until", 0.0)  # when the pause is over
        through(keeping, 1, 400 * KIB)
        wait_for(lambda: is_kept(keeping, objects, 1))
        assert keeping.report()["fault"] is None


def test_a_full_tier_is_not_asked_again_and_again(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(*[1500 * KIB] * 5)
    begun: list[bytes] = []
    real = tier.begin
    monkeypatch.setattr(tier, "begin", lambda folder, key, size: begun.append(key) or real(folder, key, size))
    with kept_in(tier, objects) as keeping:
        for row in range(5):
            through(keeping, row, 1500 * KIB)
            wait_for(lambda: keeping.report()["waiting"] == 0)
        assert begun == [key_of(row) for row in range(3)], "two fit, the third did not"
        assert [is_kept(keeping, objects, row) for row in range(5)] == [True, True, False, False, False]
        assert keeping.report()["fault"] is None


def test_it_gives_way_to_readers_for_a_while(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(700 * KIB)
    waits = threading.Event()
    is_busy = threading.Event()
    is_busy.set()

    def busy() -> bool:
        waits.set()
        return is_busy.is_set()

    monkeypatch.setattr(keepings, "GIVE_WAY_S", 1e6)
    with kept_in(tier, objects, busy) as keeping:
        through(keeping, 0, 700 * KIB)
        assert waits.wait(20)
        assert objects.readers[0].reads == []
        is_busy.clear()
        wait_for(lambda: is_kept(keeping, objects, 0))
    monkeypatch.setattr(keepings, "GIVE_WAY_S", 0.0)
    is_busy.set()
    (path,) = files_of(tier)
    path.unlink()
    with kept_in(tier, objects, busy) as keeping:
        through(keeping, 0, 700 * KIB)
        wait_for(lambda: is_kept(keeping, objects, 0))


@given(st.integers(1, 100 * MIB), st.sampled_from([4 * KIB, 5 * MIB, PART_SIZE, 20 * MIB, 64 * MIB]))
def test_steps_are_whole_parts(size_bytes: int, shard_size: int) -> None:
    found = list(steps(size_bytes, shard_size))
    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == size_bytes
    for start, end in found:
        assert end - start <= PART_SIZE
        for edge in (start, end):
            within = edge % shard_size
            assert within % PART_SIZE == 0 or edge == size_bytes, "neither inside of a part nor of a shard"


def test_slack_is_enough_for_the_least_limit(place: Path) -> None:
    with contextlib.closing(Tier(place, 8 * SLACK_BYTES)) as least:
        assert fill(least, 1, least.largest_bytes)
        assert used_bytes(place) <= 8 * SLACK_BYTES
