"""The controller as its peers meet it: real gRPC and HTTP on loopback, fake nodes, a ``file://`` origin."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import grpc
import grpc.aio
import pytest
from click.testing import CliRunner, Result

from shoal import errors
from shoal.cli import node as node_commands
from shoal.cli.root import main
from shoal.datasets import DatasetRecord
from shoal.snapshot import Snapshot
from shoal.transport import Transport
from shoal.wire import grpc_errors
from shoal.wire import shoal_pb2 as pb
from shoal.wire.shoal_pb2_grpc import ControlStub, MembershipStub
from shoal_controller import control, shell
from shoal_controller.catalog import AdhocPolicy
from shoal_controller.model import Policy
from shoal_controller.origins import list_origin
from shoal_controller.server import Address, Config, Server
from shoal_controller.sqlite_record import SqliteRecord
from tests.support import metrics

LOOPBACK = Address("127.0.0.1", 0)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_wait_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes here are scripted, and most never say that they have a snapshot."""
    monkeypatch.setattr(control, "SERVED_TIMEOUT_S", 0.01)


class FakeNode:
    """A node's side of the control plane: keeps the last orders, reports what the test says."""

    def __init__(self, stub: MembershipStub, node_id: str, port: int = 7450) -> None:
        self.node = pb.Node(id=node_id, address=f"{node_id}:{port}", weight=20 * GIB, topology={"host": node_id})
        self._stub = stub
        self._stream = stub.Watch(pb.WatchRequest(node=self.node))
        self.orders = pb.Orders()

    async def hear(self, holds: Callable[[pb.Orders], bool] = lambda orders: True) -> pb.Orders:
        """The first orders that satisfy `holds`."""
        while not (self.orders.controller_http and holds(self.orders)):
            self.orders = await self._stream.read()
            assert isinstance(self.orders, pb.Orders), "the stream ended"
        return self.orders

    async def report(self, **fields: Any) -> pb.ReportAck:
        epoch = self.orders.map.epoch
        return await self._stub.Report(pb.NodeReport(**{"node": self.node, "epoch": epoch, **fields}))

    async def share(self, job_id: str, **fields: Any) -> None:
        share = pb.PrefetchShare(**{"job_id": job_id, "epoch": self.orders.map.epoch, "bytes_total": 10, **fields})
        await self.report(prefetches=[share], capacity_bytes=20 * GIB, used_bytes=GIB)


@dataclass
class Running:
    server: Server
    channel: grpc.aio.Channel
    control: Any
    membership: Any

    async def node(self, node_id: str, port: int = 7450) -> FakeNode:
        joined = FakeNode(self.membership, node_id, port)
        await joined.hear(lambda orders: any(known.id == node_id for known in orders.map.nodes))
        return joined

    async def get(self, target: str) -> Any:
        answer = await asyncio.to_thread(Transport().get, self.server.http_address, target)
        return answer.body


@asynccontextmanager
async def served(config: Config) -> AsyncIterator[Running]:
    server = await Server.start(config, list_origin)
    try:
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            yield Running(server, channel, ControlStub(channel), MembershipStub(channel))
    finally:
        await server.close()


Test = Callable[[Running], Awaitable[None]]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    directory = tmp_path / "origin"
    (directory / "train").mkdir(parents=True)
    (directory / "train" / "0.bin").write_bytes(b"0" * 5000)
    (directory / "train" / "1.bin").write_bytes(b"1" * 7)
    (directory / "README").write_bytes(b"x")
    return directory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(shell, "TICK_S", 0.01)

    def run(test: Test, *, adhoc: AdhocPolicy | None = None, planning_s: float = 60.0) -> None:
        config = Config(
            data_dir=tmp_path / "data",
            grpc=LOOPBACK,
            http=LOOPBACK,
            advertise="127.0.0.1",
            policy=Policy(lease_s=30.0, forget_after_s=600.0, planning_s=planning_s),
            adhoc=adhoc or AdhocPolicy(),
        )

        async def whole() -> None:
            async with asyncio.timeout(60), served(config) as running:
                await test(running)

        asyncio.run(whole())

    return run


@asynccontextmanager
async def refused(kind: type[errors.ShoalError], words: str) -> AsyncIterator[None]:
    with pytest.raises(kind, match=words):
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise grpc_errors.from_rpc_error(error) from error


def test_datasets_from_add_to_remove(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        added = await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}/", replicas=2))
        assert (added.origin, added.objects, added.bytes) == (f"file://{origin}", 3, 5008)
        assert (added.shard_size, added.replicas, list(added.snapshots)) == (256 << 20, 2, [added.snapshot])
        assert added.created_at.endswith("Z")
        (origin / "more").write_bytes(b"12")
        refreshed = await it.control.RefreshDataset(pb.RefreshDatasetRequest(name="d"))
        assert list(refreshed.snapshots) == [refreshed.snapshot, added.snapshot]
        assert refreshed.objects == 4
        listed = await it.control.ListDatasets(pb.ListDatasetsRequest())
        assert list(listed.datasets) == [refreshed]
        assert await it.control.GetDataset(pb.GetDatasetRequest(name="d")) == refreshed
        await it.control.RemoveDataset(pb.RemoveDatasetRequest(name="d"))
        assert not (await it.control.ListDatasets(pb.ListDatasetsRequest())).datasets

    run(test)


def test_a_policy_reaches_nodes_clients_and_people(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        joined = await it.node("n1")

        async def shoal(*words: str) -> Result:
            arguments = ["dataset", *words, "--endpoint", f"http://{it.server.http_address}"]
            return await asyncio.to_thread(CliRunner().invoke, main, arguments)

        added = await shoal("add", "d", str(origin), "--pin", "--quota", "500GiB", "--direct", "--json")
        assert added.exit_code == 0, added.output
        policy = {"replicas": 1, "pinned": True, "quota_bytes": 500 * GIB, "direct": True}
        assert policy.items() <= json.loads(added.stdout).items()
        (told,) = (await joined.hear(lambda orders: len(orders.datasets) == 1)).datasets
        assert (told.replicas, told.pinned, told.quota_bytes, told.direct) == (1, True, 500 * GIB, True)

        changed = await shoal("set", "d", "--replicas", "3", "--no-pin", "--quota", "none")
        assert changed.stdout == "d: 3 replicas, not pinned, quota none, direct reads allowed\n"
        (told,) = (await joined.hear(lambda orders: orders.datasets[0].replicas == 3)).datasets
        assert (told.pinned, told.quota_bytes, told.direct) == (False, 0, True)
        record = DatasetRecord.from_json(await it.get("/v1/datasets/d"))
        assert (record.replicas, record.pinned, record.quota_bytes, record.direct) == (3, False, 0, True)
        assert record.snapshot == json.loads(added.stdout)["snapshot"]

        for words, sentence in (
            (("set", "d"), "nothing is to be changed"),
            (("set", "d", "--replicas", "17"), "error: 17 replicas cannot be: use 1 to 16"),
            (("set", "d", "--quota", "some"), "'some' is not a size"),
            (("set", "other", "--pin"), "error: no dataset is named 'other'"),
        ):
            failed = await shoal(*words)
            assert failed.exit_code and sentence in failed.output
        assert record == DatasetRecord.from_json(await it.get("/v1/datasets/d"))
        async with refused(errors.InvalidRequest, "a quota of 9223372036854775808 bytes cannot be"):
            await it.control.SetDataset(pb.SetDatasetRequest(name="d", quota_bytes=1 << 63))

    run(test)


def test_refusals_keep_their_class_and_sentence(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        add = it.control.AddDataset
        async with refused(errors.InvalidRequest, "'Not A Name' is no dataset name"):
            await add(pb.AddDatasetRequest(name="Not A Name", origin=f"file://{origin}"))
        async with refused(errors.InvalidRequest, "no JSON"):
            await add(pb.AddDatasetRequest(name="d", origin=f"file://{origin}", storage_options="{"))
        async with refused(errors.OriginNotFound, "nowhere"):
            await add(pb.AddDatasetRequest(name="d", origin=f"file://{origin}/nowhere"))
        async with refused(errors.InvalidRequest, "write one URL such as s3://bucket/prefix"):
            await add(pb.AddDatasetRequest(name="d", origin="origin"))
        async with refused(errors.DatasetNotFound, "no dataset is named 'd'"):
            await it.control.GetDataset(pb.GetDatasetRequest(name="d"))
        await add(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))
        async with refused(errors.AlreadyExists, "'shoal dataset refresh d'"):
            await add(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))

    run(test)


def test_secrets_go_to_nodes_alone_and_references_stay_references(
    run: Callable[..., None], origin: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEST_TOKEN", "resolved")
    options = json.dumps({"username": "env:TEST_TOKEN", "password": "hunter2"})

    async def test(it: Running) -> None:
        joined = await it.node("n1")
        added = await it.control.AddDataset(
            pb.AddDatasetRequest(name="d", origin="memory://set/", storage_options=options)
        )
        assert json.loads(added.storage_options) == {"username": "env:TEST_TOKEN", "password": "***"}
        orders = await joined.hear(lambda orders: len(orders.datasets) == 1)
        assert json.loads(orders.datasets[0].storage_options) == json.loads(options)
        answers = [
            await it.control.GetStatus(pb.GetStatusRequest()),
            await it.control.ListDatasets(pb.ListDatasetsRequest()),
            await it.control.GetDataset(pb.GetDatasetRequest(name="d")),
        ]
        told = " ".join(map(str, answers)) + (await it.get("/v1/datasets")).decode()
        assert "hunter2" not in told
        assert "resolved" not in told

    memory = fsspec.filesystem("memory", username="resolved", password="hunter2")
    memory.pipe("/set/x", b"1")
    try:
        run(test)
    finally:
        memory.rm("/set", recursive=True)


def test_orders_are_the_whole_state_and_the_same_for_all(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        first = await it.node("n1")
        assert first.orders.map.epoch == 1
        assert first.orders.controller_http == it.server.http_address
        assert len(first.orders.cluster_id) == 32
        await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))
        second = await it.node("n2")
        orders = await first.hear(lambda orders: orders.map.epoch == 2)
        assert orders == second.orders
        assert [known.id for known in orders.map.nodes] == ["n1", "n2"]
        assert [known.name for known in orders.datasets] == ["d"]
        ack = await second.report(leaving=True)
        assert (ack.epoch, ack.unknown) == (3, False)
        orders = await first.hear(lambda orders: orders.map.epoch == 3)
        assert [known.state for known in orders.map.nodes] == ["up", "down"]

    run(test)


def test_reports_from_nobody_and_of_nonsense(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        stranger = FakeNode(it.membership, "n1")
        stranger._stream.cancel()
        stranger.node.id = "n9"
        assert (await stranger.report()).unknown
        for broken in (
            pb.Node(id="", address="h:1"),
            pb.Node(id="n", address="h"),
            pb.Node(id="n", address="h:0"),
            pb.Node(id="n", address="h:1", weight=1 << 63),
        ):
            async with refused(errors.InvalidRequest, "node"):
                await it.membership.Report(pb.NodeReport(node=broken))
        node = await it.node("n1")
        for fields in (
            {"used_bytes": 1 << 63},
            {"handover_bytes": 1 << 54},
            {"cached": [pb.CachedSnapshot(snapshot="0" * 32, bytes_primary=1 << 63)]},
            {"prefetches": [pb.PrefetchShare(job_id="j", bytes_total=(1 << 64) - 1)]},
        ):
            async with refused(errors.InvalidRequest, "node n1 reports [0-9]* bytes, which no node holds"):
                await node.report(**fields)
        for epoch in (1 << 62, 1 << 63, (1 << 64) - 1):
            for each in (stranger, node):
                async with refused(errors.InvalidRequest, f"reports epoch {epoch} .* delete orders.json"):
                    await each.report(epoch=epoch)
        assert (await node.report()).epoch == 1

    run(test)


def test_the_older_of_two_processes_with_one_id_is_told(run: Callable[..., None]) -> None:
    async def test(it: Running) -> None:
        older = await it.node("n1", 1)
        newer = await it.node("n1", 2)
        async with refused(errors.AlreadyExists, "claimed by n1:2|claimed by two processes"):
            await older.hear(lambda orders: orders.map.epoch == 2)
        async with refused(errors.AlreadyExists, "node id n1 is claimed by two processes, at n1:2 and at n1:1"):
            await older.report()
        assert not (await newer.report()).unknown
        told = await it.control.GetStatus(pb.GetStatusRequest())
        assert any("claimed by two processes" in warning for warning in told.warnings)
        assert told.epoch == 2

    run(test)


def test_a_prefetch_from_start_to_end(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        nodes = [await it.node("n1"), await it.node("n2")]
        await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))
        starting = asyncio.ensure_future(
            it.control.StartPrefetch(pb.StartPrefetchRequest(dataset="d", prefix="train/"))
        )
        for each in nodes:
            orders = await each.hear(lambda orders: len(orders.prefetches) == 1 and orders.map.epoch == 2)
            (order,) = orders.prefetches
            assert (order.dataset, order.prefix, order.run) == ("d", "train/", False)
            await each.share(order.job_id)
        job = await starting
        assert (job.id, job.state, job.bytes_total) == (order.job_id, "running", 20)
        again = await it.control.StartPrefetch(
            pb.StartPrefetchRequest(dataset=f"d@{job.snapshot[:8]}", prefix="train/")
        )
        assert again.id == job.id
        watched = aiter(it.control.WatchPrefetch(pb.WatchPrefetchRequest(job_id=job.id)))
        assert (await anext(watched)).state == "running"
        for each in nodes:
            await each.hear(lambda orders: orders.prefetches[0].run)
        await nodes[0].share(job.id, bytes_done=7)
        assert (await anext(watched)).bytes_done == 7
        for each in nodes:
            await each.share(job.id, bytes_done=10, complete=True)
        states = [told async for told in watched]
        assert (states[-1].state, states[-1].bytes_done) == ("done", 20)
        assert states[-1].finished_at
        await nodes[0].hear(lambda orders: not orders.prefetches)
        listed = await it.control.ListPrefetches(pb.ListPrefetchesRequest())
        assert list(listed.jobs) == [states[-1]]

    run(test)


def test_a_prefetch_that_cannot_be_is_refused_up_front(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        start = it.control.StartPrefetch
        async with refused(errors.DatasetNotFound, "no dataset is named 'd'"):
            await start(pb.StartPrefetchRequest(dataset="d"))
        added = await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))
        async with refused(errors.Unavailable, "none is up"):
            await start(pb.StartPrefetchRequest(dataset="d"))
        joined = await it.node("n1")
        async with refused(errors.NotFound, "no object of dataset d has a path that begins with 'test/'"):
            await start(pb.StartPrefetchRequest(dataset="d", prefix="test/"))
        other = "ffff" if added.snapshot[:4] != "ffff" else "eeee"
        async with refused(errors.SnapshotNotFound, f"dataset d has no snapshot {other}"):
            await start(pb.StartPrefetchRequest(dataset=f"d@{other}"))
        async with refused(errors.InvalidRequest, "is no dataset"):
            await start(pb.StartPrefetchRequest(dataset="d/train"))
        starting = asyncio.ensure_future(start(pb.StartPrefetchRequest(dataset="d")))
        orders = await joined.hear(lambda orders: len(orders.prefetches) == 1)
        await joined.share(orders.prefetches[0].job_id, bytes_total=32 * GIB, bytes_short=12 * GIB)
        async with refused(errors.DoesNotFit, r"12 GiB more on node n1 \(capacity 20 GiB, used 1 GiB"):
            await starting

    run(test)


def test_a_prefetch_that_nodes_do_not_answer_fails_in_time(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        await it.node("n1")
        await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))
        async with refused(errors.ShoalError, "node n1 did not say whether"):
            await it.control.StartPrefetch(pb.StartPrefetchRequest(dataset="d"))

    run(test, planning_s=0.1)


def test_a_cancelled_prefetch_ends_whoever_waits_for_it(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        joined = await it.node("n1")
        await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))
        starting = asyncio.ensure_future(it.control.StartPrefetch(pb.StartPrefetchRequest(dataset="d")))
        orders = await joined.hear(lambda orders: len(orders.prefetches) == 1)
        job_id = orders.prefetches[0].job_id
        watched = it.control.WatchPrefetch(pb.WatchPrefetchRequest(job_id=job_id))
        assert (await it.control.CancelPrefetch(pb.CancelPrefetchRequest(job_id=job_id))).state == "cancelled"
        assert (await starting).state == "cancelled"
        assert [told.state async for told in watched][-1] == "cancelled"
        async with refused(errors.NotFound, "no prefetch job is named 'x'"):
            await it.control.CancelPrefetch(pb.CancelPrefetchRequest(job_id="x"))

    run(test)


def test_status_says_what_there_is_and_what_is_wrong(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        joined = await it.node("n1")
        added = await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}", replicas=3))
        await joined.report(
            used_bytes=3,
            capacity_bytes=9,
            condition="full",
            version="1.2",
            cached=[pb.CachedSnapshot(snapshot=added.snapshot, bytes_primary=5000, bytes_held=5000)],
        )
        told = await it.control.GetStatus(pb.GetStatusRequest())
        (known,) = told.nodes
        assert known.node == pb.Node(id="n1", address="n1:7450", weight=20 * GIB, topology={"host": "n1"}, state="up")
        assert (known.used_bytes, known.capacity_bytes, known.condition) == (3, 9, "full")
        assert known.version == "1.2"
        assert 0 <= known.seconds_since_report < 60
        assert told.datasets[0].cached_bytes == 5000
        assert list(told.warnings) == [
            "node n1 (n1:7450) is full: it keeps what it has and passes the rest through; add space, or "
            "remove datasets",
            "dataset d asks for 3 replicas, but 1 node is up: it has 1",
        ]

    run(test)


def test_a_node_is_drained_watched_and_undrained(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_commands, "sleep", lambda seconds: time.sleep(0.01))
    monkeypatch.setattr(node_commands, "STUCK_S", 0.1)

    async def test(it: Running) -> None:
        leaving, staying = await it.node("n1-a"), await it.node("n2")

        async def shoal(*words: str) -> Result:
            arguments = [*words, "--endpoint", f"http://{it.server.http_address}"]
            return await asyncio.to_thread(CliRunner().invoke, main, arguments)

        for words, sentence in (
            (("drain", "x"), "error: no cache node has an id that begins with 'x': 'shoal node list' shows those"),
            (("drain", "n"), "error: 'n' means 2 nodes (n1-a, n2): write more of it"),
            (("undrain", ""), "error: no cache node has an id that begins with ''"),
        ):
            failed = await shoal("node", *words)
            assert failed.exit_code == 1 and sentence in failed.stderr
        started = await shoal("node", "drain", "n1", "--no-wait")
        assert started.stdout.startswith("node n1-a is draining: 'shoal node list' shows what is left")
        last = await shoal("node", "drain", "n2")
        assert last.exit_code == 1 and "node n2 is the only one that is up and owns shards" in last.stderr

        await leaving.hear(lambda orders: orders.map.nodes[0].state == "draining")
        late = await shoal("node", "drain", "n1", "--timeout", "0")
        assert late.exit_code == 1
        assert "node n1-a is not drained after 0 s: it is not known yet what is left to hand over" in late.stderr
        await leaving.report(handover_bytes=3 << 30)
        assert "draining, 3 GiB left" in (await shoal("status")).stdout
        await staying.hear(lambda orders: orders.map.epoch == 3)
        await staying.report(short_bytes=2 << 30)
        stuck = await shoal("node", "drain", "n1", "--json")
        assert stuck.exit_code == 1
        assert "does not get on since 0.1 s: 3 GiB are left to hand over: node n2 lacks room for 2 GiB" in stuck.stderr
        told = json.loads(stuck.stdout)
        assert (told["id"], told["draining"], told["drained"], told["handover_bytes"]) == ("n1-a", True, False, 3 << 30)

        await staying.report()
        watching = asyncio.ensure_future(shoal("node", "drain", "n1"))
        await asyncio.sleep(0.1)
        assert not watching.done()
        await leaving.report(handover_bytes=0)
        done = await watching
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout == "drained node n1-a: other nodes hold all that it holds; it may be stopped\n"
        assert [known["drained"] for known in json.loads((await shoal("node", "list", "--json")).stdout)] == [
            True,
            False,
        ]

        watching = asyncio.ensure_future(shoal("node", "drain", "n1"))
        assert (await watching).exit_code == 0, "asking twice is asking once"
        assert (await shoal("node", "undrain", "n1")).stdout == "node n1-a owns its share again\n"
        assert (await shoal("node", "undrain", "n1")).stdout == "node n1-a was not draining: it is up\n"
        await leaving.report(leaving=True)
        down = await shoal("node", "drain", "n1")
        assert (
            down.exit_code == 1 and "is not drained and cannot be now: not all handed over: it is down" in down.stderr
        )
        assert "down, draining" in (await shoal("node", "list")).stdout

    run(test)


def test_ctrl_c_leaves_the_drain_going(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(node_commands, "sleep", interrupt)

    async def test(it: Running) -> None:
        await it.node("n1")
        await it.node("n2")
        words = ["node", "drain", "n1", "--endpoint", f"http://{it.server.http_address}"]
        interrupted = await asyncio.to_thread(CliRunner().invoke, main, words)
        assert interrupted.exit_code == 130
        assert interrupted.stderr.startswith("the drain goes on, 'shoal node list' shows how far it is")
        assert (await it.control.GetStatus(pb.GetStatusRequest())).nodes[0].draining

    run(test)


def test_http_answers_what_a_reader_needs(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        await it.node("n1")
        added = await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))
        cluster = json.loads(await it.get("/v1/cluster"))
        assert (cluster["epoch"], cluster["role"], cluster["node_id"]) == (1, "controller", "")
        assert (cluster["controller_grpc"], cluster["controller_http"]) == (
            it.server.grpc_address,
            it.server.http_address,
        )
        assert [known["id"] for known in cluster["map"]["nodes"]] == ["n1"]
        record = json.loads(await it.get("/v1/datasets/d"))
        assert record["snapshot"] == added.snapshot
        assert json.loads(await it.get(f"/v1/resolve?url=file://{origin}/train/0.bin")) == {
            "dataset": record,
            "path": "train/0.bin",
        }
        path = origin.parent / "fetched.arrow"
        path.write_bytes(await it.get(f"/v1/snapshots/{added.snapshot}"))
        fetched = Snapshot.open(path)
        fetched.verify()
        assert (fetched.digest, len(fetched)) == (added.snapshot, 3)
        with pytest.raises(errors.SnapshotNotFound, match="the controller has no snapshot"):
            await it.get(f"/v1/snapshots/{'0' * 32}")
        assert (await it.get("/readyz")).strip() == b"ready"

    run(test)


def test_a_refused_url_comes_with_the_line_to_type(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        with pytest.raises(errors.DatasetNotFound, match="shoal dataset add NAME s3://bucket/prefix"):
            await it.get("/v1/resolve?url=s3://bucket/prefix/x.arrow")

    run(test)


def test_an_allowed_url_becomes_a_dataset(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        answer = json.loads(await it.get(f"/v1/resolve?url=file://{origin}/train/0.bin"))
        assert answer["path"] == "train/0.bin"
        assert (answer["dataset"]["adhoc"], answer["dataset"]["objects"]) == (True, 3)
        listed = await it.control.ListDatasets(pb.ListDatasetsRequest())
        assert [known.adhoc for known in listed.datasets] == [True]

    run(test, adhoc=AdhocPolicy.parse([f"file://{origin}"], "{}"))


def test_metrics_are_documented_and_count(run: Callable[..., None], origin: Path) -> None:
    async def test(it: Running) -> None:
        await it.node("n1")
        await it.control.AddDataset(pb.AddDatasetRequest(name="d", origin=f"file://{origin}"))
        async with refused(errors.DatasetNotFound, "'e'"):
            await it.control.GetDataset(pb.GetDatasetRequest(name="e"))
        text = (await it.get("/metrics")).decode()
        metrics.check(text)
        samples = metrics.samples(text)
        assert samples["shoal_controller_epoch",] == 1
        assert samples["shoal_controller_nodes", "up"] == 1
        assert samples["shoal_controller_nodes", "down"] == 0
        assert samples["shoal_controller_datasets",] == 1
        assert samples["shoal_controller_dataset_bytes", "d"] == 5008
        assert samples["shoal_controller_calls_total", "OK", "AddDataset"] == 1
        assert samples["shoal_controller_calls_total", "NOT_FOUND", "GetDataset"] == 1
        known = metrics.documented(*metrics.PAGES, prefix="shoal_(?:controller|build)_")
        assert known == metrics.names(metrics.own(text))

    run(test)


def test_a_port_that_is_taken_is_named_with_its_flag(tmp_path: Path) -> None:
    async def test() -> None:
        policy = Policy(lease_s=5, forget_after_s=600, planning_s=60)
        config = Config(tmp_path / "a", LOOPBACK, LOOPBACK, "127.0.0.1", policy, AdhocPolicy())
        async with served(config) as first:
            taken_grpc = Address.parse(first.server.grpc_address)
            taken_http = Address.parse(first.server.http_address)
            for grpc_address, http_address, flag in (
                (taken_grpc, LOOPBACK, "--grpc-listen"),
                (LOOPBACK, taken_http, "--http-listen"),
            ):
                second = Config(tmp_path / "b", grpc_address, http_address, "127.0.0.1", policy, AdhocPolicy())
                with pytest.raises(
                    errors.StoreUnusable, match=rf"cannot listen on 127\.0\.0\.1:\d+ \(Address already in use\).*{flag}"
                ):
                    await Server.start(second, list_origin)

    asyncio.run(test())
    # What the failed starts had opened is closed again, the directory's lock with it.
    SqliteRecord.open(tmp_path / "b").close()
