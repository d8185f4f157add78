"""The controller as a process: killed, started again, started wrongly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from shoal import errors
from shoal.snapshot import Snapshot
from shoal.transport import Transport
from shoal.wire import grpc_errors
from shoal.wire import shoal_pb2 as pb
from shoal.wire.shoal_pb2_grpc import ControlStub, MembershipStub

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 30.0


def command(data_dir: Path, *args: str) -> list[str]:
    listen = ["--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"]
    return [sys.executable, "-m", "shoal_controller", "--data-dir", str(data_dir), *listen, *args]


def environment() -> dict[str, str]:
    roots = os.pathsep.join(str(ROOT / name) for name in ("client", "controller", "cachenode"))
    return {**os.environ, "PYTHONPATH": roots}


@dataclass
class Controller:
    """A running controller, and calls to it."""

    process: subprocess.Popen[str]
    grpc_address: str
    http_address: str
    _channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self._channel = grpc.insecure_channel(self.grpc_address)
        self.control = ControlStub(self._channel)
        self.membership = MembershipStub(self._channel)

    def datasets(self) -> list[pb.Dataset]:
        return list(self.control.ListDatasets(pb.ListDatasetsRequest(), timeout=TIMEOUT_S).datasets)

    def status(self) -> pb.Status:
        return self.control.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)  # type: ignore[no-any-return]

    def watch(self, node: pb.Node) -> Iterator[pb.Orders]:
        return iter(self.membership.Watch(pb.WatchRequest(node=node), timeout=TIMEOUT_S))

    def get(self, target: str) -> bytes:
        return Transport().get(self.http_address, target).body

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self._channel.close()


@contextmanager
def started(data_dir: Path, *args: str) -> Iterator[Controller]:
    with subprocess.Popen(command(data_dir, *args), stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            word, _, addresses = process.stdout.readline().partition(" ")
            assert word == "ready", f"it ended with status {process.wait(TIMEOUT_S)}"
            ready: dict[str, Any] = json.loads(addresses)
            controller = Controller(process, ready["grpc"], ready["http"])
            try:
                yield controller
            finally:
                controller.close()
        finally:
            process.kill()


def refusal(data_dir: Path, *args: str) -> str:
    """What a controller that cannot start says, after it ended with status 1."""
    done = subprocess.run(
        command(data_dir, *args), capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def origin(tmp_path: Path) -> str:
    directory = tmp_path / "origin"
    directory.mkdir()
    for number in range(3):
        (directory / f"{number}.bin").write_bytes(bytes([number]) * 100)
    return f"file://{directory}"


def test_what_was_answered_is_there_after_kill_9(tmp_path: Path, origin: str) -> None:
    node = pb.Node(id="n1", address="h:1", weight=1 << 30, topology={"host": "h"}, state="up")
    with started(tmp_path / "data") as controller:
        added = controller.control.AddDataset(
            pb.AddDatasetRequest(name="d", origin=origin, replicas=2), timeout=TIMEOUT_S
        )
        orders = next(controller.watch(node))
        starting = controller.control.StartPrefetch.future(pb.StartPrefetchRequest(dataset="d"), timeout=TIMEOUT_S)
        jobs = next(each.prefetches for each in controller.watch(node) if each.prefetches)
        controller.kill()
        with pytest.raises(errors.ClusterUnavailable):
            _answer(starting)
    with started(tmp_path / "data") as controller:
        assert controller.datasets() == [added]
        told = controller.status()
        assert told.epoch == orders.map.epoch == 1
        assert [known.node for known in told.nodes] == [node]
        assert [(job.id, job.state) for job in told.jobs] == [(jobs[0].job_id, "planning")]
        again = next(controller.watch(node))
        assert again.map == orders.map
        assert again.cluster_id == orders.cluster_id
        assert [order.job_id for order in again.prefetches] == [jobs[0].job_id]
        path = tmp_path / "fetched.arrow"
        path.write_bytes(controller.get(f"/v1/snapshots/{added.snapshot}"))
        Snapshot.open(path).verify()


def test_killed_in_the_middle_of_adding_it_knows_whole_datasets_and_all_that_it_answered(
    tmp_path: Path, origin: str
) -> None:
    with started(tmp_path / "data") as controller:
        adding = [
            controller.control.AddDataset.future(
                pb.AddDatasetRequest(name=f"d{number}", origin=origin, shard_size=(number + 1) << 20), timeout=TIMEOUT_S
            )
            for number in range(40)
        ]
        adding[5].result(TIMEOUT_S)
        controller.kill()
        answered = []
        for call in adding:
            try:
                answered.append(call.result(TIMEOUT_S))
            except grpc.RpcError:
                pass
    with started(tmp_path / "data") as controller:
        known = {dataset.name: dataset for dataset in controller.datasets()}
        assert [known[dataset.name] for dataset in answered] == answered
        for dataset in known.values():
            path = tmp_path / "fetched.arrow"
            path.write_bytes(controller.get(f"/v1/snapshots/{dataset.snapshot}"))
            Snapshot.open(path).verify()
        assert len(list((tmp_path / "data" / "snapshots").iterdir())) == len(known)
        assert not list((tmp_path / "data" / "incoming").iterdir())


def _answer(call: Any) -> Any:
    try:
        return call.result(TIMEOUT_S)
    except grpc.RpcError as error:
        raise grpc_errors.from_rpc_error(error) from error


def test_sigterm_ends_it_in_order_with_nodes_connected(tmp_path: Path, origin: str) -> None:
    with started(tmp_path / "data") as controller:
        next(controller.watch(pb.Node(id="n1", address="h:1", weight=1)))
        controller.process.send_signal(signal.SIGTERM)
        assert controller.process.wait(TIMEOUT_S) == 0


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("--grpc-listen", "--http-listen"):
            assert refusal(tmp_path / "data", flag, address) == (
                f"error: cannot listen on {address} (Address already in use): name another address with {flag}"
            )


def test_a_data_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    data_dir = tmp_path / "file" / "data"
    assert refusal(data_dir) == (
        f"error: the data directory {data_dir} cannot be used (Not a directory): make it a directory that this user "
        "can write, or name another with --data-dir"
    )


def test_a_data_directory_in_use_is_named(tmp_path: Path) -> None:
    with started(tmp_path / "data"):
        assert refusal(tmp_path / "data") == (
            f"error: another controller uses the data directory {tmp_path / 'data'}: stop that one, or name another "
            "directory with --data-dir"
        )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--http-listen", "nonsense"), "'nonsense' is no address: write HOST:PORT"),
        (("--allow-adhoc", "nonsense"), "'nonsense' is no origin"),
        (("--adhoc-storage-options", "["), "the storage options are no JSON"),
    ],
)
def test_a_malformed_flag_is_named(tmp_path: Path, args: tuple[str, ...], sentence: str) -> None:
    assert refusal(tmp_path / "data", *args).startswith(f"error: {sentence}")


def test_help_has_examples_and_every_flag_is_an_environment_variable(tmp_path: Path, origin: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal_controller", "--help"],
        capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S, check=True,
    )  # fmt: skip
    assert "shoal-controller --data-dir ./c --grpc-listen 127.0.0.1:0" in done.stdout
    variables = {"SHOAL_CONTROLLER_DATA_DIR": str(tmp_path / "file" / "x"), "SHOAL_CONTROLLER_LEASE": "3"}
    (tmp_path / "file").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "shoal_controller"],
        capture_output=True, text=True, env=environment() | variables, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert str(tmp_path / "file" / "x") in done.stderr
