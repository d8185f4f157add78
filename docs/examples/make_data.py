"""Writes the data of the worked example (docs/streaming.md): ``python make_data.py DIRECTORY``.

Eight Arrow files of 500 samples each: ``x``, 16 numbers, and ``y``, which follows from them and some noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

FILES, SAMPLES, WIDTH = 8, 500, 16


def write(directory: Path) -> None:
    """Make `directory`, and the files in it."""
    random = np.random.default_rng(0)
    slope = random.normal(size=WIDTH)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        x = random.normal(size=(SAMPLES, WIDTH)).astype(np.float32)
        y = np.tanh(x @ slope) + random.normal(scale=0.1, size=SAMPLES)
        columns = {"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), WIDTH), "y": pa.array(y)}
        table = pa.table(columns)
        with pa.ipc.new_file(str(directory / f"{number}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
