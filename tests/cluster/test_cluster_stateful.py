"""Any order of joins, losses, restarts, late orders, origin failures and reads: right bytes, or an error that is due.

The controller's core decides who is in the map, on a clock that the test moves; nodes and clients are real, on sockets
and files, and each node gets its orders when the test says so, so that maps differ for as long as it likes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal import cluster as cluster_module
from shoal import shards
from shoal.cluster_map import ClusterMap, NodeState
from shoal.errors import OriginChanged, OriginUnavailable, ShoalError, Unavailable
from shoal.filesystem import ShoalFileSystem
from tests.support.controller import POLICY, Cluster
from tests.support.minicluster import MiniCluster

NODES, PART, SHARD = 4, 64, 256
SIZES = (0, 1, 63, 64, 65, 200, 256, 257, 600, 1100)
OBJECTS = {f"{n}": bytes((i * (n + 3)) % 251 for i in range(size)) for n, size in enumerate(SIZES)}
TOTAL = sum(SIZES)

INDEXES = st.integers(0, NODES - 1)
PATHS = st.sampled_from(sorted(OBJECTS))
PLACES = st.integers(0, max(SIZES))


class ClusterMachine(RuleBasedStateMachine):
    """Nodes, a controller and clients, beside what an outsider knows of them."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="shoal-stateful-"))
        self.mini: MiniCluster | None = None
        self.story: list[str] = []  # a failure that threads had a part in may not come again: this is what led to it
        self.epochs: dict[int, int] = {}

    def tell(self, what: str) -> None:
        self.story.append(what)
        note(what)

    @initialize(replicas=st.integers(1, 3), capacity=st.sampled_from([0.2, 0.6, 10.0]), clients=st.integers(1, 2))
    def begin(self, replicas: int, capacity: float, clients: int) -> None:
        cluster_module._clusters.clear()  # an earlier example's nodes had other addresses, or the same
        self.mini = mini = MiniCluster(
            self.directory / "mini",
            OBJECTS,
            nodes=NODES,
            part_size=PART,
            shard_size=SHARD,
            replicas=replicas,
            capacity_bytes=int(capacity * TOTAL),
        )
        self.running = set(range(NODES))
        self.members = set(range(NODES))  # those that report when time passes
        self.controller = Cluster()
        self.replaced: set[str] = set()
        for index in range(NODES):
            self.controller.register(mini.nodes[index].describe())
        self.deliver_everywhere()
        self.clients = [mini.filesystem(node=index, local=index == 1) for index in range(clients)]
        for client in self.clients:
            client.ls("set")

    def teardown(self) -> None:
        try:
            if self.mini is not None:
                self.mini.close()  # which checks that nothing is left in flight
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def cluster(self) -> MiniCluster:
        assert self.mini is not None
        return self.mini

    # The map and who hears of it

    @rule(index=INDEXES)
    def deliver(self, index: int) -> None:
        """One node hears of the newest map."""
        self.tell(f"deliver {index}")
        if index in self.running:
            self.cluster.deliver(index, self.controller.state.map)

    @rule()
    def deliver_everywhere(self) -> None:
        for index in self.running:
            self.deliver(index)

    @rule(seconds=st.sampled_from([1.0, POLICY.lease_s + 1.0]))
    def let_time_pass(self, seconds: float) -> None:
        """Nodes that run report meanwhile; the leases of the others may end."""
        self.tell(f"let {seconds} s pass")
        reporting = [self.cluster.nodes[index].id for index in self.running & self.members]
        known = [node_id for node_id in reporting if node_id in self.controller.state.members]
        self.controller.run(seconds, reporting=known)

    @rule(index=INDEXES)
    def leave(self, index: int) -> None:
        """A node says goodbye, but serves on for whoever has not heard yet."""
        self.tell(f"leave {index}")
        if index in self.running and self.cluster.nodes[index].id in self.controller.state.members:
            self.members.discard(index)
            self.controller.report(self.cluster.nodes[index].describe(), is_leaving=True)

    @rule(index=INDEXES)
    def join(self, index: int) -> None:
        self.tell(f"join {index}")
        if index in self.running:
            self.members.add(index)
            self.controller.register(self.cluster.nodes[index].describe())

    # What happens to nodes and the origin

    @precondition(lambda self: len(self.running) > 1)
    @rule(index=INDEXES)
    def end(self, index: int) -> None:
        """A node ends within whatever it does; the map still names it."""
        self.tell(f"end {index}")
        if index in self.running:
            self.cluster.end_node(index)
            self.running.discard(index)

    @rule(index=INDEXES, lost_its_disk=st.sampled_from([False, False, True]))
    def start(self, index: int, lost_its_disk: bool) -> None:
        """A node comes back at its old address with its old orders, perhaps without its shards."""
        self.tell(f"start {index}, lost its disk: {lost_its_disk}")
        if index not in self.running:
            if lost_its_disk:
                shutil.rmtree(self.cluster.data_dir(index) / "shards")
                shutil.rmtree(self.cluster.data_dir(index) / "filling")
            self.cluster.start_node(index)
            self.running.add(index)
            self.join(index)

    @rule(after=st.sampled_from([0, 0, 1, 3]))
    def lose_the_origin(self, after: int) -> None:
        """At once, or within a fill: after so many more parts."""
        self.tell(f"lose the origin after {after}")
        self.cluster.origin.reads_left = after

    @rule()
    def find_the_origin_again(self) -> None:
        self.tell("find the origin again")
        self.cluster.origin.reads_left, self.cluster.origin.is_down = None, False

    @rule(path=PATHS)
    def replace_an_object(self, path: str) -> None:
        """The snapshot lists a version that the origin has no more."""
        self.tell(f"replace {path}")
        self.cluster.origin.objects[path] = bytes(len(OBJECTS[path]))
        self.cluster.origin.versions[path] = "2"
        self.replaced.add(path)

    @rule()
    def settle(self) -> None:
        for index in self.running:
            self.cluster.run(self.cluster.nodes[index].fills.settle())

    # Reads

    @rule(
        client=st.integers(0, 1),
        path=PATHS,
        start=PLACES,
        length=PLACES,
        way=st.sampled_from(["cat", "open", "buffer"]),
    )
    def read(self, client: int, path: str, start: int, length: int, way: str) -> None:
        self.tell(f"read by {client}: {path} {start} {length} {way}")
        self.settle()
        fs = self.clients[client % len(self.clients)]
        end = min(start + length, len(OBJECTS[path]))
        holders, askable = self.holders(path), self.askable(fs)
        try:
            found = read(fs, f"set/{path}", start, end, way)
        except ShoalError as error:
            self.must_be_due(error, path, holders, askable)
        else:
            assert found == OBJECTS[path][start:end]

    @rule(client=st.integers(0, 1), wanted=st.lists(st.tuples(PATHS, PLACES, PLACES), min_size=1, max_size=12))
    def read_ranges(self, client: int, wanted: list[tuple[str, int, int]]) -> None:
        self.tell(f"read by {client}: {wanted}")
        self.settle()
        fs = self.clients[client % len(self.clients)]
        before = [(self.holders(path), self.askable(fs)) for path, _, _ in wanted]
        found = fs.cat_ranges(
            [f"set/{path}" for path, _, _ in wanted],
            [start for _, start, _ in wanted],
            [start + length for _, start, length in wanted],
        )
        for (path, start, length), result, (holders, askable) in zip(wanted, found, before, strict=True):
            if isinstance(result, Exception):
                self.must_be_due(result, path, holders, askable)
            else:
                assert result == OBJECTS[path][start : start + length]

    @rule(path=PATHS)
    def many_read_at_once(self, path: str) -> None:
        """Where all know one map and have room, the origin is asked for each part once."""
        self.tell(f"many read {path}")
        self.settle()
        self.find_the_origin_again()
        self.deliver_everywhere()
        mini = self.cluster
        owners = {node.id for node in self.controller.state.map.owners()}
        whole = {mini.nodes[index].id for index in self.running} == owners
        has_room = all(mini.nodes[index].store.free_bytes >= len(OBJECTS[path]) for index in self.running)
        clients = [mini.filesystem(node=index) for index in sorted(self.running)]
        holders, askable = self.holders(path), self.askable(clients[0])
        mini.origin.reads.clear()
        with ThreadPoolExecutor(len(clients)) as threads:
            outcomes = list(threads.map(lambda fs: outcome(fs, f"set/{path}"), clients))
        for found in outcomes:
            if isinstance(found, Exception):
                self.must_be_due(found, path, holders, askable)
            else:
                assert found == OBJECTS[path]
        self.settle()
        counts = Counter(mini.origin.reads)
        note(f"{path}: {counts}, whole: {whole}, room: {has_room}")
        if whole and has_room:
            assert len({start // PART for _, start, _ in counts}) == counts.total(), "\n".join(
                [f"a part was read twice: {counts}", *self.story]
            )

    def holders(self, path: str) -> set[int]:
        """The nodes that run and hold every shard of an object."""
        keys = self.keys(path)
        return {i for i in self.running if all(self.cluster.nodes[i].store.is_sealed(key) for key in keys)}

    def keys(self, path: str) -> list[bytes]:
        snapshot = self.cluster.snapshot
        row = snapshot.find(path)
        assert row is not None
        count = shards.shard_count(snapshot.size(row), SHARD)
        return [shards.shard_key(snapshot.key(row), index) for index in range(count)]

    def askable(self, fs: ShoalFileSystem) -> set[int]:
        """The nodes that run and own shards in the newest map that a client can come to know."""
        known = fs.cluster._map
        maps = [known]
        for index in self.running:
            state = known.node(self.cluster.nodes[index].id)
            if state is not None and state.state is not NodeState.DOWN:
                maps.append(self.cluster.nodes[index].library.knowledge.cluster_map)
        newest: ClusterMap = max(maps, key=lambda each: each.epoch)
        owners = {node.id for node in newest.owners()}
        return {index for index in self.running if self.cluster.nodes[index].id in owners}

    def must_be_due(self, error: Exception, path: str, holders: set[int], askable: set[int]) -> None:
        """An error is due where nobody can be asked, or nobody holds the bytes and the origin does not give them."""
        due: tuple[type[Exception], ...] = (OriginUnavailable,)
        if not askable:
            due = (Unavailable, OriginUnavailable, OriginChanged)
        elif path in self.replaced:
            due = (OriginChanged, OriginUnavailable)
        is_due = isinstance(error, due)
        is_held = bool(holders & askable)
        can_be_read = bool(askable) and path not in self.replaced and not self.cluster.origin.is_down
        assert is_due and not is_held and not can_be_read, "\n".join(
            [f"{error!r} of {path}", f"held by {holders}, askable are {askable}", *self.story]
        )

    # What holds whatever happens

    @invariant()
    def nobody_keeps_more_than_fits(self) -> None:
        if self.mini is None:
            return
        for index in self.running:
            store = self.cluster.nodes[index].store
            assert store.used_bytes <= store.capacity_bytes
            assert store.used_bytes == sum(store.sealed_sizes().values()) + sum(store.reserved_sizes().values())

    @invariant()
    def a_client_never_goes_back(self) -> None:
        if self.mini is None:
            return
        for number, client in enumerate(self.clients):
            epoch = client.cluster._map.epoch
            assert epoch >= self.epochs.get(number, 0)
            self.epochs[number] = epoch


def read(fs: ShoalFileSystem, path: str, start: int, end: int, way: str) -> bytes:
    if way == "cat":
        return bytes(fs.cat_file(path, start, max(start, end)))
    if way == "buffer":
        return memoryview(fs.open_buffer(path)).tobytes()[start:end]
    with fs.open(path) as file:
        file.seek(start)
        return bytes(file.read(max(0, end - start)))


def outcome(fs: ShoalFileSystem, path: str) -> Any:
    try:
        return fs.cat_file(path)
    except ShoalError as error:
        return error


TestCluster = ClusterMachine.TestCase
TestCluster.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
