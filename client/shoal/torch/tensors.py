"""Arrow columns as tensors: a view where a column is one piece, one gather where it is several.

A gather is Arrow's own concatenation, in C++ over all pieces and into memory of its pool: for 256 rows of 2 KiB in 256
pieces 0.2 ms, where a copy a piece takes 0.5; for rows of 150 KiB 3 ms instead of 19, because fresh memory has to be
faulted in page by page.

The rule: bits are never changed without a dtype that says so, and a tensor that is a view must not be written. The
memory of a sealed shard is mapped read-only, torch knows no such tensors, and a write ends the process (SIGSEGV).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.utils.data
import torch.utils.dlpack

from shoal import memory
from shoal.errors import InvalidRequest


def tensor(
    column: pa.Array | pa.ChunkedArray,
    shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    pin_memory: bool = False,
    copy: bool | None = None,
) -> torch.Tensor:
    """A column of numbers as a tensor of shape (rows, *shape).

    Args:
        column: numbers, booleans, fixed-size binary (as bytes), or lists of them of one length, nested as may be.
        shape: of a row; None: as the column's type has it, () for plain numbers.
        dtype: None: the column's own, bit for bit. Else numbers are converted, and the bytes of binary columns are
            taken for numbers of this type.
        pin_memory: gather into page-locked memory, from which a GPU can copy on its own.
        copy: None: a view of the column where it is one piece, which **must not be written** (see above). True: always
            memory of its own, which may be. False: a view, or an error.

    Raises:
        InvalidRequest: it has nulls, rows of different lengths or a type without tensors, `shape` does not fit, a view
            was asked for and cannot be had, or memory is to be pinned where there is no CUDA or by a loader's worker.
    """
    pieces = [piece for piece in (column.chunks if isinstance(column, pa.ChunkedArray) else [column]) if len(piece)]
    if pin_memory and torch.utils.data.get_worker_info() is not None:
        raise InvalidRequest(
            "memory that a DataLoader's worker pins is not pinned for its trainer: leave out pin_memory here, and give "
            "it to the DataLoader"
        )
    if pin_memory and not torch.cuda.is_available():
        raise InvalidRequest("there is no CUDA device here to pin memory for: leave out pin_memory")
    if copy is False and (len(pieces) > 1 or pin_memory or pa.types.is_boolean(_leaf(column.type))):
        raise InvalidRequest(
            f"{len(pieces)} pieces of {column.type} are no view of memory: leave out copy=False, pin_memory and bits"
        )
    if not pieces:
        pieces = [pa.array([], column.type)]
    if pin_memory:
        flat, row_shape = _pinned(pieces, dtype)
    else:
        is_ours = len(pieces) > 1
        array = pa.concat_arrays(pieces) if is_ours else pieces[0]
        values, row_shape = _values(array)
        flat, row_shape = _reinterpreted(_flat(values), row_shape, array.type, dtype)
        if copy and not is_ours and not pa.types.is_boolean(values.type):
            flat = _copied(flat)
    flat = _shaped(flat, len(column), row_shape, shape, column.type)
    if dtype is None or flat.dtype == dtype:
        return flat
    if copy is False:
        raise InvalidRequest(f"{flat.dtype} as {dtype} is no view: leave out copy=False or dtype")
    if pin_memory:
        return torch.empty(flat.shape, dtype=dtype, pin_memory=True).copy_(flat)
    return flat.to(dtype)


def tensors(table: pa.Table, *, copy: bool | None = None) -> dict[str, Any]:
    """A batch as torch's users know it: by column a tensor, or a list of Python values where no tensor can hold them.

    Which of them follows from the column's type alone: numbers, and lists and binary of a fixed size, are tensors;
    text, binary and lists of any length are lists.

    Args:
        copy: see `tensor`.

    Raises:
        InvalidRequest: a column of numbers has nulls.
    """
    found: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not is_fixed(column.type):
            found[name] = column.to_pylist()
            continue
        try:
            found[name] = tensor(column, copy=copy)
        except InvalidRequest as error:
            raise InvalidRequest(f"column {name!r}: {error}") from error
    return found


def is_fixed(kind: pa.DataType) -> bool:
    """Whether all rows of a column of this type have one shape, of numbers."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_fixed_size_list(kind):
        return is_fixed(kind.value_type)
    return _is_number(kind) or pa.types.is_fixed_size_binary(kind)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _leaf(kind: pa.DataType) -> pa.DataType:
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_fixed_size_list(kind) or _is_list(kind):
            kind = kind.value_type
        else:
            return kind


def _values(array: pa.Array) -> tuple[pa.Array, tuple[int, ...]]:
    """The numbers of all rows, one after the other, as views; and the shape of a row."""
    dims: list[int] = []
    shape: tuple[int, ...] | None = None
    while True:
        kind, rows = array.type, len(array)
        if array.null_count:
            raise InvalidRequest(
                f"{array.null_count} of {rows} values of {kind} are null, and a tensor has no nulls: fill them "
                "(pyarrow.compute.fill_null) or filter them out"
            )
        if isinstance(kind, pa.FixedShapeTensorType) and not dims:
            if kind.permutation not in (None, sorted(kind.permutation or ())):
                raise InvalidRequest(f"{kind} has its dimensions in another order: use its storage and permute")
            shape, array = tuple(kind.shape), array.storage
        elif isinstance(kind, pa.BaseExtensionType):
            array = array.storage
        elif pa.types.is_fixed_size_list(kind):
            dims.append(kind.list_size)
            array = array.flatten()
        elif _is_list(kind):
            dims.append(_one_length(array.offsets.to_numpy(), kind))
            array = array.flatten()
        elif _is_bytes(kind):
            array, width = _bytes(array)
            dims.append(width)
        elif _is_number(kind):
            return array, tuple(dims) if shape is None else shape
        else:
            remedy = "decode it (dictionary_decode)" if pa.types.is_dictionary(kind) else "cast it to a number"
            raise InvalidRequest(f"there are no tensors of {kind}: {remedy}, or take the column as it is")


def _one_length(offsets: np.ndarray[Any, Any], kind: pa.DataType) -> int:
    lengths = np.diff(offsets)
    if len(lengths) and (lengths != lengths[0]).any():
        raise InvalidRequest(
            f"rows of {kind} have from {lengths.min()} to {lengths.max()} values, and a tensor has equally many in "
            "each: pad or cut them first"
        )
    return int(lengths[0]) if len(lengths) else 0


def _bytes(array: pa.Array) -> tuple[pa.Array, int]:
    """The bytes of binary rows, as a view; and how many a row has."""
    kind, rows = array.type, len(array)
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        start, data = array.offset * width, array.buffers()[1]
    else:
        dtype = np.dtype(np.int64 if pa.types.is_large_binary(kind) else np.int32)
        _, offsets, data = array.buffers()
        found = np.frombuffer(offsets, dtype, rows + 1, array.offset * dtype.itemsize) if rows else np.zeros(1, dtype)
        width, start = _one_length(found, kind), int(found[0])
    view = data.slice(start, rows * width) if data is not None else pa.py_buffer(b"")
    return pa.Array.from_buffers(pa.uint8(), rows * width, [None, view]), width


def _flat(values: pa.Array) -> torch.Tensor:
    """A view of numbers; of bits, which torch has no view of, a copy."""
    if pa.types.is_boolean(values.type):
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).astype(np.bool_))
    view: torch.Tensor = torch.utils.dlpack.from_dlpack(values)
    return view


def _reinterpreted(
    flat: torch.Tensor, row_shape: tuple[int, ...], kind: pa.DataType, dtype: torch.dtype | None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Bytes of binary columns as the numbers that the caller says they are."""
    if dtype is None or not _is_bytes(_leaf(kind)):
        return flat, row_shape
    *outer, width = row_shape
    size = dtype.itemsize
    if width % size:
        raise InvalidRequest(f"rows of {width} bytes are no numbers of {dtype}, which has {size}: correct dtype")
    if flat.data_ptr() % size:  # a slice of binary may begin anywhere
        flat = _copied(flat)
    return flat.view(dtype), (*outer, width // size)


def _copied(flat: torch.Tensor) -> torch.Tensor:
    """In memory of Arrow's pool, which is not faulted in anew each time."""
    buffer = memory.allocate(flat.nbytes)
    ours = torch.frombuffer(memory.view(buffer), dtype=flat.dtype) if flat.nbytes else torch.empty_like(flat)
    return ours.copy_(flat)


def _pinned(pieces: Sequence[pa.Array], dtype: torch.dtype | None) -> tuple[torch.Tensor, tuple[int, ...]]:
    parts, shapes = [], set()
    for piece in pieces:
        values, row_shape = _values(piece)
        part, row_shape = _reinterpreted(_flat(values), row_shape, piece.type, dtype)
        parts.append(part)
        shapes.add(row_shape)
    if len(shapes) > 1:
        raise InvalidRequest(f"rows of {pieces[0].type} have different lengths: pad or cut them first")
    out = torch.empty(sum(map(len, parts)), dtype=parts[0].dtype, pin_memory=True)
    torch.cat(parts, out=out)
    return out, shapes.pop()


def _shaped(
    flat: torch.Tensor, rows: int, row_shape: tuple[int, ...], shape: Sequence[int] | None, kind: pa.DataType
) -> torch.Tensor:
    wanted = row_shape if shape is None else tuple(shape)
    if rows == 0:
        return flat.reshape(0, *wanted)
    if math.prod(wanted) * rows != len(flat):
        raise InvalidRequest(
            f"{len(flat) // rows} values a row, of {kind}, are not of shape {wanted}: give a shape of as many"
        )
    return flat.view(rows, *wanted)
