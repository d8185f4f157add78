"""A small data set on disk, and clusters that a test may harm."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster


@pytest.fixture
def directory_origin(tmp_path: Path) -> dict[str, bytes]:
    """Objects by path, which lie in ``tmp_path / "origin"``."""
    objects = {f"{i}.bin": random.Random(i).randbytes(400_000) for i in range(12)}
    (tmp_path / "origin").mkdir()
    for path, data in objects.items():
        (tmp_path / "origin" / path).write_bytes(data)
    return objects


def add_directory(cluster: DevCluster, path: Path) -> None:
    """Register the dataset ``set`` over a directory."""
    with Control(cluster.controller_grpc) as control:
        control.add_dataset("set", f"file://{path}", shard_size=0, replicas=1, storage_options="{}")
