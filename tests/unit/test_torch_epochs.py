"""Which epoch a loop reads: agreed by its workers, in whatever order they come, die and come late."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

from shoal.torch.epochs import Epochs
from tests.support.processes import Child


def test_loops_of_one_process() -> None:
    epochs = Epochs((0, 30))
    assert [epochs.begin(), epochs.begin()] == [(0, 30), (1, 0)]
    epochs.next = (7, 0)
    assert [epochs.begin(), epochs.begin()] == [(7, 0), (8, 0)]


def test_new_workers_for_each_loop() -> None:
    epochs = Epochs()
    assert [epochs.join(w, 11, 0) for w in (2, 0, 1)] == [(0, 0)] * 3
    assert [epochs.join(w, 12, 0) for w in (0, 1)] == [(1, 0)] * 2
    assert epochs.join(0, 13, 0) == (2, 0)
    assert epochs.join(2, 12, 0) == (1, 0), "a late one joined another loop"


def test_a_seed_that_is_drawn_again() -> None:
    """Of trainers that call torch.manual_seed before each loop."""
    epochs = Epochs()
    for epoch in range(3):
        assert [epochs.join(w, 11, 0) for w in (1, 0)] == [(epoch, 0)] * 2


def test_workers_that_stay() -> None:
    epochs = Epochs()
    assert epochs.join(0, 11, 0) == (0, 0)
    epochs.next = (5, 0)
    assert epochs.join(0, 11, 1) == (5, 0)
    assert epochs.join(1, 11, 0) == (0, 0), "one that was slow to start missed the loop that was left"
    assert epochs.join(1, 11, 1) == (5, 0)
    assert [epochs.join(w, 11, 2) for w in (0, 1)] == [(6, 0)] * 2


def test_workers_that_go_on_from_a_state() -> None:
    epochs = Epochs()
    assert [epochs.join(w, 11, 0) for w in (0, 1)] == [(0, 0)] * 2
    # The same loader in the same process, whose state brings its seed as well.
    assert [epochs.join(w, 11, 0, (3, 40)) for w in (1, 0)] == [(3, 40)] * 2
    assert [epochs.join(w, 11, 1) for w in (1, 0)] == [(4, 0)] * 2


def test_many_loops_take_no_more_room() -> None:
    epochs = Epochs()
    for number in range(1000):
        assert epochs.join(0, 1 << 60, number) == (number, 0)
    assert len(epochs._read()[1]) < 20
    assert os.fstat(epochs._fd).st_size < 4096


def test_processes_agree() -> None:
    epochs = Epochs()
    for epoch in range(5):
        children = [Child(lambda say, w=w, e=epoch: epochs.join(w, 100 + e, 0)) for w in range(4)]  # type: ignore[misc]
        for child in children:
            with child:
                assert child.heard() == (epoch, 0)
    assert epochs.next == (5, 0)


def test_one_that_dies_with_the_lock_holds_nobody_up() -> None:
    epochs = Epochs()

    def die(say: object) -> None:
        with epochs._locked():
            os.kill(os.getpid(), signal.SIGKILL)

    with Child(die) as child:
        child.process.join()
    assert epochs.begin() == (0, 0)


def test_it_has_no_name_and_goes_with_its_last_holder() -> None:
    gc.collect()
    before = _nameless_files()
    epochs = Epochs()
    link = str(Path(f"/proc/self/fd/{epochs._fd}").readlink())
    assert "memfd:" in link
    assert not Path(link.removesuffix(" (deleted)")).exists()
    copied = pickle.loads(pickle.dumps(epochs))
    epochs.begin()
    assert (epochs.next, copied.next) == ((1, 0), (0, 0))
    del epochs, copied
    assert _nameless_files() == before


def _nameless_files() -> int:
    """Descriptors of such files. Not their numbers: what other tests left behind goes in between."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += str(each.readlink()).startswith("/memfd:")
    return found
