"""Streams over a real cluster: the right samples of every format, ranks that share an epoch, and where time went."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shoal
from shoal.errors import InvalidRequest
from shoal.streaming.stream import Stream
from tests.support import streams
from tests.support.minicluster import MiniCluster
from tests.support.waiting import wait_for

SAMPLES = 600
PATTERNS = ["train/*.arrow", "parquet/*.parquet", "tars/*.tar", "img"]


def objects() -> dict[str, bytes]:
    arrow = streams.arrow_objects(4, 3, 50)
    made = dict(arrow)
    for name, data in arrow.items():
        sink = pa.BufferOutputStream()
        pq.write_table(pa.ipc.open_file(data).read_all(), sink, row_group_size=50)
        made[name.replace("train", "parquet").replace(".arrow", ".parquet")] = sink.getvalue().to_pybytes()
    for number in range(3):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for sample in range(20):
                for extension in ("jpg", "cls"):
                    content = f"{number}-{sample}.{extension}".encode()
                    member = tarfile.TarInfo(f"{number}-{sample:02}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        made[f"tars/{number}.tar"] = packed.getvalue()
    return made | streams.image_objects(30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with MiniCluster(directory / "c", objects(), nodes=2, part_size=1 << 16, shard_size=1 << 18) as cluster:
        yield cluster


def options(cluster: MiniCluster, *, node: int = 0, local: bool = True) -> dict[str, Any]:
    # A client of its own for each: fsspec gives equal arguments the same one.
    own = {"endpoint": cluster.nodes[node].address, "socket": str(cluster._socket(node)), "local": local}
    return own | {"skip_instance_cache": True}


def samples_of(batch: pa.Table) -> list[Any]:
    for column in ("id", "path", "__key__"):
        if column in batch.column_names:
            return batch[column].to_pylist()
    raise AssertionError(batch.column_names)


def read(stream: Stream) -> list[Any]:
    return [sample for batch in stream for sample in samples_of(batch)]


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_format_gives_each_sample_once_and_shuffles(cluster: MiniCluster, pattern: str, local: bool) -> None:
    arguments: dict[str, Any] = {"batch_size": 32, "storage_options": options(cluster, local=local)}
    plain = shoal.stream(f"shoal://set/{pattern}", **arguments)
    in_order = read(plain)
    assert in_order == sorted(in_order) and len(set(in_order)) == len(in_order) == plain.samples
    shuffled = shoal.stream(f"shoal://set/{pattern}", shuffle=True, seed=7, **arguments)
    first, second = read(shuffled), read(shuffled)
    assert first != second and first != in_order
    assert sorted(first) == sorted(second) == in_order
    assert shuffled.epoch == 2


def test_samples_have_their_own_content(cluster: MiniCluster) -> None:
    stream = shoal.stream(
        "shoal://set/train/*.arrow", batch_size=64, shuffle=True, shuffle_window=100, storage_options=options(cluster)
    )
    for batch in stream:
        assert batch.equals(streams.table_of(batch["id"].to_numpy()))
    tars = shoal.stream("shoal://set/tars/*.tar", batch_size=8, shuffle=True, storage_options=options(cluster))
    for batch in tars:
        for row in batch.to_pylist():
            name = row["__key__"].rpartition("/")[2]
            number, sample = name.split("-")
            assert row["jpg"] == f"{number}-{int(sample)}.jpg".encode()


def gathered(size: int) -> Any:
    """An all-gather over threads."""
    barrier, slots = threading.Barrier(size), [None] * size

    def gather_of(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait(30)
            found = list(slots)
            barrier.wait(30)
            return found

        return gather

    return gather_of


def test_ranks_share_an_epoch_and_read_what_their_own_node_has(cluster: MiniCluster) -> None:
    gather_of, found, failures = gathered(2), {}, []

    def rank_of(rank: int) -> None:
        try:
            stream = shoal.stream(
                "shoal://set/train/*.arrow",
                batch_size=50,
                shuffle=True,
                rank=rank,
                world_size=2,
                gather=gather_of(rank),
                storage_options=options(cluster, node=rank),
            )
            found[rank] = read(stream), stream.waits.to_dict()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert len(found[0][0]) == len(found[1][0]) == SAMPLES // 2
    assert sorted(found[0][0] + found[1][0]) == list(range(SAMPLES))


def test_ranks_that_disagree_are_told_so(cluster: MiniCluster) -> None:
    gather_of, errors = gathered(2), []

    def rank_of(rank: int) -> None:
        try:
            shoal.stream(
                "shoal://set/train/*.arrow",
                batch_size=50 + rank,
                rank=rank,
                world_size=2,
                gather=gather_of(rank),
                storage_options=options(cluster, node=rank),
            )
        except InvalidRequest as error:
            errors.append(str(error))

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 2 and all("batch_size" in error for error in errors)


def test_all_time_inside_the_stream_is_told(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that before the first batch, and that of telling the nodes between two."""
    real = Stream._tell

    def slow(stream: Stream, horizon: Any) -> None:
        time.sleep(0.05)  # no wait for anything: that is how slow it is
        real(stream, horizon)

    monkeypatch.setattr(Stream, "_tell", slow)
    monkeypatch.setattr("shoal.streaming.stream.TELL_S", 0.0)
    stream = shoal.stream("shoal://set/train/*.arrow", batch_size=200, storage_options=options(cluster))
    batches = len(list(stream))
    told = stream.waits.to_dict()
    assert told["waited_s"] >= 0.05 * batches
    assert told["by_cause_s"]["stream"] >= 0.05 * batches
    assert told["elapsed_s"] >= told["waited_s"]
    stream.close()


def test_time_is_told_by_cause_and_node_here_and_on_the_node(tmp_path: Path) -> None:
    data = streams.arrow_objects(4, 3, 50)
    with MiniCluster(tmp_path, data, nodes=1, part_size=1 << 16, shard_size=1 << 18) as cluster:
        node = cluster.nodes[0]
        arguments: dict[str, Any] = {"batch_size": 50, "storage_options": options(cluster, local=False)}
        stream = shoal.stream("shoal://set/train/*.arrow", **arguments)
        read(stream)
        told = stream.waits.to_dict()
        assert abs(sum(told["by_cause_s"].values()) - told["waited_s"]) < 1e-6
        assert set(told["by_node_s"]) <= {node.id}
        assert node.id[:8] in stream.report() or not told["by_node_s"]
        wait_for(lambda: sum(node.streams.waited.values()) > 0.5 * told["waited_s"])
        stream.close()
        wait_for(lambda: node.streams.count == 0)


def test_what_a_stream_will_read_is_fetched_before_it_comes(tmp_path: Path) -> None:
    """A consumer that stops after its first batch, with room for hardly more: nodes fill all the rest meanwhile."""
    data = streams.arrow_objects(12, 4, 50)
    with MiniCluster(tmp_path, data, nodes=2, part_size=1 << 12, shard_size=1 << 14) as cluster:
        stream = shoal.stream(
            "shoal://set/train/*.arrow", batch_size=50, ahead_bytes=1, storage_options=options(cluster)
        )
        batches = iter(stream)
        next(batches)
        wait_for(
            lambda: sum(len(node.store.sealed_sizes()) for node in cluster.nodes) == cluster.snapshot.shard_count()
        )
        rest = [sample for batch in batches for sample in samples_of(batch)]
        assert sorted(rest) == list(range(50, 12 * 4 * 50))
        assert cluster.origin.bytes_read == sum(map(len, data.values()))
        stream.close()
