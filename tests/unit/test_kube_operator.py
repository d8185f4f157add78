"""The operator over an API server in memory, with a real core, catalog and origin: what people write, happens."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from shoal.cluster_map import NodeState
from shoal.wire.process_metrics import Exposition
from shoal_controller import shell as shell_module
from shoal_controller.catalog import AdhocPolicy, Catalog, Definition
from shoal_controller.events import DrainRequested, NodeRegistered, NodeReported
from shoal_controller.kube import datasets, gate, operator
from shoal_controller.kube.api import DATASETS, NODES, PODS, PREFETCHES, SECRETS, ApiError, Object
from shoal_controller.kube.metrics import Backlog, OperatorMetrics
from shoal_controller.kube.operator import Operator, Settings
from shoal_controller.kube.record import KubeRecord
from shoal_controller.model import Policy, Report, Share
from shoal_controller.origins import list_origin
from shoal_controller.shell import Shell
from tests.support import metrics
from tests.support.controller import node
from tests.support.kube import FakeApi

POLICY = Policy(lease_s=600.0, forget_after_s=600.0, planning_s=60.0)


@dataclass
class Running:
    """A leader: its API server, its shell, and cache nodes that only say what they are told to."""

    api: FakeApi
    shell: Shell
    catalog: Catalog
    origin: Path
    told: OperatorMetrics

    async def join(self, *names: str) -> None:
        for name in names:
            await self.shell.apply(NodeRegistered(node(name)))

    async def report(self, name: str, **fields: Any) -> None:
        await self.shell.apply(NodeReported(Report(node(name), self.shell.state.map.epoch, **fields)))

    async def until(self, holds: Callable[[], object]) -> None:
        while not holds():
            await asyncio.sleep(0.01)

    def dataset(self, name: str = "d", **spec: Any) -> Object:
        return self.api.put(DATASETS, {"metadata": {"name": name}, "spec": {"origin": f"file://{self.origin}"} | spec})

    def prefetch(self, name: str = "warm", **spec: Any) -> Object:
        item = {"metadata": {"name": name, "namespace": "team"}, "spec": {"dataset": "d"} | spec}
        return self.api.put(PREFETCHES, item)

    def pod(self, name: str = "train", text: str = "d", **annotations: str) -> Object:
        metadata = {"name": name, "namespace": "team", "labels": {gate.KEY: text}, "annotations": annotations}
        spec = {"schedulingGates": [{"name": gate.GATE}, {"name": "other"}], "containers": [{"name": "c"}]}
        return self.api.put(PODS, {"metadata": metadata, "spec": spec})

    def node(self, name: str, **spec: Any) -> Object:
        labels = {"kubernetes.io/hostname": f"{name}.host"}
        return self.api.put(NODES, {"metadata": {"name": name, "labels": labels}, "spec": spec})

    def status(self, name: str = "d") -> Mapping[str, Any]:
        return self.api.read(DATASETS, name).get("status") or {}

    def reason(self, kind: str, name: str = "d") -> str:
        return str(condition(self.status(name), kind).get("reason"))

    def events(self, name: str) -> list[tuple[str, str]]:
        found = self.api.objects.get("events", {}).values()
        return [(e["type"], e["reason"]) for e in found if e["involvedObject"]["name"] == name]

    def numbers(self) -> dict[tuple[str, ...], float]:
        return metrics.samples(Exposition("p", self.told).text().decode())

    @property
    def digest(self) -> str:
        return self.shell.state.datasets["d"].newest.digest


def condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((c for c in status.get("conditions") or [] if c["type"] == kind), {})


@asynccontextmanager
async def led(api: FakeApi, directory: Path, origin: Path, **settings: Any) -> AsyncIterator[Running]:
    """A leader over `directory`, as one process has it."""
    loop = asyncio.get_running_loop()
    told = OperatorMetrics()

    def open_record() -> KubeRecord:
        return KubeRecord.open(directory, api=api, loop=loop, namespace="shoal", name="record")

    shell = await Shell.start(open_record, POLICY)
    catalog = Catalog(shell, list_origin, AdhocPolicy())
    it = Operator(api, shell, catalog, cast(KubeRecord, shell.record), Settings("shoal", **settings), told)
    told.work = it
    running = asyncio.create_task(it.run())
    try:
        yield Running(api, shell, catalog, origin, told)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await catalog.close()
        await shell.close()


Test = Callable[[Running], Awaitable[None]]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    directory = tmp_path / "origin"
    (directory / "train").mkdir(parents=True)
    (directory / "train" / "0").write_bytes(b"0" * 1000)
    (directory / "val").write_bytes(b"1" * 24)
    return directory


@pytest.fixture
def run(tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(shell_module, "TICK_S", 0.01)
    monkeypatch.setattr(operator, "PASS_S", 0.02)
    monkeypatch.setattr(operator, "FIGURES_S", 0.0)
    monkeypatch.setattr(operator, "SECRET_S", 0.1)
    monkeypatch.setattr(datasets, "FIRST_RETRY_S", 0.05)

    def run(test: Test, **settings: Any) -> None:
        async def whole() -> None:
            async with asyncio.timeout(60), led(FakeApi(), tmp_path / "data", origin, **settings) as it:
                await test(it)

        asyncio.run(whole())

    return run


def test_a_dataset_from_declared_to_gone(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.join("n1")
        it.dataset(replicas=1)
        await it.until(lambda: it.status().get("phase") == "Ready")
        assert datasets.FINALIZER in it.api.read(DATASETS, "d")["metadata"]["finalizers"]
        assert (it.status()["objects"], it.status()["bytes"], it.status()["cachedPercent"]) == (2, 1024, 0)
        assert ("Normal", "Serving") in it.events("d")
        await it.report("n1", cached_bytes={it.digest: 512}, held_bytes={it.digest: 512})
        await it.until(lambda: it.status()["cachedPercent"] == 50)
        assert it.status()["nodes"] == [{"id": "n1", "host": "n1", "bytes": 512}]

        spec = {"origin": f"file://{it.origin}", "replicas": 2, "pin": True}
        it.api.put(DATASETS, {**it.api.read(DATASETS, "d"), "spec": spec})
        await it.until(lambda: it.shell.state.datasets["d"].is_pinned)
        await it.until(lambda: it.status()["observedGeneration"] == 2)
        assert it.reason("Replicated") == "TooFewNodes"
        assert ("Warning", "TooFewNodes") in it.events("d")

        digest = it.digest
        await it.report("n1", cached_bytes={digest: 512})
        it.api.remove(DATASETS, "d")
        await it.until(lambda: "d" not in it.shell.state.datasets)
        await it.until(lambda: "n1" in condition(it.status(), "Ready")["message"])
        assert it.api.has(DATASETS, "d")
        await it.report("n1")
        await it.until(lambda: not it.api.has(DATASETS, "d"))

    run(test)


def test_an_origin_that_is_not_there_is_told_and_tried_again(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.dataset(origin=f"file://{it.origin}/later")
        await it.until(lambda: it.status().get("phase") == "Failed")
        assert it.reason("Ready") == "OriginNotFound"
        assert ("Warning", "OriginNotFound") in it.events("d")
        (it.origin / "later").mkdir()
        (it.origin / "later" / "0").write_bytes(b"x")
        await it.until(lambda: it.status().get("phase") == "Ready")

    run(test)


def test_credentials_come_from_a_secret_and_follow_it(run: Callable[..., None]) -> None:
    def secret(value: str) -> Object:
        data = {"auto_mkdir": base64.b64encode(value.encode()).decode()}
        return {"metadata": {"name": "creds", "namespace": "shoal"}, "data": {"options.json": data["auto_mkdir"]}}

    async def test(it: Running) -> None:
        it.dataset(secretRef={"name": "creds"})
        await it.until(lambda: it.reason("Ready") == "SecretMissing")
        assert "no Secret creds in namespace shoal" in condition(it.status(), "Ready")["message"]
        assert not it.shell.state.datasets
        it.api.put(SECRETS, secret("{}"))
        await it.until(lambda: it.status().get("phase") == "Ready")
        it.api.put(SECRETS, secret('{"auto_mkdir": false}'))
        await it.until(lambda: "auto_mkdir" in it.shell.state.datasets["d"].storage_options)
        it.api.put(SECRETS, secret("[]"))
        await it.until(lambda: it.reason("Ready") == "SecretMissing")
        assert condition(it.status(), "Ready")["status"] == "True"  # what is served goes on being served

    run(test)


def test_the_origin_is_listed_again_when_asked(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.dataset()
        await it.until(lambda: it.status().get("phase") == "Ready")
        (it.origin / "new").write_bytes(b"y")
        item = it.api.read(DATASETS, "d")
        item["metadata"]["annotations"] = {datasets.REFRESH_KEY: "monday"}
        it.api.put(DATASETS, item)
        await it.until(lambda: it.status().get("observedRefresh") == "monday")
        assert it.status()["objects"] == 3
        assert len(it.shell.state.datasets["d"].snapshots) == 2

    run(test)


def test_an_eager_dataset_is_prefetched_and_again_when_it_changes(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.join("n1")
        it.dataset(prefetch="Eager")
        await it.until(lambda: len(it.shell.state.jobs) == 1)
        await it.until(lambda: it.reason("Warm") == "Prefetching")
        first = it.digest
        (it.origin / "new").write_bytes(b"y")
        await it.catalog.refresh("d")
        await it.until(lambda: len(it.shell.state.jobs) == 2)
        assert {job.snapshot for job in it.shell.state.jobs.values()} == {first, it.digest}

    run(test)


def test_a_name_that_was_taken_by_hand(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.catalog.add(Definition("d", f"file://{it.origin}/train"))
        it.dataset()
        await it.until(lambda: it.reason("Ready") == "NameTaken")
        it.api.remove(DATASETS, "d")
        await it.until(lambda: not it.api.has(DATASETS, "d"))
        assert "d" in it.shell.state.datasets

    run(test)


async def answer(it: Running, name: str, *, done: int, complete: bool = False, total: int = 100) -> None:
    epoch = it.shell.state.map.epoch
    shares = {
        job.id: Share(epoch, total, done, 0, complete, "")
        for job in it.shell.state.jobs.values()
        if not job.is_finished
    }
    await it.report(name, shares=shares)


def test_a_prefetch_from_asked_to_complete(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        def status() -> Mapping[str, Any]:
            return it.api.read(PREFETCHES, "warm", "team").get("status") or {}

        it.prefetch(paths=["train/"])
        await it.until(lambda: condition(status(), "Complete").get("reason") == "NoDataset")
        it.dataset()
        await it.until(lambda: condition(status(), "Complete").get("reason") == "NoNodes")
        await it.join("n1")
        await it.until(lambda: status().get("phase") == "Running")
        await answer(it, "n1", done=50)
        await it.until(lambda: status()["percent"] == 50)
        await answer(it, "n1", done=100, complete=True)
        await it.until(lambda: condition(status(), "Complete")["status"] == "True")
        assert status()["percent"] == 100
        assert ("Normal", "Cached") in it.events("warm")
        await it.until(lambda: not it.api.read(PREFETCHES, "warm", "team")["metadata"]["finalizers"])

    run(test)


def test_a_prefetch_of_nothing_fails_and_goes_after_its_time(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.join("n1")
        it.dataset()
        it.prefetch(paths=["tarin/"])
        await it.until(lambda: (it.api.read(PREFETCHES, "warm", "team").get("status") or {}).get("phase") == "Failed")
        failed = condition(it.api.read(PREFETCHES, "warm", "team")["status"], "Failed")
        assert failed["reason"] == "NothingToFetch"
        assert "begins with 'tarin/'" in failed["message"]
        it.prefetch("short", paths=["tarin/"], ttlSecondsAfterFinished=0)
        await it.until(lambda: ("delete", "prefetches", "short") in it.api.calls)
        await it.until(lambda: not it.api.has(PREFETCHES, "short", "team"))

    run(test)


def test_a_deleted_prefetch_stops(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.join("n1")
        it.dataset()
        it.prefetch()
        await it.until(lambda: it.shell.state.jobs)
        it.api.remove(PREFETCHES, "warm", "team")
        await it.until(lambda: not it.api.has(PREFETCHES, "warm", "team"))
        (job,) = it.shell.state.jobs.values()
        assert str(job.state) == "cancelled"

    run(test)


def test_a_pod_waits_until_its_data_is_there(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.node("n1")
        it.node("n2")
        await it.join("n1", "n2")
        it.dataset()
        it.pod(text="d", **{gate.KEY: "d[>=50%]"})
        # Nobody else asks for the data, so the gate does.
        await it.until(lambda: it.shell.state.jobs)
        await it.until(lambda: ("Normal", "WaitingForData") in it.events("train"))
        await it.report("n1", cached_bytes={it.digest: 511}, held_bytes={it.digest: 511})
        await it.until(lambda: it.status().get("cachedPercent") == 49)
        told = it.numbers()
        assert told["shoal_operator_gated_pods",] == 1
        assert told["shoal_operator_gated_oldest_seconds",] > 0
        assert told["shoal_operator_datasets", "Ready"] == told["shoal_operator_watched_objects", "datasets"] == 1
        assert told["shoal_operator_datasets", "Failed"] == told["shoal_operator_failing", "dataset"] == 0
        assert len(it.api.read(PODS, "train", "team")["spec"]["schedulingGates"]) == 2
        await it.report("n2", cached_bytes={it.digest: 128}, held_bytes={it.digest: 128})
        await it.until(lambda: len(it.api.read(PODS, "train", "team")["spec"]["schedulingGates"]) == 1)
        spec = it.api.read(PODS, "train", "team")["spec"]
        assert spec["schedulingGates"] == [{"name": "other"}]
        terms = spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert [(t["weight"], t["preference"]["matchExpressions"][0]["values"]) for t in terms] == [
            (100, ["n1.host"]),
            (30, ["n2.host"]),
        ]
        assert ("Normal", "Released") in it.events("train")
        assert it.numbers()["shoal_operator_gate_wait_seconds_count", "warm"] == 1
        await it.until(lambda: it.numbers()["shoal_operator_gated_pods",] == 0)
        await it.until(lambda: it.numbers()["shoal_operator_queue_depth",] == 0)
        assert it.numbers()["shoal_operator_pass_seconds_count",] > 2

    run(test)


def test_a_pod_that_waited_long_enough_goes(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.pod(text="missing", **{gate.MAX_WAIT_KEY: "1s"})
        await it.until(lambda: len(it.api.read(PODS, "train", "team")["spec"]["schedulingGates"]) == 1)
        assert ("Warning", "Released") in it.events("train")
        told = it.numbers()
        assert told["shoal_operator_gate_wait_seconds_count", "long_enough"] == 1
        assert told["shoal_operator_gate_wait_seconds_sum", "long_enough"] >= 1

    run(test)


def test_where_nothing_is_gated_pods_are_not_even_read(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.pod(text="missing", **{gate.MAX_WAIT_KEY: "1s"})
        it.dataset()
        await it.until(lambda: it.status().get("phase") == "Ready")
        assert len(it.api.read(PODS, "train", "team")["spec"]["schedulingGates"]) == 2

    run(test, gate_namespaces=())


def test_cordons_drain_and_people_keep_their_own(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        def states() -> dict[str, NodeState]:
            return {known.id: known.state for known in it.shell.state.map.nodes}

        for name in ("n1", "n2", "n3"):
            it.node(name)
        await it.join("n1", "n2", "n3")
        await it.shell.apply(DrainRequested("n3"))
        it.node("n1", unschedulable=True)
        await it.until(lambda: states()["n1"] is NodeState.DRAINING)
        assert cast(KubeRecord, it.shell.record).drained == {"n1"}
        assert it.numbers()["shoal_operator_drained_nodes",] == 1
        # The last owner stays.
        it.node("n2", taints=[{"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}])
        it.node("n1")
        await it.until(lambda: states() == {"n1": NodeState.UP, "n2": NodeState.DRAINING, "n3": NodeState.DRAINING})
        it.api.remove(NODES, "n1")
        it.node("n2")
        await it.until(lambda: states()["n2"] is NodeState.UP)
        await it.until(lambda: states()["n1"] is NodeState.DRAINING)
        assert states()["n3"] is NodeState.DRAINING

    run(test)


def test_one_object_that_fails_is_nothing_to_the_others(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = datasets.Declared.parse

    def sometimes(raw: Mapping[str, Any]) -> datasets.Declared:
        if raw["metadata"]["name"] == "bad":
            raise KeyError("nobody foresaw this")
        return parse(raw)

    monkeypatch.setattr(datasets.Declared, "parse", sometimes)

    async def test(it: Running) -> None:
        it.dataset("bad")
        it.dataset("good")
        await it.until(lambda: it.status("good").get("phase") == "Ready")
        told = it.numbers()
        assert told["shoal_operator_failing", "dataset"] == 1
        assert told["shoal_operator_reconciles_total", "dataset", "error"] > 0
        assert told["shoal_operator_reconcile_seconds_count", "dataset"] > 1
        it.api.remove(DATASETS, "bad")
        await it.until(lambda: it.numbers()["shoal_operator_failing", "dataset"] == 0)

    run(test)


def test_what_waits_for_a_pass_is_counted_from_the_oldest() -> None:
    now = 0.0
    backlog = Backlog(lambda: now)
    assert (backlog.depth, backlog.age_s) == (0, 0.0)
    backlog.add()
    now = 1.0
    backlog.add()
    backlog.begin()
    now = 3.0
    backlog.add()
    assert (backlog.depth, backlog.age_s) == (3, 3.0)
    backlog.end()
    now = 5.0
    assert (backlog.depth, backlog.age_s) == (1, 2.0)
    backlog.begin()
    backlog.end()
    assert (backlog.depth, backlog.age_s) == (0, 0.0)


def test_an_outage_of_the_api_server_is_waited_out(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        it.dataset()
        await it.until(lambda: it.status().get("phase") == "Ready")
        await it.join("n1")
        it.api.failing = ApiError("gone for a moment")
        await it.report("n1", cached_bytes={it.digest: 1024})
        await it.api.asked(2)
        it.api.failing = None
        await it.until(lambda: it.status()["cachedPercent"] == 100)

    run(test)


def test_a_new_leader_goes_on_where_the_old_one_was(
    tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell_module, "TICK_S", 0.01)
    monkeypatch.setattr(operator, "PASS_S", 0.02)

    async def whole() -> None:
        api = FakeApi()
        api.put(NODES, {"metadata": {"name": "n1"}, "spec": {"unschedulable": True}})
        async with asyncio.timeout(60):
            async with led(api, tmp_path / "a", origin) as old:
                await old.join("n1", "n2")
                old.dataset(prefetch="Eager")
                await old.until(lambda: old.shell.state.jobs)
                await old.until(lambda: old.status().get("phase") == "Ready")
                await old.until(lambda: old.shell.state.members["n1"].is_draining)
                before = old.shell.state
            listed: list[str] = []

            def counting(url: str, *rest: Any) -> Any:
                listed.append(url)
                return list_origin(url, *rest)

            monkeypatch.setattr("tests.unit.test_kube_operator.list_origin", counting)
            async with led(api, tmp_path / "b", origin) as new:
                await new.join("n2")
                await new.report("n2", cached_bytes={new.digest: 10})
                await new.until(lambda: new.status()["cachedBytes"] == 10)
                after = new.shell.state
                assert after.datasets == before.datasets
                assert set(after.jobs) == set(before.jobs)
                assert after.map == before.map
                # What the old one drained the new one brings back.
                new.node("n1")
                await new.until(lambda: not new.shell.state.members["n1"].is_draining)
            assert not listed, "a new leader lists nothing again"

    asyncio.run(whole())


def test_deleted_while_it_is_listed(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    started = asyncio.Event()

    async def slow(catalog: Catalog, wanted: Definition) -> Any:
        started.set()
        await asyncio.sleep(3600)

    monkeypatch.setattr(Catalog, "add", slow)

    async def test(it: Running) -> None:
        it.dataset()
        await started.wait()
        await it.until(lambda: it.status().get("phase") == "Listing")
        it.api.remove(DATASETS, "d")
        await it.until(lambda: not it.api.has(DATASETS, "d"))

    run(test)


def test_nothing_is_written_when_all_is_done(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        await it.join("n1")
        it.dataset()
        await it.report("n1")
        await it.until(lambda: it.status().get("phase") == "Ready")
        await asyncio.sleep(0.1)
        before = len(it.api.calls)
        await asyncio.sleep(0.2)  # ten passes
        assert len(it.api.calls) == before

    run(test)
