"""The index of a selection: asked of the cluster, where one node builds it for all, or built from heads and feet.

All clients ask the nodes in one order, which follows from the selection, so that one of them builds it (`fetch`). A
node builds as a client could (`build`), which blocks and reads many objects at a time.

The rule: what is read is what the formats need to count, never payload.
"""

from __future__ import annotations

import io
import logging
import time
import unicodedata
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import quote_plus, urlencode

import pyarrow as pa
import pyarrow.parquet as pq

from shoal import placement, transport
from shoal.cluster import Cluster
from shoal.errors import ClusterUnavailable, DeadlineExceeded, InvalidRequest, ShoalError
from shoal.parallel import run_parallel
from shoal.reader import ObjectReader
from shoal.snapshot import Snapshot
from shoal.streaming.formats import arrow_ipc, parquet, tar
from shoal.streaming.formats.format import Format
from shoal.streaming.formats.source import Extent, SourceFile
from shoal.streaming.index import Index, check_schema
from shoal.streaming.selection import Selection

log = logging.getLogger(__name__)

Found = tuple[list[Extent], pa.Schema | None]

#: A tar's heads are read with so many bytes after each.
TAR_AHEAD = 256 << 10
#: Nodes that are asked before a client builds an index for itself.
ASKED = 3
#: A client waits so long for nodes that build.
PATIENCE_S = 3600.0
#: Between two questions, whatever the node says.
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 30.0
#: Bytes of a pattern as it stands in a URL: a request's head must hold it.
MAX_PATTERN = 4096


def fetch(cluster: Cluster, snapshot: Snapshot, selection: Selection, replicas: int) -> Index:
    """The index of `selection`, from the node that has it or builds it; where no node gives it, as `build` does.

    Raises: as `build`.
    """
    if selection.format is Format.OBJECTS:
        return Index.of_objects(snapshot, selection.rows(snapshot))
    if is_askable(selection.pattern):
        query = urlencode({"pattern": selection.pattern, "format": str(selection.format)})
        target, until = f"/v1/snapshots/{selection.digest}/index?{query}", time.monotonic() + PATIENCE_S
        nodes = placement.order(bytes.fromhex(selection.key), cluster.map.owners(), 1)
        addresses = sorted(map(cluster.address_of, nodes), key=cluster.transport.health.is_open)
        for address in addresses[:ASKED]:
            try:
                return Index.from_buffer(pa.py_buffer(_ask(cluster, address, target, until)), selection)
            except ShoalError as error:
                if not isinstance(error, DeadlineExceeded) and not transport.is_worth_another_node(error):
                    raise
                log.info("%s does not give an index of samples: %s", address, error)
    return build(cluster, snapshot, selection, replicas)


def _ask(cluster: Cluster, address: str, target: str, until: float) -> bytes:
    while True:
        answer = cluster.transport.get(address, target, is_hasty=True)
        cluster.note_epoch(answer.epoch)
        if answer.status != HTTPStatus.ACCEPTED:
            return answer.body
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"{address} and those before it have built an index for {PATIENCE_S:.0f} s")
        time.sleep(min(_pause_s(answer.headers.get("retry-after", "")), left_s))


def _pause_s(text: str) -> float:
    """Of a Retry-After header that says seconds."""
    return min(max(float(text), MIN_PAUSE_S), MAX_PAUSE_S) if text.isascii() and text.isdigit() else 1.0


def is_askable(pattern: str) -> bool:
    """Whether a node takes the pattern. Names at an origin may hold anything; of odd ones a client builds the index."""
    try:
        encoded = quote_plus(pattern)
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= MAX_PATTERN and not any(unicodedata.category(each) == "Cc" for each in pattern)


def build(cluster: Cluster, snapshot: Snapshot, selection: Selection, replicas: int) -> Index:
    """The index of `selection`.

    Raises:
        InvalidRequest: an object is not of the selection's format, or its columns are not those of the first.
        ShoalError: as reads do.
    """
    rows = selection.rows(snapshot)
    if selection.format is Format.OBJECTS:
        return Index.of_objects(snapshot, rows)
    readers = [ObjectReader(cluster, snapshot, replicas, row, verify=True) for row in rows.tolist()]
    examine = _EXAMINE[selection.format]

    def examined(reader: ObjectReader) -> Found:
        if cluster.transport.is_closed:  # by a node that stops, which a long build must not keep
            raise ClusterUnavailable("an index of samples is not built to its end: this process stops")
        return examine(snapshot.path(reader.row), reader)

    found = run_parallel(examined, readers)
    first = snapshot.path(readers[0].row)
    schema = found[0][1]
    for reader, (_, other) in zip(readers, found, strict=True):
        if schema is not None and other is not None:
            check_schema(first, schema, snapshot.path(reader.row), other)
    serialised = schema.serialize().to_pybytes() if schema is not None else b""
    return Index.of_runs(rows.tolist(), [extents for extents, _ in found], serialised)


def _arrow(name: str, reader: ObjectReader) -> Found:
    extents = arrow_ipc.runs(name, reader)
    file = pa.PythonFile(SourceFile(reader), mode="r")
    try:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        return extents, (pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)).schema
    except pa.ArrowException as error:
        raise InvalidRequest(f"{name} is no Arrow IPC file or stream ({error})") from error


def _parquet(name: str, reader: ObjectReader) -> Found:
    file = pa.PythonFile(SourceFile(reader), mode="r")
    extents = parquet.runs(name, file)
    file.seek(0)
    return extents, pq.read_schema(file)


def _tar(name: str, reader: ObjectReader) -> Found:
    return tar.runs(name, io.BufferedReader(SourceFile(reader), TAR_AHEAD)), None


_EXAMINE: dict[Format, Callable[[str, ObjectReader], Found]] = {
    Format.ARROW: _arrow,
    Format.PARQUET: _parquet,
    Format.TAR: _tar,
}
