"""The index of samples: built once in the cluster, kept, the same whoever built it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pytest

from shoal.cluster import Cluster
from shoal.errors import ClusterUnavailable, InvalidRequest, NotFound, OriginUnavailable, Overloaded
from shoal.streaming import indexing
from shoal.streaming.index import Index
from shoal.streaming.selection import Selection
from shoal_cachenode import indexes
from shoal_cachenode.indexes import Served
from tests.cluster import test_streams
from tests.support import streams
from tests.support.minicluster import DictOrigin, MiniCluster

PATTERNS = ["train/*.arrow", "parquet/*.parquet", "tars/*.tar"]


def start(directory: Path, objects: dict[str, bytes] | None = None, **options: Any) -> MiniCluster:
    return MiniCluster(directory, objects or test_streams.objects(), part_size=1 << 16, shard_size=1 << 18, **options)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    with start(tmp_path_factory.mktemp("cluster") / "c") as cluster:
        yield cluster


def client(cluster: MiniCluster, node: int = 0) -> Cluster:
    return Cluster(cluster.nodes[node].address, use_local=False)


def fetch(cluster: MiniCluster, pattern: str, opened: Cluster | None = None) -> Index:
    opened = opened or client(cluster)
    snapshot = opened.snapshot(cluster.snapshot.digest)
    return indexing.fetch(opened, snapshot, Selection.of_path(snapshot, pattern), 1)


def target(cluster: MiniCluster, pattern: str, kind: str = "arrow") -> str:
    return f"/v1/snapshots/{cluster.snapshot.digest}/index?{urlencode({'pattern': pattern, 'format': kind})}"


def builds(cluster: MiniCluster) -> int:
    return sum(node.indexes.builds for node in cluster.nodes)


def files(cluster: MiniCluster) -> list[Path]:
    return [path for n in range(len(cluster.nodes)) for path in (cluster.data_dir(n) / "indexes").iterdir()]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_node_builds_it_for_all(tmp_path: Path, pattern: str) -> None:
    with start(tmp_path, nodes=3) as cluster:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda n: fetch(cluster, pattern, client(cluster, n % 3)), range(8)))
        assert builds(cluster) == 1 and len(files(cluster)) == 1
        scraped = [client(cluster).transport.get(node.address, "/metrics").body.decode() for node in cluster.nodes]
        counted = [
            float(value)
            for text in scraped
            for value in re.findall(r"^shoal_node_index_builds_total (.*)$", text, re.M)
        ]
        assert sorted(counted) == [0, 0, 1]
        assert len(cluster.origin.reads) == len(set(cluster.origin.reads)), "the origin was asked twice for the same"
        opened = client(cluster)
        snapshot = opened.snapshot(cluster.snapshot.digest)
        ours = indexing.build(opened, snapshot, Selection.of_path(snapshot, pattern), 1)
        assert {index.digest for index in found} == {ours.digest}
        assert found[0].sample_count == (60 if "tar" in pattern else 600)


def test_single_objects_need_none(cluster: MiniCluster) -> None:
    before = builds(cluster)
    assert fetch(cluster, "img").sample_count == 30
    assert builds(cluster) == before


def test_it_outlives_its_node_and_damage_is_repaired(tmp_path: Path) -> None:
    with start(tmp_path) as cluster:
        digest = fetch(cluster, PATTERNS[0]).digest
        for damage in ("", "torn", "flipped"):
            cluster.end_node(0)
            (path,) = files(cluster)
            data = path.read_bytes()
            if damage == "torn":
                path.write_bytes(data[: len(data) // 2])
            elif damage == "flipped":  # samples of a run, where Arrow itself sees nothing wrong
                place = data.index((50).to_bytes(8, "little") * 3)
                path.write_bytes(data[:place] + (51).to_bytes(8, "little") + data[place + 8 :])
            cluster.start_node(0)
            assert fetch(cluster, PATTERNS[0]).digest == digest
            assert builds(cluster) == (1 if damage else 0)
            assert files(cluster)[0].read_bytes() == data


def test_where_its_node_is_gone_the_next_one_has_it(tmp_path: Path) -> None:
    with start(tmp_path, nodes=2) as cluster:
        digest = fetch(cluster, PATTERNS[0]).digest
        (first,) = (n for n, node in enumerate(cluster.nodes) if node.indexes.builds)
        opened = client(cluster, 1 - first)
        cluster.end_node(first)
        assert fetch(cluster, PATTERNS[0], opened).digest == digest
        assert cluster.nodes[1 - first].indexes.builds == 1


def test_where_no_node_gives_it_the_client_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def older(*_: object) -> None:
        raise NotFound("nothing is served there")

    with start(tmp_path) as cluster:
        digest = fetch(cluster, PATTERNS[0]).digest
        monkeypatch.setattr(indexes.Indexes, "get", older)
        assert fetch(cluster, PATTERNS[0]).digest == digest


class Held(DictOrigin):
    """An origin that gives nothing before `go` is set."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.go = threading.Event()

    def stream(self, path: str, version: str, start: int, end: int, sink: Any) -> None:
        assert self.go.wait(30)
        super().stream(path, version, start, end, sink)


def test_who_asks_during_a_build_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "WAIT_S", 0.05)
    with start(tmp_path) as cluster:
        cluster.origin = origin = Held(test_streams.objects())
        opened = client(cluster)
        answer = opened.transport.get(cluster.nodes[0].address, target(cluster, PATTERNS[0]))
        assert (answer.status, answer.headers["retry-after"]) == (202, "1")
        with ThreadPoolExecutor(1) as threads:
            found = threads.submit(fetch, cluster, PATTERNS[0], opened)
            origin.go.set()
            assert found.result(60).sample_count == 600
        assert builds(cluster) == 1


def test_a_node_that_has_enough_to_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "WAIT_S", 0.05)
    monkeypatch.setattr(indexes, "MAX_WAITING", 1)
    with start(tmp_path) as cluster:
        cluster.origin = origin = Held(test_streams.objects())
        ask = client(cluster).transport.get
        address = cluster.nodes[0].address
        assert ask(address, target(cluster, PATTERNS[0])).status == 202
        with pytest.raises(Overloaded, match="ask another"):
            ask(address, target(cluster, PATTERNS[1], "parquet"))
        assert ask(address, target(cluster, PATTERNS[0])).status == 202, "who comes for the same is no further build"
        origin.go.set()
        assert fetch(cluster, PATTERNS[0]).sample_count == 600
        assert fetch(cluster, PATTERNS[1]).sample_count == 600


def test_nobody_waits_for_a_node_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def busy(*_: object) -> None:
        asked.append(1)

    with start(tmp_path) as cluster:
        digest = fetch(cluster, PATTERNS[0]).digest
        monkeypatch.setattr(indexes.Indexes, "get", busy)
        monkeypatch.setattr(indexing, "PATIENCE_S", 0.2)
        assert fetch(cluster, PATTERNS[0]).digest == digest
        assert len(asked) == 2


@pytest.mark.parametrize(("text", "pause_s"), [("2", 2), ("0", 0.1), ("9" * 40, 30), ("", 1), ("soon", 1), ("nan", 1)])
def test_a_node_does_not_decide_alone_when_it_is_asked_again(text: str, pause_s: float) -> None:
    assert indexing._pause_s(text) == pause_s


def test_a_damaged_answer_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(tmp_path) as cluster:
        good = fetch(cluster, PATTERNS[0])
        data = bytearray(files(cluster)[0].read_bytes())
        data[data.index((50).to_bytes(8, "little") * 3)] ^= 1

        async def damaged(*_: object) -> Served:
            return Served(good.digest, bytes(data))

        monkeypatch.setattr(indexes.Indexes, "get", damaged)
        assert fetch(cluster, PATTERNS[0]).digest == good.digest


def test_the_answer_is_tagged_with_its_digest(cluster: MiniCluster) -> None:
    index = fetch(cluster, PATTERNS[1])
    for method in ("GET", "HEAD"):
        wanted = target(cluster, PATTERNS[1], "parquet")
        answer = client(cluster).transport.get(cluster.nodes[0].address, wanted, method=method)
        assert answer.headers["etag"] == f'"{index.digest}"'
        assert bool(answer.body) == (method == "GET") and int(answer.headers["content-length"]) > 1000


@pytest.mark.parametrize(
    ("directory", "is_asked"),
    [("wide\u3000space", True), ("plus+%25 &=#?", True), ("line\nend", False), ("語" * 500, False)],
)
def test_any_name_at_the_origin_can_be_streamed(tmp_path: Path, directory: str, is_asked: bool) -> None:
    objects = {path.replace("train", directory): data for path, data in streams.arrow_objects(2, 1, 10).items()}
    with start(tmp_path, objects) as cluster:
        assert fetch(cluster, directory.replace("?", "[?]") + "/*").sample_count == 20
        assert builds(cluster) == is_asked


def test_what_cannot_be_indexed_is_named_and_not_read_again(tmp_path: Path) -> None:
    objects = streams.arrow_objects(2, 1, 10) | {"train/x.arrow": b"no Arrow file, however long it is" * 10}
    with start(tmp_path, objects) as cluster:
        for _ in range(3):
            with pytest.raises(InvalidRequest, match=r"train/x\.arrow"):
                fetch(cluster, PATTERNS[0])
        assert builds(cluster) == 1 and not files(cluster)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_an_object_of_another_format_is_named(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    opened = client(cluster)
    snapshot = opened.snapshot(cluster.snapshot.digest)
    build, built = indexing.build, []

    def counted(*arguments: Any) -> Index:
        built.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(indexing, "build", counted)
    with pytest.raises(InvalidRequest, match=r"train/0\.arrow"):
        indexing.fetch(opened, snapshot, Selection.of_path(snapshot, "train/0.arrow", kind), 1)
    assert len(built) == 1, "the node said so, and the client did not try for itself"


def test_objects_of_different_columns_are_named(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    other = pa.table({"id": np.arange(3)})
    with pa.ipc.new_file(sink, other.schema) as writer:
        writer.write_table(other)
    objects = streams.arrow_objects(2, 1, 10) | {"train/other.arrow": sink.getvalue().to_pybytes()}
    with start(tmp_path, objects) as cluster:
        with pytest.raises(InvalidRequest, match=r"train/0\.arrow and train/other\.arrow have different columns"):
            fetch(cluster, PATTERNS[0])
        assert builds(cluster) == 1


def test_an_origin_that_is_down_is_asked_by_one_node(tmp_path: Path) -> None:
    with start(tmp_path, nodes=3) as cluster:
        cluster.origin.is_down = True
        with pytest.raises(OriginUnavailable):
            fetch(cluster, PATTERNS[0])
        assert builds(cluster) == 1


@pytest.mark.parametrize(
    ("pattern", "kind", "says"),
    [
        ("", "arrow", "pattern"),
        ("x" * 5000, "arrow", "pattern"),
        ("a\nb", "arrow", "pattern"),
        ("train/*", "", "format"),
        ("train/*", "zip" * 1000, "format"),
        ("img/*", "objects", "no index"),
        ("../../../etc/*", "arrow", "matches"),
        ("/etc/passwd", "tar", "matches"),
        ("train/[", "arrow", "pattern|matches"),
    ],
)
def test_requests_that_make_no_sense_are_refused(cluster: MiniCluster, pattern: str, kind: str, says: str) -> None:
    before = builds(cluster), files(cluster)
    with pytest.raises((InvalidRequest, NotFound), match=says):
        client(cluster).transport.get(cluster.nodes[0].address, target(cluster, pattern, kind))
    assert (builds(cluster), files(cluster)) == before


def test_a_snapshot_that_nobody_serves_has_none(cluster: MiniCluster) -> None:
    wanted = target(cluster, "train/*.arrow").replace(cluster.snapshot.digest, "0" * 32)
    with pytest.raises(NotFound, match="belongs to no dataset"):
        client(cluster).transport.get(cluster.nodes[0].address, wanted)


def kept_bytes(cluster: MiniCluster) -> float:
    text = client(cluster).transport.get(cluster.nodes[0].address, "/metrics").body.decode()
    (value,) = re.findall(r"^shoal_node_index_bytes (.*)$", text, re.M)
    return float(value)


def test_those_that_were_used_longest_ago_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "MAX_FILES", 2)
    with start(tmp_path) as cluster:
        patterns = [*PATTERNS, "train/[0-1].arrow"]
        fetch(cluster, patterns[0])
        (first,) = files(cluster)
        fetch(cluster, patterns[1])
        (second,) = {*files(cluster)} - {first}
        for at, path in enumerate((first, second)):
            os.utime(path, (at, at))
        fetch(cluster, patterns[0])  # from the file: its last use is now
        fetch(cluster, patterns[2])
        assert first.exists() and not second.exists() and len(files(cluster)) == 2
        assert kept_bytes(cluster) == sum(path.stat().st_size for path in files(cluster))
        assert len(cluster.nodes[0].indexes._checked) == 2, "what is gone is forgotten"
        assert builds(cluster) == 3
        cluster.end_node(0)
        cluster.start_node(0)
        assert kept_bytes(cluster) == sum(path.stat().st_size for path in files(cluster))
        cluster.publish()
        fetch(cluster, patterns[0])
        fetch(cluster, patterns[3])
        assert first.exists() and len(files(cluster)) == 2, "also over a restart"


def test_the_bytes_of_all_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(tmp_path) as cluster:
        stale = cluster.data_dir(0) / "indexes" / f"{'1' * 32}-{'2' * 32}.arrow"
        stale.write_bytes(b"of a snapshot that is gone")
        fetch(cluster, PATTERNS[0])
        assert not stale.exists()
        (first,) = files(cluster)
        monkeypatch.setattr(indexes, "LIMIT_BYTES", first.stat().st_size + 100)
        fetch(cluster, PATTERNS[1])
        assert not first.exists() and len(files(cluster)) == 1
        fetch(cluster, PATTERNS[0])
        assert builds(cluster) == 3


def test_a_drive_that_takes_nothing_keeps_nobody_from_streaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with start(tmp_path) as cluster:
        monkeypatch.setattr(indexes, "write_atomically", full)
        assert fetch(cluster, PATTERNS[0]).digest == fetch(cluster, PATTERNS[0]).digest
        assert builds(cluster) == 1 and not files(cluster)


def test_a_file_that_was_taken_away_is_built_anew(tmp_path: Path) -> None:
    with start(tmp_path) as cluster:
        digest = fetch(cluster, PATTERNS[0]).digest
        files(cluster)[0].unlink()
        assert fetch(cluster, PATTERNS[0]).digest == digest
        assert builds(cluster) == 2 and len(files(cluster)) == 1


def test_what_a_crash_left_of_a_write_is_removed(tmp_path: Path) -> None:
    with start(tmp_path) as cluster:
        fetch(cluster, PATTERNS[0])
        (path,) = files(cluster)
        cluster.end_node(0)
        path.rename(path.with_name(path.name + ".new"))
        cluster.start_node(0)
        assert not files(cluster)
        assert fetch(cluster, PATTERNS[0]).sample_count == 600


@pytest.mark.parametrize("part", ["_check", "_use"])
def test_a_drive_that_hangs_keeps_nobody_from_streaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    recovered = threading.Event()
    real = getattr(indexes, part)

    def hung(*arguments: Any) -> Any:
        recovered.wait(60)
        return real(*arguments)

    with start(tmp_path, stall_s=0.2, retry_s=0.2) as cluster:
        digest = fetch(cluster, PATTERNS[0]).digest
        cluster.end_node(0)
        cluster.start_node(0)
        cluster.publish()
        if part == "_use":
            fetch(cluster, PATTERNS[0])  # so that the file is known to be whole
        monkeypatch.setattr(indexes, part, hung)
        try:
            assert fetch(cluster, PATTERNS[0]).digest == digest
            assert builds(cluster) == 1
            assert fetch(cluster, PATTERNS[0]).digest == digest
            assert builds(cluster) == 1, "it stays in memory"
        finally:
            recovered.set()


def test_a_node_that_stops_does_not_build_on(tmp_path: Path) -> None:
    with start(tmp_path) as cluster:
        opened = client(cluster)
        snapshot = opened.snapshot(cluster.snapshot.digest)
        selection = Selection.of_path(snapshot, PATTERNS[0])
        opened.transport.close()
        with pytest.raises(ClusterUnavailable, match="this process stops"):
            indexing.build(opened, snapshot, selection, 1)
        assert not cluster.origin.reads
