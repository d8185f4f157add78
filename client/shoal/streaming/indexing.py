"""The index of a selection: asked of the cluster, where one node builds it for all, or built from heads and feet.

All clients ask the nodes in one order, which follows from the selection, so that one of them builds it (`fetch`). A
node builds as a client could (`build`), which blocks and reads many objects at a time, in bounded memory.

The rule: what is read is what the formats need to count, never payload; and the index does not depend on who builds it,
nor on how much of it is found at a time.
"""

from __future__ import annotations

import logging
import time
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote_plus, urlencode

import pyarrow as pa

from shoal import placement, transport
from shoal.cluster import Cluster
from shoal.errors import ClusterUnavailable, DeadlineExceeded, ShoalError
from shoal.parallel import run_parallel
from shoal.reader import ObjectReader
from shoal.snapshot import Snapshot
from shoal.streaming import skim
from shoal.streaming.formats import arrow_ipc, parquet, tar
from shoal.streaming.formats.format import Format
from shoal.streaming.formats.source import Extent, SourceFile
from shoal.streaming.index import Index, check_schema
from shoal.streaming.selection import Selection
from shoal.streaming.skim import Room, Skim

log = logging.getLogger(__name__)

#: A tar whose members are small is read so many bytes at a time.
TAR_AHEAD = 256 << 10
#: A Parquet footer that Arrow has decoded takes five times its bytes (measured: 2,000 columns, 60 row groups).
PARQUET_WEIGHT = 6
#: What is held of objects at a time, decoded footers included.
HELD_BYTES = 256 << 20
#: Objects whose runs are found before they are joined.
TOGETHER = 512
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


def build(
    cluster: Cluster,
    snapshot: Snapshot,
    selection: Selection,
    replicas: int,
    *,
    room: Room | None = None,
    together: int = TOGETHER,
) -> Index:
    """The index of `selection`. What it holds beside the index itself is bounded.

    Args:
        room: of what is held of objects; several builds may share it. None: `HELD_BYTES` for this one.
        together: objects of which the runs are found before they are joined.

    Raises:
        InvalidRequest: an object is not of the selection's format, its columns are not those of the first, or its
            footer is too long.
        ShoalError: as reads do.
    """
    rows = selection.rows(snapshot)
    if selection.format is Format.OBJECTS:
        return Index.of_objects(snapshot, rows)
    reads = _READS[selection.format]
    room = Room(HELD_BYTES) if room is None else room

    def check() -> None:
        if cluster.transport.is_closed:  # by a node that stops, which a long build must not keep
            raise ClusterUnavailable("an index of samples is not built to its end: this process stops")

    first, schema = snapshot.path(int(rows[0])), None  # that one's, as soon as it is known

    def examined(row: int) -> tuple[Index, pa.Schema | None]:
        """The part of one object, and its schema if that is still to be compared with the first one's."""
        nonlocal schema
        check()
        name = snapshot.path(row)
        through, aside = (
            ObjectReader(cluster, snapshot, replicas, row, verify=True, is_kept=is_kept) for is_kept in (True, False)
        )
        with Skim(name, through, aside, room, ahead_bytes=reads.ahead_bytes, weight=reads.weight, check=check) as it:
            found, extents = reads.examine(name, it)
            part = Index.of_runs([row], [extents])
        if name == first:
            schema, found = found, None
        elif schema is not None and found is not None:
            check_schema(first, schema, name, found)
            found = None
        return part, found

    parts = []
    for start in range(0, len(rows), together):
        group = rows[start : start + together].tolist()
        several = run_parallel(examined, group)
        for row, (_, other) in zip(group, several, strict=True):
            if schema is not None and other is not None:
                check_schema(first, schema, snapshot.path(row), other)
        parts.append(Index.joined([part for part, _ in several]))
    return Index.joined(parts, schema.serialize().to_pybytes() if schema is not None else b"")


@dataclass(frozen=True, slots=True)
class _Reads:
    """How objects of a format are read for an index.

    Attributes:
        examine: finds an object's schema, if the format has such a thing, and its runs.
        ahead_bytes, weight: see `skim.Skim`.
    """

    examine: Callable[[str, Skim], tuple[pa.Schema | None, Iterable[Extent]]]
    ahead_bytes: int = skim.HEAD_BYTES
    weight: int = 1


def _arrow(name: str, it: Skim) -> tuple[pa.Schema, Iterable[Extent]]:
    return arrow_ipc.examine(name, it, it.read_several)


def _parquet(name: str, it: Skim) -> tuple[pa.Schema, Iterable[Extent]]:
    return parquet.examine(name, pa.PythonFile(SourceFile(it), mode="r"))


def _tar(name: str, it: Skim) -> tuple[None, Iterable[Extent]]:
    return None, tar.extents(name, SourceFile(it))  # type: ignore[arg-type] # an IO[bytes] as far as tarfile reads


_READS: dict[Format, _Reads] = {
    Format.ARROW: _Reads(_arrow),
    Format.PARQUET: _Reads(_parquet, weight=PARQUET_WEIGHT),
    Format.TAR: _Reads(_tar, ahead_bytes=TAR_AHEAD),
}
