"""`IterableStream`: a stream as torch's DataLoader and torchdata's StatefulDataLoader read it, with any workers.

    loader = StatefulDataLoader(shoal.torch.IterableStream(url, batch_size=256), batch_size=None, num_workers=4)

Worker w of n has the steps w, w + n, … of the stream, and the loader takes from its workers in turn, so the batches
come in the stream's order.

The rule: a ``for`` over the loader is an epoch, as everywhere in torch: it begins where a state that was loaded says,
else with the epoch after the last loop's. Workers are ahead of the trainer, so only the loader knows what the trainer
had: to go on with an interrupted epoch, load the state that the loader gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
from torch.utils.data import IterableDataset, get_worker_info

from shoal import memory
from shoal.errors import InvalidRequest
from shoal.streaming import state as states
from shoal.streaming import trainer
from shoal.streaming.state import State
from shoal.streaming.stream import Stream
from shoal.torch import handover, tensors
from shoal.torch.epochs import Epochs


class IterableStream(IterableDataset[Any]):
    """The batches of a stream, for a DataLoader with ``batch_size=None``.

    Args:
        source: a URL, or a `Stream`, which then belongs to this.
        transform: is given each batch as a `pyarrow.Table`, in the worker, and returns what the trainer gets. None:
            `shoal.torch.tensors`: a dictionary of tensors, and of lists for what no tensor holds. Either way the
            trainer may write what it gets, unless a transform returns views (see `shoal.torch.tensor`).
        arguments: of `shoal.stream`.
    """

    def __init__(
        self,
        source: str | Stream,
        *,
        transform: Callable[[pa.Table], Any] | None = None,
        **arguments: Any,
    ) -> None:
        if isinstance(source, Stream) and arguments:
            raise InvalidRequest(f"{', '.join(arguments)} belong to the stream, which is open already: give a URL")
        self.stream = source if isinstance(source, Stream) else Stream(source, **arguments)
        self.transform = transform
        given = State.from_dict(self.stream.state_dict())
        self._epochs = Epochs((given.epoch, given.position))
        self._identity = replace(given, epoch=0, position=0)
        self._loop: State | None = None  # the one that is read, by this process, as it began
        self._taken = 0  # batches of it that were handed out, by this process
        self._given: State | None = None  # where the next one begins, if this process is a worker
        self._begun = 0  # by this process, if it is a worker

    def __len__(self) -> int:
        """Batches of a whole epoch, on this rank. One that goes on from a state has fewer left."""
        return self.stream.steps(0)

    def set_epoch(self, epoch: int) -> None:
        """The next loop reads epoch `epoch` from its beginning, as one does with torch's DistributedSampler."""
        if epoch < 0:
            raise InvalidRequest(f"epoch {epoch} is none: epochs are counted from 0")
        self._epochs.next = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next loop, or this worker's share of them.

        Raises:
            ShoalError: see `shoal.errors`. A loop that failed does not go on by itself: load the last state.
        """
        info = get_worker_info()
        if info is None:
            epoch, position = self._epochs.begin()
            loop = replace(self._identity, epoch=epoch, position=position)
        else:
            loop = self._join(info)
        self._loop, self._taken = loop, loop.taken
        return self._batches(loop)

    def _join(self, info: Any) -> State:
        """This worker's part of the loop that begins."""
        trainer.follow()
        memory.keep_freed()
        given, self._given = self._given, None
        seed = info.seed - info.id
        place = None if given is None else (given.epoch, given.position)
        epoch, position = self._epochs.join(info.id, seed, self._begun, place)
        self._begun += 1
        return replace(
            self._identity,
            epoch=epoch,
            position=position,
            worker=info.id,
            workers=info.num_workers,
            taken=given.taken if given is not None else 0,
        )

    def _batches(self, loop: State) -> Iterator[Any]:
        # Not what a batch is a view of, which is read-only: only batches that go to another process are copied anyway.
        copy = None if loop.workers > 1 or get_worker_info() else True
        if loop.worker + loop.taken * loop.workers >= self.stream.steps(loop.position):
            return
        self.stream.load_state_dict(loop.to_dict())
        for taken, table in enumerate(self.stream, loop.taken + 1):
            # Counted when it is handed out: whoever asks for the state between two batches has had this one.
            self._taken = taken
            yield _tensors(table, copy=copy) if self.transform is None else self.transform(table)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, for StatefulDataLoader, which asks in each worker; JSON values.

        Raises:
            InvalidRequest: workers read the loop, and this is not one of them.
        """
        is_worker = get_worker_info() is not None
        if not is_worker and self._epochs.is_with_workers:
            raise InvalidRequest(
                "workers read this stream, and only the loader knows how much of it the trainer had: use torchdata's "
                "StatefulDataLoader and take the loader's state_dict()"
            )
        if self._loop is None:
            epoch, position = self._epochs.next
            return replace(self._identity, epoch=epoch, position=position).to_dict()
        loop = replace(self._loop, taken=self._taken)
        return (loop if loop.workers > 1 else states.merged([loop])).to_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, other_snapshot: bool = False) -> None:
        """The next loop goes on where `state` was taken: what `state_dict` or `merged` gave.

        Args:
            other_snapshot: see `Stream.load_state_dict`.

        Raises:
            InvalidRequest: it is no state, one of another stream, or of one of several workers and this is not it.
        """
        given = State.from_dict(state)
        given.check(self._identity, other_snapshot=other_snapshot)
        given = replace(given, position=min(given.position, self.stream.samples))
        info = get_worker_info()
        mine = (info.id, info.num_workers) if info is not None else (0, 1)
        if given.workers > 1 and ((given.worker, given.workers) != mine or given.step_size != self._identity.step_size):
            raise InvalidRequest(
                f"the state is that of worker {given.worker} of {given.workers} at {given.step_size} samples a step: "
                "to go on with other workers, batch size or ranks, give shoal.torch.merged(loader.state_dict()) to "
                "IterableStream.load_state_dict and make a new loader"
            )
        if given.workers == 1 and mine[1] > 1:
            raise InvalidRequest("the state is that of a loader with one worker: see shoal.torch.merged")
        if info is None:
            self._epochs.next, self._loop = (given.epoch, given.position), None
        else:
            self._given = given


def _tensors(table: pa.Table, *, copy: bool | None) -> dict[str, Any]:
    return handover.copied(tensors.tensors(table, copy=copy))


def merged(loader_state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a whole stream, from what ``StatefulDataLoader.state_dict()`` gave for one `IterableStream`.

    With it any number of workers, ranks and samples a batch may go on: give it to `IterableStream.load_state_dict`
    before a new loader's first loop, or to `Stream.load_state_dict`. The states of all ranks are the same.

    Raises:
        InvalidRequest: it is not such a state.
    """
    try:
        if "_snapshot" in loader_state:  # of several processes
            snapshots = loader_state["_snapshot"]["_worker_snapshots"]
            found = [State.from_dict(snapshot["dataset_state"]) for snapshot in snapshots.values()]
            since = int(loader_state["_steps_since_snapshot"])
        else:
            found, since = [State.from_dict(loader_state["dataset_state"])], 0
        has_ended = bool(loader_state["_iterator_finished"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"this is no state of a loader over an IterableStream ({error!r}): give what StatefulDataLoader's "
            "state_dict() returned"
        ) from error
    whole = states.merged(found)
    if has_ended:
        return replace(whole, epoch=whole.epoch + 1, position=0).to_dict()
    return replace(whole, position=min(whole.samples, whole.position + since * whole.step_size)).to_dict()
