"""``shoal plan``: what it foretells is what ranks then read, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

import shoal
from shoal.cli.root import main
from tests.support import streams
from tests.support.minicluster import MiniCluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    objects = streams.arrow_objects(8, 3, 50) | streams.image_objects(30)
    directory = tmp_path_factory.mktemp("cluster")
    with MiniCluster(directory / "c", objects, nodes=2, part_size=1 << 16, shard_size=1 << 20) as cluster:
        yield cluster


def plan(cluster: MiniCluster, *words: str) -> Result:
    return CliRunner().invoke(main, ["plan", *words, "--endpoint", cluster.nodes[0].address])


def document(cluster: MiniCluster, *words: str) -> dict[str, Any]:
    result = plan(cluster, *words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_each_rank_has_a_row_that_adds_up(cluster: MiniCluster) -> None:
    found = document(cluster, "set/train/*.arrow", "--world-size", "4", "--batch-size", "25", "--shuffle")
    assert (found["samples"], found["runs"], found["steps"], len(found["ranks"])) == (1200, 24, 12, 4)
    assert {rank["samples"] for rank in found["ranks"]} == {300}
    assert {rank["node"] for rank in found["ranks"]} == {node.id for node in cluster.nodes}
    assert found["local_share"] > 0.6
    text = plan(cluster, "set/train/*.arrow", "--world-size", "4", "--batch-size", "25", "--shuffle").output
    assert "1,200 in 24 runs" in text and "rank 3" in text and "█" in text.replace("·", "█")


def test_what_is_cold_is_no_longer_so_once_it_was_read(cluster: MiniCluster) -> None:
    words = ("set/img", "--world-size", "1", "--batch-size", "10")
    before = document(cluster, *words)
    assert before["ranks"][0]["cold_bytes"] == before["bytes"]
    options = {"endpoint": cluster.nodes[0].address, "local": False}
    for batch in shoal.stream("shoal://set/img", batch_size=10, storage_options=options):
        assert len(batch) == 10
    for node in cluster.nodes:
        cluster.run(node.fills.settle())
    assert document(cluster, *words)["ranks"][0]["cold_bytes"] == 0


def test_nodes_can_be_imagined_and_named(cluster: MiniCluster) -> None:
    words = ("set/train", "--world-size", "8", "--batch-size", "10", "--shuffle")
    imagined = document(cluster, *words, "--nodes", "4")
    assert len({rank["node"] for rank in imagined["ranks"]}) == 4
    one = document(cluster, *words, "--nodes", cluster.nodes[0].id[:8])
    assert {rank["node"] for rank in one["ranks"]} == {cluster.nodes[0].id}
    many = plan(cluster, "set/train", "--world-size", "64", "--batch-size", "2", "--nodes", "4")
    assert many.exit_code == 0 and "16 ranks" in many.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("set/nothing/*.arrow", "--world-size", "2", "--batch-size", "2"), "nothing"),
        (("set/train", "--world-size", "64", "--batch-size", "64", "--drop-last"), "drop_last"),
        (("set/train", "--world-size", "2", "--batch-size", "2", "--nodes", "zz"), "no node"),
        (("set/train", "--world-size", "2", "--batch-size", "2", "--nodes", "0"), "1 or more"),
        (("set/img", "--world-size", "2", "--batch-size", "2", "--format", "parquet"), "img/000.jpg"),
        (("other/train", "--world-size", "2", "--batch-size", "2"), "other"),
    ],
)
def test_mistakes_are_named(cluster: MiniCluster, words: tuple[str, ...], says: str) -> None:
    result = plan(cluster, *words)
    assert result.exit_code != 0
    assert says in result.output, result.output
