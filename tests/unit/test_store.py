"""The store against a dict: what was sealed is there, byte for byte, whatever happened in between."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.errors import ShardCorrupt, StoreUnusable
from shoal_cachenode import sealed_file
from shoal_cachenode import store as store_module
from shoal_cachenode.sealed_file import Damage
from shoal_cachenode.shard_file import XATTR, ShardHeader
from shoal_cachenode.store import AlreadySealed, PartialFile, Store, StoreFull

PART = 64


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int, size_bytes: int) -> bytes:
    return bytes((number * 31 + i) % 251 for i in range(size_bytes))


def fill(store: Store, number: int, size_bytes: int) -> None:
    partial = store.begin(key(number), size_bytes)
    for part in range(len(partial.header.checksums)):
        start, end = partial.header.part_range(part)
        partial.write_part(part, content(number, size_bytes)[start:end])
    assert partial.claim_seal()
    partial.seal()


def read(store: Store, number: int) -> bytes | None:
    file = store.open_sealed(key(number))
    if file is None:
        return None
    data = os.pread(file.fd, file.header.size_bytes + 1, 0)
    file.release()
    return data


def crash(store: Store) -> None:
    """Let go of the directory as a killed process does: no clean mark."""
    os.close(store._data._lock_fd)


def test_header_round_trip() -> None:
    header = ShardHeader.empty(1000, 64, 7)
    header.checksums[0], header.checksums[15] = 0, 2**64 - 1
    header.written_ns = 123
    raw = header.encode(key(1))
    assert ShardHeader.decode(raw, key(1)) == header
    assert not header.is_complete
    for cut in range(len(raw)):
        with pytest.raises(ShardCorrupt):
            ShardHeader.decode(raw[:cut], key(1))


@pytest.mark.parametrize("byte", range(32 + 16 * 8 + 2))
def test_header_with_a_changed_byte_is_none(byte: int) -> None:
    header = ShardHeader.empty(1000, 64, 7)
    header.checksums = list(range(16))
    raw = bytearray(header.encode(key(1)))
    raw[byte] ^= 1
    with pytest.raises(ShardCorrupt):
        ShardHeader.decode(bytes(raw), key(1))


def test_header_of_another_shard_is_none() -> None:
    with pytest.raises(ShardCorrupt, match="of another shard"):
        ShardHeader.decode(ShardHeader.empty(1000, 64, 7).encode(key(1)), key(2))


def test_largest_header_fits_an_ext4_attribute() -> None:
    from shoal.shards import MAX_SHARD_SIZE, PART_SIZE

    assert len(ShardHeader.empty(MAX_SHARD_SIZE, PART_SIZE, 1).encode(key(1))) < 4000


def test_sealed_shard_is_read_only_and_outlives_eviction(tmp_path: Path) -> None:
    store = Store(tmp_path, 10_000, part_size=PART)
    fill(store, 1, 200)
    file = store.open_sealed(key(1))
    assert file is not None
    with pytest.raises(OSError):
        os.pwrite(file.fd, b"x", 0)
    assert store.evict(key(1)) == 200
    assert os.pread(file.fd, 200, 0) == content(1, 200)
    file.release()
    assert read(store, 1) is None
    assert store.used_bytes == 0
    store.close()


def test_full_store_refuses_and_reserves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, 300, part_size=PART)
    fill(store, 1, 200)
    with pytest.raises(StoreFull):
        store.begin(key(2), 101)
    assert store.used_bytes == 200
    with pytest.raises(AlreadySealed):
        store.begin(key(1), 200)
    store.close()


def test_part_that_did_not_read_back_stops_the_seal(tmp_path: Path) -> None:
    store = Store(tmp_path, 10_000, part_size=PART)
    partial = store.begin(key(1), 200)
    for part in range(4):
        start, end = partial.header.part_range(part)
        partial.write_part(part, content(1, 200)[start:end])
    os.pwrite(partial.fd, b"\xff", 70)
    with pytest.raises(ShardCorrupt):
        partial.seal()
    assert partial.header.checksums[1] is None
    partial.drop()
    assert store.used_bytes == 0
    assert not list((tmp_path / "filling").iterdir())
    store.close()


def test_killed_fill_goes_on_where_it_was_and_trusts_no_torn_part(tmp_path: Path) -> None:
    store = Store(tmp_path, 10_000, part_size=PART)
    partial = store.begin(key(1), 200)
    partial.write_part(0, content(1, 200)[:64])
    partial.write_part(2, content(1, 200)[128:192])
    os.pwrite(partial.fd, b"\xff", 130)  # as a torn write would leave it
    crash(store)
    store = Store(tmp_path, 10_000, part_size=PART)
    assert store.used_bytes == 200
    partial = store.begin(key(1), 200)
    assert [c is not None for c in partial.header.checksums] == [True, False, False, False]
    partial.drop()
    store.close()


def test_foreign_or_resized_partial_file_is_begun_anew(tmp_path: Path) -> None:
    store = Store(tmp_path, 10_000, part_size=PART)
    store.begin(key(1), 200).open()
    crash(store)
    os.setxattr(tmp_path / "filling" / key(1).hex(), XATTR, b"garbage")
    store = Store(tmp_path, 10_000, part_size=PART)
    partial = store.begin(key(1), 200)
    assert partial.header == ShardHeader.empty(200, PART, store.generation)
    partial.drop()
    store.close()


def test_truncated_sealed_file_is_a_miss(tmp_path: Path) -> None:
    store = Store(tmp_path, 10_000, part_size=PART)
    fill(store, 1, 200)
    crash(store)
    path = tmp_path / "shards" / key(1).hex()[:2] / key(1).hex()
    path.chmod(0o644)
    os.truncate(path, 100)
    store = Store(tmp_path, 10_000, part_size=PART)
    assert read(store, 1) is None
    assert store.used_bytes == 0
    store.close()


@pytest.mark.parametrize("flip", [False, True])
def test_after_an_unclean_stop_of_the_machine_sealed_files_are_verified(tmp_path: Path, flip: bool) -> None:
    store = Store(tmp_path, 10_000, part_size=PART)
    fill(store, 1, 200)
    crash(store)
    state = tmp_path / "state.json"
    state.write_text(state.read_text().replace('"boot_id": "', '"boot_id": "another-'))
    path = tmp_path / "shards" / key(1).hex()[:2] / key(1).hex()
    if flip:
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"\xff")
    store = Store(tmp_path, 10_000, part_size=PART)
    assert store.generation == 2
    assert read(store, 1) == (None if flip else content(1, 200))
    store.close()


def after_the_machine_went_down(directory: Path) -> Store:
    """A store with one sealed shard, of before."""
    store = Store(directory, 10_000, part_size=PART)
    fill(store, 1, 200)
    crash(store)
    state = directory / "state.json"
    state.write_text(state.read_text().replace('"boot_id": "', '"boot_id": "another-'))
    return Store(directory, 10_000, part_size=PART)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each time that a sealed file is read and verified; it takes a moment."""
    times: list[int] = []

    def slow(fd: int, header: ShardHeader, beat: Callable[[], None]) -> Damage | None:
        times.append(fd)
        time.sleep(0.1)
        return sealed_file.check(fd, header, beat)

    monkeypatch.setattr(store_module, "check", slow)
    return times


def close_files(store: Store) -> None:
    """As when many others are opened."""
    for file in store._open.values():
        file.release()
    store._open.clear()


@pytest.mark.parametrize("is_open", [False, True])
def test_readers_that_come_together_verify_a_shard_once(tmp_path: Path, verified: list[int], is_open: bool) -> None:
    store = after_the_machine_went_down(tmp_path)
    if is_open:
        assert read(store, 1) == content(1, 200)
        (tmp_path / "shards" / key(1).hex()[:2] / key(1).hex()).touch()
        verified.clear()
    for _ in range(2):
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(read, [store] * 16, [1] * 16)) == [content(1, 200)] * 16
        assert len(verified) == 1
        close_files(store)
    store.close()


def test_a_shard_is_verified_once_where_that_cannot_be_noted(
    tmp_path: Path, verified: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = after_the_machine_went_down(tmp_path)
    path = tmp_path / "shards" / key(1).hex()[:2] / key(1).hex()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "setxattr", refuse)
        for _ in range(3):
            assert read(store, 1) == content(1, 200)
            close_files(store)
        assert len(verified) == 1
        path.touch()
        assert read(store, 1) == content(1, 200)
        assert len(verified) == 2, "somebody may have written to it"
        close_files(store)
    path.chmod(0o644)
    path.write_bytes(bytes(200))
    assert read(store, 1) is None
    store.close()


def test_readers_that_come_together_to_a_damaged_shard_find_none(tmp_path: Path, verified: list[int]) -> None:
    store = after_the_machine_went_down(tmp_path)
    lost: list[bytes] = []
    store.on_lost = lambda key, damage: lost.append(key)
    path = tmp_path / "shards" / key(1).hex()[:2] / key(1).hex()
    path.chmod(0o644)
    path.write_bytes(bytes(200))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, [store] * 16, [1] * 16)) == [None] * 16
    assert (len(verified), lost, store.used_bytes) == (1, [key(1)], 0)
    store.close()


def test_second_node_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000)
    with pytest.raises(StoreUnusable, match="another cache node already uses"):
        Store(tmp_path, 1000)
    store.close()


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable, match=r"file/data as data directory: Not a directory"):
        Store(tmp_path / "file" / "data", 1000)


def test_damaged_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(StoreUnusable, match=r"state\.json is damaged"):
        Store(tmp_path, 1000)


class SlowUnlink:
    """`Path.unlink` that waits for `may_end`, in threads that were told to."""

    def __init__(self, patch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        unlink = Path.unlink

        def slow(path: Path, missing_ok: bool = False) -> None:
            if threading.current_thread().name.startswith("slow"):
                self.has_begun.set()
                assert self.may_end.wait(20)
                if error is not None:
                    raise error
            unlink(path, missing_ok)

        patch.setattr(Path, "unlink", slow)


def leave_a_partial(store: Store) -> None:
    partial = store.begin(key(1), 200)
    partial.write_part(0, content(1, 200)[:PART])
    store.suspend(partial)


@pytest.mark.parametrize("was_sealed", [False, True])
def test_fill_that_begins_while_its_shard_is_evicted_keeps_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_sealed: bool
) -> None:
    store = Store(tmp_path, 300, part_size=PART)
    lost: list[bytes] = []
    store.on_lost = lambda key, damage: lost.append(key)
    if was_sealed:
        fill(store, 1, 200)
    else:
        leave_a_partial(store)
    slow = SlowUnlink(monkeypatch)
    with ThreadPoolExecutor(1, "slow") as evicting, ThreadPoolExecutor(1) as filling:
        evicted = evicting.submit(store.evict, key(1))
        assert slow.has_begun.wait(20)
        assert store.used_bytes == 200, "counted as long as it is there"
        assert (store.is_sealed(key(1)), store.has_partial(key(1)), store.begin_blocks(key(1))) == (False, False, True)
        assert (read(store, 1), store.evict(key(1))) == (None, 0)
        with pytest.raises(AlreadySealed):
            store.begin(key(1), 200, waits=False)
        began = filling.submit(fill, store, 1, 200)
        with pytest.raises(TimeoutError):
            began.result(0.1)
        slow.may_end.set()
        assert evicted.result(20) == 200
        began.result(20)
    assert (store.used_bytes, store.reserved_bytes, store.sealed_sizes()) == (200, 0, {key(1): 200})
    assert (read(store, 1), lost) == (content(1, 200), [])
    store.close()


@pytest.mark.parametrize("was_sealed", [False, True])
def test_shard_that_the_drive_does_not_let_go_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_sealed: bool
) -> None:
    store = Store(tmp_path, 300, part_size=PART)
    if was_sealed:
        fill(store, 1, 200)
    else:
        leave_a_partial(store)
    slow = SlowUnlink(monkeypatch, OSError(errno.EIO, "Input/output error"))
    with ThreadPoolExecutor(1, "slow") as evicting:
        evicted = evicting.submit(store.evict, key(1))
        slow.may_end.set()
        with pytest.raises(OSError, match="Input/output error"):
            evicted.result(20)
    assert store.used_bytes == 200
    if was_sealed:
        assert read(store, 1) == content(1, 200)
    else:
        fill(store, 1, 200)
    assert store.evict(key(1)) == 200
    assert (store.used_bytes, store.begin_blocks(key(1))) == (0, False)
    store.close()


def test_fills_and_evictions_at_a_time_leave_what_the_ledger_says(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000, part_size=PART)
    lost: list[bytes] = []
    store.on_lost = lambda key, damage: lost.append(key)
    is_over = threading.Event()

    def evict() -> None:
        while not is_over.is_set():
            if not store.evict(key(1)):
                time.sleep(0.0005)  # the processor is for who fills

    with ThreadPoolExecutor(3) as threads:
        evicting = [threads.submit(evict) for _ in range(3)]
        try:
            filled = 0
            while filled < 200:  # each but the first takes an eviction
                try:
                    leave_a_partial(store)
                    fill(store, 1, 200)
                    filled += 1
                except AlreadySealed:
                    time.sleep(0)
        finally:
            is_over.set()
        for each in evicting:
            each.result(20)
    assert lost == []
    on_drive = [path for kind in ("shards", "filling") for path in (tmp_path / kind).rglob("*") if path.is_file()]
    assert store.used_bytes == 200 * len(on_drive) == sum(store.sealed_sizes().values()) + store.reserved_bytes
    store.close()


class StoreMachine(RuleBasedStateMachine):
    """Random fills, evictions and crashes against a dict of what was sealed."""

    capacity = 1000

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self._temporary = tempfile.TemporaryDirectory()
        self.store = Store(Path(self._temporary.name), self.capacity, part_size=PART)
        self.sealed: dict[int, int] = {}
        self.partials: dict[int, PartialFile] = {}
        self.left_over: dict[int, int] = {}

    def _reserved(self) -> int:
        return sum(p.header.size_bytes for p in self.partials.values()) + sum(self.left_over.values())

    @rule(number=st.integers(0, 9), size_bytes=st.integers(1, 400))
    def begin(self, number: int, size_bytes: int) -> None:
        if number in self.partials:
            return
        size_bytes = self.left_over.get(number, size_bytes)
        if number in self.sealed:
            with pytest.raises(AlreadySealed):
                self.store.begin(key(number), size_bytes)
            return
        fits = number in self.left_over or sum(self.sealed.values()) + self._reserved() + size_bytes <= self.capacity
        if not fits:
            with pytest.raises(StoreFull):
                self.store.begin(key(number), size_bytes)
            return
        self.partials[number] = self.store.begin(key(number), size_bytes)
        self.left_over.pop(number, None)

    @precondition(lambda self: self.partials)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.partials)))
        header = self.partials[number].header
        part = data.draw(st.integers(0, len(header.checksums) - 1))
        start, end = header.part_range(part)
        self.partials[number].write_part(part, content(number, header.size_bytes)[start:end])

    @precondition(lambda self: any(p.header.is_complete for p in self.partials.values()))
    @rule()
    def seal(self) -> None:
        number = next(n for n, p in self.partials.items() if p.header.is_complete)
        partial = self.partials.pop(number)
        partial.seal()
        self.sealed[number] = partial.header.size_bytes

    @precondition(lambda self: self.partials)
    @rule(data=st.data(), keep=st.booleans())
    def give_up(self, data: st.DataObject, keep: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.partials)))
        partial = self.partials.pop(number)
        if keep:
            self.store.suspend(partial)
            if partial.has_file:
                self.left_over[number] = partial.header.size_bytes
        else:
            partial.drop()

    @rule(number=st.integers(0, 9))
    def evict(self, number: int) -> None:
        expected = 0 if number in self.partials else self.sealed.pop(number, 0) or self.left_over.pop(number, 0)
        assert self.store.evict(key(number)) == expected

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        for number, partial in self.partials.items():
            if partial.has_file:
                self.left_over[number] = partial.header.size_bytes
            partial.close()
        self.partials.clear()
        if clean:
            self.store.close()
        else:
            crash(self.store)
        self.store = Store(Path(self._temporary.name), self.capacity, part_size=PART)

    @invariant()
    def holds_what_was_sealed(self) -> None:
        assert self.store.used_bytes == sum(self.sealed.values()) + self._reserved()
        assert self.store.sealed_sizes() == {key(n): size for n, size in self.sealed.items()}
        for number, size_bytes in self.sealed.items():
            assert read(self.store, number) == content(number, size_bytes)

    def teardown(self) -> None:
        for partial in self.partials.values():
            partial.drop()
        self.store.close()
        self._temporary.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
