"""Datasets to stream, in a `MiniCluster`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

#: Values of a sample's ``tokens``.
TOKENS = 16


def table_of(ids: np.ndarray[Any, Any]) -> pa.Table:
    """Samples: an ``id``, and ``tokens`` that follow from it."""
    tokens = (ids[:, None] * 31 + np.arange(TOKENS)).astype(np.uint16)
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), TOKENS),
            "text": pa.array([f"sample {number}" for number in ids], pa.string()),
        }
    )


def arrow_objects(files: int, batches: int, rows: int) -> dict[str, bytes]:
    """Arrow files ``train/N.arrow``; ids are in the order of the data."""
    objects, first = {}, 0
    for number in range(files):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table_of(np.arange(0)).schema) as writer:
            for _ in range(batches):
                writer.write_table(table_of(np.arange(first, first + rows)))
                first += rows
        objects[f"train/{number}.arrow"] = sink.getvalue().to_pybytes()
    return objects


def image_objects(count: int) -> dict[str, bytes]:
    """Objects that are a sample each: ``img/NNN.jpg``."""
    return {f"img/{number:03}.jpg": bytes([number]) * (100 + number) for number in range(count)}
