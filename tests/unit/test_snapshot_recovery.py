"""A controller whose disk has not the snapshots that its record names: from nodes, or from the origin again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from shoal.errors import NodeUnavailable
from shoal.snapshot import Snapshot
from shoal.transport import Transport
from shoal_controller import snapshot_recovery
from shoal_controller.catalog import AdhocPolicy, Catalog, Definition
from shoal_controller.events import NodeRegistered, NodeReported
from shoal_controller.model import Report
from shoal_controller.origins import list_origin
from shoal_controller.shell import Shell
from shoal_controller.snapshot_recovery import SnapshotRecovery
from shoal_controller.sqlite_record import SqliteRecord
from tests.support.controller import POLICY, node


@dataclass
class Answer:
    body: bytes


class Nodes:
    """Answers for nodes, by address; who is not in it does not answer."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.asked: list[str] = []

    def get(self, address: str, target: str, headers: dict[str, str]) -> Answer:
        self.asked.append(f"{address}{target}")
        if address not in self.bodies:
            raise NodeUnavailable(f"{address} does not answer")
        return Answer(self.bodies[address])


@dataclass
class Lost:
    shell: Shell
    nodes: Nodes
    path: Path
    content: bytes
    recovery: SnapshotRecovery
    listed: list[str]


def run(tmp_path: Path, test: Callable[[Lost], Any]) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "o").write_bytes(b"x")

    async def whole() -> None:
        listed: list[str] = []

        def listing(url: str, *rest: Any) -> Any:
            listed.append(url)
            return list_origin(url, *rest)

        shell = await Shell.start(lambda: SqliteRecord.open(tmp_path / "data"), POLICY)
        catalog = Catalog(shell, listing, AdhocPolicy())
        try:
            dataset = await catalog.add(Definition("d", f"file://{origin}"))
            for name in ("n1", "n2"):
                await shell.apply(NodeRegistered(node(name)))
            path = shell.record.snapshot_path(dataset.newest.digest)
            content = path.read_bytes()
            path.unlink()
            listed.clear()
            nodes = Nodes()
            recovery = SnapshotRecovery(shell, catalog, cast(Transport, nodes))
            async with asyncio.timeout(20):
                await test(Lost(shell, nodes, path, content, recovery, listed))
        finally:
            await catalog.close()
            await shell.close()

    asyncio.run(whole())


def test_the_file_comes_from_the_node_that_has_it(tmp_path: Path) -> None:
    async def test(it: Lost) -> None:
        it.nodes.bodies["n2:7450"] = it.content
        await it.recovery.run()
        assert it.path.read_bytes() == it.content
        assert it.nodes.asked == [f"{name}:7450/v1/snapshots/{it.path.stem}" for name in ("n1", "n2")]
        assert not it.listed

    run(tmp_path, test)


def test_a_damaged_file_is_not_taken(tmp_path: Path) -> None:
    async def test(it: Lost) -> None:
        it.nodes.bodies["n1:7450"] = it.content[:-8] + b"\0" * 8
        it.nodes.bodies["n2:7450"] = it.content
        await it.recovery.run()
        Snapshot.open(it.path).verify()

    run(tmp_path, test)


def test_the_origin_is_listed_only_once_every_node_was_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_recovery, "FIRST_RETRY_S", 0.01)

    async def test(it: Lost) -> None:
        running = asyncio.create_task(it.recovery.run())
        await it.shell.apply(NodeReported(Report(node("n1"), 1)))
        while len(it.nodes.asked) < 6:
            await asyncio.sleep(0.01)
        assert not it.listed
        await it.shell.apply(NodeReported(Report(node("n2"), 1)))
        await running
        assert len(it.listed) == 1
        assert Snapshot.open(it.path).digest == it.path.stem

    run(tmp_path, test)
