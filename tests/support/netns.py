"""Machines that can be cut off: network namespaces on a bridge, and a cluster whose processes live in them.

What a partition does is not what a dead process does: nobody answers, not even with a reset, and whoever waits for an
answer waits until his own clock says otherwise. A link that is down on the bridge's side gives just that.

The rule: what is made here has this process's number in its name, and is removed again; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from shoal.devcluster import DevCluster
from shoal.devcluster.starting import Startable

#: Part of 198.18.0.0/15, which is for tests of networks among themselves (RFC 2544): no machine has an address there.
_PREFIX = "198.18"


def why_not() -> str:
    """Why this process may not make namespaces and links; "" where it may."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    try:
        with Network(["probe"]):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"network namespaces cannot be made here: {reason}"


class Network(Startable):
    """A bridge that this process has an address on, and machines, each a namespace with one link to it.

    A context manager.

    Args:
        machines: their names.
    """

    def __init__(self, machines: Sequence[str]) -> None:
        self._machines = list(machines)
        self._tag = f"s{os.getpid() % 100_000}"
        self._net = f"{_PREFIX}.{random.SystemRandom().randrange(1, 255)}"
        self._bridge = f"{self._tag}br"

    def start(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for number, machine in enumerate(self._machines):
            inside = f"{self._tag}i{number}"
            _ip("netns", "add", self.namespace(machine))
            _ip("link", "add", self._link(machine), "type", "veth", "peer", "name", inside)
            _ip("link", "set", inside, "netns", self.namespace(machine))
            _ip("link", "set", self._link(machine), "master", self._bridge, "up")
            for command in (
                ("addr", "add", f"{self.address(machine)}/24", "dev", inside),
                ("link", "set", inside, "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", self.namespace(machine), *command)

    def close(self) -> None:
        """Remove everything that there is of it."""
        for machine in self._machines:
            for command in (("link", "del", self._link(machine)), ("netns", "del", self.namespace(machine))):
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip(*command)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)

    def namespace(self, machine: str) -> str:
        return f"{self._tag}-{machine}"

    def address(self, machine: str) -> str:
        """Its IPv4 address."""
        return f"{self._net}.{1 + self._machines.index(machine)}"

    def cut_off(self, machine: str) -> None:
        """From now on every packet from and to a machine is lost, and nobody is told."""
        _ip("link", "set", self._link(machine), "down")

    def join_again(self, machine: str) -> None:
        _ip("link", "set", self._link(machine), "up")

    @contextlib.contextmanager
    def without(self, machine: str) -> Iterator[None]:
        """A machine is cut off within the block."""
        self.cut_off(machine)
        try:
            yield
        finally:
            self.join_again(machine)

    def _link(self, machine: str) -> str:
        return f"{self._tag}o{self._machines.index(machine)}"


class SpreadCluster(DevCluster):
    """A cluster each of whose processes has a machine to itself; its clients are this process's machine."""

    def __init__(self, *, nodes: int, **options: Any) -> None:
        self.network = Network(["controller", *(f"node-{index}" for index in range(nodes))])
        super().__init__(nodes=nodes, **options)

    def start(self) -> None:
        self.network.start()
        super().start()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.network.close()

    def host_of(self, name: str) -> str:
        return self.network.address(name)

    def wrapper_of(self, name: str) -> Sequence[str]:
        return ("ip", "netns", "exec", self.network.namespace(name))


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)
