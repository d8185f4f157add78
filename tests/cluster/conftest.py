"""A cluster of real processes over a real S3 origin, shared by the tests that do not harm it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from tests.support.weed import Weed

_names = itertools.count()


@pytest.fixture(scope="session")
def cluster() -> Iterator[DevCluster]:
    """Three nodes. Use datasets of your own; kill nothing."""
    with DevCluster(nodes=3, capacity="1GiB") as cluster:
        yield cluster


#: One for all datasets: the server's first write to a new one takes 0.2 s.
BUCKET = "sets"


class S3Dataset:
    """A prefix of its own at the origin, and the dataset over it.

    Attributes:
        root: bucket and prefix.
    """

    def __init__(self, name: str, weed: Weed, endpoint_url: str) -> None:
        self.name = name
        self.root = f"{BUCKET}/{name}/data"
        self.url = f"s3://{self.root}"
        self.s3 = weed.filesystem()
        self.options = weed.storage_options | {"endpoint_url": endpoint_url}
        if not self.s3.exists(BUCKET):
            weed.create_bucket(BUCKET)

    def put(self, objects: Mapping[str, bytes]) -> None:
        for path, data in objects.items():
            self.s3.pipe_file(f"{self.root}/{path}", data)

    def add(self, cluster: DevCluster, *, shard_size: int = 0, replicas: int = 1) -> None:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset(
                self.name,
                self.url,
                shard_size=shard_size,
                replicas=replicas,
                storage_options=json.dumps(self.options),
            )

    def refresh(self, cluster: DevCluster) -> None:
        with Control(cluster.controller_grpc) as control:
            control.refresh_dataset(self.name)


@pytest.fixture
def make_dataset(s3: Weed) -> Callable[..., S3Dataset]:
    """Makes an S3 dataset of a fresh name; ``endpoint_url`` may be a proxy's."""

    def make(endpoint_url: str = "") -> S3Dataset:
        return S3Dataset(f"set-{next(_names)}", s3, endpoint_url or s3.endpoint_url)

    return make


def filesystem(endpoint: str, *, local: bool = False) -> ShoalFileSystem:
    """A file system that pins for itself."""
    return ShoalFileSystem(endpoint=endpoint, local=local, skip_instance_cache=True)
