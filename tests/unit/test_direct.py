"""The origin as the last resort: only where the dataset and the caller allow it, loud, counted, and of one version."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from shoal.direct import DirectOrigin
from shoal.errors import InvalidRequest, NodeUnavailable, OriginChanged
from shoal.filesystem import ShoalFileSystem
from shoal.origin import open_origin
from tests.support.minicluster import MiniCluster

PLAIN = {"a": bytes(range(200)), "b/c": bytes(range(100, 250))}


class World:
    """A cluster whose dataset lies in a directory, which the client can read too."""

    def __init__(self, directory: Path, *, direct: bool) -> None:
        self.files = directory / "origin"
        for path, data in PLAIN.items():
            (self.files / path).parent.mkdir(parents=True, exist_ok=True)
            (self.files / path).write_bytes(data)
        versions = {i.path: i.version for batch in open_origin(f"file://{self.files}", {}).list() for i in batch}
        self.cluster = MiniCluster(
            directory / "nodes",
            PLAIN,
            nodes=2,
            part_size=16,
            shard_size=64,
            versions=versions,
            origin_url=f"file://{self.files}",
            direct=direct,
        )

    def filesystem(self, **options: object) -> ShoalFileSystem:
        endpoint = self.cluster.nodes[0].address
        fs = ShoalFileSystem(endpoint=endpoint, local=False, skip_instance_cache=True, **options)
        fs.info("set/a")
        return fs

    def stop(self) -> None:
        for index in range(2):
            self.cluster.stop_node(index)


def test_reads_go_to_the_origin_when_no_node_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = world.filesystem(origin={})
        assert fs.cat_file("set/a") == PLAIN["a"] and fs.direct_bytes == 0
        world.stop()
        with caplog.at_level(logging.WARNING, "shoal.direct"):
            assert fs.cat_file("set/a") == PLAIN["a"]
            assert fs.cat_file("set/a", 10, 190) == PLAIN["a"][10:190]
            assert fs.open_buffer("set/b/c").to_pybytes() == PLAIN["b/c"]
            assert fs.cat_ranges(["set/a", "set/b/c"], [60, 3], [70, 9]) == [PLAIN["a"][60:70], PLAIN["b/c"][3:9]]
        assert len(caplog.records) <= 5, "it is said once, as are the two nodes that fail and the map that stays"
        assert [record.name for record in caplog.records].count("shoal.direct") == 1
        assert fs.direct_bytes == 200 + 180 + 150 + 10 + 6


def test_version_is_the_snapshot_s(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = world.filesystem(origin={})
        world.stop()
        (world.files / "a").write_bytes(b"x" * 200)
        with pytest.raises(OriginChanged, match="dataset refresh"):
            fs.cat_file("set/a")


@pytest.mark.parametrize(("direct", "options"), [(False, {"origin": {}}), (True, {})])
def test_neither_alone_is_enough(tmp_path: Path, direct: bool, options: dict[str, object]) -> None:
    world = World(tmp_path, direct=direct)
    with world.cluster:
        fs = world.filesystem(**options)
        world.stop()
        with pytest.raises(NodeUnavailable, match="no cache node gave bytes of 'a'"):
            fs.cat_file("set/a")


def test_origin_that_cannot_be_opened_is_said_beside_the_reason(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = world.filesystem(origin={"no": "such option"})
        world.stop()
        with pytest.raises(NodeUnavailable, match=r"no cache node answers .* takes no storage options"):
            fs.cat_file("set/a")


def test_chained_url_has_its_own_options(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        fs = ShoalFileSystem(
            endpoint=world.cluster.nodes[0].address,
            local=False,
            target_protocol="file",
            fo=str(world.files),
            skip_instance_cache=True,
        )
        fs.info(f"{world.files}/a")
        world.stop()
        assert fs.cat_file(f"{world.files}/a") == PLAIN["a"] and fs.direct_bytes == 200


def test_options_that_are_none() -> None:
    with pytest.raises(InvalidRequest, match="'origin'"):
        ShoalFileSystem(endpoint="127.0.0.1:1", origin="s3", skip_instance_cache=True)


def test_endpoint_of_the_dataset_is_used_where_the_caller_names_none(tmp_path: Path) -> None:
    world = World(tmp_path, direct=True)
    with world.cluster:
        record = world.filesystem().cluster.dataset("set")
    s3 = dataclasses.replace(record, origin="s3://bucket/set", endpoint="http://s3:9000")
    named = {"client_kwargs": {"endpoint_url": "http://other"}}
    assert DirectOrigin(s3, {"key": "k"})._with_endpoint() == {"key": "k", "endpoint_url": "http://s3:9000"}
    assert DirectOrigin(s3, named)._with_endpoint() == named
    assert DirectOrigin(record, {})._with_endpoint() == {}
