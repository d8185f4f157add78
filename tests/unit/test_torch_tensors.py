"""Arrow columns as tensors: every bit, no copy where there need be none, and plain words where there is no tensor."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from shoal.errors import InvalidRequest  # noqa: E402
from shoal.torch import tensor, tensors  # noqa: E402

NUMBERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"]


def lists(values: np.ndarray[Any, Any]) -> pa.Array:
    """Fixed-size lists, nested as deep as `values` has dimensions."""
    array = pa.array(values.reshape(-1))
    for size in values.shape[:0:-1]:
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def any_bits(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(1).bytes(size), dtype).reshape(shape)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 1, 4, 6]])
def test_bits_of_every_type(dtype: str, cuts: list[int]) -> None:
    values = any_bits(dtype, 8, 2, 3)
    whole = lists(values)[1:7]
    column = pa.chunked_array([whole[a:b] for a, b in itertools.pairwise(cuts)])
    found = tensor(column)
    assert found.dtype is getattr(torch, dtype)
    assert found.shape == (6, 2, 3)
    assert found.numpy().tobytes() == values[1:7].tobytes()
    assert tensor(column, (6,)).shape == (6, 6)
    flat = pa.chunked_array([pa.array(values[0, 0]), pa.array(values[3, 1])])
    assert tensor(flat).numpy().tobytes() == values[0, 0].tobytes() + values[3, 1].tobytes()


def address(array: pa.Array) -> int:
    while isinstance(array.type, pa.FixedSizeListType):
        array = array.flatten()
    return int(array.buffers()[1].address) + array.offset * array.type.bit_width // 8


def test_one_piece_is_a_view_and_several_are_gathered_once() -> None:
    array = lists(any_bits("uint16", 9, 4))[2:7]
    assert tensor(array).data_ptr() == address(array)
    assert tensor(pa.chunked_array([array[:0], array]), copy=False).data_ptr() == address(array)
    ours = tensor(array, copy=True)
    assert ours.data_ptr() != address(array)
    ours[:] = 0  # may be written, and nothing else changes
    assert tensor(array).numpy().any()
    gathered = tensor(pa.chunked_array([array, array]))
    gathered[:] = 0
    assert tensor(array).numpy().any()
    with pytest.raises(InvalidRequest, match="copy=False"):
        tensor(pa.chunked_array([array, array]), copy=False)


def test_a_view_outlives_its_column() -> None:
    before = pa.total_allocated_bytes()
    values = any_bits("int64", 1 << 17)
    view = tensor(pa.concat_arrays([pa.array(values), pa.array(values)]))
    assert pa.total_allocated_bytes() - before == 2 * values.nbytes
    assert view.numpy().tobytes() == values.tobytes() * 2
    del view
    assert pa.total_allocated_bytes() == before


def test_bytes_lists_and_bits() -> None:
    rows = [b"0123", b"4567", b"89ab"]
    for kind in (pa.binary(4), pa.binary(), pa.large_binary()):
        for column in (pa.array(rows, kind)[1:], pa.chunked_array([pa.array([each], kind) for each in rows[1:]])):
            assert bytes(tensor(column).numpy().tobytes()) == b"456789ab"
            assert (
                tensor(column, dtype=torch.uint16).tolist() == np.frombuffer(b"456789ab", "<u2").reshape(2, 2).tolist()
            )
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.int32())):
        assert tensor(pa.array([[9, 9], [1, 2], [3, 4]], kind)[1:]).tolist() == [[1, 2], [3, 4]]
    bits = pa.array([True, False, True, True])
    assert tensor(bits[1:]).tolist() == [False, True, True]
    assert tensor(pa.FixedSizeListArray.from_arrays(bits, 2)).tolist() == [[True, False], [True, True]]
    assert tensor(pa.array([1, 2]), dtype=torch.float32).dtype is torch.float32


def test_extension_type_knows_its_shape() -> None:
    images = any_bits("uint8", 5, 3, 2, 2)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    assert tensor(column).numpy().tobytes() == images.tobytes()
    assert tensor(column[1:3]).shape == (2, 3, 2, 2)


def test_nothing_at_all() -> None:
    assert tensor(pa.array([], pa.list_(pa.int32(), 3))).shape == (0, 3)
    assert tensor(pa.chunked_array([], pa.float32()), (2, 2)).shape == (0, 2, 2)
    assert tensor(pa.array([], pa.binary()), copy=True).shape == (0, 0)


@pytest.mark.parametrize(
    ("column", "shape", "message"),
    [
        (pa.array([1, None]), None, "fill them"),
        (pa.array([[1, 2], None], pa.list_(pa.int32(), 2)), None, "fill them"),
        (pa.array([[1, 2], [1, None]], pa.list_(pa.int32(), 2)), None, "fill them"),
        (pa.array([[1, 2], [3]]), None, "pad or cut"),
        (pa.array([b"a", b"bc"]), None, "pad or cut"),
        (pa.chunked_array([[[1, 2]], [[3]]]), None, "pad or cut"),
        (pa.array(["text"]), None, "cast it"),
        (pa.array(["text"]).dictionary_encode(), None, "dictionary_decode"),
        (pa.array([[1, 2, 3]], pa.list_(pa.int32(), 3)), (2, 2), "give a shape of as many"),
        (pa.array([1], pa.timestamp("s")), None, "cast it"),
    ],
)
def test_what_is_no_tensor(column: Any, shape: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tensor(column, shape)


def test_odd_bytes_are_no_numbers() -> None:
    with pytest.raises(InvalidRequest, match="correct dtype"):
        tensor(pa.array([b"abc"], pa.binary(3)), dtype=torch.uint16)


def test_a_batch_by_the_types_of_its_columns() -> None:
    table = pa.table({"x": [1, 2], "text": ["a", "b"], "many": [[1], [2]], "raw": [b"a", b"b"]})
    found = tensors(table)
    assert found["x"].tolist() == [1, 2]
    # Equal lengths by chance are no reason for a tensor: the next batch may have others.
    assert (found["text"], found["many"], found["raw"]) == (["a", "b"], [[1], [2]], [b"a", b"b"])
    with pytest.raises(InvalidRequest, match="column 'x'"):
        tensors(pa.table({"x": [1, None]}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_pinning_without_cuda_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="leave out pin_memory"):
        tensor(pa.array([1]), pin_memory=True)


def test_pinning_in_a_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.worker._worker_info", object())
    with pytest.raises(InvalidRequest, match="to the DataLoader"):
        tensor(pa.array([1]), pin_memory=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("cuts", [[0, 8], [0, 3, 8]], ids=["one piece", "two pieces"])
def test_pinned_memory(cuts: list[int]) -> None:
    values = any_bits("uint16", 8, 4)
    column = pa.chunked_array([lists(values[a:b]) for a, b in itertools.pairwise(cuts)])
    pinned = tensor(column, pin_memory=True)
    assert pinned.is_pinned()
    assert pinned.cuda(non_blocking=True).cpu().numpy().tobytes() == values.tobytes()
    converted = tensor(column, pin_memory=True, dtype=torch.float32)
    assert converted.is_pinned(), "also where numbers are converted"
    assert np.array_equal(converted.cuda().cpu().numpy(), values.astype(np.float32))


def test_shoal_alone_imports_no_torch() -> None:
    code = (
        "import sys, shoal; shoal.stream; assert 'torch' not in sys.modules; "
        "shoal.torch.tensor; assert sys.modules['torch'].Tensor"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
