"""The data as people write them: sequences of 16-bit tokens in Arrow files, and a folder of JPEG pictures.

Beside each directory lies `NAME.npy`: the CRC of each sample, by its number.
"""

from __future__ import annotations

import concurrent.futures
import io
import multiprocessing
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.loading.job import LENGTH, SIDE, TOKENS

#: Sequences of a record batch, and record batches of a file: 1 MiB and 32 MiB.
BATCH, BATCHES = 256, 32
#: Pictures of a directory below the folder.
PICTURES = 1000
#: A picture is a blurred field of so many random cells a side, which makes a JPEG of some 20 KB.
CELLS, QUALITY = 56, 85


@dataclass(frozen=True, slots=True)
class Written:
    """Attributes:
    size_bytes: of all files.
    """

    files: Path
    samples: int
    size_bytes: int


def write(kind: str, samples: int, directory: Path) -> Written:
    """Write `samples` of a kind to `directory`/`kind`."""
    files = directory / kind
    files.mkdir()
    sums = _tokens(files, samples) if kind == TOKENS else _images(files, samples)
    np.save(files.with_suffix(".npy"), sums)
    return Written(files, samples, sum(path.stat().st_size for path in files.rglob("*") if path.is_file()))


def _tokens(files: Path, samples: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    schema = pa.schema([("tokens", pa.list_(pa.uint16(), LENGTH))])
    random = np.random.default_rng(1)
    sums = np.empty(samples, np.uint32)
    for begin in range(0, samples, BATCH * BATCHES):
        with pa.ipc.new_file(str(files / f"{begin // (BATCH * BATCHES):05}.arrow"), schema) as writer:
            for first in range(begin, min(samples, begin + BATCH * BATCHES), BATCH):
                numbers = np.arange(first, min(samples, first + BATCH))
                rows = np.frombuffer(random.bytes(2 * LENGTH * len(numbers)), np.uint16).reshape(-1, LENGTH).copy()
                rows[:, 0], rows[:, 1] = numbers & 0xFFFF, numbers >> 16
                sums[numbers] = [zlib.crc32(row) for row in rows]
                column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), LENGTH)
                writer.write_batch(pa.record_batch([column], schema=schema))
    return sums


def _images(files: Path, samples: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    context = multiprocessing.get_context("spawn")
    firsts = range(0, samples, PICTURES)
    with concurrent.futures.ProcessPoolExecutor(min(len(firsts), os.cpu_count() or 1), context) as pool:
        parts = [pool.submit(_folder, files, first, min(samples, first + PICTURES)) for first in firsts]
        return np.array([each for part in parts for each in part.result()], np.uint32)


def _folder(files: Path, first: int, last: int) -> list[int]:
    folder = files / f"{first // PICTURES:03}"
    folder.mkdir()
    sums = []
    for number in range(first, last):
        cells = np.random.default_rng(number).integers(0, 256, (CELLS, CELLS, 3), np.uint8)
        image = Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=QUALITY)
        sums.append(zlib.crc32(out.getvalue()))
        (folder / f"{number:06}.jpg").write_bytes(out.getvalue())
    return sums
