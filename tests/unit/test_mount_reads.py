"""What is fetched ahead, and what is held of it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import memory
from shoal.errors import DeadlineExceeded, NodeUnavailable, OriginChanged, OriginDenied, SnapshotNotFound
from shoal.memory import Allocate
from shoal.reader import ObjectReader
from shoal.shards import PART_SIZE, Piece
from shoal_csi import failures
from shoal_csi import reads as mount_reads
from shoal_csi.readahead import MAX_WINDOW, MIN_WINDOW, WINDOWS_HELD, Readahead, Window
from shoal_csi.reads import Reads
from shoal_csi.window_memory import BLOCK_BYTES, WindowMemory, held_bytes
from tests.support.waiting import wait_for

MIB = 1 << 20
SIZE = 100 * MIB


def test_a_head_and_a_foot_fetch_nothing_more() -> None:
    ahead = Readahead(SIZE)
    assert ahead.observe(0, 4096) == []
    assert ahead.observe(SIZE - 4096, SIZE) == []


def test_windows_double_and_end_where_parts_do() -> None:
    ahead = Readahead(SIZE)
    assert ahead.observe(0, MIB // 4) == []
    windows: list[Window] = []
    for start in range(MIB // 4, 60 * MIB, MIB // 4):
        windows += ahead.observe(start, start + MIB // 4)
    assert windows[0].start == MIB // 2
    assert [window.start for window in windows[1:]] == [window.end for window in windows[:-1]], "no gap, no overlap"
    lengths = [window.end - window.start for window in windows]
    assert max(lengths) == MAX_WINDOW
    assert lengths[-1] == MAX_WINDOW
    assert all(window.start % MAX_WINDOW == 0 for window in windows if window.end - window.start == MAX_WINDOW)


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.sampled_from([1, 4096, 128 << 10, MIB])), max_size=30))
def test_nothing_is_fetched_for_scattered_reads(reads: list[tuple[int, int]]) -> None:
    ahead, ends = Readahead(SIZE), set()
    for start, length in reads:
        if start in ends:
            continue
        assert ahead.observe(start, min(SIZE, start + length)) == []
        ends.add(min(SIZE, start + length))


@given(st.permutations(range(8)), st.integers(1, 40))
def test_requests_out_of_order_are_one_stream(order: list[int], rounds: int) -> None:
    """The kernel sends a few requests of one stream at the same time."""
    ahead, step = Readahead(SIZE), 128 << 10
    ahead.observe(0, step)
    fetched, reach = ahead.observe(step, 2 * step), 2 * step
    for number in range(rounds):
        for each in order:
            start = (2 + 8 * number + each) * step
            fetched += ahead.observe(start, start + step)
            reach = max(reach, start + step)
            assert fetched[-1].end - reach <= 3 * MAX_WINDOW
    assert all(window.start >= before.end for before, window in itertools.pairwise(fetched)), "nothing twice"


def test_many_streams_share_the_room() -> None:
    for room_bytes, longest in ((64 * MIB, 8 * MIB), (13 * MIB, 4 * MIB), (7 * MIB, 2 * MIB), (MIB, MIB)):
        ahead, windows = Readahead(SIZE), list[Window]()
        for start in range(0, 40 * MIB, MIB):
            windows += ahead.observe(start, start + MIB, room_bytes)
            assert not windows or windows[-1].end - (start + MIB) <= WINDOWS_HELD * longest
        assert max(window.end - window.start for window in windows) == longest


def test_windows_begin_within_twice_what_was_read() -> None:
    """Who reads a few MiB and stops had not much more fetched."""
    ahead, begun = Readahead(SIZE), 0
    for start in range(0, 8 * MIB, MIB // 4):
        reach = start + MIB // 4
        for window in ahead.observe(start, reach):
            assert window.start < reach + 2 * reach
            begun += 1
    assert begun > 4


def test_windows_end_with_the_object() -> None:
    ahead = Readahead(3 * MIB + 5)
    ahead.observe(0, MIB)
    windows = ahead.observe(MIB, 2 * MIB)
    assert windows[-1].end == 3 * MIB + 5
    assert ahead.observe(2 * MIB, 3 * MIB + 5) == []


def test_streams_beside_each_other() -> None:
    ahead = Readahead(SIZE)
    for start in (0, 50 * MIB):
        assert ahead.observe(start, start + MIN_WINDOW) == []
    for step in range(1, 4):
        for start in (0, 50 * MIB):
            found = ahead.observe(start + step * MIN_WINDOW, start + (step + 1) * MIN_WINDOW)
            assert all(start < window.start < start + 50 * MIB for window in found)
            assert found or step > 1


class Source:
    """Readers of objects that are known by heart, and that may hang or fail."""

    def __init__(self, size_bytes: int = 24 * MIB) -> None:
        self.size_bytes = size_bytes
        self.asked: list[tuple[int, int, int]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.timeout_s = 20.0
        self.fails_from = size_bytes  # reads of more than this many bytes raise

    def reader(self, row: int) -> ObjectReader:
        source = self

        class Reader:
            size_bytes = source.size_bytes
            timeout_s = source.timeout_s

            def __init__(self) -> None:
                self.row = row

            def pieces(self, start: int, end: int) -> list[Piece]:
                return [Piece(0, start, end)]

            def mapped(self, piece: Piece) -> None:
                return None

            def read_buffer(
                self, start: int, end: int, until: float | None = None, *, allocate: Allocate | None = None
            ) -> pa.Buffer:
                left_s = 20.0 if until is None else until - time.monotonic()
                if not source.may_go_on.wait(left_s):
                    raise DeadlineExceeded("too late")
                source.asked.append((row, start, end))
                if end - start > source.fails_from:
                    raise NodeUnavailable("nobody")
                buffer = (allocate or memory.allocate)(end - start)
                memory.view(buffer)[:] = content(row, start, end)
                return buffer

        reader: Any = Reader()
        return reader  # type: ignore[no-any-return]


def content(row: int, start: int, end: int) -> bytes:
    first, last = start // 8, -(-end // 8)
    words = np.arange(first, last, dtype="<u8") | np.uint64(row << 32)
    return words.tobytes()[start - first * 8 : end - first * 8]


def got(reads: Reads, row: int, start: int, end: int) -> bytes:
    found: list[bytes] = []
    reads.read(row, start, end, lambda buffers: found.extend(buffer.to_pybytes() for buffer in buffers))
    return b"".join(found)


def is_at_hand(reads: Reads, row: int, start: int, end: int) -> bool:
    return reads.read_at_hand(row, start, end, lambda _: None)


STEP = 64 << 10


def test_bytes_come_right_through_windows_and_past_them() -> None:
    source = Source(4 * MIB + 77)
    reads = Reads(source.reader)
    for start in range(0, source.size_bytes, STEP):
        end = min(source.size_bytes, start + STEP)
        assert got(reads, 3, start, end) == content(3, start, end)
    assert reads.ahead_bytes > 3 * MIB
    assert got(reads, 3, MIB - 10, MIB + STEP) == content(3, MIB - 10, MIB + STEP)
    reads.forget(3)
    wait_for(lambda: reads.window_bytes == 0)
    reads.close()


def test_windows_hold_no_more_than_they_may() -> None:
    """Of many objects at once, while none of the windows comes."""
    source, limit = Source(), 6 * MIB
    reads = Reads(source.reader, limit)
    for row in range(20):
        assert got(reads, row, 0, STEP) == content(row, 0, STEP)
    source.may_go_on.clear()
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(got, reads, row, STEP, 2 * STEP) for row in range(20)]
        wait_for(lambda: reads.window_bytes > limit - 2 * MIB)
        for row in range(20):
            reads.forget(row)
        assert reads.window_bytes > limit - 2 * MIB, "what is on its way counts until it is here"
        source.may_go_on.set()
        assert [future.result(20) for future in waiting] == [content(row, STEP, 2 * STEP) for row in range(20)]
    wait_for(lambda: reads.window_bytes == 0)
    assert reads.most_window_bytes <= limit
    reads.close()


def test_room_is_made_of_the_windows_used_longest_ago() -> None:
    source, limit = Source(), 4 * MIB
    reads = Reads(source.reader, limit)
    for row in range(6):
        for start in range(0, 4 * STEP, STEP):
            assert got(reads, row, start, start + STEP) == content(row, start, start + STEP)
        wait_for(lambda row=row: is_at_hand(reads, row, 4 * STEP, 5 * STEP))  # type: ignore[misc]
    assert not is_at_hand(reads, 0, 4 * STEP, 5 * STEP)
    assert 0 < reads.most_window_bytes <= limit
    reads.close()


def test_memory_of_windows_is_used_again_by_one_at_a_time() -> None:
    memory_, size = WindowMemory(), 3 * BLOCK_BYTES
    first, second = memory_.allocate(size), memory_.allocate(size - 5)
    assert first.address != second.address and held_bytes(second.size) == size
    memory.view(first)[:] = bytes([1]) * size
    memory.view(second)[:] = bytes([2]) * (size - 5)
    memory_.free(second)
    memory_.free(pa.py_buffer(b"of somebody else"))
    assert memory_.kept_bytes == size
    third = memory_.allocate(size)
    assert third.address == second.address and memory_.kept_bytes == 0
    memory.view(third)[:] = bytes([3]) * size
    assert first.to_pybytes() == bytes([1]) * size
    for buffer in (first, third):
        memory_.free(buffer)
    memory_.keep_at_most(size)
    assert memory_.kept_bytes == size
    memory_.keep_at_most(0)
    assert memory_.kept_bytes == 0


def test_memory_is_not_used_again_while_somebody_reads_it() -> None:
    """Streams through more objects than have room at a time: what one lets go of is received into for another."""
    source, step = Source(16 * MIB), MIB // 4
    reads = Reads(source.reader, 24 * MIB)

    def stream(row: int) -> None:
        def compare(buffers: Sequence[pa.Buffer]) -> None:
            time.sleep(0)  # the others go on while this one sends
            found.append(b"".join(buffer.to_pybytes() for buffer in buffers))

        for start in range(0, source.size_bytes, step):
            found = list[bytes]()
            if not reads.read_at_hand(row, start, start + step, compare):
                reads.read(row, start, start + step, compare)
            assert found == [content(row, start, start + step)], (row, start)
        reads.forget(row)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(stream, range(8)))
    wait_for(lambda: reads.window_bytes == 0)
    assert reads.ahead_bytes > 32 * MIB and not reads._memory._used
    reads.close()


@pytest.mark.parametrize("how", [Reads.read, Reads.read_at_hand])
def test_what_is_being_sent_stays_whatever_happens_to_its_window(how: Any) -> None:
    """Its file is closed, and others are read meanwhile, with windows of the same sizes."""
    source, step = Source(8 * MIB), MIB // 4
    reads = Reads(source.reader)
    for start in range(0, 2 * MIB, step):
        assert got(reads, 1, start, start + step) == content(1, start, start + step)
    wait_for(lambda: is_at_hand(reads, 1, 2 * MIB, 2 * MIB + step))
    sent: list[bytes] = []

    def send(buffers: Sequence[pa.Buffer]) -> None:
        reads.forget(1)
        for row in (2, 3):
            for start in range(0, source.size_bytes, step):
                assert got(reads, row, start, start + step) == content(row, start, start + step)
        sent.append(b"".join(buffer.to_pybytes() for buffer in buffers))

    how(reads, 1, 2 * MIB + step, 2 * MIB + 2 * step, send)
    assert sent == [content(1, 2 * MIB + step, 2 * MIB + 2 * step)]
    reads.close()


def test_memory_that_a_window_took_and_has_no_use_for_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node failed half-way, and the one on this machine passed its file instead."""
    source = Source(6 * MIB)
    reads = Reads(source.reader)
    plain = mount_reads.Reads._read_buffer

    def mapped_in_the_end(*args: Any, **named: Any) -> pa.Buffer:
        *_, allocate = args
        buffer = plain(*args, **named)
        return pa.py_buffer(buffer.to_pybytes()) if allocate is not None else buffer

    monkeypatch.setattr(mount_reads.Reads, "_read_buffer", mapped_in_the_end)
    for start in range(0, source.size_bytes, MIB):
        assert got(reads, 1, start, start + MIB) == content(1, start, start + MIB)
    reads.forget(1)
    wait_for(lambda: reads.window_bytes == 0)
    assert reads.ahead_bytes > 3 * MIB
    assert not reads._memory._used
    reads.close()


def test_a_window_that_fails_is_no_failure() -> None:
    source = Source()
    source.fails_from = STEP
    reads = Reads(source.reader)
    for start in range(0, 10 * STEP, STEP):
        assert got(reads, 1, start, start + STEP) == content(1, start, start + STEP)
    with pytest.raises(NodeUnavailable):
        got(reads, 2, 0, 2 * STEP)
    reads.close()


def test_a_read_is_over_in_time_whatever_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread, a window that hangs, or the node."""
    monkeypatch.setattr(mount_reads, "LONG_S", 1e9)
    source = Source()
    source.timeout_s = 0.3
    reads = Reads(source.reader)
    with pytest.raises(DeadlineExceeded, match=r"it waited 0.3 s for reads before it"):
        reads.read(1, 0, STEP, lambda _: None, time.monotonic() - 1)
    assert source.asked == []
    for start in range(0, 4 * STEP, STEP):
        assert got(reads, 1, start, start + STEP) == content(1, start, start + STEP)
    wait_for(lambda: is_at_hand(reads, 1, 4 * STEP, 5 * STEP))
    source.may_go_on.clear()
    with pytest.raises(DeadlineExceeded):
        got(reads, 1, 20 * MIB, 20 * MIB + STEP)
    for start in range(4 * STEP, 20 * MIB, STEP):  # until one of the windows that are now on their way is met
        try:
            got(reads, 1, start, start + STEP)
        except DeadlineExceeded:
            break
    else:
        pytest.fail("all came")
    source.may_go_on.set()
    reads.close()


def test_a_failure_that_took_long_is_told_again_and_soon_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_reads, "LONG_S", 0.0)
    monkeypatch.setattr(mount_reads, "TOLD_AGAIN_S", 1e9)
    source = Source()
    source.fails_from = STEP
    reads = Reads(source.reader)
    with pytest.raises(NodeUnavailable) as first:
        got(reads, 1, 0, 2 * STEP)
    asked = len(source.asked)
    with pytest.raises(NodeUnavailable) as second:
        got(reads, 1, STEP, STEP + 4096)  # the page that is asked for after it was to be read ahead
    assert second.value is first.value and len(source.asked) == asked
    assert got(reads, 1, 2 * STEP, 3 * STEP) == content(1, 2 * STEP, 3 * STEP), "other bytes"
    assert got(reads, 2, 0, STEP) == content(2, 0, STEP), "another object"
    monkeypatch.setattr(mount_reads, "TOLD_AGAIN_S", 0.0)
    assert got(reads, 1, 0, STEP) == content(1, 0, STEP)
    reads.close()


def test_a_failure_of_bytes_that_may_fare_differently_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails of two parts may be the one, and the other is there."""
    monkeypatch.setattr(mount_reads, "LONG_S", 0.0)
    source = Source()
    source.fails_from = STEP
    reads = Reads(source.reader)
    with pytest.raises(NodeUnavailable):
        got(reads, 1, PART_SIZE - STEP, PART_SIZE + STEP)
    assert got(reads, 1, PART_SIZE - STEP, PART_SIZE) == content(1, PART_SIZE - STEP, PART_SIZE)
    reads.close()


def test_errnos() -> None:
    changed = OriginChanged("x changed: run 'shoal dataset refresh set'")
    assert failures.errno_of(changed) == 116
    assert failures.errno_of(OriginDenied("no")) == 13
    assert failures.errno_of(NodeUnavailable("gone")) == 5
    told = failures.sentence("a/b", "set", changed)
    assert "'a/b' of dataset set" in told
    assert "ESTALE" in told
    assert "mount again" in told
    gone = failures.sentence("a/b", "set", SnapshotNotFound("snapshot 12 belongs to no dataset here"))
    assert "ENOENT" in gone and "is unmounted" in gone
    assert "shoal mount --timeout" in failures.sentence("a/b", "set", DeadlineExceeded("not read within 300 s"))
