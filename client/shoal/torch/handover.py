"""Tensors that a DataLoader's worker hands to its trainer, in memory that is used again and again.

torch gives each tensor of a worker a file of shared memory of its own: it is made, written page by page for the first
time, sent as a descriptor over a socket, mapped by the trainer, and thrown away. Here a worker keeps its files, the
trainer keeps its maps of them, and a batch only says which file it lies in. When the trainer lets go of the tensor's
storage, the file is free for a later batch.

    FREE     nobody needs what is in it
    HELD     the worker writes, or keeps, a tensor there
    SENT     the trainer has the tensor, or will have it

The rule: a file is used again when both have let go of it. The worker ends FREE and HELD, the trainer ends SENT, each
with the last reference to the storage; what was sent once is copied when it is sent again. Whatever cannot be done
here is left to torch. A process forked while a batch is held must not use it for longer than its parent does.
"""

from __future__ import annotations

import copy
import math
import mmap
import multiprocessing
import multiprocessing.reduction
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch.multiprocessing import reductions
from torch.utils.data._utils import collate as torch_collate

from shoal.maps import Region

#: Files of one worker at most; beyond them torch has its way. A DataLoader has about four batches of each on their way.
MAX_FILES = 64
#: The first bytes of a file: its state, and whether the trainer has mapped it. Then come the tensors.
_STATE, _IS_MAPPED, _HEAD_BYTES = 0, 1, mmap.PAGESIZE
_FREE, _HELD, _SENT = 0, 1, 2

_Process = tuple[int, str]
"""Process and pool: a process id may come again."""
_Key = tuple[int, str, int]
"""Process, pool and number of a file."""


class _Bytes:
    """Bytes [start, end) of a file that is mapped, for numpy; `released` is called when the last view of them is gone.

    Memory is told from a copy of it in a forked child, which says nothing.
    """

    __slots__ = ("__array_interface__", "_getpid", "_pid", "_region", "_released")

    def __init__(self, region: Region, start: int, end: int, released: Callable[[], None] | None = None) -> None:
        self._region, self._released, self._pid, self._getpid = region, released, os.getpid(), os.getpid
        place = (region.address + start, False)
        self.__array_interface__ = {"version": 3, "shape": (end - start,), "typestr": "|u1", "data": place}

    def __del__(self) -> None:
        if self._released is not None and self._getpid() == self._pid:
            self._released()


class _File:
    """A file in this process's addresses.

    Attributes:
        head: state, and whether the trainer has mapped it.
        place: address of what comes after it.
    """

    __slots__ = ("_region", "capacity", "head", "place")

    def __init__(self, descriptor: int, capacity: int) -> None:
        self.capacity = capacity
        self._region = Region(descriptor, _HEAD_BYTES + capacity, mmap.PROT_READ | mmap.PROT_WRITE)
        self.place = self._region.address + _HEAD_BYTES
        self.head = np.asarray(_Bytes(self._region, 0, _HEAD_BYTES))

    def lease(self, size_bytes: int, released: Callable[[], None]) -> torch.UntypedStorage:
        """The first bytes after the head; `released` is called when the last tensor over them is gone."""
        leased = _Bytes(self._region, _HEAD_BYTES, _HEAD_BYTES + size_bytes, released)
        return torch.from_numpy(np.asarray(leased)).untyped_storage()

    def given_back(self) -> None:
        """The trainer does not need it any more."""
        self.head[_STATE] = _FREE


class _Own(_File):
    """A file of this process, a worker.

    Attributes:
        descriptor: open as long as this process lives, for whoever else gets a tensor.
        is_alive: a tensor of this process lies in it.
        size_bytes: of the last one.
    """

    __slots__ = ("descriptor", "is_alive", "key", "size_bytes")

    def __init__(self, key: _Key, capacity: int) -> None:
        self.key, self.is_alive, self.size_bytes = key, False, 0
        self.descriptor = os.memfd_create("shoal-batch", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, _HEAD_BYTES + capacity)
            super().__init__(self.descriptor, capacity)
        except BaseException:
            os.close(self.descriptor)
            raise

    @property
    def is_free(self) -> bool:
        return not self.is_alive and self.head[_STATE] == _FREE

    def take(self, size_bytes: int) -> torch.UntypedStorage:
        """Its first bytes, for a tensor of this process."""
        self.head[_STATE], self.is_alive, self.size_bytes = _HELD, True, size_bytes
        return self.lease(size_bytes, self._let_go)

    def _let_go(self) -> None:
        if self.head[_STATE] == _HELD:
            self.head[_STATE] = _FREE
        self.is_alive = False

    def send(self) -> Any:
        """The tensor goes to another process: with a handle, as long as none has mapped the file."""
        self.head[_STATE] = _SENT
        return None if self.head[_IS_MAPPED] else multiprocessing.reduction.DupFd(self.descriptor)


class _Pool:
    """The files of a worker. Thread-safe."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()  # guards _files, and that a file is given to one thread
        self._name = os.urandom(8).hex()
        self._files: list[_Own] = []

    def take(self, size_bytes: int) -> tuple[_Own, torch.UntypedStorage] | None:
        """A file with so much room that was free, or new, and its first bytes; None where there are too many."""
        with self._lock:
            file = self._file(size_bytes)
            return (file, file.take(size_bytes)) if file is not None else None

    def _file(self, size_bytes: int) -> _Own | None:
        # Powers of two, so that batches of many lengths share files. Pages that nobody writes take no memory.
        capacity = max(mmap.PAGESIZE, 1 << (size_bytes - 1).bit_length())
        found = [each for each in self._files if capacity <= each.capacity <= 2 * capacity and each.is_free]
        if found:
            return min(found, key=lambda each: each.capacity)
        if len(self._files) >= MAX_FILES:
            return None
        try:
            made = _Own((self.pid, self._name, len(self._files)), capacity)
        except OSError:  # no descriptors are left, or no addresses
            return None
        self._files.append(made)
        return made


class _Handed(torch.Tensor):
    """A tensor of a worker in one of its files. What is computed from it is an ordinary one, as is a copy."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _file: _Own

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For `torch.save` and whatever else does not send it to another process of torch."""
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return copy.deepcopy(self._plain(), memo)

    def _plain(self) -> torch.Tensor:
        return torch.Tensor._make_subclass(torch.Tensor, self, self.requires_grad)


_pool: _Pool | None = None


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
    """A tensor to be written and handed over. None where this process hands nothing over, or there is no room."""
    global _pool
    size_bytes = math.prod(shape) * dtype.itemsize
    if torch.utils.data.get_worker_info() is None or not size_bytes or not hasattr(os, "memfd_create"):
        return None
    if _pool is None or _pool.pid != os.getpid():
        _pool = _Pool()
    taken = _pool.take(size_bytes)
    if taken is None:
        return None
    file, storage = taken
    handed: _Handed = torch.Tensor._make_subclass(_Handed, _tensor(storage, dtype, 0, shape, ()))
    handed._file = file
    return handed


def _tensor(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """As torch makes one that another process sent: the whole of a storage, not a view that autograd watches."""
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, tuple(shape), tuple(stride))


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with its tensors copied into memory to be handed over; themselves where this process hands none over."""
    return {name: _copied(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _copied(source: torch.Tensor) -> torch.Tensor:
    handed = empty(source.shape, source.dtype)
    return source if handed is None else handed.copy_(source)


def collate(samples: Sequence[Any]) -> Any:
    """Samples as a batch, exactly as `torch.utils.data.default_collate` does it; a drop-in for ``collate_fn``.

    A worker puts the batch's tensors into memory that is used again. With pictures of 150 KiB that is a fifth of what a
    processor does for a sample, decoding included.
    """
    return torch_collate.collate(samples, collate_fn_map=_how())


def _stacked(tensors: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    first = tensors[0]
    if first.layout == torch.strided and first.device.type == "cpu" and not first.is_nested:
        handed = empty((len(tensors), *first.shape), first.dtype)
        if handed is not None:
            whole = _filled(handed.as_subclass(torch.Tensor), tensors)
            return handed if type(whole) is torch.Tensor else whole
    stacked: torch.Tensor = torch_collate.collate_tensor_fn(tensors, collate_fn_map=collate_fn_map)
    return stacked


def _filled(batch: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack`, which takes twice as long as a copy each where samples are turned (pictures as (3, h, w)).

    Returns `batch`, or what the samples' own kind of tensor makes of it.
    """
    kind = torch.Tensor, tensors[0].shape, tensors[0].dtype
    if tensors[0].is_contiguous() or any((type(each), each.shape, each.dtype) != kind for each in tensors):
        return torch.stack(list(tensors), 0, out=batch)
    for place, tensor in zip(batch.unbind(0), tensors, strict=True):
        place.copy_(tensor)
    return batch


def _numbers(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(numbers: Sequence[Any], *, collate_fn_map: Any = None) -> torch.Tensor:
        return _copied(make(numbers, collate_fn_map=collate_fn_map))

    return made


def _how() -> dict[Any, Any]:
    """By type how samples are put together: torch's ways, where a program has not changed them, with our memory."""
    ways = dict(torch_collate.default_collate_fn_map)
    ours = {kind: _numbers(way) for kind, way in _NUMBERS.items() if ways.get(kind) is way}
    if ways.get(torch.Tensor) is torch_collate.collate_tensor_fn:
        ours[torch.Tensor] = _stacked
    return ways | ours


_NUMBERS: dict[Any, Callable[..., torch.Tensor]] = {
    int: torch_collate.collate_int_fn,
    float: torch_collate.collate_float_fn,
    (np.bool_, np.number, np.object_): torch_collate.collate_numpy_scalar_fn,
}


# From process to process


class _Maps:
    """Maps of other processes' files, as long as these processes run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _maps and _followed: a DataLoader may receive in a thread
        self._maps: dict[_Key, _File] = {}
        self._followed: set[_Process] = set()
        self._ended: deque[_Process] = deque()  # still in _maps, since somebody had the lock

    def get(self, key: _Key, handle: Any, number: int, capacity: int) -> _File:
        descriptor = handle.detach() if handle is not None else None
        try:
            with self._lock:
                mapped = self._maps.get(key)
                if mapped is None:
                    if descriptor is None:  # the trainer has mapped it, and this is another process
                        descriptor = _open(key[0], number)
                    mapped = self._maps[key] = _File(descriptor, capacity)
                    mapped.head[_IS_MAPPED] = 1
                    self._follow(key[:2])
            return mapped
        finally:
            if descriptor is not None:
                os.close(descriptor)
            self._forget_ended()

    def _follow(self, process: _Process) -> None:
        """Let go of a worker's files with it: when its loader lets go of it, or the next one begins."""
        if process in self._followed:
            return
        for gone in [each for each in self._followed if not _is_running(each[0])]:
            self._forget(gone)
        self._followed.add(process)
        for child in multiprocessing.active_children():
            if child.pid == process[0]:
                weakref.finalize(child, self.forget, process).atexit = False

    def forget(self, process: _Process) -> None:
        """No more batches come from that process.

        Never waits: the garbage collector calls it wherever it runs, in `get` too.
        """
        self._ended.append(process)
        self._forget_ended()

    def drop(self) -> None:
        """In a forked child, where nobody else has the lock, whoever seems to."""
        self._maps.clear()

    def _forget_ended(self) -> None:
        while self._ended and self._lock.acquire(blocking=False):  # else whoever has the lock does it afterwards
            try:
                while self._ended:
                    self._forget(self._ended.popleft())
            finally:
                self._lock.release()

    def _forget(self, process: _Process) -> None:
        self._followed.discard(process)
        for key in [key for key in self._maps if key[:2] == process]:
            del self._maps[key]


_maps = _Maps()


def _forked() -> None:
    """In a forked child: no batches come, and it keeps no files of its parent's workers, as long as it may run."""
    global _maps
    _maps.drop()
    _maps = _Maps()


os.register_at_fork(after_in_child=_forked)


def _open(pid: int, number: int) -> int:
    """What another process has open."""
    try:
        return os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeError(f"a batch lies in memory of process {pid}, which does not give it: {error}") from error


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _reduced(handed: _Handed) -> Any:
    """How a tensor goes to another process."""
    file = handed._file
    if handed.requires_grad and not handed.is_leaf:
        return reductions.reduce_tensor(handed)  # type: ignore[no-untyped-call] # refuses it, and says why
    offset = handed.data_ptr() - file.place
    if not 0 <= offset < file.size_bytes or file.head[_STATE] != _HELD:
        plain = handed.detach().clone().as_subclass(torch.Tensor).requires_grad_(handed.requires_grad)
        return reductions.reduce_tensor(plain)  # type: ignore[no-untyped-call]
    layout = handed.dtype, offset // handed.element_size(), tuple(handed.shape), handed.stride()
    return _rebuilt, (
        file.key,
        file.send(),
        file.descriptor,
        file.capacity,
        file.size_bytes,
        *layout,
        handed.requires_grad,
    )


def _rebuilt(
    key: _Key,
    handle: Any,
    number: int,
    capacity: int,
    size_bytes: int,
    dtype: torch.dtype,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
    requires_grad: bool,  # what pickle calls has no keywords
) -> torch.Tensor:
    file = _maps.get(key, handle, number, capacity)
    tensor = _tensor(file.lease(size_bytes, file.given_back), dtype, offset, shape, stride)
    return tensor.requires_grad_(requires_grad)


multiprocessing.reduction.ForkingPickler.register(_Handed, _reduced)
