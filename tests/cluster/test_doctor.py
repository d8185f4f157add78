"""`shoal doctor` over set-ups that are really broken: real controller, nodes, sockets, drives and origin.

Each test breaks one thing, and looks for the finding that names it and its remedy. The cluster is one for all, so what
a test cannot mend comes late, and only the first one may look for a cluster without any problem.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shoal.cli.control import Control
from shoal.cli.root import main
from shoal.devcluster import DevCluster
from shoal.devcluster.server import ServerProcess
from shoal.doctor import asking
from shoal.doctor.facts import Trouble
from shoal.errors import DoesNotFit
from tests.cluster.conftest import BUCKET, filesystem
from tests.support import filesystems
from tests.support.minicluster import MiniCluster
from tests.support.processes import Child, Say
from tests.support.proxy import CountingProxy
from tests.support.waiting import wait_for
from tests.support.weed import Weed

#: Runs before a server's own code: a process that lives an hour ahead, and takes itself for a version of the future.
_ALTERED = """
import importlib.metadata, time
of_here, now = importlib.metadata.version, time.time
importlib.metadata.version = lambda name: "9.0.0" if name == "shoal" else of_here(name)
time.time = lambda: now() + 3600
"""
_SECRET = "SHOAL_TEST_DOCTOR_SECRET"


class Cluster(DevCluster):
    """Two nodes, of which the second lacks an environment variable; and a third one, altered as above, when added."""

    def wrapper_of(self, name: str) -> Sequence[str]:
        match name:
            case "node-1":
                return ("env", "-u", _SECRET)
            case "node-2":
                return ("env", f"PYTHONPATH={self.data_dir / 'altered'}:{self._env['PYTHONPATH']}")
        return ()


class Seen:
    """What `shoal doctor --json` said."""

    def __init__(self, stdout: str, status: int) -> None:
        self.document: dict[str, Any] = json.loads(stdout)
        self.status = status
        self.findings: list[dict[str, Any]] = self.document["findings"]
        self.kinds = {finding["kind"] for finding in self.findings}

    def problems(self) -> list[dict[str, Any]]:
        return [finding for finding in self.findings if finding["outcome"] == "problem"]

    def one(self, kind: str, *, names: Sequence[object], remedy: str) -> dict[str, Any]:
        """The finding of that kind; its sentence names things, and its remedy says what to do."""
        found = [each for each in self.findings if each["kind"] == kind]
        assert found, (kind, self.findings)
        for each in found:
            if all(str(name) in each["sentence"] for name in names):
                assert remedy in each["remedy"], each
                assert self.status == (1 if self.problems() else 0)
                return each
        raise AssertionError((names, found))


@pytest.fixture(autouse=True)
def no_usual_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may have a node of its own."""
    monkeypatch.setattr("shoal.cli.doctor.DEFAULT_SOCKET", str(tmp_path / "usual.sock"))


def doctor(cluster: DevCluster, *words: str, **environment: str) -> Seen:
    done = CliRunner().invoke(main, ["doctor", "--json", *words], env=cluster.environment() | environment)
    assert done.exit_code in (0, 1), done.output
    return Seen(done.stdout, done.exit_code)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(
        nodes=2, capacity="64MiB", env={_SECRET: "x"}, controller_args=("--lease", "2"), node_args=("--scrub-rate", "0")
    ) as cluster:
        (cluster.data_dir / "altered").mkdir()
        (cluster.data_dir / "altered" / "sitecustomize.py").write_text(_ALTERED)
        yield cluster


@pytest.fixture(scope="module")
def files(cluster: Cluster) -> Path:
    """The dataset ``files``, over a directory."""
    directory = cluster.data_dir / "files"
    directory.mkdir()
    for name in ("a", "b", "c"):
        (directory / name).write_bytes(name.encode() * 100_000)
    add(cluster, "files", str(directory))
    return directory


def add(cluster: DevCluster, name: str, origin: str, **options: str) -> None:
    with Control(cluster.controller_grpc) as control:
        control.add_dataset(name, origin, shard_size=0, replicas=1, storage_options=json.dumps(options))


def test_a_healthy_cluster_has_no_problem(cluster: Cluster, files: Path) -> None:
    seen = doctor(cluster)
    assert (seen.problems(), seen.status, seen.document["healthy"]) == ([], 0, True)
    assert {finding["check"] for finding in seen.findings if finding["outcome"] == "ok"} >= {
        *("endpoint", "controller", "versions", "clocks", "nodes", "disks", "socket", "datasets", "origins")
    }
    by_node = doctor(cluster, "--endpoint", cluster.node_endpoints[1], SHOAL_SOCKET="")
    assert by_node.problems() == []


def test_as_people_and_pipes_see_it(cluster: Cluster, files: Path) -> None:
    """A process of its own that may open few files: no colours in a pipe, a warning alone is status 0."""
    environment = os.environ | cluster.environment()
    few = (300, 300)
    done = subprocess.run(
        [sys.executable, "-m", "shoal.cli", "doctor"],
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "\x1b" not in done.stdout and "Traceback" not in done.stdout
    assert "a process here may have 300 files open" in done.stdout and "remedy: raise it" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 warning")


# The endpoint.


def test_the_grpc_port_as_endpoint(cluster: Cluster) -> None:
    seen = doctor(cluster, "--endpoint", f"http://{cluster.controller_grpc}", SHOAL_SOCKET="")
    seen.one("endpoint-grpc", names=[cluster.controller_grpc], remedy="7441")


def test_nobody_at_the_endpoint_and_a_socket_that_helps(cluster: Cluster, files: Path) -> None:
    """The local node leads to all the rest."""
    seen = doctor(cluster, "--endpoint", "http://127.0.0.1:1")
    seen.one("endpoint-refused", names=["127.0.0.1:1"], remedy="start the controller or cache node there")
    assert {"controller-ok", "nodes-ok", "origins-ok"} <= seen.kinds


def test_an_endpoint_without_an_address(cluster: Cluster) -> None:
    """As ``http://shoal-controller.$NAMESPACE.svc:7441`` becomes where that is not set."""
    seen = doctor(cluster, "--endpoint", "http://shoal-controller..svc:7441", SHOAL_SOCKET="")
    seen.one("endpoint-unresolved", names=["shoal-controller..svc"], remedy="on Kubernetes name the Service")


def test_an_endpoint_that_is_none(cluster: Cluster) -> None:
    seen = doctor(cluster, "--endpoint", "https://shoal", SHOAL_SOCKET="")
    seen.one("endpoint-malformed", names=["'https://shoal'"], remedy="write http://HOST:PORT")


def test_somebody_else_at_the_endpoint(cluster: Cluster) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        seen = doctor(cluster, "--endpoint", f"http://127.0.0.1:{other.server_port}", SHOAL_SOCKET="")
        other.shutdown()
    seen.one("endpoint-stranger", names=[other.server_port, "HTTP 501"], remedy="correct host and port")


def test_an_endpoint_that_never_answers(cluster: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        seen = doctor(cluster, "--endpoint", f"http://{address}", "--timeout", "0.3", SHOAL_SOCKET="")
    seen.one("endpoint-mute", names=[address], remedy="see its log and restart it")


# The local socket.


def test_a_wrong_socket_path(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    doctor(cluster, SHOAL_SOCKET=str(path)).one("socket-missing", names=[path], remedy="--socket")
    path.mkdir()  # as a container runtime makes it
    doctor(cluster, SHOAL_SOCKET=str(path)).one("socket-no-socket", names=[path], remedy="mount its folder")


def test_a_socket_whose_node_has_ended(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    doctor(cluster, SHOAL_SOCKET=str(path)).one("socket-stale", names=[path], remedy="start the node again")


def test_a_socket_of_another_cluster(cluster: Cluster, tmp_path: Path) -> None:
    with MiniCluster(tmp_path / "other", {"o": b"x"}) as other:
        path = str(other.filesystem(local=True).storage_options["socket"])
        seen = doctor(cluster, SHOAL_SOCKET=path)
        seen.one("socket-other-cluster", names=[path, other.nodes[0].id], remedy="SHOAL_SOCKET")


def test_a_socket_without_the_right_to_it(cluster: Cluster, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("to become another user takes root")

    def ask(say: Say) -> tuple[Trouble, str]:
        os.setuid(65534)
        try:
            asking.ask(f"unix:{cluster.sockets[0]}", "/v1/cluster", 5.0)
        except asking.Unanswered as error:
            return error.silence.trouble, error.silence.reason
        raise AssertionError("it answers")

    with Child(ask) as child:
        assert child.heard() == (Trouble.DENIED, "Permission denied")


# Origins: each broken after it was listed, as it happens.


@pytest.fixture(scope="module")
def secret(cluster: Cluster) -> Path:
    return cluster.data_dir / "secret"


@pytest.fixture(scope="module")
def proxied(cluster: Cluster, s3: Weed, secret: Path) -> Iterator[CountingProxy]:
    """The dataset ``objects`` in a bucket, through a proxy, its secret key in the file `secret`."""
    secret.write_text(s3.secret_key)
    if not s3.filesystem().exists(BUCKET):
        s3.create_bucket(BUCKET)
    s3.filesystem().pipe_file(f"{BUCKET}/doctor/a", b"a" * 1000)
    with CountingProxy(s3.endpoint_url) as proxy:
        options = {"key": s3.access_key, "secret": f"file:{secret}", "endpoint_url": proxy.endpoint_url}
        add(cluster, "objects", f"s3://{BUCKET}/doctor", **options)
        yield proxy


def test_a_secret_that_is_not_there(cluster: Cluster, proxied: CountingProxy, secret: Path, s3: Weed) -> None:
    assert "origins-ok" in doctor(cluster).kinds
    secret.unlink()
    named = ["the controller and all nodes", "dataset objects", f"s3://{BUCKET}/doctor", str(secret)]
    doctor(cluster).one("origins-options", names=named, remedy="put the variable or file there")
    secret.write_text(s3.secret_key)


def test_a_secret_that_one_node_lacks(cluster: Cluster, files: Path) -> None:
    """`file://` takes no options; a web server's are asked for before it is."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _One) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        options = {"client_kwargs": {"headers": {"Authorization": f"env:{_SECRET}"}}}
        with Control(cluster.controller_grpc) as control:
            url = f"http://127.0.0.1:{server.server_port}/one"
            control.add_dataset("web", url, shard_size=0, replicas=1, storage_options=json.dumps(options))
        seen = doctor(cluster)
        found = seen.one("origins-options", names=[cluster.node_ids[1], _SECRET, "dataset web"], remedy="restart")
        assert cluster.node_ids[0] not in found["sentence"] and "the controller" not in found["sentence"]
        with Control(cluster.controller_grpc) as control:
            control.remove_dataset("web")
        server.shutdown()


class _One(BaseHTTPRequestHandler):
    """An object of one byte."""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"x")

    def _answer(self, body: bytes) -> None:
        self.send_response(206 if body and "Range" in self.headers else 200)
        for name, value in (("Content-Length", "1"), ("ETag", '"1"'), ("Accept-Ranges", "bytes")):
            self.send_header(name, value)
        if body and "Range" in self.headers:
            self.send_header("Content-Range", "bytes 0-0/1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_credentials_that_are_refused(cluster: Cluster, proxied: CountingProxy, secret: Path, s3: Weed) -> None:
    secret.write_text("another one")
    seen = doctor(cluster)
    found = seen.one(
        "origins-denied", names=["dataset objects", proxied.endpoint_url], remedy="correct the credentials"
    )
    assert "another one" not in json.dumps(seen.document) and "HTTP 403" in found["sentence"]
    secret.write_text(s3.secret_key)


def test_an_object_that_changed_and_one_that_went(cluster: Cluster, proxied: CountingProxy, s3: Weed) -> None:
    s3.filesystem().pipe_file(f"{BUCKET}/doctor/a", b"b" * 1000)
    doctor(cluster).one("origins-changed", names=["dataset objects"], remedy="shoal dataset refresh objects")
    s3.filesystem().rm_file(f"{BUCKET}/doctor/a")
    doctor(cluster).one("origins-gone", names=["dataset objects", "holds no object"], remedy="put the data back")


def test_a_local_origin_that_is_mounted_nowhere(cluster: Cluster, files: Path) -> None:
    elsewhere = files.rename(files.with_name("elsewhere"))
    doctor(cluster).one("origins-gone", names=["dataset files", str(files)], remedy="mount it at the same path")
    elsewhere.rename(files)


def test_an_origin_that_cannot_be_reached(cluster: Cluster, s3: Weed, files: Path) -> None:
    s3.filesystem().pipe_file(f"{BUCKET}/doctor-away/a", b"a" * 1000)
    with CountingProxy(s3.endpoint_url) as proxy:
        add(cluster, "away", f"s3://{BUCKET}/doctor-away", **s3.storage_options | {"endpoint_url": proxy.endpoint_url})
    seen = doctor(cluster)
    names = ["the controller and all nodes", "dataset away", proxy.endpoint_url, "connection refused"]
    seen.one("origins-unreachable", names=names, remedy="firewall")
    for name in ("away", "objects"):
        with Control(cluster.controller_grpc) as control:
            control.remove_dataset(name)


# Datasets.


def test_more_promised_than_there_is(cluster: Cluster, files: Path, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as large:
        large.truncate(1 << 30)
    add(cluster, "large", str(tmp_path))
    with Control(cluster.controller_grpc) as control:
        control.set_dataset("large", pinned=True, quota_bytes=1 << 40, replicas=3)
        with pytest.raises(DoesNotFit):
            control.start_prefetch("large", "")
        seen = doctor(cluster)
        control.remove_dataset("large")
    seen.one("datasets-pinned", names=["large", "2 GiB", "128 MiB"], remedy="--no-pin")
    seen.one("datasets-quotas", names=["large", "1.0 TiB", "128 MiB"], remedy="--quota")
    seen.one("datasets-few-nodes", names=["dataset large", "3 replicas", "2 nodes are up"], remedy="--replicas 2")
    refused = ["the last prefetch of large", "was refused", "prefetch of large needs"]
    seen.one("datasets-prefetch-failed", names=refused, remedy="shoal prefetch large")
    assert seen.problems() == []


def test_a_snapshot_that_the_controller_lost(cluster: Cluster, files: Path) -> None:
    (snapshot,) = (
        path for path in (cluster.data_dir / "controller" / "snapshots").iterdir() if path.suffix == ".arrow"
    )
    bytes_before = snapshot.read_bytes()
    snapshot.unlink()
    doctor(cluster).one("datasets-snapshot-lost", names=["dataset files"], remedy="shoal dataset refresh files")
    snapshot.write_bytes(bytes_before)


# Nodes, and what is not mended afterwards.


def test_a_node_that_drains(cluster: Cluster, files: Path) -> None:
    node_id = cluster.node_ids[1]
    with Control(cluster.controller_grpc) as control:
        control.drain_node(node_id)
        wait_for(lambda: {node.drained for node in control.status().nodes if node.node.id == node_id} == {True})
        seen = doctor(cluster)
        control.undrain_node(node_id)
    seen.one("nodes-drained", names=[node_id], remedy=f"shoal node undrain {node_id}")
    assert seen.status == 0


@pytest.fixture(scope="module")
def altered(cluster: Cluster, files: Path) -> Iterator[ServerProcess]:
    """A third node, on a small drive of its own, whose clock is an hour ahead and whose version is another."""
    with filesystems.memory(cluster.data_dir / "node-2", 8 << 20):
        node = cluster.add_node("4MiB", ("--scrub-rate", "0"))
        yield node
        node.kill()


def test_a_node_of_another_version_and_with_another_clock(cluster: Cluster, altered: ServerProcess) -> None:
    seen = doctor(cluster)
    node = f"node {altered.ready['id']} ({altered.ready['http']})"
    seen.one("versions-major", names=["9.0.0", node, "the controller"], remedy="install shoal 0.1.0")
    seen.one("clocks-far-off", names=[node, "60 min", "ahead of"], remedy="chronyc")
    assert len(seen.problems()) == 2


def test_a_drive_that_other_files_fill(cluster: Cluster, altered: ServerProcess, files: Path) -> None:
    filesystems.fill_up(cluster.data_dir / "node-2")
    for number in range(20):  # some of which are this node's
        (files / f"more-{number}").write_bytes(bytes(50_000))
    with Control(cluster.controller_grpc) as control:
        control.refresh_dataset("files")
    fs = filesystem(cluster.endpoint)
    for path in fs.find("files"):
        fs.cat_file(path)
    named = [f"node {altered.ready['id']}", "is full although this node may use 4 MiB"]
    wait_for(lambda: "disks-failing" in doctor(cluster).kinds)
    doctor(cluster).one("disks-failing", names=named, remedy="free space there")


def test_a_stopped_node_and_a_killed_one(cluster: Cluster, altered: ServerProcess) -> None:
    name = f"node {altered.ready['id']}"
    os.kill(altered.pid, signal.SIGSTOP)
    seen = doctor(cluster, "--timeout", "0.5")
    # Its lease may end meanwhile: then it is down and still does not answer.
    assert {"nodes-mute", "nodes-down"} & seen.kinds
    assert any(name in each["sentence"] and "0.5 s" in each["sentence"] for each in seen.problems()), seen.findings
    altered.kill()
    wait_for(lambda: "nodes-down" in doctor(cluster, "--timeout", "0.5").kinds)
    doctor(cluster).one("nodes-down", names=[name, "connection refused"], remedy="start it again")


def test_a_controller_that_is_away(cluster: Cluster, files: Path) -> None:
    address = cluster.endpoint.removeprefix("http://")
    cluster.controller.kill()
    seen = doctor(cluster, "--endpoint", cluster.node_endpoints[0])
    seen.one("controller-away", names=[address, "connection refused", "reads go on"], remedy="start it again")
    answering = [finding for finding in seen.findings if finding["kind"] == "socket-ok"]
    assert answering, "the rest is looked at all the same"
    both = doctor(cluster)
    both.one("endpoint-refused", names=[address], remedy="start the controller")
    both.one("controller-away", names=[address], remedy="start it again")
