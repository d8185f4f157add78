"""What the probes found: values, with no word yet about what is good or bad. Pure.

The rule: a thing that did not answer is a fact too (`Silence`), and one that nobody asked is None.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shoal.cluster_map import ClusterMap, Node
from shoal.datasets import DatasetRecord


class Trouble(enum.Enum):
    """Why there is no answer of Shoal's."""

    UNRESOLVED = enum.auto()  #: the name has no address
    REFUSED = enum.auto()  #: nobody listens
    UNREACHABLE = enum.auto()  #: no connection
    MUTE = enum.auto()  #: connected, and no answer
    NO_FILE = enum.auto()  #: no such socket
    NO_SOCKET = enum.auto()  #: something else has its name
    DENIED = enum.auto()  #: the file's rights
    GRPC = enum.auto()  #: a gRPC server answers
    STANDBY = enum.auto()  #: a controller that does not lead
    STRANGER = enum.auto()  #: something else answers


@dataclass(frozen=True, slots=True)
class Silence:
    """No answer. `reason` is a few words."""

    trouble: Trouble
    reason: str


@dataclass(frozen=True, slots=True)
class Clock:
    """Another clock less this machine's, in seconds, and how far off that may be."""

    offset_s: float
    uncertainty_s: float


@dataclass(frozen=True, slots=True)
class Process:
    """What a process says at ``/v1/cluster``.

    Attributes:
        address: where it was asked.
        node_id: "" for the controller.
        controller_http, controller_grpc: ``host:port``; "" where it has not heard of one.
        condition: a node's, as in ``shoal status``; None where it does not say (the controller, an older version).
        clock: None where its answer has no date.
    """

    address: str
    role: str
    version: str
    cluster_id: str
    cluster_map: ClusterMap
    node_id: str
    controller_http: str
    controller_grpc: str
    condition: str | None
    clock: Clock | None

    @property
    def is_controller(self) -> bool:
        return self.role == "controller"


Asked = Process | Silence


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the cluster is looked for.

    Attributes:
        text: as it was given; "" where none was.
        address: ``host:port``; "" where there is none.
        malformed: why `text` is none; "" where it is one.
        asked: None where there is nothing to ask.
    """

    text: str
    address: str
    malformed: str
    asked: Asked | None


@dataclass(frozen=True, slots=True)
class Socket:
    """The local node's socket. `is_given`: somebody named it, in ``SHOAL_SOCKET``."""

    path: str
    is_given: bool
    asked: Asked


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node of the map, as it looks from here.

    Attributes:
        drive_hangs: it says so itself.
        metrics: by name, with labels as they stand (``name{label="value"}``); empty where it gave none.
        is_here: its address is one of this machine's.
    """

    node: Node
    asked: Asked
    drive_hangs: bool
    metrics: Mapping[str, float]
    is_here: bool


@dataclass(frozen=True, slots=True)
class ToldNode:
    """What the controller knows of a node besides the map. Sizes in bytes; `waits_for` and `contest` are sentences."""

    id: str
    version: str
    condition: str
    used_bytes: int
    capacity_bytes: int
    short_bytes: int
    drained: bool
    waits_for: str
    contest: str


@dataclass(frozen=True, slots=True)
class ToldJob:
    """A prefetch job. `target` is ``NAME`` or ``NAME/PREFIX``."""

    id: str
    target: str
    state: str
    reason: str
    finished_at: str


@dataclass(frozen=True, slots=True)
class Told:
    """What the controller says over gRPC."""

    nodes: tuple[ToldNode, ...]
    jobs: tuple[ToldJob, ...]


@dataclass(frozen=True, slots=True)
class Untold:
    """Why it says nothing. `is_installed`: gRPC is."""

    reason: str
    is_installed: bool = True


@dataclass(frozen=True, slots=True)
class OriginFact:
    """What came of a read of a dataset's origin.

    Attributes:
        who: node id, "" for the controller.
        error: name of the class in `shoal.errors`; "" where it was read; None where nobody could say.
        sentence: the error's, or why nobody could say.
    """

    dataset: str
    who: str
    error: str | None
    sentence: str


@dataclass(frozen=True, slots=True)
class SnapshotFact:
    """Whether somebody has the newest snapshot of a dataset; `who` as in `OriginFact`."""

    dataset: str
    who: str
    has_it: bool


@dataclass(frozen=True, slots=True)
class MountFact:
    """A mount of this machine, as ``shoal mount`` lists it."""

    mountpoint: str
    dataset: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, as far as it matters to who reads here.

    Attributes:
        kernel: its release.
        user: name or number of whom this process runs as.
        open_files: this process's limit, and the one up to which it may be raised.
        shared_memory_bytes: size of ``/dev/shm``; None where there is none.
        has_torch: torch is installed.
        has_fuse: ``/dev/fuse`` can be opened.
        may_mount: this process has the right to.
        mounts: None where they could not be listed.
    """

    kernel: str
    user: str
    open_files: tuple[int, int]
    shared_memory_bytes: int | None
    has_torch: bool
    has_fuse: bool
    may_mount: bool
    mounts: tuple[MountFact, ...] | None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything.

    Attributes:
        version: of this client.
        controller_address: where the controller's HTTP was asked; "" where nobody named it.
        controller: None where nobody named it.
        grpc_address: where its gRPC was asked.
        told: None where there was nobody to ask.
        cluster_map: the newest that anybody has; None where nobody answers.
        datasets: None where nobody answers.
        timeout_s: that each answer was waited for.
        unchecked_pairs: of a process and a dataset, of which the one was not asked about the other.
    """

    version: str
    timeout_s: float
    endpoint: Endpoint
    socket: Socket
    machine: Machine
    controller_address: str = ""
    controller: Asked | None = None
    grpc_address: str = ""
    told: Told | Untold | None = None
    cluster_map: ClusterMap | None = None
    nodes: tuple[NodeFacts, ...] = ()
    datasets: tuple[DatasetRecord, ...] | None = None
    origins: tuple[OriginFact, ...] = ()
    snapshots: tuple[SnapshotFact, ...] = ()
    unchecked_pairs: int = 0

    def answering(self) -> Iterator[tuple[str, Process]]:
        """Every process of the cluster that answered, the controller first, by its name for people; some twice.

        The local node counts by itself only where nothing else leads to the cluster: it may be of another one.
        """
        endpoint = self.endpoint.asked
        local = [] if isinstance(endpoint, Process) else [self.socket.asked]
        for process in (self.controller, endpoint, *local, *(seen.asked for seen in self.nodes)):
            if isinstance(process, Process):
                yield self.name_of("" if process.is_controller else process.node_id), process

    def name_of(self, node_id: str) -> str:
        """A node for people: its id, as short as ``shoal node`` takes it, and where it is; "" is the controller."""
        if not node_id:
            return "the controller"
        node = self.cluster_map.node(node_id) if self.cluster_map is not None else None
        return f"node {node_id}" + (f" ({node.address})" if node is not None else "")
