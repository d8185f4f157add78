"""Controllers and cache nodes as processes, over an API server in memory: who leads, and what a new leader has."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import ShoalError
from shoal.transport import Transport
from shoal_controller.kube.api import DATASETS, ENDPOINT_SLICES, LEASES, PREFETCHES
from tests.support import kube_http, metrics
from tests.support.kube_clusters import KubeCluster
from tests.support.kube_http import KubeHttp
from tests.support.waiting import wait_for


@pytest.fixture
def kube(tmp_path: Path) -> Iterator[KubeHttp]:
    with kube_http.running(tmp_path) as server:
        yield server


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    directory = tmp_path / "origin"
    directory.mkdir()
    for number in range(4):
        (directory / str(number)).write_bytes(bytes([number]) * (64 << 10))
    return directory


def declare(kube: KubeHttp, origin: Path, **spec: object) -> None:
    item = {"metadata": {"name": "d"}, "spec": {"origin": f"file://{origin}"} | spec}
    kube.call(lambda fake: fake.put(DATASETS, item))


def holder(kube: KubeHttp) -> str:
    return str(kube.call(lambda fake: fake.read(LEASES, "shoal-controller", "shoal"))["spec"]["holderIdentity"])


def epoch_and_jobs(cluster: DevCluster) -> tuple[int, set[str]]:
    with Control(cluster.controller_grpc) as control:
        return control.status().epoch, {job.id for job in control.prefetches()}


def _follow(kube: KubeHttp, origin: Path, *, killed: bool) -> None:
    with KubeCluster(kube.kubeconfig, "shoal") as cluster:
        declare(kube, origin, prefetch="Eager")
        wait_for(lambda: kube.status(DATASETS, "d").get("cachedPercent") == 100)
        standby = cluster.standby()
        _check_stands_by(f"127.0.0.1:{cluster.standby_http}")
        before, snapshot = epoch_and_jobs(cluster), kube.status(DATASETS, "d")
        (origin / "new").write_bytes(b"a second listing would find this")
        if killed:
            cluster.controller.kill()
        else:
            cluster.controller.stop()
        standby.wait_until_ready()
        assert holder(kube) == "b"

        # Nothing moved, nothing was begun or listed again, and the snapshot's file came from a node.
        wait_for(lambda: "came from node" in standby.log_path.read_text())
        item = {"metadata": {"name": "p", "namespace": "team"}, "spec": {"dataset": "d"}}
        kube.call(lambda fake: fake.put(PREFETCHES, item))
        wait_for(lambda: kube.status(PREFETCHES, "p", "team").get("phase") == "Complete")
        after = kube.status(DATASETS, "d")
        assert (after["snapshot"], after["refreshedAt"]) == (snapshot["snapshot"], snapshot["refreshedAt"])
        epoch, jobs = epoch_and_jobs(cluster)
        assert epoch == before[0]
        assert jobs >= before[1]
        assert all(job.startswith("kube-") for job in jobs - before[1])
        port = int(str(standby.ready["http"]).rpartition(":")[2])
        _check_leads(port)
        # The Service leads to the new one.
        wait_for(lambda: port in [p["port"] for p in _slice(kube)["ports"]])

        kube.call(lambda fake: fake.remove(DATASETS, "d"))
        wait_for(lambda: not kube.call(lambda fake: fake.has(DATASETS, "d")))
        with Control(cluster.controller_grpc) as control:
            wait_for(lambda: all(node.used_bytes == 0 for node in control.status().nodes))
        standby.stop()


def _check_stands_by(address: str) -> None:
    """It is ready for all that a standby can, and sends people on."""
    assert Transport().get(address, "/readyz").body == b"standby\n"
    assert Transport().get(address, "/healthz").body == b"standby\n"
    with pytest.raises(ShoalError, match="stands by: ask the one that leads"):
        Transport().get(address, "/v1/cluster")
    text = metrics.scrape(int(address.rpartition(":")[2]))
    metrics.check(text)
    told = metrics.samples(text)
    assert told["shoal_operator_leader",] == 0
    assert told["shoal_operator_lease_age_seconds",] < 60
    assert told["shoal_operator_api_requests_total", "200", "leases", "get"] > 0
    assert told["process_resident_memory_bytes",] > 0
    assert metrics.names(metrics.own(text)) > {"shoal_build_info"}


def _check_leads(port: int) -> None:
    text = metrics.scrape(port)
    metrics.check(text)
    told = metrics.samples(text)
    assert told["shoal_operator_leader",] == told["shoal_operator_datasets", "Ready"] == 1
    assert told["shoal_operator_lease_transitions_total",] >= 1
    assert told["shoal_operator_reconciles_total", "dataset", "ok"] > 0
    assert told["shoal_operator_api_requests_total", "200", "datasets", "patch"] > 0
    assert told["shoal_controller_datasets",] == 1
    # All that the docs have of both, but what only a gate has.
    names = metrics.names(metrics.own(text))
    written = metrics.documented(*metrics.PAGES, prefix="shoal_(?:operator|controller)_")
    assert {name for name in written - names if "webhook_certificate" not in name} == set()


def _slice(kube: KubeHttp) -> dict[str, list[dict[str, object]]]:
    return kube.call(lambda fake: fake.read(ENDPOINT_SLICES, "shoal-controller", "shoal"))


def test_a_leader_that_stops_is_followed_at_once(kube: KubeHttp, origin: Path) -> None:
    _follow(kube, origin, killed=False)


@pytest.mark.long  # the lease of a leader that was killed has to run out
def test_a_leader_that_was_killed_is_followed(kube: KubeHttp, origin: Path) -> None:
    _follow(kube, origin, killed=True)


@pytest.mark.long
def test_a_leader_that_was_stopped_and_goes_on_ends_and_changes_nothing(kube: KubeHttp, origin: Path) -> None:
    with KubeCluster(kube.kubeconfig, "shoal") as cluster:
        declare(kube, origin)
        wait_for(lambda: kube.status(DATASETS, "d").get("phase") == "Ready")
        standby = cluster.standby(other_port=True)
        pid = cluster.controller.pid
        # As a virtual machine that hangs: it does not know that its time is over.
        os.kill(pid, signal.SIGSTOP)
        standby.wait_until_ready()
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: not cluster.controller.is_running)
        words = cluster.controller.log_path.read_text()
        assert "leads now" in words or "could not be renewed" in words or "no longer leads" in words
        assert holder(kube) == "b"
        standby.stop()
