"""The table of open inodes: agreement, counting, and a successor for every store at which a server can die."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.datasets import DatasetRecord
from shoal.errors import StoreUnusable
from shoal_csi import state as states
from shoal_csi.opens import CACHED, Opens
from shoal_csi.protocol import RESEND_BIT, Terms
from shoal_csi.state import Slot, State

RECORD = DatasetRecord("set", "s3://b/p", "", 1 << 28, 1, "0" * 32, ("0" * 32,), 1, 10)


@contextmanager
def memory() -> Iterator[int]:
    fd = os.memfd_create("state")
    try:
        yield fd
    finally:
        os.close(fd)


class Died(Exception):
    """Instead of SIGKILL."""


class Kernel:
    """Backing ids as the kernel gives them: in turn. Not thread-safe."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.given = 0

    def give(self) -> int:
        self.given += 1
        self.open.add(self.given)
        return self.given

    def close(self, backing: int) -> None:
        self.open.discard(backing)


def test_what_is_pinned_and_agreed_is_found_again() -> None:
    with memory() as fd:
        first = State(fd)
        assert first.pinned is None
        assert first.terms is None
        first.pin(RECORD, "f" * 32)
        first.agree(Terms(40, 1 << 37 | 1, 1 << 20))
        second = State(fd)
        assert second.starts == 2
        assert second.terms == Terms(40, 1 << 37 | 1, 1 << 20)
        record, digest = second.pinned or pytest.fail("nothing is pinned")
        assert digest == "f" * 32
        assert (record.name, record.origin, record.shard_size) == ("set", "s3://b/p", 1 << 28)


def test_a_file_of_something_else_is_refused() -> None:
    with memory() as fd:
        os.write(fd, b"x" * (1 << 16))
        with pytest.raises(StoreUnusable, match="mount again"):
            State(fd)


def test_the_first_open_decides_until_the_last_release() -> None:
    with memory() as fd:
        kernel = Kernel()
        opens = Opens(State(fd), kernel.close)
        assert opens.open(0, 1, 7, kernel.give) == 1
        assert opens.open(1, 2, 7, lambda: pytest.fail("it is decided")) == 1
        opens.release(0, 3, 7)
        assert kernel.open == {1}
        opens.release(0, 4, 7)
        assert kernel.open == set()
        assert opens.open(0, 5, 7, lambda: CACHED) == CACHED
        assert opens.open(0, 6, 7, kernel.give) == CACHED
        assert (opens.passthrough, opens.cached, len(opens)) == (2, 2, 1)


def test_threads_that_open_at_once_agree() -> None:
    with memory() as fd:
        kernel, together, got = Kernel(), threading.Barrier(2), []
        lock = threading.Lock()
        opens = Opens(State(fd), kernel.close)

        def choose() -> int:
            together.wait(10)
            with lock:
                return kernel.give()

        threads = [
            threading.Thread(target=lambda n=n: got.append(opens.open(n, n + 1, 7, choose)))  # type: ignore[misc]
            for n in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got[0] == got[1]
        assert kernel.open == {got[0]}


def test_the_table_grows() -> None:
    with memory() as fd:
        kernel = Kernel()
        opens = Opens(State(fd), kernel.close)
        inodes = range(10, 10 + 3 * states._FIRST_SLOTS)
        for inode in inodes:
            opens.open(0, inode, inode, kernel.give)
        successor = Opens(State(fd), kernel.close)
        assert len(successor) == len(inodes)
        assert [successor.backing_of(i) for i in inodes] == [opens.backing_of(i) for i in inodes]
        assert len(kernel.open) == len(inodes)


class DyingState(State):
    """Dies before its n-th store into the words of the file."""

    def __init__(self, fd: int, stores: int) -> None:
        super().__init__(fd)
        self.left = stores
        real = self._words

        class Words:
            def __len__(words) -> int:
                return len(real)

            def __getitem__(words, at: Any) -> Any:
                return real[at]

            def __setitem__(words, at: int, value: Any) -> None:
                if self.left == 0:
                    raise Died
                self.left -= 1
                real[at] = value

        self._words = Words()  # type: ignore[assignment]


@given(
    st.lists(st.tuples(st.sampled_from([7, 8, 9]), st.booleans(), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(0, 150),
    st.booleans(),
)
def test_a_successor_counts_what_its_predecessor_did(
    steps: list[tuple[int, bool, int]], stores: int, is_twice: bool
) -> None:
    """The kernel hands a request out again until it is answered; its view is that of the answers alone."""
    with memory() as fd:
        kernel = Kernel()
        opens = Opens(DyingState(fd, stores), kernel.close)
        held: dict[int, list[int]] = {}  # inode to the mode of each open, as answered
        deaths = [True, is_twice]

        def answered(thread: int, unique: int, inode: int, is_open: bool, mode: int) -> int | None:
            nonlocal opens
            while True:
                try:
                    if is_open:
                        return opens.open(thread, unique, inode, kernel.give if mode else lambda: CACHED)
                    opens.release(thread, unique, inode)
                    return None
                except Died:
                    deaths.pop(0)
                    unique |= RESEND_BIT
                    thread = (thread + 1) % 3  # whoever is free takes it
                    opens = Opens(DyingState(fd, stores // 2) if deaths[0] else State(fd), kernel.close)

        deaths.append(False)
        for number, (inode, is_open, thread) in enumerate(steps):
            if is_open:
                mode = answered(thread, 2 * number + 2, inode, True, number % 3)
                assert mode is not None
                held.setdefault(inode, []).append(mode)
            elif held.get(inode):
                held[inode].pop()
                answered(thread, 2 * number + 2, inode, False, 0)
        table = {slot.inode: slot for slot in State(fd).used().values()}
        for inode, modes in held.items():
            assert len(set(modes)) <= 1, "all opens of an inode agree"
            assert table.get(inode) == (Slot(inode, modes[0], len(modes)) if modes else None)
        assert Opens(State(fd), kernel.close) is not None
        assert kernel.open == {modes[0] for modes in held.values() if modes and modes[0] != CACHED}
