"""Local files as torch's users read them: a map-style data set, shuffled by the DataLoader's own sampler.

    FILES       a sample at a time, put together by default_collate
    GATHERED    a whole batch at a time, put together by hand: what somebody writes who has measured the first

The rule: each reads the data as they lie there; nothing is prepared or kept but open files and maps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.loading.job import CROP, LENGTH, TOKENS, Epoch, Job, decoded


class Sequences(torch.utils.data.Dataset[Any]):
    """Rows of memory-mapped Arrow files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._batches = []
        for path in paths:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            for number in range(file.num_record_batches):
                values = file.get_batch(number).column("tokens").flatten()
                self._batches.append(values.to_numpy().reshape(-1, LENGTH))
        self._ends = np.cumsum([len(batch) for batch in self._batches])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, number: int) -> np.ndarray[Any, Any]:
        batch = int(np.searchsorted(self._ends, number, side="right"))
        rows: np.ndarray[Any, Any] = self._batches[batch]
        return rows[number - int(self._ends[batch])]

    def __getitem__(self, number: int) -> Any:
        return {"tokens": torch.from_numpy(self.row(number))}


class GatheredSequences(Sequences):
    def __getitems__(self, numbers: Sequence[int]) -> Any:
        return {"tokens": torch.from_numpy(np.stack([self.row(number) for number in numbers]))}


class Pictures(torch.utils.data.Dataset[Any]):
    """Files of a folder."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Any:
        with open(self._paths[number], "rb") as file:  # noqa: PTH123 - as fast as it goes
            return decoded(file.read())


class GatheredPictures(Pictures):
    def __getitems__(self, numbers: Sequence[int]) -> Any:
        pixels = torch.empty((len(numbers), 3, CROP, CROP), dtype=torch.uint8).share_memory_()
        sums = torch.empty(len(numbers), dtype=torch.int64)
        for place, number in enumerate(numbers):
            sample = self[number]
            pixels[place], sums[place] = sample["pixels"], sample["sum"]
        return {"pixels": pixels, "sum": sums}


def files(job: Job) -> Epoch:
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
    data = Sequences(job.paths()) if job.kind == TOKENS else Pictures(job.paths())
    return _epochs(job, data)


def gathered(job: Job) -> Epoch:
    data = GatheredSequences(job.paths()) if job.kind == TOKENS else GatheredPictures(job.paths())
    return _epochs(job, data, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def _epochs(job: Job, data: Any, **options: Any) -> Epoch:
    loader = job.loader(data, batch_size=job.batch_size, shuffle=True, **options)
    return lambda epoch: loader
