"""Streams in real DataLoaders: the stream's order with any workers, epoch after epoch, and resumes at other sizes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402

import shoal  # noqa: E402
from shoal.errors import InvalidRequest  # noqa: E402
from shoal.streaming.runs import Want  # noqa: E402
from shoal.torch import IterableStream, Samples, merged  # noqa: E402
from tests.support import streams  # noqa: E402
from tests.support.minicluster import MiniCluster  # noqa: E402

#: Each spawned worker imports torch anew.
LONG = pytest.param(2, "spawn", True, marks=pytest.mark.long)
SAMPLES, BATCH = 600, 32
STEPS = -(-SAMPLES // BATCH)
URL = "shoal://set/train/*.arrow"

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


multiprocessing.set_forkserver_preload(["torch", "shoal.torch", "shoal.streaming.stream"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    objects = streams.arrow_objects(4, 3, 50) | streams.image_objects(30)
    directory = tmp_path_factory.mktemp("cluster")
    with MiniCluster(directory / "c", objects, nodes=2, part_size=1 << 16, shard_size=1 << 20) as cluster:
        yield cluster


@pytest.fixture(params=[True, False], ids=["mapped", "remote"], scope="module")
def options(request: pytest.FixtureRequest, cluster: MiniCluster) -> dict[str, Any]:
    return {"endpoint": cluster.nodes[0].address, "socket": str(cluster._socket(0)), "local": request.param}


@pytest.fixture
def arguments(cluster: MiniCluster) -> dict[str, Any]:
    options = {"endpoint": cluster.nodes[0].address, "socket": str(cluster._socket(0))}
    return {"shuffle": True, "seed": 7, "shuffle_window": 200, "storage_options": options}


def make(arguments: dict[str, Any], rank: int = 0, world_size: int = 1, batch_size: int = BATCH) -> IterableStream:
    return IterableStream(URL, batch_size=batch_size, rank=rank, world_size=world_size, **arguments)


def loader_of(dataset: IterableStream, workers: int, kind: Any = None, **more: Any) -> Any:
    if workers and "multiprocessing_context" not in more:
        more["multiprocessing_context"] = "fork"
    return (kind or stateful.StatefulDataLoader)(dataset, batch_size=None, num_workers=workers, **more)


def ids(loader: Any) -> list[int]:
    return list(itertools.chain.from_iterable(batch["id"].tolist() for batch in loader))


def take(loader: Any, batches: int) -> list[int]:
    """So many batches, and an iterator that is left."""
    return ids(itertools.islice(iter(loader), batches)) if batches else []


@pytest.fixture
def expected(arguments: dict[str, Any]) -> list[list[int]]:
    """The ids of three epochs, as a plain stream has them."""
    stream = shoal.stream(URL, batch_size=BATCH, **arguments)
    epochs = [list(itertools.chain.from_iterable(batch["id"].to_pylist() for batch in stream)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    return epochs


@pytest.mark.parametrize(
    ("workers", "context", "persistent"),
    [(0, None, False), (2, "fork", False), (3, "fork", True), (2, "forkserver", False), LONG],
)
def test_epochs_of_a_loader(
    arguments: dict[str, Any], expected: list[list[int]], workers: int, context: str | None, persistent: bool
) -> None:
    loader = loader_of(
        make(arguments), workers, DataLoader, multiprocessing_context=context, persistent_workers=persistent
    )
    assert len(loader) == STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch warns where more comes than len() said
        warnings.filterwarnings("ignore", "This DataLoader will create")
        assert [ids(loader), ids(loader)] == expected[:2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_batches_reach_the_gpu_from_pinned_memory(arguments: dict[str, Any], expected: list[list[int]]) -> None:
    found: list[int] = []
    for batch in loader_of(make(arguments), 2, DataLoader, pin_memory=True):
        assert batch["id"].is_pinned()
        found += batch["id"].cuda(non_blocking=True).cpu().tolist()
    assert found == expected[0]
    found = []
    for batch in shoal.stream(URL, batch_size=BATCH, **arguments):
        pinned = shoal.torch.tensor(batch["id"], pin_memory=True)
        assert pinned.is_pinned()
        found += pinned.cuda(non_blocking=True).cpu().tolist()
    assert found == expected[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loop_that_is_left_and_epochs_that_are_set(
    arguments: dict[str, Any], expected: list[list[int]], workers: int, persistent: bool
) -> None:
    dataset = make(arguments)
    loader = loader_of(dataset, workers, DataLoader, persistent_workers=persistent and workers > 0)
    assert take(loader, 1) == expected[0][:BATCH]
    assert ids(loader) == expected[1], "a loop is an epoch, whatever was left of the one before"
    dataset.set_epoch(0)
    assert take(loader, 2) == expected[0][: 2 * BATCH]
    dataset.set_epoch(2)
    assert ids(loader) == expected[2]
    with pytest.raises(InvalidRequest, match="counted from 0"):
        dataset.set_epoch(-1)


@pytest.mark.parametrize(
    ("workers", "more"),
    [
        (0, {}),
        (1, {}),
        (2, {"persistent_workers": True}),
        (3, {}),
        (3, {"snapshot_every_n_steps": 4}),
        pytest.param(2, {"multiprocessing_context": "forkserver"}, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("taken", [0, 7, STEPS])
def test_state_of_a_loader(
    arguments: dict[str, Any], expected: list[list[int]], workers: int, more: dict[str, Any], taken: int
) -> None:
    loader = loader_of(make(arguments), workers, **more)
    batches = iter(loader)
    read = ids(itertools.islice(batches, taken))
    state = json.loads(json.dumps(loader.state_dict()))
    del batches, loader
    again = loader_of(make(arguments), workers, **more)
    again.load_state_dict(state)
    assert read + ids(again) == expected[0]
    assert ids(again) == expected[1]
    # With another number of workers, and with none of torch.
    other = make(arguments)
    other.load_state_dict(merged(state))
    again = loader_of(other, 0 if workers else 2)
    assert read + ids(again) == expected[0]
    assert ids(again) == expected[1]
    if taken < STEPS:
        plain = shoal.stream(URL, batch_size=BATCH, **arguments)
        plain.load_state_dict(merged(state))
        assert read + [each for batch in plain for each in batch["id"].to_pylist()] == expected[0]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_state_after_the_end(
    arguments: dict[str, Any], expected: list[list[int]], workers: int, persistent: bool
) -> None:
    loader = loader_of(make(arguments), workers, persistent_workers=persistent and workers > 0)
    assert ids(loader) == expected[0]
    state = loader.state_dict()
    again = loader_of(make(arguments), workers, persistent_workers=persistent and workers > 0)
    again.load_state_dict(state)
    assert [ids(again), ids(again)] == expected[1:]
    other = make(arguments)
    other.load_state_dict(merged(state))
    assert ids(loader_of(other, 0)) == expected[1]


@pytest.mark.parametrize(
    ("before", "after"), [((4, 16, 0), (2, 16, 2)), ((2, 8, 2), (3, 11, 0)), ((3, 10, 3), (1, 32, 2))]
)
def test_other_ranks_workers_and_batches(
    arguments: dict[str, Any],
    expected: list[list[int]],
    before: tuple[int, int, int],
    after: tuple[int, int, int],
) -> None:
    def run(sizes: tuple[int, int, int], state: Any, steps: int | None) -> tuple[list[set[int]], list[Any]]:
        """What all ranks read, by step, and the state of each rank's loader."""
        world_size, batch_size, workers = sizes
        read: dict[int, set[int]] = {}
        found = []
        for rank in range(world_size):
            dataset = make(arguments, rank, world_size, batch_size)
            if state is not None:
                dataset.load_state_dict(state)
            loader = loader_of(dataset, workers)
            for step, batch in enumerate(itertools.islice(loader, steps)):
                here = batch["id"].tolist()
                assert not read.setdefault(step, set()) & set(here) or steps is None, "two ranks read one sample"
                read[step] |= set(here)
            found.append(merged(loader.state_dict()))
        return [read[step] for step in sorted(read)], found

    steps, states = run(before, None, 4)
    assert all(state == states[0] for state in states)
    size = before[0] * before[1]
    assert steps == [set(expected[0][k * size : (k + 1) * size]) for k in range(4)]
    rest, _ = run(after, json.loads(json.dumps(states[0])), None)
    begin, size = 4 * size, after[0] * after[1]
    assert rest == [set(expected[0][k : k + size]) for k in range(begin, SAMPLES, size)]


def test_states_of_others_are_refused(arguments: dict[str, Any]) -> None:
    loader = loader_of(make(arguments), 2)
    take(loader, 3)
    state = loader.state_dict()
    one = state["_snapshot"]["_worker_snapshots"]["worker_1"]["dataset_state"]
    with pytest.raises(InvalidRequest, match=r"shoal\.torch\.merged"):
        make(arguments).load_state_dict(one)
    with pytest.raises(InvalidRequest, match="order is another"):
        make(arguments | {"seed": 8}).load_state_dict(merged(state))
    with pytest.raises(InvalidRequest, match="StatefulDataLoader"):
        loader.dataset.state_dict()
    with pytest.raises(InvalidRequest, match="no state of a loader"):
        merged({"_snapshot": {}})
    with pytest.raises(InvalidRequest, match="samples a step") as raised:
        another = loader_of(make(arguments, batch_size=16), 2)
        another.load_state_dict(state)
        next(iter(another))
    # Torch raises a worker's error in a cycle with its iterator. One that the garbage collector finds, with its queues,
    # cannot tell its workers any more that it is over, and waits 5 s for each: whatever test that happens in.
    traceback.clear_frames(raised.tb)


def test_what_a_batch_is(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Tensors that may be written, also where the data lie in read-only maps; or whatever a transform makes."""
    plain = arguments | {"shuffle": False, "storage_options": options}
    for workers in (0, 1):
        for batch in loader_of(make(plain, batch_size=50), workers, DataLoader):
            assert batch["tokens"].dtype is torch.uint16
            assert batch["tokens"].shape == (50, streams.TOKENS)
            wanted = streams.table_of(batch["id"].numpy())
            assert batch["tokens"].tolist() == wanted["tokens"].to_pylist()
            assert batch["text"] == wanted["text"].to_pylist()
            batch["tokens"][:] = 0
    dataset = IterableStream(URL, batch_size=50, transform=pa.Table.num_rows.__get__, **plain)
    assert list(loader_of(dataset, 2, DataLoader)) == [50] * 12


def test_pictures(arguments: dict[str, Any]) -> None:
    dataset = IterableStream("shoal://set/img", batch_size=8, **(arguments | {"shuffle_window": None}))
    found = {
        p: b for batch in loader_of(dataset, 2, DataLoader) for p, b in zip(batch["path"], batch["bytes"], strict=True)
    }
    assert found == streams.image_objects(30)


# Single samples


def test_samples_by_number(options: dict[str, Any]) -> None:
    samples = Samples(URL, storage_options=options)
    assert len(samples) == SAMPLES
    assert [samples[n]["id"].item() for n in (0, 599, 49, 50, -1)] == [0, 599, 49, 50, 599]
    numbers = np.random.default_rng(1).integers(0, SAMPLES, 100).tolist()
    found = samples.__getitems__(numbers)
    assert [each["id"].item() for each in found] == numbers
    assert [each["text"] for each in found] == [f"sample {n}" for n in numbers]
    assert found[3]["tokens"].tolist() == streams.table_of(np.array(numbers[3:4]))["tokens"].to_pylist()[0]
    found[3]["tokens"][:] = 0
    for outside in (SAMPLES, -SAMPLES - 1):
        with pytest.raises(IndexError):
            samples[outside]
    by_row = Samples(URL, transform=lambda table: table["id"][0].as_py(), storage_options=options)
    assert by_row.__getitems__([5, 3]) == [5, 3]
    with pytest.raises(InvalidRequest, match="shuffle"):
        Samples(URL, shuffle=True, storage_options=options)


def test_only_runs_that_are_needed_are_read_and_few_are_kept(cluster: MiniCluster) -> None:
    options = {"endpoint": cluster.nodes[0].address, "local": False}
    samples = Samples(URL, cache_bytes=10_000, storage_options=options)
    read: list[int] = []
    runs = samples.stream.open_runs()
    load, bytes_of = runs.load, runs.bytes_of

    def counted(wants: Any, trace: Any) -> Any:
        read.extend(want.run for want in wants)
        return load(wants, trace)

    runs.load = counted  # type: ignore[method-assign]
    samples.stream.open_runs = lambda: runs  # type: ignore[method-assign]
    samples.__getitems__([120, 101, 149, 3])
    assert sorted(read) == [0, 2]
    samples[100], samples[0]
    assert sorted(read) == [0, 2], "what was read just now was read again"
    for number in range(0, SAMPLES, 50):
        samples[number]
    kept = samples._kept
    assert kept._held_bytes == sum(bytes_of(Want(run, None)) for run in kept._runs) <= 10_000
    assert 2 <= len(kept._runs) < 12
    samples[599]
    assert len(read) == 12, "the last one was not kept"


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (2, "fork"), pytest.param(2, "forkserver", marks=pytest.mark.long)]
)
def test_samples_with_a_distributed_sampler(arguments: dict[str, Any], workers: int, context: str | None) -> None:
    samples = Samples(URL, columns=["id", "tokens"], storage_options=arguments["storage_options"])
    samples[0]  # what is open here is not what a forked worker uses
    found: list[int] = []
    for rank in range(3):
        sampler = DistributedSampler(samples, num_replicas=3, rank=rank, seed=1)
        loader = DataLoader(
            samples, batch_size=20, sampler=sampler, num_workers=workers, multiprocessing_context=context
        )
        for batch in loader:
            assert batch["tokens"].shape == (20, streams.TOKENS)
            assert batch["tokens"].dtype is torch.uint16
            found += batch["id"].tolist()
    assert sorted(found) == list(range(SAMPLES))
