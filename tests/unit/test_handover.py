"""Batches that real DataLoader workers hand over in memory that is used again: right, and never written while held."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, default_convert
from torch.utils.data._utils.collate import default_collate_fn_map

import shoal.torch
from shoal.torch import handover

WIDTH = 3000


class Numbers(Dataset[Any]):
    """Sample n is n everywhere."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return {"row": torch.full((WIDTH,), number, dtype=torch.uint16), "number": number}


def loader(count: int, *, workers: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(count), batch_size=4, num_workers=workers, collate_fn=shoal.torch.collate, **options)


def check(batch: Any, first: int) -> None:
    numbers = list(range(first, first + 4))
    assert batch["number"].tolist() == numbers
    assert type(batch["row"]) is torch.Tensor
    assert batch["row"].shape == (4, WIDTH)
    assert batch["row"].numpy().tolist() == [[number] * WIDTH for number in numbers]


def test_batches_that_are_held_are_never_written() -> None:
    held = list(loader(400))
    for number, batch in enumerate(held):
        check(batch, 4 * number)


def test_memory_is_used_again_once_a_batch_is_gone_and_may_be_written_by_the_trainer() -> None:
    places = []
    for number, batch in enumerate(loader(800)):
        check(batch, 4 * number)
        places.append(batch["row"].data_ptr())
        batch["row"].fill_(7)
    assert len(places) == 200
    assert len(set(places)) <= 2 * 5, "two workers, each with two batches ahead, one in the queue and one in use"


def test_a_batchs_labels_share_files_however_small_they_are() -> None:
    batches = iter(loader(800))
    for _ in range(200):
        batch = next(batches)
        assert not batch["number"].is_shared(), "torch had to send it: there were too many files"
        assert not batch["row"].is_shared()
    assert len(handover._maps._maps) <= 2 * 2 * 5, "two tensors a batch"


def test_a_view_keeps_a_batch_and_a_copy_does_not() -> None:
    views = [(number, batch["row"][2, 5:9]) for number, batch in enumerate(loader(200))]
    gc.collect()
    for number, view in views:
        assert view.numpy().tolist() == [4 * number + 2] * 4


def test_a_worker_has_a_bounded_number_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "MAX_FILES", 3)
    held = list(loader(200))
    for number, batch in enumerate(held):
        check(batch, 4 * number)


def test_a_loader_that_is_gone_takes_its_files_along() -> None:
    before = handover._maps
    kept = list(loader(40))
    gc.collect()
    assert handover._maps is before
    assert not before._maps
    for number, batch in enumerate(kept):
        check(batch, 4 * number)


class _Collecting(str):
    """Where it is looked up, garbage is collected."""

    def __hash__(self) -> int:
        gc.collect()
        return super().__hash__()


def test_a_loader_may_be_garbage_collected_while_a_batch_is_received() -> None:
    maps = handover._Maps()
    child = multiprocessing.get_context("fork").Process(target=_leave, args=([],))
    child.start()
    gone = handover._Own((child.pid or 0, "gone", 0), 4096)
    maps.get(gone.key, gone.send(), gone.descriptor, 4096)
    child.join()
    gc.disable()
    try:
        cycle: list[Any] = [child]
        cycle.append(cycle)
        del child, cycle
        new = handover._Own((os.getpid(), _Collecting("new"), 0), 4096)
        receiving = threading.Thread(target=maps.get, args=(new.key, new.send(), new.descriptor, 4096), daemon=True)
        receiving.start()
        receiving.join(30)
        assert not receiving.is_alive(), "it waits for itself"
        assert list(maps._maps) == [new.key]
    finally:
        gc.enable()


def test_a_process_that_has_an_earlier_ones_number_keeps_its_files() -> None:
    maps = handover._Maps()
    for name in ("earlier", "later"):
        file = handover._Own((os.getpid(), name, 0), 4096)
        maps.get(file.key, file.send(), file.descriptor, 4096)
    maps.forget((os.getpid(), "earlier"))
    assert list(maps._maps) == [(os.getpid(), "later", 0)]


def _leave(batches: list[Any]) -> None:
    batches.clear()


def test_a_forked_process_that_lets_go_of_its_copy_gives_nothing_back() -> None:
    batches = iter(loader(200))
    held = [next(batches) for _ in range(3)]
    child = multiprocessing.get_context("fork").Process(target=_leave, args=(held,))
    child.start()
    child.join()
    rest = [batch["number"].tolist() for batch in batches]
    assert len(rest) == 47
    for number, batch in enumerate(held):
        check(batch, 4 * number)


def _mapped() -> int:
    return Path("/proc/self/maps").read_text().count("shoal-batch")


def test_a_forked_process_has_only_the_batches_that_were_held() -> None:
    batches = iter(DataLoader(Numbers(200), batch_size=4, num_workers=1, collate_fn=shoal.torch.collate))
    for _ in range(20):  # with two workers the loader itself holds batches that come early
        next(batches)
    held = next(batches)
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(_mapped()))
    child.start()
    child.join()
    assert _mapped() > 2
    assert child.exitcode == 2, "a file for each of the batch's tensors"
    check(held, 80)


def test_a_worker_that_is_spawned_and_stays_hands_over_too() -> None:
    batches = loader(48, workers=1, multiprocessing_context="spawn", persistent_workers=True)
    for _ in range(2):
        for number, batch in enumerate(batches):
            check(batch, 4 * number)


SAMPLES: list[Any] = [
    [{"a": torch.arange(6).reshape(2, 3).t() + n, "b": (n, 1.5, "text"), "c": b"bytes"} for n in range(3)],
    [(torch.tensor(n, dtype=torch.bfloat16), np.arange(n, n + 4, dtype=np.int16), True) for n in range(5)],
    [torch.empty(0, 7) for _ in range(2)],
    [torch.tensor([True, False])] * 3,
]


class Collated(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ((number, shoal.torch.collate(samples)) for number, samples in enumerate(SAMPLES))


@pytest.mark.parametrize("workers", [0, 1])
def test_collate_is_torchs(workers: int) -> None:
    found = list(DataLoader(Collated(), batch_size=None, num_workers=workers))
    assert [number for number, _ in found] == list(range(len(SAMPLES)))
    for number, batch in found:
        whole = default_convert(default_collate(SAMPLES[number]))  # type: ignore[no-untyped-call] # as a loader does it
        _same(batch, whole)


def test_what_torch_does_not_put_together_is_refused_in_its_words() -> None:
    with pytest.raises(RuntimeError, match="sparse tensors are not currently supported"):
        shoal.torch.collate([torch.eye(3).to_sparse()] * 2)


def _same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            _same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            _same(one, other)
    else:
        assert found == wanted


class Odd(IterableDataset[Any]):
    """What a transform may do to a tensor before its worker sends it."""

    def __iter__(self) -> Iterator[Any]:
        kept = shoal.torch.collate([torch.arange(6)] * 2)
        for _ in range(3):
            yield "kept", kept  # sent three times
        turned = shoal.torch.collate([torch.arange(6)] * 2)
        turned.t_()
        yield "turned", turned
        yield "part", shoal.torch.collate([torch.arange(6)] * 2)[:, 2:4]
        yield "computed", shoal.torch.collate([torch.arange(6)] * 2) + 1
        for _ in range(20):
            shoal.torch.collate([torch.zeros(6, dtype=torch.int64)] * 2)  # never sent
        yield "twice", (kept, kept)


def test_what_is_done_to_a_tensor_before_it_is_sent_is_seen() -> None:
    rows = torch.arange(6).repeat(2, 1)
    wanted = {"kept": rows, "turned": rows.t(), "part": rows[:, 2:4], "computed": rows + 1}
    found = list(DataLoader(Odd(), batch_size=None, num_workers=1))
    assert len(found) == 7
    for name, batch in found:
        for each in batch if name == "twice" else [batch]:
            assert type(each) is torch.Tensor
            assert torch.equal(each, wanted.get(name, rows)), name


class LikeTorchs(IterableDataset[Any]):
    """Batches that torch put together, and the same from here."""

    def __iter__(self) -> Iterator[Any]:
        for collate in (default_collate, shoal.torch.collate):
            yield collate([torch.arange(300.0)] * 2)
            yield collate([torch.arange(300.0)] * 2).requires_grad_()


def test_a_batch_is_a_tensor_as_torch_makes_it() -> None:
    with torch.no_grad():  # as for a view that was made here
        found = list(DataLoader(LikeTorchs(), batch_size=None, num_workers=1))
    for batch, wanted in zip(found[2:], found[:2], strict=True):
        assert batch.requires_grad == wanted.requires_grad
        assert batch.is_leaf
        assert batch.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()
        assert batch.detach_() is batch, "a view cannot be detached in place"
        assert batch.mul_(torch.ones((), requires_grad=True)).requires_grad
        assert torch.equal(batch, wanted)


class Kept(IterableDataset[Any]):
    """Copies that a worker makes of a batch."""

    def __iter__(self) -> Iterator[Any]:
        batch = shoal.torch.collate([torch.arange(6.0)] * 2).requires_grad_()
        file = io.BytesIO()
        torch.save({"batch": batch}, file)
        yield torch.load(io.BytesIO(file.getvalue()))["batch"]
        yield pickle.loads(pickle.dumps(batch))
        deep = copy.deepcopy({"batch": batch})["batch"]
        shallow = copy.copy(batch)
        batch.data.fill_(7)
        yield deep
        yield shallow.detach() - 7 + torch.arange(6.0)


def test_a_worker_may_save_and_copy_a_batch() -> None:
    found = list(DataLoader(Kept(), batch_size=None, num_workers=1))
    assert [batch.requires_grad for batch in found] == [True, True, True, False]
    for batch in found:
        assert type(batch) is torch.Tensor
        assert torch.equal(batch, torch.arange(6.0).repeat(2, 1))


class Picture(torch.Tensor):
    """A kind of tensor that a program made."""


class Pictures(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        turned, torchs = torch.arange(6.0).reshape(2, 3).t(), dict(default_collate_fn_map)
        for collate in (default_collate, shoal.torch.collate):
            yield collate([turned.as_subclass(Picture)] * 2)
            yield collate([turned.contiguous().as_subclass(Picture)] * 2)
            default_collate_fn_map[torch.Tensor] = lambda samples, **_: len(samples)
            default_collate_fn_map[int] = lambda samples, **_: "numbers"
            yield collate([(turned, 1)] * 2)
            default_collate_fn_map.update(torchs)


def test_a_programs_kinds_of_tensors_and_ways_to_put_samples_together_are_kept() -> None:
    found = list(DataLoader(Pictures(), batch_size=None, num_workers=1))
    for batch, wanted in zip(found[3:], found[:3], strict=True):
        _same(batch, wanted)
    assert type(found[3]) is Picture
    assert found[5] == [2, "numbers"]


class ToTwo(IterableDataset[Any]):
    """A worker that gives every other batch to another process than its trainer."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def __iter__(self) -> Iterator[Any]:
        for number in range(40):
            self.other.put(shoal.torch.collate([torch.full((600,), number)] * 2))
            yield shoal.torch.collate([torch.full((600,), number)] * 2)


def _add_up(batches: Any, sums: Any) -> None:
    sums.put([int(batches.get().sum()) for _ in range(40)])


def test_a_worker_may_send_batches_to_another_process_too() -> None:
    fork = multiprocessing.get_context("fork")
    batches, sums = fork.Queue(), fork.Queue()
    other = fork.Process(target=_add_up, args=(batches, sums), daemon=True)
    other.start()
    loaded = DataLoader(ToTwo(batches), batch_size=None, num_workers=1)
    assert [int(batch.sum()) for batch in loaded] == [1200 * number for number in range(40)]
    assert sums.get(timeout=30) == [1200 * number for number in range(40)]
    other.join()


class InThreads(IterableDataset[Any]):
    """Batches that a worker puts together in several threads at a time."""

    def __iter__(self) -> Iterator[Any]:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as threads:
            yield sum(threads.map(self._wrong, range(4)))

    def _wrong(self, number: int) -> int:
        found = 0
        for _ in range(100):
            batches = [shoal.torch.collate([torch.full((600,), number)] * 2) for _ in range(8)]
            found += sum(int((batch != number).any()) for batch in batches)
        return found


def test_threads_of_a_worker_get_memory_of_their_own() -> None:
    assert list(DataLoader(InThreads(), batch_size=None, num_workers=1)) == [0]


def test_outside_of_a_worker_nothing_is_handed_over() -> None:
    assert handover.empty((4,), torch.int64) is None
    batch = {"a": torch.arange(3), "b": ["text"]}
    assert handover.copied(batch)["a"] is batch["a"]


def test_descriptors_of_the_trainer_do_not_grow_with_batches_held() -> None:
    batches = iter(loader(200))
    held = [next(batches) for _ in range(10)]
    before = _descriptors()
    held += list(batches)
    assert _descriptors() <= before


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
