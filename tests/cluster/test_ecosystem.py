"""What people read with: pandas, pyarrow, Polars and DuckDB take the URL, with no word of Shoal but that."""

from __future__ import annotations

import io
from collections.abc import Callable

import duckdb
import fsspec
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from shoal.devcluster import DevCluster
from tests.cluster.conftest import S3Dataset

TABLE = pa.table({"n": list(range(5000)), "text": [f"row {i}" for i in range(5000)]})


@pytest.fixture
def url(cluster: DevCluster, make_dataset: Callable[[], S3Dataset], monkeypatch: pytest.MonkeyPatch) -> str:
    """``shoal://NAME`` of two Parquet files and two Arrow files; the cluster is found by the environment."""
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    dataset = make_dataset()
    for number in range(2):
        part = TABLE.slice(number * 2500, 2500)
        parquet, arrow = io.BytesIO(), io.BytesIO()
        pq.write_table(part, parquet, row_group_size=500)
        with pa.ipc.new_file(arrow, part.schema) as writer:
            writer.write_table(part)
        dataset.put({f"p/{number}.parquet": parquet.getvalue(), f"a/{number}.arrow": arrow.getvalue()})
    dataset.add(cluster, shard_size=8192)  # several shards a file
    fsspec.filesystem("shoal").clear_instance_cache()
    return f"shoal://{dataset.name}"


def test_pandas(url: str) -> None:
    assert pd.read_parquet(f"{url}/p/1.parquet").equals(TABLE.slice(2500).to_pandas())


def test_pyarrow_dataset(url: str) -> None:
    fs, path = fsspec.url_to_fs(f"{url}/p")
    dataset = pa.dataset.dataset(path, filesystem=fs, format="parquet")
    assert dataset.to_table().sort_by("n").equals(TABLE)
    assert dataset.to_table(columns=["n"], filter=pa.dataset.field("n") >= 4990)["n"].to_pylist() == list(
        range(4990, 5000)
    )


def test_pyarrow_ipc(url: str) -> None:
    with fsspec.open(f"{url}/a/0.arrow") as file:
        assert pa.ipc.open_file(file).read_all().equals(TABLE.slice(0, 2500))


def test_polars(url: str) -> None:
    """By URL with `use_pyarrow`: Polars' own readers know a fixed set of protocols and ask nobody for others."""
    assert pl.read_parquet(f"{url}/p/0.parquet", use_pyarrow=True)["n"].to_list() == list(range(2500))
    with fsspec.open(f"{url}/p/0.parquet") as file:
        assert pl.read_parquet(file).to_arrow()["n"].to_pylist() == list(range(2500))
    fs, path = fsspec.url_to_fs(f"{url}/p")
    frame = pl.scan_pyarrow_dataset(pa.dataset.dataset(path, filesystem=fs, format="parquet"))
    assert frame.select(pl.col("n").sum()).collect().item() == sum(range(5000))


def test_duckdb(url: str) -> None:
    connection = duckdb.connect()
    connection.register_filesystem(fsspec.filesystem("shoal"))
    rows = connection.sql(f"select count(*), sum(n) from '{url}/p/*.parquet'").fetchall()
    assert rows == [(5000, sum(range(5000)))]
