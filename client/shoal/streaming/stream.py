"""`Stream`: a rank's batches, epoch after epoch, in an order that outlives interruptions and another world size.

    1. agree      the ranks meet once: snapshot, cluster map, settings       (`shoal.streaming.world`)
    2. plan       what this rank reads at each step                          (`shoal.streaming.plan`)
    3. look ahead the runs of the coming steps are loaded, within a bound    (`shoal.streaming.lookahead`)
    4. batch      a step's samples in their order, as slices of their runs

The rule: a sample is where the flat order puts it. What fails raises and moves nothing: iterating again goes on with
the same step.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from shoal.cluster_map import ClusterMap
from shoal.datasets import DatasetRecord
from shoal.errors import InvalidRequest
from shoal.filesystem import ShoalFileSystem
from shoal.placement import Placement
from shoal.streaming import indexing, trainer
from shoal.streaming import plan as plans
from shoal.streaming.announce import Announcer
from shoal.streaming.horizon import Horizon
from shoal.streaming.index import Index
from shoal.streaming.lookahead import LookAhead
from shoal.streaming.order import Order
from shoal.streaming.plan import Homes, Plan, Reads, order_of
from shoal.streaming.ready import DEPTH, Awaited, Ready
from shoal.streaming.runs import Rows, Runs, Want
from shoal.streaming.selection import Selection
from shoal.streaming.state import State
from shoal.streaming.steps import Schedule
from shoal.streaming.waits import Waits
from shoal.streaming.world import Gather, World

#: Bytes that a stream holds and has on their way, unless the caller says otherwise; what is mapped takes none.
AHEAD_BYTES = 2 << 30
#: From one word to the nodes to the next, of what is needed and what was waited for.
TELL_S = 1.0
#: A step takes so long until it is known how long it takes.
FIRST_STEP_S = 1.0


class Stream:
    """Batches of samples of a dataset, for one rank of a job. See `stream` for the arguments.

    Iterating it gives the batches that are left of the current epoch, then the next epoch is current; after a ``break``
    it goes on where it was. In a worker of torch's DataLoader it gives that worker's share of them: every n-th batch.

    Attributes:
        world: the ranks.
        epoch: the current one, from 0.
        batch_size: samples a rank and step.
        waits: where the time went.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        shuffle_window: int | None = None,
        drop_last: bool = False,
        columns: Sequence[str] | None = None,
        format: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        gather: Gather | None = None,
        locality: bool = True,
        ahead_bytes: int = AHEAD_BYTES,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.world = World.find(rank, world_size, gather)
        self.batch_size, self.epoch, self._seed = batch_size, 0, seed
        #: Where the epoch's steps are counted from, and those that were taken since, by this worker of its DataLoader.
        self._position, self._taken, self._worker = 0, 0, (0, 1)
        self._iteration = 0  # which iterator may go on
        self._shuffle, self._drop_last, self._ahead_bytes = shuffle, drop_last, ahead_bytes
        self._columns = list(columns) if columns is not None else None
        if ahead_bytes < 1:
            raise InvalidRequest(f"ahead_bytes is {ahead_bytes}: give the bytes that may be held, 1 or more")
        fs, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
        if not isinstance(fs, ShoalFileSystem):
            raise InvalidRequest(f"{url!r} is no URL of Shoal: write shoal://DATASET/PATTERN or shoal::ORIGIN_URL")
        self._fs = fs
        pinned, inside = fs.locate(path)
        self._record: DatasetRecord = pinned.record
        settings = {
            "dataset": self._record.name,
            "path": inside,
            "batch_size": batch_size,
            "shuffle": shuffle,
            "seed": seed,
            "shuffle_window": shuffle_window,
            "drop_last": drop_last,
            "format": format,
            "locality": locality,
            "world_size": self.world.size,
        }
        local = fs.cluster.local
        offers = self.world.agree(
            settings,
            {
                "snapshot": pinned.snapshot.digest,
                "map": json.loads(fs.cluster.map.to_json()),
                "node": local.node_id if local is not None else "",
            },
        )
        first = offers[0] if offers else {"snapshot": pinned.snapshot.digest}
        if "@" in url and pinned.snapshot.digest != first["snapshot"]:
            raise InvalidRequest(
                f"rank 0 streams snapshot {first['snapshot'][:8]} of {self._record.name}, rank {self.world.rank} was "
                f"told to stream {pinned.snapshot.digest[:8]}: name one snapshot on all ranks"
            )
        self._snapshot = fs.cluster.snapshot(first["snapshot"])
        self._selection = Selection.of_path(self._snapshot, inside, format)
        self._index = indexing.fetch(fs.cluster, self._snapshot, self._selection, self._record.replicas)
        self._window = (shuffle_window or plans.window_of(self._index)) if shuffle else 1
        #: The map by which samples go to ranks; None: without regard to where they lie.
        self._map = ClusterMap.from_json(json.dumps(first["map"])) if offers and locality else None
        self._rank_nodes = [offer["node"] for offer in offers] if offers else []
        self._set_up()
        self._schedule(0)  # refuses an epoch without a step

    def _set_up(self) -> None:
        """What follows from the rest, and is not taken along to another process."""
        self._pid = os.getpid()
        self.waits = Waits()
        self._runs = self.open_runs()
        self._announcer = Announcer(self._fs.cluster, self._snapshot, self._record.replicas)
        self._homes: Homes | None = None
        if self._map is not None and self._map.owners():
            snapshot, replicas = self._snapshot, self._record.replicas
            placement = Placement(snapshot.shard_table, snapshot.shard_count(), self._map, replicas)
            self._homes = Homes(snapshot, self._index, placement, self._rank_nodes)

    def open_runs(self) -> Runs:
        """A reader of the stream's runs, for this process."""
        return Runs(
            self._selection.format,
            self._index,
            self._snapshot,
            functools.partial(self._fs.object_reader, self._record, self._snapshot),
            self._fs.read_ranges,
            self._columns,
        )

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker, which finds the agreement made."""
        state = self.__dict__.copy()
        for name in ("_runs", "_homes", "_snapshot", "_announcer", "waits"):
            del state[name]
        world = World(self.world.rank, self.world.size)
        return state | {"world": world, "_index": self._index.to_buffer(self._selection).to_pybytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index = Index.from_buffer(pa.py_buffer(state["_index"]), self._selection)
        self._snapshot = self._fs.cluster.snapshot(self._selection.digest)
        self._set_up()

    # Where it stands

    @property
    def snapshot(self) -> str:
        """Digest of the snapshot that all ranks read."""
        return self._selection.digest

    @property
    def index(self) -> Index:
        """Where the samples lie."""
        return self._index

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self._index.sample_count

    def __len__(self) -> int:
        """Steps that are left of the current epoch."""
        return self._schedule(self._reached).steps

    def steps(self, position: int) -> int:
        """Steps of an epoch that goes on after `position` samples."""
        return self._schedule(position).steps

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.world.size

    @property
    def _reached(self) -> int:
        """The position in the flat order before which everything is consumed. Not for one of several workers."""
        return min(self._position + self._taken * self._step_size, self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch `epoch`, as one does with torch's DistributedSampler; running iterators end with an error."""
        if epoch < 0:
            raise InvalidRequest(f"epoch {epoch} is none: epochs are counted from 0")
        self._move_to(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: what a checkpoint needs, a few hundred bytes that JSON can say.

        Batches count as consumed when they were handed out. It is the same on all ranks that are at the same step.
        """
        worker, workers = self._worker
        if workers > 1:
            state = self._state(self.epoch, self._position)
            return replace(state, worker=worker, workers=workers, taken=self._taken).to_dict()
        return self._state(*self._normal(self.epoch, self._reached)).to_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, other_snapshot: bool = False) -> None:
        """Go on where `state` was taken: also with another world size, batch size or number of workers.

        Args:
            other_snapshot: also where the dataset was refreshed meanwhile; then only the number of samples that were
                consumed is kept, and some may come twice or not at all.

        Raises:
            InvalidRequest: it is no state, or one of another stream or snapshot; the message says what to do.
        """
        given = State.from_dict(state)
        given.check(self._state(0, 0), other_snapshot=other_snapshot)
        if given.workers == 1:
            self._move_to(*self._normal(given.epoch, min(given.position, self.samples)))
            return
        if given.step_size != self._step_size:
            raise InvalidRequest(
                "the state is of one of several workers, at another batch size or world size: merge the states of all "
                "workers (shoal.torch.merged), then any number may go on"
            )
        self._move_to(given.epoch, given.position)
        self._worker, self._taken = (given.worker, given.workers), given.taken

    def _normal(self, epoch: int, position: int) -> tuple[int, int]:
        """The place itself, or the beginning of the next epoch where nothing is left of this one."""
        return (epoch, position) if self._schedule(position).steps else (epoch + 1, 0)

    def _state(self, epoch: int, position: int) -> State:
        return State(
            dataset=self._record.name,
            snapshot=self._selection.digest,
            pattern=self._selection.pattern,
            format=str(self._selection.format),
            samples=self.samples,
            seed=self._seed,
            shuffle=self._shuffle,
            window=self._window,
            epoch=epoch,
            position=position,
            step_size=self._step_size,
        )

    def _move_to(self, epoch: int, position: int) -> None:
        self._iteration += 1
        self.epoch, self._position, self._taken = epoch, position, 0

    def _schedule(self, position: int) -> Schedule:
        return Schedule(self.samples, position, self.batch_size, self.world.size, self._drop_last)

    def _order(self) -> Order:
        return order_of(self._index, seed=self._seed, epoch=self.epoch, window=self._window, shuffle=self._shuffle)

    def _plan(self, order: Order, position: int) -> Plan:
        return Plan(self._index, order, self._schedule(position), self._homes)

    # Reading

    def __iter__(self) -> Iterator[pa.Table]:
        """The batches that are left of the epoch, then the next epoch is current.

        Raises:
            ShoalError: see `shoal.errors`.
        """
        if self._pid != os.getpid():
            self._set_up()  # threads and locks stayed in the parent
        worker = _worker_of_loader()
        if worker != self._worker:
            if self._taken:
                raise InvalidRequest(
                    f"this stream stands where worker {self._worker[0]} of {self._worker[1]} left it, and is iterated "
                    f"by worker {worker[0]} of {worker[1]}: merge the states of all workers (shoal.torch.merged)"
                )
            self._worker = worker
        if worker[1] == 1:
            self._move_to(self.epoch, self._reached)
        elif self._taken and not self._steps_left:
            self._move_to(self.epoch + 1, 0)
        return self._batches()

    @property
    def _steps_left(self) -> range:
        """Steps after the position that this worker has not taken."""
        worker, workers = self._worker
        return range(worker + self._taken * workers, self._schedule(self._position).steps, workers)

    def _batches(self) -> Iterator[pa.Table]:
        if _worker_info() is not None:
            trainer.follow()
        asked = came = told = time.perf_counter()
        self._iteration += 1
        iteration, order, waits = self._iteration, self._order(), self.waits
        plan, horizon = self._plan(order, self._position), self._horizon(order)
        steps = (plan.reads(step, self.world.rank) for step in self._steps_left)
        awaited = Awaited()
        ahead = LookAhead(steps, self._runs, self._ahead_bytes, awaited)
        # A loader's worker is a thread of the trainer's already, and one more would only share its processor.
        with contextlib.closing(Ready(ahead, awaited, batch_of, depth=0 if _worker_info() else DEPTH)) as ready:
            self._tell(horizon)
            while True:
                if iteration != self._iteration:
                    raise RuntimeError("this stream was moved, or iterated again: an older iterator cannot go on")
                batch = ready.take(asked, waits)
                if batch is None:
                    break
                waits.steps, waits.samples = waits.steps + 1, waits.samples + len(batch)
                self._taken += 1
                if time.perf_counter() - told > TELL_S:
                    self._tell(horizon)
                    told = time.perf_counter()
                handed = time.perf_counter()
                waits.inside(handed - asked)
                waits.elapsed_s, came = waits.elapsed_s + handed - came, handed
                yield batch
                asked = time.perf_counter()
        ended = time.perf_counter()
        waits.inside(ended - asked)
        waits.elapsed_s += ended - came
        self._tell(None)
        if self._worker[1] == 1:  # else the state of this worker is still one of this epoch's
            self._move_to(self.epoch + 1, 0)

    def _horizon(self, order: Order) -> Horizon:
        worker, workers = self._worker
        part, parts = self.world.rank * workers + worker, self.world.size * workers
        return Horizon(self._snapshot, self._index, order, part, parts)

    def _tell(self, horizon: Horizon | None) -> None:
        """Let the nodes know what is needed and when (None: nothing), and what was waited for. Waits for nobody."""
        for (cause, node), seconds in self.waits.news().items():
            self._announcer.waited(cause, node, seconds)
        if horizon is None:
            self._announcer.update((), ())
            return
        worker, workers = self._worker
        taken = self._taken * workers + worker
        step_s = self.waits.elapsed_s / (self.waits.steps * workers) if self.waits.steps else FIRST_STEP_S
        shards, parts, samples = horizon.at(self._position + taken * self._step_size)
        self._announcer.update(shards, samples / self._step_size * step_s, parts)

    def close(self) -> None:
        """Tell the nodes that nothing more is read. A stream that is just dropped they forget within half a minute."""
        self._iteration += 1
        self._announcer.close()

    def report(self) -> str:
        """Where the time went since the stream was opened: for people."""
        world = f"rank {self.world.rank} of {self.world.size}"
        return f"{self._record.name}@{self.snapshot[:8]} {self._selection.pattern}, {world}: {self.waits.report()}"


def _worker_of_loader() -> tuple[int, int]:
    """Which worker of torch's DataLoader this process is, and of how many; (0, 1) outside of one."""
    info = _worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)


def _worker_info() -> Any:
    module = sys.modules.get("torch.utils.data")
    return module.get_worker_info() if module is not None else None


def batch_of(reads: Reads, tables: Mapping[Want, Rows]) -> pa.Table:
    """A step's samples in their order: neighbours of one run as one slice of it, nothing copied."""
    runs, places = reads.runs, reads.places.copy()
    found: dict[int, Rows] = {}
    for want, table in tables.items():
        found[want.run] = table
        if want.places is not None:  # the table has just these rows
            mine = runs == want.run
            places[mine] = np.searchsorted(np.array(want.places), places[mine])
    edges = np.flatnonzero((np.diff(runs) != 0) | (np.diff(places) != 1)) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [len(runs)]]))
    slices = [
        found[run].slice(place, length)
        for run, place, length in zip(runs[starts].tolist(), places[starts].tolist(), lengths.tolist(), strict=True)
    ]
    if all(isinstance(each, pa.RecordBatch) for each in found.values()):
        return pa.Table.from_batches(slices)
    slices = [each if isinstance(each, pa.Table) else pa.Table.from_batches([each]) for each in slices]
    try:
        return pa.concat_tables(slices)
    except pa.ArrowInvalid:  # samples of tars need not have the same columns, and to look beforehand costs more
        return pa.concat_tables(slices, promote_options="default")


def stream(url: str, **arguments: Any) -> Stream:
    """Open a stream. See `Stream`."""
    return Stream(url, **arguments)
