"""The local tier, as two processes use it, against what is on the drive: random fills, reads, deaths, damage, starts.

After every step the directory is within its limit, what somebody reads is there and right, and nothing else was dropped
than what had to go, in the order of its last use.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import time
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_csi.tier import Filling, Tier
from shoal_csi.tier_ledger import SLACK_BYTES, NoRoom
from shoal_csi.tier_room import FORGOTTEN_S, IDLE_S

LIMIT = 1 << 20
NS = 1_000_000_000
FOLDERS = ("a" * 16, "b" * 16)
SIZES = (90_000, 200_000, 300_001, 600_000)

#: A folder and a number; the number says how large the object is.
Name = tuple[str, int]
names = st.tuples(st.sampled_from(FOLDERS), st.integers(0, 7))
either = st.integers(0, 1)


def size_of(name: Name) -> int:
    return SIZES[name[1] % len(SIZES)]


def content(name: Name) -> bytes:
    return random.Random(f"{name}").randbytes(size_of(name))


def key_of(name: Name) -> bytes:
    return bytes([name[1]]) * 16


def memory() -> str | None:
    """Where a sync costs nothing."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


class TierMachine(RuleBasedStateMachine):
    """Two datasets of eight objects share a megabyte."""

    @initialize()
    def start(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(dir=memory())
        self.directory = Path(self._temporary.name)
        self.now = time.time_ns()  # the kernel notes some uses, too
        self.boots = itertools.count(1)
        self.boot = next(self.boots)
        self.tiers = [self._open(), self._open()]
        self.coming: list[tuple[Filling, Name] | None] = [None, None]
        self.held: list[tuple[int, Name]] = []
        self.damaged: set[Name] = set()

    def _open(self) -> Tier:
        return Tier(self.directory, LIMIT, now_ns=lambda: self.now, boot=self.boot.to_bytes(16, "big"))

    # What is there

    def path(self, name: Name) -> Path:
        return self.directory / "objects" / name[0] / key_of(name).hex()

    def there(self) -> dict[Name, tuple[int, int]]:
        """Bytes and last use of each file."""
        found = {}
        for name in itertools.product(FOLDERS, range(8)):
            if self.path(name).exists():
                stat = self.path(name).stat()
                found[name] = stat.st_blocks * 512, stat.st_atime_ns
        return found

    def may_go(self, name: Name, used_ns: int) -> bool:
        if any(name == held for _, held in self.held):
            return False
        dataset_ns = (self.directory / "objects" / name[0] / "used").stat().st_mtime_ns
        unused, idle = (self.now - used_ns) / NS, (self.now - dataset_ns) / NS
        return unused > FORGOTTEN_S or (unused > IDLE_S and idle > IDLE_S)

    def used_bytes(self) -> int:
        found = [path.lstat().st_blocks * 512 for path in self.directory.rglob("*")]
        return sum(found)

    # What happens

    def begin(self, which: int, name: Name) -> Filling | None:
        """Begin an object, and see to it that what went for it was right to go."""
        before = self.there()
        droppable = {each: use for each, use in before.items() if self.may_go(each, use[1])}
        try:
            filling = self.tiers[which].begin(name[0], key_of(name), size_of(name))
        except NoRoom:
            assert self.there() == before, "nothing goes where there would be no room"
            least = self.used_bytes() - sum(size for size, _ in droppable.values())
            slack = (2 + len(self.coming) - self.coming.count(None)) * SLACK_BYTES + (8 << 10)
            assert least + size_of(name) + slack > LIMIT, "there was room to be made"
            return None
        gone = before.keys() - self.there().keys()
        assert gone <= droppable.keys()
        stay = [use for each, (_, use) in droppable.items() if each not in gone]
        assert all(droppable[each][1] <= min(stay, default=self.now) for each in gone), "the least recently used went"
        self.damaged -= gone
        if filling is None:
            assert name in before or any(each and each[1] == name for each in self.coming)
        else:
            assert name not in before
        return filling

    @precondition(lambda self: None in self.coming)
    @rule(which=either, name=names)
    def fill(self, which: int, name: Name) -> None:
        if self.coming[which] is not None:
            return
        is_held = any(name == held for _, held in self.held)
        is_whole = self.tiers[which].verify(name[0], key_of(name), size_of(name), lambda: True)
        if name in self.damaged and not is_held:
            assert is_whole is False
            self.damaged.discard(name)
        filling = self.begin(which, name)
        if filling is not None:
            with filling:
                filling.write(memoryview(content(name)))
                filling.seal()

    @rule(which=either, name=names)
    def begin_only(self, which: int, name: Name) -> None:
        if self.coming[which] is None:
            filling = self.begin(which, name)
            if filling is not None:
                filling.write(memoryview(content(name))[: size_of(name) // 2])
                self.coming[which] = filling, name

    @rule(which=either, is_sealed=st.booleans())
    def end(self, which: int, is_sealed: bool) -> None:
        if self.coming[which] is not None:
            filling, name = self.coming[which]  # type: ignore[misc]
            self.coming[which] = None
            with filling:
                if is_sealed:
                    filling.write(memoryview(content(name))[size_of(name) // 2 :])
                    filling.seal()

    @rule(which=either)
    def die(self, which: int) -> None:
        """Whatever was coming in stays as it is, and nobody has it locked; then the process is replaced."""
        if self.coming[which] is not None:
            os.close(self.coming[which][0].fd)  # type: ignore[index]
            self.coming[which] = None
        self.tiers[which].close()
        self.tiers[which] = self._open()

    @rule(which=either, name=names, is_kept=st.booleans())
    def open(self, which: int, name: Name, is_kept: bool) -> None:
        self.tiers[which].mark_used(name[0])
        fd, _ = self.tiers[which].find(name[0], key_of(name), size_of(name))
        if fd is None:
            return
        assert name not in self.damaged
        if is_kept:
            self.held.append((fd, name))
        else:
            assert os.pread(fd, 1 << 20, 0) == content(name)
            os.close(fd)

    @precondition(lambda self: self.held)
    @rule()
    def close_one(self) -> None:
        os.close(self.held.pop(0)[0])

    @rule(minutes=st.sampled_from([0.5, 5, 70, 70, 25 * 60]))
    def wait(self, minutes: float) -> None:
        self.now += int(minutes * 60 * NS)

    @rule(name=names, is_cut=st.booleans())
    def damage(self, name: Name, is_cut: bool) -> None:
        if name in self.damaged or not self.path(name).exists() or any(name == held for _, held in self.held):
            return
        before = self.path(name).stat()
        if is_cut:
            os.truncate(self.path(name), before.st_size - 1)
        else:
            flipped = bytearray(self.path(name).read_bytes())
            flipped[len(flipped) // 2] ^= 8
            self.path(name).write_bytes(flipped)
        os.utime(self.path(name), ns=(before.st_atime_ns, before.st_mtime_ns + NS))
        self.damaged.add(name)

    @precondition(lambda self: not self.held)
    @rule()
    def start_the_machine_anew(self) -> None:
        self.boot = next(self.boots)
        for which in (0, 1):
            self.die(which)

    @invariant()
    def is_within_its_limit(self) -> None:
        assert self.used_bytes() <= LIMIT
        assert self.tiers[0].counts()[1] == len(self.there())

    @invariant()
    def what_is_read_is_there_and_right(self) -> None:
        for fd, name in self.held:
            assert os.fstat(fd).st_nlink == 1
            assert os.pread(fd, 1 << 20, 0) == content(name)

    def teardown(self) -> None:
        for each in self.coming:
            if each is not None:
                os.close(each[0].fd)
        for fd, _ in self.held:
            os.close(fd)
        for tier in self.tiers:
            tier.close()
        self._temporary.cleanup()


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
