"""What a CSI driver tells Prometheus, of a real mount of a real cluster whose processes are killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.devcluster import DevCluster
from shoal_csi import mounts
from tests.cluster.conftest import S3Dataset
from tests.support import metrics, mounting
from tests.support.csi import Driver, Place, driver, files_in
from tests.support.waiting import wait_for

FILES = {"train/0.bin": b"zero", "train/1.bin": bytes(1 << 20), "top": b"t"}

pytestmark = pytest.mark.skipif(mounting.why_not() != "", reason=mounting.why_not())


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with Place() as place:
        monkeypatch.setenv("SHOAL_RUN_DIR", str(place.path / "run"))
        yield place


def test_what_daemons_counted_is_told_and_outlives_them(
    place: Place, cluster: DevCluster, make_dataset: Callable[..., S3Dataset]
) -> None:
    dataset = make_dataset()
    dataset.put(FILES)
    dataset.add(cluster)
    with driver(place, cluster.environment(), "--probe-timeout", "5", "--log-format", "json") as running:
        _look(place, running, dataset.name)


def _look(place: Place, running: Driver, dataset: str) -> None:
    target, size_bytes = place.target("a"), sum(map(len, FILES.values()))

    def told(name: str, *labels: str) -> float:
        return metrics.samples(metrics.scrape(running.metrics_port)).get((f"shoal_{name}", *labels), 0)

    assert told("csi_mounts", "serving") == told("csi_volumes") == 0
    running.publish(target, {"dataset": dataset})
    assert files_in(target) == FILES
    wait_for(lambda: told("mount_read_bytes_total", dataset) == size_bytes)
    # Numbers are written once a second: of a READ at that moment it may be known what was asked and not what came.
    sources = ("local", "peer", "origin")
    wait_for(lambda: sum(told("mount_received_bytes_total", dataset, each) for each in sources) >= size_bytes)
    text = metrics.scrape(running.metrics_port)
    metrics.check(text)
    found = metrics.samples(text)
    assert found["shoal_csi_mounts", "serving"] == found["shoal_csi_volumes",] == 1
    assert found["shoal_csi_calls_total", "OK", "NodePublishVolume"] == 1
    assert found["shoal_mount_resident_bytes", dataset, "daemon"] > 10 << 20
    (mounted,) = _served(place)
    assert mounted["numbers"]["read_bytes"] == size_bytes

    os.kill(mounted["daemon_pid"], signal.SIGKILL)
    wait_for(lambda: told("mount_daemon_starts_total", dataset) == 2)
    wait_for(lambda: told("mount_daemon_restarts_total", dataset) == 1 and told("csi_mounts", "serving") == 1)
    os.kill(mounted["supervisor_pid"], signal.SIGKILL)
    wait_for(lambda: told("mount_takeovers_total", dataset) == 1)
    assert told("csi_mounts_kept_total", "supervised") >= 1
    assert told("mount_read_bytes_total", dataset) == size_bytes
    running.unpublish(target)
    wait_for(lambda: _served(place) == [])
    assert told("csi_mounts", "serving") == told("csi_volumes") == 0
    assert told("mount_read_bytes_total", dataset) == size_bytes, "a counter does not fall with its mount"
    assert told("mount_daemon_restarts_total", dataset) == 1

    lines = [json.loads(line) for path in (place.log, Path(mounted["log"])) for line in path.read_text().splitlines()]
    by_logger = {line["logger"]: line for line in lines}
    assert target in [line["volume"] for line in lines if "volume" in line]
    assert by_logger["shoal_csi.shared"]["dataset"] == by_logger["shoal_csi.daemon"]["dataset"] == dataset
    assert by_logger["shoal_csi.supervisor"]["mount"] == mounted["mountpoint"]


def _served(place: Place) -> list[dict[str, Any]]:
    """Mounts of this place; others on this machine may have some too."""
    return [each for each in mounts.listed() if each["mountpoint"].startswith(str(place.path))]
