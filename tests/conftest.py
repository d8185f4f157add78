"""Fixtures that several folders share."""

from __future__ import annotations

import gc
import os

# Before anything imports grpc: its fork handlers wait for gRPC's own threads, and this process has both in-process gRPC
# servers and tests that fork. No child uses gRPC, as no reader does.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from shoal import watch
from shoal.devcluster import ports
from tests.support.proxy import CountingProxy
from tests.support.weed import Weed

#: How long an example takes says something of the machine, not of what is tested.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Processes of pytest-xdist each have ports of their own.

    A port is chosen a second before a server listens on it, and stays a killed server's until that is back; what one
    process finds free in between must not be another one's.
    """
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        number, count = int(workerinput["workerid"].removeprefix("gw")), workerinput["workercount"]
        mine = ports._candidates()[number::count]
        ports._candidates = lambda: mine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of real processes are tried once more where they fail, and told of at the end (R).

    Where twenty processes share two processors a node may be late for once, and is rightly taken for a dead one.
    """
    for item in items:
        if {"cluster", "faults"} & set(item.path.parts):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_collection_finish() -> None:
    """What was imported stays to the end: no collection need look at it again, nor write to its pages in a fork."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _patient(request: pytest.FixtureRequest) -> Iterator[None]:
    """But in fault tests no node is grey: where one is late, in this process too, a second one that is asked would fill
    the same once more."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not request.module.__name__.startswith("tests.faults."):
            monkeypatch.setattr(watch, "HASTY_S", 20.0)
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[Weed]:
    """A real S3 server for the whole run. Make a bucket, or at least a prefix, of your own in it."""
    with Weed() as weed:
        yield weed


@pytest.fixture
def counting_s3(s3: Weed) -> Iterator[CountingProxy]:
    """The same server behind a proxy that counts; use its `endpoint_url` with the server's credentials."""
    with CountingProxy(s3.endpoint_url) as proxy:
        yield proxy
