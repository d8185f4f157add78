"""Clusters of processes whose controllers work at an API server."""

from __future__ import annotations

from pathlib import Path

from shoal.devcluster import DevCluster, ports
from shoal.devcluster.server import ServerProcess
from tests.support.waiting import wait_for

NAME = "shoal-controller"


class KubeCluster(DevCluster):
    """A cluster whose controller works at an API server, and one more controller that stands by."""

    def __init__(self, kubeconfig: Path, namespace: str, *args: str, nodes: int = 2) -> None:
        self._kube_args = ["--kubernetes", "--namespace", namespace, "--lease-name", NAME, *args]
        self._kube_args += ["--pod-ip", "192.0.2.1"]  # nobody goes there, but an API server takes no loopback address
        self.standby_http = 0
        super().__init__(
            nodes=nodes,
            capacity="64MiB",
            controller_args=[*self._kube_args, "--identity", "a"],
            env={"KUBECONFIG": str(kubeconfig)},
        )

    def standby(self, *, other_port: bool = False) -> ServerProcess:
        """Start the second controller and wait until it stands by.

        Args:
            other_port: where its gRPC address must not be that of the first, which it takes only when it leads.
        """
        self.standby_http, grpc = ports.free_ports(2, frozenset(self._ports))
        listen = ["--grpc-listen", f"127.0.0.1:{grpc}" if other_port else self.controller_grpc, "--identity", "b"]
        listen += ["--http-listen", f"127.0.0.1:{self.standby_http}"]
        data_dir = ["--data-dir", str(self.data_dir / "controller-b")]
        process = self._server("controller-b", "shoal_controller", [*data_dir, *listen, *self._kube_args])
        process.spawn()
        wait_for(lambda: "stands by" in process.log_path.read_text())
        return process
