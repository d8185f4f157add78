"""Memory that reads are received into: who owns it, and why it is not simply `bytearray`.

Arrow buffers come from pyarrow's default pool (mimalloc), which hands out pages that earlier reads have touched;
faulting in fresh pages costs more than receiving into them.

A `bytes` object, which is what ``read()`` must return, cannot come from a pool. A large one is given huge pages before
its first byte is written (512 times fewer page faults), which makes ``read()`` about twice as fast as a plain
file's. It is filled through a view that ends before anybody else sees the object, as CPython's
``PyBytes_FromStringAndSize(NULL, n)`` allows.

The rule: whoever calls owns what is returned; it stays valid as long as it is referenced.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import numpy as np
import pyarrow as pa

#: Below this a copy is cheaper than the detour.
_DIRECT_FROM = 64 << 10
#: From here on fresh memory comes straight from the kernel, page by page (glibc's largest mmap threshold is 32 MiB).
_HUGE_FROM = 8 << 20
_PAGE = mmap.PAGESIZE
_HEADER = bytes.__basicsize__ - 1

#: What is kept of what was freed, in each arena that a process allocates from (one, and more with threads that do), and
#: the smallest piece that goes back to the kernel each time (mallopt(3)).
_KEPT_BYTES, _LARGE_BYTES = 64 << 20, 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_library = ctypes.CDLL(None, use_errno=True)
_mallopt = getattr(_library, "mallopt", None)
_madvise = _library.madvise
_madvise.restype = ctypes.c_int
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


Allocate = Callable[[int], pa.Buffer]
"""Gives a writable buffer of so many bytes."""


def allocate(length: int) -> pa.Buffer:
    """A writable Arrow buffer of `length` bytes, not zeroed."""
    return pa.allocate_buffer(length)


def view(buffer: pa.Buffer) -> memoryview:
    """The bytes of an Arrow buffer, writable where it is. Good as long as the view or the buffer is held."""
    return memoryview(buffer).cast("B")


def keep_freed() -> None:
    """Have this process use memory again that it freed, up to `_KEPT_BYTES` an arena, before the kernel gives it more.

    A loader's worker allocates and frees all of a batch again and again. glibc would give it back each time, and fault
    it in anew page by page: of 64 decoded pictures a tenth of the worker's time. Other C libraries know no such thing.
    """
    if _mallopt is not None:
        _mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        _mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def make_bytes(length: int, fill: Callable[[memoryview], None]) -> bytes:
    """A `bytes` of `length` that `fill` writes through the view it gets. The view ends when `fill` returns."""
    if length < _DIRECT_FROM:
        small = bytearray(length)
        fill(memoryview(small))
        return bytes(small)
    result, address = _fresh(length)
    whole: memoryview = np.asarray(_Written(result, address, length)).data
    with whole:
        fill(whole)
    return result


def to_bytes(buffer: pa.Buffer) -> bytes:
    """A copy of `buffer`, made without the interpreter lock where it is large."""
    if buffer.size < _HUGE_FROM:
        return b"".join((memoryview(buffer),))
    result, address = _fresh(buffer.size)
    ctypes.memmove(address, buffer.address, buffer.size)
    return result


def copy(source: pa.Buffer, target: memoryview) -> None:
    """Copy `source` into `target`, which is as long, without the interpreter lock where that is large."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


class _Written:
    """A `bytes` that is being written, for numpy's view of it, which keeps it alive.

    A thread that an interrupted read left behind may still receive into a slice of that view.
    """

    __slots__ = ("__array_interface__", "_result")

    def __init__(self, result: bytes, address: int, length: int) -> None:
        self._result = result
        self.__array_interface__ = {"version": 3, "shape": (length,), "typestr": "|u1", "data": (address, False)}


def _fresh(length: int) -> tuple[bytes, int]:
    """A new `bytes`, not written yet, and where its first byte lies."""
    result: bytes = _new_bytes(None, length)
    address = id(result) + _HEADER
    if length >= _HUGE_FROM:
        first = -(-address // _PAGE) * _PAGE
        # Advice only: a kernel without huge pages refuses it, and everything works as before.
        _madvise(first, (address + length - first) // _PAGE * _PAGE, mmap.MADV_HUGEPAGE)
    return result, address
