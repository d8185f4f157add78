"""Store, retention and their inventory against a dict: random fills, reads, evictions, restarts, uses, pins and quotas.

The machine keeps what must be on the drive and who may not be dropped; after every step the ledger is exact, nothing
protected is gone, and every sealed shard reads right.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal import snapshot
from shoal.snapshot import Snapshot
from shoal_cachenode.inventory import PLAN_S, DatasetState, Inventory
from shoal_cachenode.retention import Step
from shoal_cachenode.store import Store, StoreFull

PART, SIZE = 64, 100
CAPACITY = 4 * SIZE
OBJECTS = 3
NAMES = ("a", "b", "c")


def content(key: bytes) -> bytes:
    return (key * (SIZE // len(key) + 1))[:SIZE]


class RetentionMachine(RuleBasedStateMachine):
    """Three datasets of three shards each share a drive for four."""

    @initialize()
    def start(self) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        root = Path(self._temporary.name)
        self.snapshots: dict[str, Snapshot] = {}
        for name in NAMES:
            rows = [(f"{i}", SIZE, "1") for i in range(OBJECTS)]
            path = snapshot.write(root, origin=f"m://{name}", identity=name, key_prefix="", shard_size=4096, rows=rows)
            self.snapshots[name] = Snapshot.open(path)
        self.keys = {
            name: [row.astype("<u8").tobytes() for row in opened.shard_table().keys]
            for name, opened in self.snapshots.items()
        }
        self.now = 0.0
        self.used = dict.fromkeys(NAMES, 0.0)
        self.live = dict.fromkeys(NAMES, True)
        self.pinned = dict.fromkeys(NAMES, False)
        self.quota = dict.fromkeys(NAMES, 0)
        self.owned = {name: np.ones(OBJECTS, np.bool_) for name in NAMES}
        self.epoch = 1
        self.sealed: set[bytes] = set()
        self.dropped: list[bytes] = []
        self.data = root / "node"
        self._open()

    def _open(self) -> None:
        self.store = Store(self.data, CAPACITY, part_size=PART)
        self.inventory = Inventory(self.store, on_dropped=self.dropped.append, clock=lambda: self.now)
        for opened in self.snapshots.values():
            self.inventory.of(opened)

    def states(self) -> list[DatasetState]:
        return [
            DatasetState(
                name,
                self.snapshots[name].digest,
                lambda name=name: self.owned[name],  # type: ignore[misc]
                (self.epoch, 0.0),
                self.pinned[name],
                self.live[name],
                self.used[name],
                self.quota[name],
            )
            for name in NAMES
        ]

    def held(self, name: str) -> int:
        return SIZE * len(self.sealed & set(self.keys[name]))

    @rule(data=st.data())
    def fill_up(self, data: st.DataObject) -> None:
        """Room is short most of the time."""
        for name in NAMES:
            self.use(name, data.draw(st.booleans()))
            self.pinned[name] = data.draw(st.sampled_from([False, False, True]))
        for name in data.draw(st.permutations(NAMES)):
            for index in range(OBJECTS):
                self.fill_one(name, index, is_prefetch=False)

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, OBJECTS - 1), is_prefetch=st.booleans())
    def fill(self, name: str, index: int, is_prefetch: bool) -> None:
        self.fill_one(name, index, is_prefetch=is_prefetch)

    def fill_one(self, name: str, index: int, *, is_prefetch: bool) -> None:
        key = self.keys[name][index]
        if key in self.sealed:
            return
        self.live[name], self.used[name] = True, self.now
        before, held = set(self.sealed), {n: self.held(n) for n in NAMES}
        self.dropped.clear()
        possible = self.inventory.droppable_bytes(self.states(), asker=name)
        found = self.inventory.make_room(SIZE, self.states(), asker=name, may_drop_idle=not is_prefetch)
        if found is None:  # by a plan that does not know yet what was sealed since
            self.now += PLAN_S
            found = self.inventory.make_room(SIZE, self.states(), asker=name, may_drop_idle=not is_prefetch)
        gone = set(self.dropped)
        assert gone <= before
        self.sealed -= gone
        if found is not None:
            assert sum(found.values()) == SIZE * len(gone), "what was dropped was counted"
            assert len(gone) <= 1, "no more than was needed"
        else:
            assert not gone
            allowed = [step for step in Step if step <= Step.SURPLUS or (step is Step.IDLE and not is_prefetch)]
            assert sum(possible[step] for step in allowed) == 0, "there was something to drop"
        for lost in gone:
            owner = next(n for n in NAMES if lost in self.keys[n])
            is_surplus = not self.owned[owner][self.keys[owner].index(lost)]
            assert not self.pinned[owner]
            assert self.held(owner) >= self.quota[owner], "within its guarantee"
            if self.live[owner] and not is_surplus:
                assert held[name] + SIZE <= self.quota[name], "only for one that is below its quota"
            assert not is_prefetch or is_surplus
        if found is None:
            try:
                self.store.begin(key, SIZE)
            except StoreFull:
                return
            raise AssertionError("there was room after all")
        partial = self.store.begin(key, SIZE)
        for part in range(len(partial.header.checksums)):
            start, end = partial.header.part_range(part)
            partial.write_part(part, content(key)[start:end])
        assert partial.claim_seal()
        partial.seal()
        self.inventory.sealed(key)
        self.sealed.add(key)

    @rule(name=st.sampled_from(NAMES), live=st.booleans())
    def use(self, name: str, live: bool) -> None:
        self.live[name] = live
        self.used[name] = self.now

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans(), quota=st.integers(0, 3))
    def set_policy(self, name: str, pinned: bool, quota: int) -> None:
        self.pinned[name], self.quota[name] = pinned, quota * SIZE

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, OBJECTS - 1), owned=st.booleans())
    def change_map(self, name: str, index: int, owned: bool) -> None:
        self.owned[name][index] = owned
        self.epoch += 1

    @rule(seconds=st.sampled_from([0.5, PLAN_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A file is cut; whoever opens it notices."""
        key = data.draw(st.sampled_from(sorted(self.sealed)))
        path = self.data / "shards" / key.hex()[:2] / key.hex()
        path.chmod(0o644)
        os.truncate(path, SIZE // 2)
        assert self.store.open_sealed(key) is None
        self.inventory.gone(key)
        self.sealed.discard(key)

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        if clean:
            self.store.close()
        else:
            os.close(self.store._data._lock_fd)
        self._open()

    @invariant()
    def everything_agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        files = {path.name: path.stat().st_size for path in (self.data / "shards").rglob("*") if path.is_file()}
        assert files == {key.hex(): SIZE for key in self.sealed}
        assert self.store.sealed_sizes() == dict.fromkeys(self.sealed, SIZE)
        assert self.store.used_bytes == SIZE * len(self.sealed) <= CAPACITY
        assert self.store.reserved_bytes == 0 and not list((self.data / "filling").iterdir())
        for name, opened in self.snapshots.items():
            held = self.inventory.of(opened).held.tolist()
            assert held == [key in self.sealed for key in self.keys[name]]
        for key in self.sealed:
            file = self.store.open_sealed(key)
            assert file is not None
            assert os.pread(file.fd, SIZE + 1, 0) == content(key)
            file.release()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self._temporary.cleanup()


TestRetentionMachine = RetentionMachine.TestCase
TestRetentionMachine.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
