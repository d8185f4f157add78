"""A trainer that streams with workers, or one of these, killed with -9: nothing of it stays, and the next one goes on.

The trainer says its state after each step, as a checkpoint has it; the next one starts from the last that was heard.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

import shoal  # noqa: E402
from shoal.torch import IterableStream, merged  # noqa: E402
from tests.support import streams  # noqa: E402
from tests.support.minicluster import MiniCluster  # noqa: E402
from tests.support.processes import DEADLINE_S, Child, Say, is_running  # noqa: E402
from tests.support.waiting import wait_for  # noqa: E402

SAMPLES, BATCH = 3000, 16
URL = "shoal://set/train/*.arrow"

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Job:
    """A training job over a cluster, and a directory of our own for temporary files."""

    def __init__(self, cluster: MiniCluster, temporary: Path) -> None:
        self.temporary = temporary
        self.arguments: dict[str, Any] = {
            "batch_size": BATCH,
            "shuffle": True,
            "storage_options": {"endpoint": cluster.nodes[0].address, "socket": str(cluster._socket(0))},
        }
        self.expected = [each for batch in shoal.stream(URL, **self.arguments) for each in batch["id"].to_pylist()]

    def loader(self, state: Any = None, *, workers: int = 3) -> Any:
        dataset = IterableStream(URL, **self.arguments)
        if state is not None:
            dataset.load_state_dict(state)
        return stateful.StatefulDataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            timeout=DEADLINE_S if workers else 0,
        )

    def train(self, say: Say, state: Any = None) -> None:
        """Say which processes read, then the state and the ids after each step."""
        loader = self.loader(state)
        batches = iter(loader)
        say([worker.pid for worker in batches._workers])
        for batch in batches:
            say((batch["id"].tolist(), merged(loader.state_dict())))

    def left_over(self) -> set[str]:
        """Files in memory and in the directory for temporary ones.

        But for Python's own: a process that sends tensors listens at a socket ``pymp-*/listener-*``, and an empty one
        stays of a worker that is killed itself. Nothing of Shoal's can help that.
        """
        found = {path for place in (Path("/dev/shm"), self.temporary) for path in place.rglob("*")}
        return {str(path) for path in found if not any(part.startswith("pymp-") for part in path.parts)}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    objects = streams.arrow_objects(5, 6, 100)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with MiniCluster(tmp_path / "c", objects, nodes=2, part_size=1 << 16, shard_size=1 << 20) as cluster:
        yield Job(cluster, temporary)


def test_killed_trainer(job: Job) -> None:
    """In the middle of an epoch, again and again, each time with workers; the epoch is whole, and in its order."""
    before = job.left_over()
    read: list[int] = []
    state: Any = None
    for steps in (2, 30):
        with Child(lambda say, state=state: job.train(say, state), has_children=True) as trainer:  # type: ignore[misc]
            workers = trainer.heard()
            assert len(workers) == 3
            for _ in range(steps):
                ids, state = trainer.heard()
                read += ids
            trainer.kill()
        wait_for(lambda workers=workers: not any(map(is_running, workers)))  # type: ignore[misc]
        wait_for(lambda: job.left_over() <= before)  # tests beside this one have files there, for a moment
    for batch in job.loader(state, workers=0):
        read += batch["id"].tolist()
    assert read == job.expected
    wait_for(lambda: job.left_over() <= before)  # tests beside this one have files there, for a moment


def test_killed_worker(job: Job) -> None:
    """The trainer is told, and a new loader goes on from the last state."""
    before = job.left_over()

    def train(say: Say) -> None:
        loader = job.loader()
        batches = iter(loader)
        read = [each for batch in itertools.islice(batches, 5) for each in batch["id"].tolist()]
        state = loader.state_dict()
        with pytest.raises(RuntimeError, match=r"killed by signal: Killed|exited unexpectedly"):
            os.kill(batches._workers[1].pid, signal.SIGKILL)
            time.sleep(DEADLINE_S)  # torch tells by a handler of SIGCHLD, wherever the trainer is
        del batches, loader
        for batch in job.loader(merged(state), workers=2):
            read += batch["id"].tolist()
        say(read == job.expected)

    with Child(train, has_children=True) as trainer:
        assert trainer.heard()
    wait_for(lambda: job.left_over() <= before)  # tests beside this one have files there, for a moment
