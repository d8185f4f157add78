"""A controller and cache nodes as real processes on 127.0.0.1, over one data directory.

    DIR/dev.json            the ports, so that a cluster started again over DIR is found where it was
    DIR/controller          the controller's state
    DIR/node-0, node-1, …   each node's cache
    DIR/log/NAME.log        what each process wrote to stderr

The rule: every process dies with the one that started it, and only a directory made here is ever removed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import tenacity

from shoal import sizes
from shoal.cluster_map import ClusterMap, NodeState
from shoal.devcluster import ports
from shoal.devcluster.server import STOP_GRACE_S, Death, ServerProcess
from shoal.devcluster.starting import Startable
from shoal.errors import ShoalError, StoreUnusable
from shoal.transport import Transport

HOST = "127.0.0.1"
READY_TIMEOUT_S = 60.0
#: A Unix socket's path has at most 107 bytes (unix(7)).
_MAX_SOCKET_PATH = 107


class DevCluster(Startable):
    """A controller and `len(nodes)` cache nodes. A context manager; not thread-safe, but any one thread may use it.

        with DevCluster(nodes=3, capacity="1GiB") as cluster:
            fs = fsspec.filesystem("shoal", endpoint=cluster.endpoint)
            cluster.nodes[1].kill()
            cluster.nodes[1].start()

    Attributes:
        data_dir: everything the cluster keeps.
        controller, nodes: the processes, each with ``start``, ``stop``, ``kill`` and ``pid``.
        deaths: processes that ended although nobody stopped them here, in the order of their ends.
    """

    def __init__(
        self,
        *,
        nodes: int = 3,
        data_dir: Path | str | None = None,
        capacity: str | Sequence[str] = "20GiB",
        allow_adhoc: Sequence[str] = (),
        controller_args: Sequence[str] = (),
        node_args: Sequence[str] | Mapping[int, Sequence[str]] = (),
        env: Mapping[str, str] | None = None,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        """Describe the cluster; `start` starts it.

        Args:
            nodes: how many cache nodes.
            data_dir: kept afterwards; None: a temporary one, removed by `close`.
            capacity: bytes of cache of each node, as a size; a sequence gives each node its own.
            allow_adhoc: origin prefixes for which the controller makes datasets by itself.
            controller_args, node_args: more flags, after the cluster's own; a mapping gives them by node index.
            env: more environment variables for all processes.
            ready_timeout_s: from the start of a process until it serves.

        Raises:
            InvalidRequest: `capacity` is no size.
        """
        self._capacities = [capacity] if isinstance(capacity, str) else list(capacity)
        for size in self._capacities:
            sizes.parse(size)
        self._node_count = nodes
        self._allow_adhoc = allow_adhoc
        self._controller_args = controller_args
        self._node_args = node_args
        self._env = _environment(env or {})
        self._ready_timeout_s = ready_timeout_s
        self._temporary: list[tempfile.TemporaryDirectory[str]] = []
        self.data_dir = self._temporary_dir() if data_dir is None else Path(data_dir).absolute()
        self._socket_dir = self.data_dir
        self._lock: IO[str] | None = None  # held on dev.json's neighbour: one cluster at a time over a directory
        self._spawner: ThreadPoolExecutor | None = None
        self._ports: list[int] = []  # controller gRPC, controller HTTP, then the nodes
        self._transport = Transport(read_timeout_s=5.0)
        self.deaths: SimpleQueue[Death] = SimpleQueue()
        self.controller: ServerProcess
        self.nodes: list[ServerProcess] = []
        self.sockets: list[Path] = []

    # What a user of the cluster asks.

    @property
    def endpoint(self) -> str:
        """URL for ``SHOAL_ENDPOINT``: the controller's, which outlives any node."""
        return f"http://{self.host_of('controller')}:{self._ports[1]}"

    @property
    def controller_grpc(self) -> str:
        return f"{self.host_of('controller')}:{self._ports[0]}"

    @property
    def node_endpoints(self) -> list[str]:
        """URL of each node; each is a ``SHOAL_ENDPOINT`` too, and works without the controller."""
        return [f"http://{self.host_of(f'node-{index}')}:{port}" for index, port in enumerate(self._ports[2:])]

    @property
    def node_ids(self) -> list[str]:
        """Of each node, as in the cluster map."""
        return [str(node.ready["id"]) for node in self.nodes]

    @property
    def processes(self) -> dict[str, ServerProcess]:
        """All processes by name; empty before the first `start`."""
        return {server.name: server for server in [self.controller, *self.nodes]} if self._spawner else {}

    def environment(self, node: int = 0) -> dict[str, str]:
        """The variables with which a process is a client on the machine of one node."""
        return {"SHOAL_ENDPOINT": self.endpoint, "SHOAL_SOCKET": str(self.sockets[node])}

    # What a subclass may have otherwise.

    def host_of(self, name: str) -> str:
        """The address that a process listens on, by its name."""
        return HOST

    def wrapper_of(self, name: str) -> Sequence[str]:
        """The command that runs a process: one that becomes what it is given, as ``ip netns exec NAME`` does."""
        return ()

    # What it does.

    def start(self) -> None:
        """Start whatever does not run, and wait until every node is in every node's map.

        Raises:
            ShoalError: a process did not start: its own sentence. What was started is stopped again.
            StoreUnusable: the data directory cannot be used, or another cluster uses it.
        """
        self._open()
        try:
            self.controller.start()
            for node in self.nodes:
                node.spawn()
            for node in self.nodes:
                node.wait_until_ready()
            self.wait_until_joined()
            self._save_ports()
        except BaseException:
            self.kill()
            raise

    def add_node(self, capacity: str | None = None, args: Sequence[str] = ()) -> ServerProcess:
        """Start one more node and wait until it is in every node's map; it stays part of the cluster.

        Raises:
            ShoalError: it did not start.
        """
        index = len(self.nodes)
        self._ports += ports.free_ports(1, frozenset(self._ports))
        node = self._node(index, capacity or self._capacity(index), [*self._args_of(index), *args])
        self.nodes.append(node)
        node.start()
        self.wait_until_joined()
        self._save_ports()
        return node

    def wait_until_joined(self) -> None:
        """Wait until the controller and all running nodes hold a map in which no running node is down.

        Raises:
            ShoalError: they do not within `ready_timeout_s`.
        """
        wanted = {str(node.ready["id"]) for node in self.nodes if node.is_running}
        asked = [server for server in [self.controller, *self.nodes] if server.is_running]
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda late: bool(late)),
            wait=tenacity.wait_fixed(0.02),
            stop=tenacity.stop_after_delay(self._ready_timeout_s),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        late = retrying(lambda: [server for server in asked if not self._knows(server, wanted)])
        if late:
            raise ShoalError(f"{late[0].name} does not know all nodes: see {late[0].log_path}")

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stop all processes in good order, nodes first; kill those that still run after `grace_s`."""
        deadline = time.monotonic() + grace_s
        try:
            for is_controller in (False, True):
                group = [s for s in self.processes.values() if (s is self.controller) is is_controller]
                for server in group:
                    server.terminate()
                for server in group:
                    server.join(max(0.0, deadline - time.monotonic()))
        finally:
            self.kill()  # does nothing, unless a second Ctrl-C cut the above short

    def kill(self) -> None:
        """End all processes with SIGKILL and wait until they are gone. `start` brings the same cluster back."""
        for server in self.processes.values():
            server.kill()

    def close(self) -> None:
        """`stop`, then let go of the data directory; a temporary one is removed. Idempotent."""
        try:
            self.stop()
        finally:
            self._transport.close()
            if self._spawner is not None:
                self._spawner.shutdown()
                self._spawner = None
            if self._lock is not None:
                self._lock.close()
                self._lock = None
            for directory in self._temporary:
                directory.cleanup()

    # How.

    def _open(self) -> None:
        if self._spawner is not None:
            return
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._lock = (self.data_dir / "dev.lock").open("w")
        except OSError as error:
            raise StoreUnusable(
                f"the data directory {self.data_dir} cannot be used: {error.strerror}; give another --data-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise StoreUnusable(
                f"another 'shoal dev' uses {self.data_dir}: stop it, or give another --data-dir"
            ) from None
        self._ports = self._choose_ports()
        if len(os.fsencode(self.data_dir / "node-000.sock")) > _MAX_SOCKET_PATH:
            self._socket_dir = self._temporary_dir("/tmp")
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="spawner")
        listen = ["--grpc-listen", self.controller_grpc, "--http-listen", self.endpoint.removeprefix("http://")]
        adhoc = [part for prefix in self._allow_adhoc for part in ("--allow-adhoc", prefix)]
        self.controller = self._server(
            "controller",
            "shoal_controller",
            ["--data-dir", str(self.data_dir / "controller"), *listen, *adhoc, *self._controller_args],
        )
        for index in range(self._node_count):
            self.nodes.append(self._node(index, self._capacity(index), self._args_of(index)))

    def _node(self, index: int, capacity: str, args: Sequence[str]) -> ServerProcess:
        name = f"node-{index}"
        self.sockets.append(self._socket_dir / f"{name}.sock")
        own = ["--data-dir", str(self.data_dir / name), "--controller", self.controller_grpc]
        own += ["--listen", f"{self.host_of(name)}:{self._ports[2 + index]}", "--socket", str(self.sockets[index])]
        # Nodes of one machine stand for machines, so that replicas spread over them.
        own += ["--capacity", capacity, "--topology", f"host={name}"]
        return self._server(name, "shoal_cachenode", [*own, *args])

    def _server(self, name: str, module: str, args: Sequence[str]) -> ServerProcess:
        assert self._spawner is not None
        return ServerProcess(
            name,
            module,
            args,
            log_path=self.data_dir / "log" / f"{name}.log",
            wrapper=self.wrapper_of(name),
            env=self._env,
            spawner=self._spawner,
            on_death=self.deaths.put,
            ready_timeout_s=self._ready_timeout_s,
        )

    def _capacity(self, index: int) -> str:
        return self._capacities[min(index, len(self._capacities) - 1)]

    def _args_of(self, index: int) -> Sequence[str]:
        return self._node_args.get(index, ()) if isinstance(self._node_args, Mapping) else self._node_args

    def _knows(self, server: ServerProcess, wanted: set[str]) -> bool:
        try:
            answer = self._transport.get(str(server.ready["http"]), "/v1/cluster")
        except ShoalError:
            return False
        known = ClusterMap.from_json(json.dumps(json.loads(answer.body)["map"]))
        return wanted <= {node.id for node in known.nodes if node.state is not NodeState.DOWN}

    def _choose_ports(self) -> list[int]:
        """The ports of the last start over this directory where they are still free, else new ones."""
        try:
            before = json.loads((self.data_dir / "dev.json").read_text())["ports"]
        except (OSError, ValueError, KeyError, TypeError):
            before = []
        wanted = 2 + self._node_count
        kept = [port if isinstance(port, int) and ports.is_free(port) else 0 for port in before[:wanted]]
        fresh = iter(ports.free_ports(wanted, frozenset(kept)))
        return [port or next(fresh) for port in kept + [0] * (wanted - len(kept))]

    def _save_ports(self) -> None:
        aside = self.data_dir / "dev.json.new"
        aside.write_text(json.dumps({"ports": self._ports}))
        aside.replace(self.data_dir / "dev.json")

    def _temporary_dir(self, parent: str | None = None) -> Path:
        made = tempfile.TemporaryDirectory(prefix="shoal-dev-", dir=parent, ignore_cleanup_errors=True)
        self._temporary.append(made)
        return Path(made.name)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, in which the servers are found also where they are not installed."""
    env = {**os.environ, **more}
    found = (importlib.util.find_spec(name) for name in ("shoal", "shoal_controller", "shoal_cachenode"))
    roots = [str(Path(spec.origin).parent.parent) for spec in found if spec and spec.origin]
    # An installed package is found anyway, and site-packages must not come before the standard library.
    source_roots = [root for root in roots if Path(root).name not in ("site-packages", "dist-packages")]
    path = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*path, *source_roots]))
    return env
