"""A process's view of the cluster: map, datasets and snapshots, all over HTTP from whoever answers.

The endpoint is only where the first answer comes from. Once the map is known any node can be asked, so neither the
controller nor the endpoint need stay up.

The rule: the view may be late, never wrong. Every answer carries its sender's epoch; a newer one than ours means that
the map is fetched again before the next plan.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import stat
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from shoal import shard_client
from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.connection import Answer
from shoal.datasets import DatasetRecord
from shoal.errors import (
    ClusterUnavailable,
    InvalidRequest,
    NotFound,
    Overloaded,
    ShardCorrupt,
    ShoalError,
    SnapshotNotFound,
    StoreUnusable,
    Unavailable,
)
from shoal.local import LocalNode
from shoal.placement import Placement
from shoal.snapshot import Snapshot
from shoal.transport import Transport

log = logging.getLogger(__name__)

MAX_PLACEMENTS = 64
#: Snapshots kept besides those that file systems have: a process that lives through many refreshes keeps no old ones.
MAX_SNAPSHOTS = 16
#: Between two looks for a node on this machine, where there was none.
LOOK_FOR_LOCAL_S = 5.0
#: A map that nobody gave is not asked for again by those whose reads fail for this long.
RENEW_AGAIN_S = 1.0


def parse_endpoint(text: str) -> str:
    """``host:port`` of ``http://host:port`` or ``host:port``.

    Raises:
        InvalidRequest: it is neither.
    """
    address = text.strip().removeprefix("http://").rstrip("/")
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise InvalidRequest(
            f"{text!r} is no endpoint: write http://HOST:PORT of the controller (port 7441) or of a cache node (7450)"
        )
    return address


def reachable(address: str, answered_at: str) -> str:
    """`address` for whoever asked at `answered_at`: a server that listens everywhere is where it answered."""
    host, _, port = address.rpartition(":")
    if host in ("", "0.0.0.0", "[::]") and port and not answered_at.startswith("unix:"):
        return f"{answered_at.rpartition(':')[0]}:{port}"
    return address


class Cluster:
    """What one process knows of one cluster. Thread-safe; shared by all file systems of the process.

    Args:
        endpoint: see `parse_endpoint`; "" to start from the local node.
        socket_path: of the local node; None for the usual one.
        use_local: False forces the network.
    """

    def __init__(self, endpoint: str, socket_path: str | None = None, *, use_local: bool = True) -> None:
        self.transport = Transport()
        self._socket_path = socket_path
        self._local = LocalNode.find(self.transport, socket_path) if use_local else None
        self._look_for_local_at = time.monotonic() + LOOK_FOR_LOCAL_S if use_local else math.inf
        if not endpoint and self._local is None:
            raise ClusterUnavailable(
                "no cluster to read from: set SHOAL_ENDPOINT to http://HOST:PORT of the controller or a cache node, or "
                "pass storage_options={'endpoint': …}; 'shoal dev' starts a cluster on this machine"
            )
        self._endpoint = parse_endpoint(endpoint) if endpoint else ""
        self._map = ClusterMap()
        self._known_epoch = 0
        self._cluster_id = ""
        self._not_renewed_at = -math.inf  # `time.monotonic` of the last failure, if it was the last attempt
        self._snapshots: weakref.WeakValueDictionary[str, Snapshot] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[str, Snapshot] = OrderedDict()  # of these some that perhaps nobody holds now
        self._placements: OrderedDict[tuple[str, int], Placement] = OrderedDict()
        self._reset_lock()
        self.document: dict[str, Any] = {}
        self.document = self._fetch_document()

    def _reset_lock(self) -> None:
        self._lock = threading.Lock()  # guards _map, _recent, _placements; in a fork's child a new one: see `connect`

    @property
    def local(self) -> LocalNode | None:
        """The node on this machine; None where there is none. One that starts after this process is found, too."""
        if self._local is None and time.monotonic() >= self._look_for_local_at:
            self._look_for_local_at = time.monotonic() + LOOK_FOR_LOCAL_S  # before: others need not look meanwhile
            found = LocalNode.find(self.transport, self._socket_path)
            if found is not None and not self._is_another(found.cluster):
                log.info("the cache node of this machine is there now: node %s", found.node_id)
                self._local = found
        return self._local

    @property
    def map(self) -> ClusterMap:
        """The newest cluster map known here."""
        if self._known_epoch > self._map.epoch:
            self.refresh_map()
        return self._map

    def address_of(self, node: Node) -> str:
        """Where this process asks a node: the local one at its socket."""
        local = self.local
        return node.address if local is None or node.id != local.node_id else local.address

    def avoiding(self, asked: str) -> dict[str, str]:
        """The header that tells the node at `asked` which others do not answer this process; mostly none."""
        health = self.transport.health
        if not health.circuits:
            return {}
        self.transport.prober.keep_on()
        others = ((node.id, self.address_of(node)) for node in self._map.nodes)
        return shard_client.avoiding(node for node, address in others if address != asked and health.is_open(address))

    def note_epoch(self, epoch: int) -> None:
        """Remember that somebody has a map of this epoch."""
        if epoch > self._known_epoch:
            self._known_epoch = epoch

    def refresh_map(self) -> None:
        """Fetch the map anew; keep the old one where nobody answers at once."""
        try:
            self.document = self._fetch_document(is_patient=False)
            self._not_renewed_at = -math.inf
        except (Unavailable, Overloaded) as error:
            # Said once: a reader that is helped without any node would say it for each piece.
            level = logging.WARNING if self._not_renewed_at == -math.inf else logging.DEBUG
            log.log(level, "the cluster map could not be renewed, going on with epoch %d: %s", self._map.epoch, error)
            self._not_renewed_at = time.monotonic()
            self._known_epoch = self._map.epoch

    def newer_map(self, epoch: int) -> bool:
        """Whether there is a map newer than `epoch`: fetches it, unless nobody answered just now."""
        cluster_id = self._cluster_id
        if time.monotonic() - self._not_renewed_at > RENEW_AGAIN_S:
            self.refresh_map()
        return self._map.epoch > epoch or self._cluster_id != cluster_id

    def _fetch_document(self, *, is_patient: bool = True) -> dict[str, Any]:
        newest = self._parsed(self.ask("/v1/cluster", is_patient=is_patient).body)
        if self._is_another(newest):
            # Of the others one may know the former cluster: the one that was configured decides.
            found = self._document_of(self._endpoint or (self.local.address if self.local is not None else ""))
            if found is None:
                self._known_epoch = self._map.epoch  # what was heard of a newer one is of the other cluster too
                return self.document
            self._adopt(found, may_be_another=True)
            return found
        if newest["epoch"] < self._known_epoch:
            # Whoever answered is late itself. The nodes hear of a new map from the controller, so one of them has it.
            for address in self._node_addresses():
                document = self._document_of(address)
                if document is not None and document.get("cluster_id") == newest.get("cluster_id"):
                    newest = max(newest, document, key=lambda d: d["epoch"])
        self._adopt(newest, may_be_another=False)
        return newest

    def _parsed(self, body: bytes) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(body)
            ClusterMap.from_json(json.dumps(document["map"]))
            _ = document["epoch"] < self._known_epoch
            return document
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ClusterUnavailable(
                f"what answers at {self._endpoint or 'the local socket'} is no Shoal process: correct SHOAL_ENDPOINT "
                "(or storage_options 'endpoint')"
            ) from error

    def _document_of(self, address: str) -> dict[str, Any] | None:
        """What a process says of its cluster; None where it does not."""
        try:
            return self._parsed(self.transport.get(address, "/v1/cluster", is_hasty=True).body) if address else None
        except ShoalError:
            return None

    def _is_another(self, document: dict[str, Any]) -> bool:
        """Whether a document is of another cluster than the one known so far: one whose controller lost its record."""
        cluster_id = document.get("cluster_id", "")
        return bool(cluster_id and self._cluster_id and cluster_id != self._cluster_id)

    def _adopt(self, document: dict[str, Any], *, may_be_another: bool) -> None:
        """Take the map of a document, unless another thread took a newer one meanwhile."""
        cluster_map = ClusterMap.from_json(json.dumps(document["map"]))
        with self._lock:
            is_another = self._is_another(document)
            if may_be_another or not is_another:
                if is_another or cluster_map.epoch > self._map.epoch:
                    self._map = cluster_map
                self._cluster_id = document.get("cluster_id", "") or self._cluster_id
            self._known_epoch = self._map.epoch

    def _node_addresses(self) -> list[str]:
        return [n.address for n in self._map.nodes if n.state is not NodeState.DOWN]

    def ask(self, target: str, *, is_patient: bool = True) -> Answer:
        """GET a resource that every process of the cluster can answer: the local node first, then the endpoint.

        An address that is silent is passed over at once; where all are, a patient caller waits for each in turn.

        Raises:
            ClusterUnavailable: nobody answers.
            ShoalError: what the one that answers says.
        """
        addresses = self._anybody()
        failure: Unavailable | Overloaded | None = None
        for is_hasty in (True, False) if is_patient else (True,):
            for address in addresses:
                try:
                    answer = self.transport.get(address, target, is_hasty=is_hasty)
                except (Unavailable, Overloaded) as error:
                    failure = failure or error
                    continue
                except NotFound as error:
                    answer = self._second_opinion(address, target, error)
                self.note_epoch(answer.epoch)
                return answer
        raise ClusterUnavailable(
            f"no Shoal cluster answers at {self._endpoint or 'the local socket'}: {failure}; check SHOAL_ENDPOINT (or "
            "storage_options 'endpoint') and that the cluster runs"
        ) from failure

    def _anybody(self) -> list[str]:
        """Addresses of all processes of the cluster: the local node, the endpoint, the others; who fails comes last."""
        local = [self.local.address] if self.local is not None else []
        addresses = dict.fromkeys([*local, *filter(None, [self._endpoint]), *self._node_addresses()])
        return sorted(addresses, key=self.transport.health.is_open)

    def _second_opinion(self, address: str, target: str, error: NotFound) -> Answer:
        """The controller's answer: a node that says "not found" may not have heard yet. Raises `error` or its own."""
        controller = self.document.get("controller_http", "")
        if controller in ("", address):
            raise error
        try:
            return self.transport.get(controller, target, is_hasty=True)
        except (Unavailable, Overloaded):
            raise error from None

    def datasets(self) -> list[DatasetRecord]:
        """All registered datasets."""
        return [DatasetRecord.from_dict(raw) for raw in json.loads(self.ask("/v1/datasets").body)]

    def dataset(self, name: str) -> DatasetRecord:
        """The record of a dataset as it is now. Raises DatasetNotFound."""
        return DatasetRecord.from_json(self.ask(f"/v1/datasets/{quote(name)}").body)

    def resolve(self, url: str, endpoint: str) -> tuple[DatasetRecord, str]:
        """The dataset over an origin URL, and the path inside it.

        Raises:
            DatasetNotFound: none, and an ad-hoc one is not allowed; the message has the line to type.
        """
        raw = json.loads(self.ask(f"/v1/resolve?{urlencode({'url': url, 'endpoint': endpoint})}").body)
        return DatasetRecord.from_dict(raw["dataset"]), raw["path"]

    def snapshot(self, digest: str) -> Snapshot:
        """The snapshot, mapped: the local node's file, or a copy that all processes of this user share.

        Raises:
            SnapshotNotFound: it is served no more.
        """
        known = self._snapshots.get(digest)
        if known is None:
            opened = self.local.snapshot(digest) if self.local is not None else None
            if opened is None:
                opened = self._download(digest)
            known = self._snapshots.setdefault(digest, opened)
        with self._lock:
            self._recent[digest] = known
            self._recent.move_to_end(digest)
            while len(self._recent) > MAX_SNAPSHOTS:
                self._recent.popitem(last=False)
        return known

    def _download(self, digest: str) -> Snapshot:
        shared = _shared_snapshots()
        path = None if shared is None else shared / f"{digest}.arrow"
        if path is not None:
            try:
                return Snapshot.open(path)
            except FileNotFoundError:
                pass
            except StoreUnusable as error:
                log.warning("fetching a copy of our own: %s", error)
                path = None
            except ShardCorrupt as error:
                log.warning("fetching the snapshot anew: %s", error)
                path.unlink(missing_ok=True)
        # A file without a name: whatever happens to this process before the end, nothing is left of it.
        try:
            fd = os.open(shared or tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            fd = os.memfd_create("shoal-snapshot")  # a file system without such files: a copy of our own
            path = None
        try:
            address = self._receive_snapshot(digest, fd)
            opened = Snapshot.from_fd(fd)
            opened.verify()
            if opened.digest != digest:
                raise ShardCorrupt(f"{address} sent snapshot {opened.digest} where {digest} was asked for")
            if path is not None:
                _link(fd, path)
        finally:
            os.close(fd)
        return opened

    def _receive_snapshot(self, digest: str, fd: int) -> str:
        """Write a snapshot into the empty file `fd`; return the address of whoever sent it."""
        failure: Unavailable | Overloaded | None = None
        target = f"/v1/snapshots/{digest}"
        local = self.local.address if self.local is not None else ""
        for is_hasty in (True, False):
            for address in self._anybody():
                if address == local:
                    continue  # it was asked for its own file, and has none
                try:
                    answer = self.transport.get(address, target, method="HEAD", is_hasty=is_hasty)
                    size_bytes = int(answer.headers["content-length"])
                    os.ftruncate(fd, size_bytes)
                    # Received into the file's own pages: a copy on the heap would be private to this process.
                    with mmap.mmap(fd, size_bytes) as pages, memoryview(pages) as view:
                        self.transport.read_into(address, target, 0, size_bytes, view, is_hasty=is_hasty)
                    return address
                except (Unavailable, Overloaded) as error:
                    failure = error
                except NotFound as error:  # without a sentence: an answer to HEAD has none
                    raise SnapshotNotFound(
                        f"snapshot {digest} is served no more, its dataset was removed or has newer ones: open the "
                        "dataset again, or mount it again"
                    ) from error
        raise ClusterUnavailable(f"nobody gives snapshot {digest}: {failure}") from failure

    def placement(self, snapshot: Snapshot, replicas: int) -> Placement:
        """Who owns the shards of a snapshot under the newest map."""
        cluster_map = self.map
        key = snapshot.digest, replicas
        known = self._placements.get(key)  # without the lock, as for each range of a batch
        if known is not None and known.cluster_map is cluster_map:
            return known
        with self._lock:
            placement = self._placements.get(key)
            if placement is None or placement.cluster_map is not cluster_map:
                placement = Placement(snapshot.shard_table, snapshot.shard_count(), cluster_map, replicas)
                self._placements[key] = placement
                self._placements.move_to_end(key)
                while len(self._placements) > MAX_PLACEMENTS:
                    self._placements.popitem(last=False)
            return placement


def _link(fd: int, path: Path) -> None:
    """Give a file without a name one, for the other processes of this user."""
    try:
        # As open(2) has it under O_TMPFILE; with a directory given Python calls linkat, which follows the link.
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)
    except OSError as error:
        log.debug("%s is not shared: %s", path, error)  # mostly: another process was faster


def _shared_snapshots() -> Path | None:
    """Where this user's processes share snapshots on a machine without a cache node.

    None where others can put something there, since a snapshot from there is taken for what its name says: then each
    process has a copy of its own, in a file without a name.
    """
    try:
        directory = Path(tempfile.gettempdir())
        for name in (f"shoal-{os.getuid()}", "snapshots"):
            directory /= name
            try:
                directory.mkdir(mode=0o700)
            except FileExistsError:
                pass
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                log.warning("snapshots are not shared: others can change %s, so remove it", directory)
                return None
    except OSError as error:
        log.debug("snapshots are not shared: %s", error)
        return None
    return directory


_clusters: dict[tuple[str, str | None, bool], Cluster] = {}
_connecting = threading.Lock()  # guards _clusters


def connect(endpoint: str | None, socket_path: str | None = None, *, use_local: bool = True) -> Cluster:
    """The process's one `Cluster` for an endpoint (default: ``SHOAL_ENDPOINT``).

    Raises:
        InvalidRequest, ClusterUnavailable: see `Cluster`.
    """
    key = endpoint or os.environ.get("SHOAL_ENDPOINT", ""), socket_path, use_local
    with _connecting:
        cluster = _clusters.get(key)
        if cluster is None:
            cluster = _clusters[key] = Cluster(key[0], socket_path, use_local=use_local)
        return cluster


def _after_fork_in_child() -> None:
    # A lock that another thread of the parent held at the fork would never be released here.
    global _connecting
    _connecting = threading.Lock()
    for cluster in _clusters.values():
        cluster._reset_lock()
        if cluster._local is not None:
            cluster._local.maps.reset_lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
