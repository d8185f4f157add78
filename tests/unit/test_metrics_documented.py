"""Every metric has a line in the docs, and the docs name no metric that is not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shoal.wire.process_metrics import Exposition
from shoal_cachenode.metrics import exposition
from shoal_csi.metrics import CallMetrics, MountMetrics
from tests.support import metrics, mounting
from tests.support.minicluster import MiniCluster


def check_all(text: str, prefix: str) -> None:
    """What `text` has is described, and it has all that the docs have with that prefix."""
    metrics.check(text)
    assert metrics.documented(*metrics.PAGES, prefix=prefix) <= metrics.names(metrics.own(text))


def test_of_a_cache_node(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": b"x"}) as cluster:
        text = exposition(cluster.nodes[0], cluster.servers[0]).decode()
    check_all(text, "shoal_(?:node|build)_")
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total"} <= metrics.names(metrics.families(text))


def test_of_the_csi_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of its mounts; what they count is in tests/cluster/test_csi_metrics.py."""
    monkeypatch.setenv("SHOAL_RUN_DIR", str(tmp_path / "run"))
    told = Exposition("shoal-csi")
    told.registry.register(MountMetrics(tmp_path / "mounts", None, 0))
    CallMetrics(told).begun("Probe")("OK")
    (tmp_path / "run" / "a").mkdir(parents=True)
    record = dataclasses.replace(mounting.RECORD, mountpoint=str(tmp_path / "mounts" / "d" / "1"))
    (tmp_path / "run" / "a" / "mount.json").write_text(record.to_json())
    check_all(told.text().decode(), "shoal_(?:csi|mount|build)_")
