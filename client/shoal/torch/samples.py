"""`Samples`: single samples by their number, as torch's map-style data sets give them.

    DataLoader(shoal.torch.Samples(url), batch_size=256, sampler=DistributedSampler(...), num_workers=4)

Numbers are those of the data's own order. A read brings the whole run that a sample lies in (a record batch, a row
group), and runs are kept within a bound; so a sampler that goes by neighbourhood is cheap, and one that jumps about in
large runs pays for a run a sample. A shuffled `IterableStream` reads each run once: use it to train.

The rule: what is kept stays within `cache_bytes`; the runs of one request come on top, while it is answered.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, get_worker_info

from shoal import memory, parallel
from shoal.errors import InvalidRequest
from shoal.streaming import trainer
from shoal.streaming.formats.format import Format
from shoal.streaming.plan import Reads
from shoal.streaming.runs import Loaded, Rows, Runs, Want
from shoal.streaming.stream import Stream, batch_of
from shoal.streaming.waits import Trace
from shoal.torch import tensors

#: Bytes of runs that are kept, unless the caller says otherwise; in each worker.
CACHE_BYTES = 128 << 20
#: Runs that are kept: those that are maps take no memory of their own, but descriptors.
RUNS_KEPT = 4096


class Samples(Dataset[Any]):
    """All samples that a URL matches. Threads may share it; each worker has a cache of its own.

    Args:
        source: a URL as for `shoal.stream`, or a `Stream`.
        transform: is given each sample as a `pyarrow.Table` of one row. None: a dictionary with a tensor for each
            column that has one, which may be written, and a Python value for the others.
        cache_bytes: of runs that are kept.
        arguments: ``columns``, ``format``, ``storage_options``, and ``rank``, ``world_size``, ``gather`` by which ranks
            agree on the snapshot.
    """

    def __init__(
        self,
        source: str | Stream,
        *,
        transform: Callable[[pa.Table], Any] | None = None,
        cache_bytes: int = CACHE_BYTES,
        **arguments: Any,
    ) -> None:
        allowed = {"columns", "format", "storage_options", "rank", "world_size", "gather"}
        if unknown := sorted(arguments.keys() - allowed):
            raise InvalidRequest(f"single samples have no {unknown[0]}: a sampler decides which are read, and when")
        if isinstance(source, Stream) and arguments:
            raise InvalidRequest(f"{', '.join(arguments)} belong to the stream, which is open already: give a URL")
        self.stream = source if isinstance(source, Stream) else Stream(source, batch_size=1, **arguments)
        self.transform, self.cache_bytes = transform, cache_bytes
        self._set_up()

    def _set_up(self) -> None:
        """What is not taken along to another process by pickling; a forked one has its own copy of it."""
        index = self.stream.index
        self._firsts = np.cumsum(index.samples) - index.samples
        self._kept = _Kept(self.cache_bytes)
        self._runs: Runs | None = None
        self._pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("stream", "transform", "cache_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __len__(self) -> int:
        """Samples."""
        return self.stream.samples

    def __getitem__(self, number: int) -> Any:
        """One sample. Raises IndexError, and `ShoalError` as reads do."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """Several samples, in the order asked for: each of their runs is read once, several at a time."""
        if not len(numbers):
            return []
        table = self.table(numbers)
        if self.transform is not None:
            return [self.transform(table.slice(row, 1)) for row in range(len(table))]
        columns = tensors.tensors(table, copy=True)
        return [{name: column[row] for name, column in columns.items()} for row in range(len(table))]

    def table(self, numbers: Sequence[int]) -> pa.Table:
        """Several samples as a table, a row each, in the order asked for. Raises as `__getitem__`."""
        wanted = np.asarray(numbers, np.int64)
        outside = wanted[(wanted < -len(self)) | (wanted >= len(self))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {len(self)}: numbers go from 0 to {len(self) - 1}")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        runs = np.searchsorted(self._firsts, wanted, side="right") - 1
        reads = Reads(0, runs, wanted - self._firsts[runs], np.ones(len(runs), np.bool_))
        return batch_of(reads, self._tables(np.unique(runs).tolist()))

    def _tables(self, numbers: list[int]) -> dict[Want, Rows]:
        if self._runs is None or self._pid != os.getpid():  # a fork's child: its parent's locks may be held for ever
            if get_worker_info() is not None:
                trainer.follow()
                memory.keep_freed()
            self._runs, self._kept, self._pid = self.stream.open_runs(), _Kept(self.cache_bytes), os.getpid()
        runs, kept = self._runs, self._kept
        tables = {Want(run, None): table for run in numbers if (table := kept.get(run)) is not None}
        missing = [want for want in (Want(run, None) for run in numbers) if want not in tables]
        if runs.format in (Format.OBJECTS, Format.TAR):
            found = runs.load(missing, Trace()) if missing else []
        else:
            found = parallel.run_parallel(lambda want: runs.load([want], Trace())[0], missing)
        for want, loaded in zip(missing, found, strict=True):
            tables[want] = loaded.table
            kept.put(want.run, loaded)
        return tables


class _Kept:
    """Runs, the last used ones of so many bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._held_bytes = limit_bytes, 0
        self._runs: OrderedDict[int, Loaded] = OrderedDict()
        self._lock = threading.Lock()  # guards both

    def get(self, run: int) -> Rows | None:
        with self._lock:
            loaded = self._runs.get(run)
            if loaded is None:
                return None
            self._runs.move_to_end(run)
            return loaded.table

    def put(self, run: int, loaded: Loaded) -> None:
        with self._lock:
            if run in self._runs:  # another thread was faster
                return
            self._runs[run] = loaded
            self._held_bytes += loaded.held_bytes
            while self._held_bytes > self._limit_bytes or len(self._runs) > RUNS_KEPT:
                _, dropped = self._runs.popitem(last=False)
                self._held_bytes -= dropped.held_bytes
