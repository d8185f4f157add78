"""fsspec's own test suite for file systems, the parts that read, against a running cluster over S3.

The suite writes its trees through the file system under test. Ours is read-only, so here writes go to the origin and
the dataset is refreshed before the next read; every read is Shoal's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests, AbstractOpenTests

from shoal.devcluster import DevCluster
from shoal.errors import ReadOnly
from shoal.filesystem import ShoalFileSystem
from tests.cluster.conftest import S3Dataset


class WritesAtTheOrigin(ShoalFileSystem):
    """Shoal's reads; writes at the origin, seen after a refresh."""

    cachable = False

    def __init__(self, cluster: DevCluster, dataset: S3Dataset) -> None:
        super().__init__(endpoint=cluster.endpoint, local=False)
        self._dev, self._dataset, self._is_stale = cluster, dataset, False

    def locate(self, path: str) -> Any:
        if self._is_stale:
            self._dataset.refresh(self._dev)
            self._pins.clear()
            self._is_stale = False
        return super().locate(path)

    def _origin(self, path: str) -> str:
        return f"{self._dataset.root}/" + self._strip_protocol(path).partition("/")[2]

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        self._dataset.s3.pipe_file(self._origin(path), b"")
        self._is_stale = True

    def pipe(self, path: str, value: bytes | None = None, **kwargs: Any) -> None:
        assert value is not None
        self._dataset.s3.pipe_file(self._origin(path), value)
        self._is_stale = True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.pipe(path, value)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """S3 has no directories."""

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """S3 has no directories."""

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        for each in path if isinstance(path, list) else [path]:
            self._dataset.s3.rm(self._origin(each), recursive=recursive)
        self._is_stale = True


class ShoalFixtures(AbstractFixtures):
    @pytest.fixture
    def dataset(self, cluster: DevCluster, make_dataset: Callable[[], S3Dataset]) -> S3Dataset:
        dataset = make_dataset()
        dataset.put({"keep": b"an origin without objects is refused"})
        dataset.add(cluster)
        return dataset

    @pytest.fixture
    def fs(self, cluster: DevCluster, dataset: S3Dataset) -> WritesAtTheOrigin:
        return WritesAtTheOrigin(cluster, dataset)

    @pytest.fixture
    def fs_path(self, dataset: S3Dataset) -> str:
        return dataset.name

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False


class TestGet(ShoalFixtures, AbstractGetTests):
    pass


class TestOpen(ShoalFixtures, AbstractOpenTests):
    def test_open_exclusive(self, fs: Any, fs_target: str) -> None:
        """The suite's own writes with mode "xb"; a read-only file system refuses."""
        with pytest.raises(ReadOnly):
            fs.open(fs_target, "xb")
