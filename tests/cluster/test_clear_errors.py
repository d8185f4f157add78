"""Each mistake a person makes gives one sentence that names the thing and the remedy, and a non-zero exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.devcluster import DevCluster
from tests.cluster.conftest import S3Dataset
from tests.support.weed import Weed


def sentence(*command: str, endpoint: str = "") -> str:
    """Run a command that fails, and return what it says: one line, no traceback."""
    # A node of this machine that is not ours is none of these tests' business.
    own = {"SHOAL_ENDPOINT": endpoint, "SHOAL_SOCKET": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}
    environment = {**os.environ, **own}
    program, *arguments = command
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    (last,) = [line for line in done.stderr.splitlines() if line.lower().startswith("error: ")]
    assert "Traceback" not in done.stderr
    return last.partition(": ")[2]


def test_endpoint_down() -> None:
    said = sentence("shoal.cli", "status", endpoint="http://127.0.0.1:1")
    assert "127.0.0.1:1" in said and "SHOAL_ENDPOINT" in said


def test_malformed_endpoint() -> None:
    assert "nonsense" in sentence("shoal.cli", "status", endpoint="nonsense")


def test_dataset_and_path_unknown(cluster: DevCluster, make_dataset: Callable[..., S3Dataset]) -> None:
    dataset = make_dataset()
    dataset.put({"a": b"x" * 1000})
    dataset.add(cluster)
    for words in (("cat", "shoal://none/x"), ("ls", "shoal://none"), ("prefetch", "none"), ("dataset", "show", "none")):
        said = sentence("shoal.cli", *words, endpoint=cluster.endpoint)
        assert "'none'" in said and "shoal dataset add none" in said
    for words in (("cat", f"shoal://{dataset.name}/b"), ("ls", f"shoal://{dataset.name}/b")):
        said = sentence("shoal.cli", *words, endpoint=cluster.endpoint)
        assert f"{dataset.name}/b is not in snapshot" in said and "shoal dataset refresh" in said
    assert "begins with 'zz'" in sentence("shoal.cli", "prefetch", f"{dataset.name}/zz", endpoint=cluster.endpoint)


def add(cluster: DevCluster, url: str, options: dict[str, str]) -> str:
    words = ("dataset", "add", "wrong", url, "--storage-options", json.dumps(options))
    return sentence("shoal.cli", *words, endpoint=cluster.endpoint)


def test_origin_unreachable(cluster: DevCluster, s3: Weed) -> None:
    said = add(cluster, "s3://bucket/x", s3.storage_options | {"endpoint_url": "http://127.0.0.1:1"})
    assert "http://127.0.0.1:1" in said


def test_bad_credentials(cluster: DevCluster, make_dataset: Callable[..., S3Dataset], s3: Weed) -> None:
    dataset = make_dataset()
    dataset.put({"a": b"x"})
    said = add(cluster, dataset.url, s3.storage_options | {"secret": "not the secret"})
    assert dataset.url in said and "not the secret" not in said


def test_bucket_missing(cluster: DevCluster, s3: Weed) -> None:
    assert "no-such-bucket" in add(cluster, "s3://no-such-bucket/x", s3.storage_options)


def test_prefetch_larger_than_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "big").write_bytes(bytes(3_000_000))
    with DevCluster(nodes=2, capacity="1MiB") as small:
        words = ("dataset", "add", "big", str(tmp_path / "origin"))
        subprocess.run(
            [sys.executable, "-m", "shoal.cli", *words],
            env={**os.environ, "SHOAL_ENDPOINT": small.endpoint},
            check=True,
        )
        said = sentence("shoal.cli", "prefetch", "big", endpoint=small.endpoint)
    assert "prefetch of big needs" in said and "more on node" in said and "add nodes" in said


@pytest.mark.parametrize("program", ["shoal_controller", "shoal_cachenode"])
def test_data_directory_not_writable(tmp_path: Path, program: str) -> None:
    (tmp_path / "file").write_text("")
    said = sentence(program, "--data-dir", str(tmp_path / "file" / "data"))
    assert str(tmp_path / "file" / "data") in said and "--data-dir" in said


def test_port_taken(cluster: DevCluster, tmp_path: Path) -> None:
    taken = cluster.endpoint.removeprefix("http://")
    said = sentence("shoal_controller", "--data-dir", str(tmp_path / "c"), "--grpc-listen", "127.0.0.1:0",
                    "--http-listen", taken)  # fmt: skip
    assert taken in said and "--http-listen" in said
    said = sentence("shoal_cachenode", "--data-dir", str(tmp_path / "n"), "--listen", taken)
    assert taken in said and "--listen" in said


def test_malformed_url_size_and_options(cluster: DevCluster, tmp_path: Path) -> None:
    for words, named in (
        (("dataset", "add", "x", "foo://bar"), "foo://bar"),
        (("dataset", "add", "x", "s3://"), "s3://"),
        (("dataset", "add", "Bad!", str(tmp_path)), "'Bad!'"),
        (("dataset", "add", "x", str(tmp_path / "none")), str(tmp_path / "none")),
        (("dataset", "add", "x", str(tmp_path), "--shard-size", "12parsecs"), "'12parsecs' is not a size"),
        (("dataset", "add", "x", str(tmp_path), "--storage-options", "{bad"), "is no JSON"),
        (("ls", "shoal://Bad Name/x"), "'Bad Name'"),
    ):
        assert named in sentence("shoal.cli", *words, endpoint=cluster.endpoint)
