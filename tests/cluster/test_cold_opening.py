"""Opening a stream on cold data: the index takes few of the origin's bytes and fills nothing; the epoch then reads all.

Where the heads lie close together one by one takes longer than all, so there the opening fills what the epoch reads.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shoal
from shoal.cluster import Cluster
from shoal.devcluster import DevCluster
from shoal.errors import ShoalError
from shoal.streaming import indexing, skim
from shoal.streaming.selection import Selection
from tests.cluster import test_streams
from tests.cluster.conftest import S3Dataset
from tests.support import streams
from tests.support.minicluster import MiniCluster
from tests.support.origin_faults import Trouble, TroubledOrigin
from tests.support.proxy import CountingProxy
from tests.support.waiting import wait_for
from tests.support.weed import Weed

FILES, BATCHES, ROWS = 4, 6, 400


def arrow_files() -> dict[str, bytes]:
    return streams.arrow_objects(FILES, BATCHES, ROWS)


def arrow_streams() -> dict[str, bytes]:
    made = {}
    for name, data in arrow_files().items():
        sink, reader = pa.BufferOutputStream(), pa.ipc.open_file(data)
        with pa.ipc.new_stream(sink, reader.schema) as writer:
            for number in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(number))
        made[name] = sink.getvalue().to_pybytes()
    return made


def parquet_files() -> dict[str, bytes]:
    made = {}
    for name, data in streams.arrow_objects(FILES, BATCHES, 5 * ROWS).items():  # Arrow itself asks for 64 KiB of foot
        sink = pa.BufferOutputStream()
        pq.write_table(pa.ipc.open_file(data).read_all(), sink, row_group_size=ROWS, use_dictionary=False)
        made[name.replace("arrow", "parquet")] = sink.getvalue().to_pybytes()
    return made


def tars(member_bytes: int, members: int) -> dict[str, bytes]:
    made, rng = {}, np.random.default_rng(5)
    for number in range(FILES):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for sample in range(members):
                member = tarfile.TarInfo(f"{number}-{sample:04}.bin")
                member.size = member_bytes
                tar.addfile(member, io.BytesIO(rng.bytes(member_bytes)))
        made[f"train/{number}.tar"] = packed.getvalue()
    return made


FAR: Mapping[str, Callable[[], dict[str, bytes]]] = {
    "arrow files": arrow_files,
    "arrow streams": arrow_streams,
    "parquet": parquet_files,
    "tars of large members": lambda: tars(30_000, 6),
}
NEAR: Mapping[str, Callable[[], dict[str, bytes]]] = {
    "tars of small members": lambda: tars(700, 300),
    "arrow files of small batches": lambda: streams.arrow_objects(FILES, 60, 20),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is near, and read at a time, in proportion to the objects here."""
    monkeypatch.setattr(skim, "NEAR_BYTES", 8 << 10)
    monkeypatch.setattr(skim, "HEAD_BYTES", 1 << 10)
    monkeypatch.setattr(skim, "FOOT_BYTES", 4 << 10)
    monkeypatch.setattr(indexing, "_READS", {k: _small(v) for k, v in indexing._READS.items()})


def _small(reads: Any) -> Any:
    return indexing._Reads(reads.examine, ahead_bytes=2 << 10, weight=reads.weight)


def opened_on(cluster: MiniCluster) -> Any:
    options = test_streams.options(cluster, local=False)
    return shoal.stream("shoal://set/train", batch_size=50, shuffle=True, storage_options=options)


def sealed(cluster: MiniCluster) -> int:
    return sum(len(node.store.sealed_sizes()) for node in cluster.nodes)


def covered(reads: list[tuple[str, int, int]]) -> dict[str, int]:
    """The bytes of each object that were read; every one of them once."""
    found: dict[str, int] = {}
    for path, each in itertools.groupby(sorted(reads), key=lambda read: read[0]):
        spans = [(start, end) for _, start, end in each]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), f"{path} was read twice"
        found[path] = sum(end - start for start, end in spans)
    return found


def start(directory: Path, objects: Mapping[str, bytes], **options: Any) -> MiniCluster:
    return MiniCluster(directory, objects, nodes=2, part_size=16 << 10, shard_size=64 << 10, **options)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", FAR)
def test_it_reads_little_fills_nothing_and_the_epoch_reads_all_once(tmp_path: Path, kind: str) -> None:
    objects = FAR[kind]()
    size = sum(map(len, objects.values()))
    with start(tmp_path, objects) as cluster:
        stream = opened_on(cluster)
        assert cluster.origin.bytes_read < size / 6
        assert covered(cluster.origin.reads).keys() == objects.keys()
        assert sealed(cluster) == 0 and all(node.fills.count == 0 for node in cluster.nodes)
        assert all(node.store.used_bytes == 0 for node in cluster.nodes)
        cluster.origin.reads.clear()
        samples = test_streams.read(stream)
        assert len(set(samples)) == len(samples) == stream.samples
        wait_for(lambda: sealed(cluster) == cluster.snapshot.shard_count())
        assert covered(cluster.origin.reads) == {path: len(data) for path, data in objects.items()}
        cluster.origin.reads.clear()
        client = Cluster(cluster.nodes[0].address, use_local=False)
        snapshot = client.snapshot(cluster.snapshot.digest)
        again = indexing.build(client, snapshot, Selection.of_path(snapshot, "train"), 1)
        assert again.digest == stream.index.digest and not cluster.origin.reads, (
            "sealed shards are read, not the origin"
        )
        stream.close()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", NEAR)
def test_where_heads_lie_close_together_it_is_filled(tmp_path: Path, kind: str) -> None:
    objects = NEAR[kind]()
    with start(tmp_path, objects) as cluster:
        stream = opened_on(cluster)
        wait_for(lambda: sealed(cluster) > 0.9 * cluster.snapshot.shard_count())
        assert test_streams.read(stream)
        wait_for(lambda: sealed(cluster) == cluster.snapshot.shard_count())
        size = sum(map(len, objects.values()))
        assert cluster.origin.bytes_read < 1.2 * size, "beside the fills, a few reads of each object"
        stream.close()


def test_small_objects_are_filled(tmp_path: Path) -> None:
    objects = streams.arrow_objects(12, 2, 50)
    with start(tmp_path, objects) as cluster:
        stream = opened_on(cluster)
        assert test_streams.read(stream)
        assert covered(cluster.origin.reads) == {path: len(data) for path, data in objects.items()}
        stream.close()


# A real origin


def large_arrow(files: int, batches: int, batch_bytes: int) -> dict[str, bytes]:
    made, rng = {}, np.random.default_rng(7)
    for number in range(files):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, pa.schema([("id", pa.int64()), ("data", pa.binary(batch_bytes // 16))])) as writer:
            for batch in range(batches):
                ids = np.arange(16) + 16 * (batch + batches * number)
                data = [rng.bytes(batch_bytes // 16) for _ in range(16)]
                writer.write_table(pa.table({"id": ids, "data": pa.array(data, pa.binary(batch_bytes // 16))}))
        made[f"{number}.arrow"] = sink.getvalue().to_pybytes()
    return made


def used_bytes(cluster: DevCluster) -> float:
    opened = Cluster(cluster.endpoint, use_local=False)
    pages = [opened.transport.get(node.address, "/metrics").body.decode() for node in opened.map.nodes]
    lines = [line for page in pages for line in page.splitlines()]
    return sum(float(line.split()[1]) for line in lines if line.startswith("shoal_node_used_bytes "))


def test_an_s3_origin_gives_a_small_part_at_the_opening_and_the_rest_once(
    cluster: DevCluster, make_dataset: Callable[..., S3Dataset], counting_s3: CountingProxy
) -> None:
    objects = large_arrow(8, 4, 2 << 20)
    size = sum(map(len, objects.values()))
    dataset = make_dataset(counting_s3.endpoint_url)
    dataset.put(objects)
    dataset.add(cluster, shard_size=8 << 20)
    before = used_bytes(cluster)
    options = {"endpoint": cluster.endpoint, "local": False, "skip_instance_cache": True}
    counting_s3.reset()
    stream = shoal.stream(f"shoal://{dataset.name}/*.arrow", batch_size=16, shuffle=True, storage_options=options)
    opening = counting_s3.bytes_from_origin
    assert stream.samples == 8 * 4 * 16
    assert 0 < opening < size / 50
    assert used_bytes(cluster) == before, "nothing was filled"
    counting_s3.reset()
    ids = [number for batch in stream for number in batch["id"].to_pylist()]
    assert sorted(ids) == list(range(8 * 4 * 16))
    assert size <= counting_s3.bytes_from_origin < 1.05 * size
    stream.close()


@pytest.mark.parametrize("batch_bytes", [2 << 20, 200 << 10], ids=["aside", "through"])
def test_a_node_told_to_stop_within_a_build_stops(s3: Weed, batch_bytes: int) -> None:
    """The origin stalls; the build's threads, and those that read or fill for it, would wait for it for minutes."""
    with TroubledOrigin(s3.endpoint_url) as origin, DevCluster(nodes=1, capacity="100MiB") as cluster:
        dataset = S3Dataset(f"stops-within-a-build-{batch_bytes}", s3, origin.endpoint_url)
        dataset.options["patience"] = {"read_s": 300, "idle_s": 120}
        dataset.put(large_arrow(2, 2, batch_bytes))
        dataset.add(cluster)
        opened = Cluster(cluster.endpoint, use_local=False)
        snapshot = opened.snapshot(opened.dataset(dataset.name).snapshot)
        origin.always(Trouble.STALL)
        selection = Selection.of_path(snapshot, "*.arrow")
        failures: list[ShoalError] = []

        def fetch() -> None:
            try:
                indexing.fetch(opened, snapshot, selection, 1)
            except ShoalError as error:
                failures.append(error)

        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        wait_for(lambda: bool(origin.asked))
        node = cluster.nodes[0]
        node.terminate()
        node.join(30)
        assert node._process is not None and node._process.returncode == 0, "it did not wait for the origin"
        origin.go_on.set()
        thread.join(60)
        assert failures
