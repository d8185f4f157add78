"""WebDataset tars: a sample is the neighbouring members that share a name up to the first dot of its last part.

``a/0001.jpg`` and ``a/0001.cls`` are one sample of key ``a/0001`` with the columns ``jpg`` and ``cls``, as WebDataset
has it. A run is a stretch of whole samples of about `RUN_BYTES`. Indexing reads each member's head of 512 bytes and
steps over its body.

The rule: members that are no regular files (directories, links) are passed over; long names by GNU or PAX are honoured.
"""

from __future__ import annotations

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow as pa

from shoal.errors import InvalidRequest
from shoal.streaming.formats.source import Extent

#: So that a picture is a run of its own, and is read by whoever wants it and by nobody else.
RUN_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of a tar: its name, where its head (with those of a long name) begins, and its bytes."""

    name: str
    head: int
    start: int
    size_bytes: int

    @property
    def key(self) -> str:
        directory, name = posixpath.split(self.name)
        return posixpath.join(directory, name.partition(".")[0])

    @property
    def column(self) -> str:
        return posixpath.basename(self.name).partition(".")[2].lower()


def members(name: str, file: IO[bytes]) -> Iterator[Member]:
    """The regular files of a tar, one after the other. Raises InvalidRequest where it is none, or is cut short."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            while (info := opened.next()) is not None:
                opened.members.clear()  # type: ignore[attr-defined] # documented; else it holds every one
                if info.isreg():
                    yield Member(info.name, info.offset, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise InvalidRequest(
            f"{name} cannot be read as a tar ({error}): compressed ones must be unpacked first, for their samples "
            "cannot be told apart without reading all of them"
        ) from error


def runs(name: str, file: IO[bytes], run_bytes: int = RUN_BYTES) -> list[Extent]:
    """As `extents`, all of them."""
    return list(extents(name, file, run_bytes))


def extents(name: str, file: IO[bytes], run_bytes: int = RUN_BYTES) -> Iterator[Extent]:
    """Stretches of whole samples, found while they are asked for.

    `run_bytes` is what a stretch has at least, but for the last. Raises as `members`.
    """
    number, start, end, samples = 0, -1, 0, 0
    for _, sample in itertools.groupby(members(name, file), key=lambda member: member.key):
        for member in sample:
            start = member.head if start < 0 else start
            end = member.start + -(-member.size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        samples += 1
        if end - start >= run_bytes:
            yield Extent(number, samples, start, end)
            number, start, samples = number + 1, -1, 0
    if samples:
        yield Extent(number, samples, start, end)


def table(name: str, data: pa.Buffer, run: Extent, columns: list[str] | None) -> pa.Table:
    """The samples of a run as rows: ``__key__`` and a binary column for each suffix, null where a sample lacks it.

    Args:
        data: bytes [run.start, run.end) of the object.

    Raises:
        InvalidRequest: it is no tar.
    """
    rows: list[dict[str, object]] = []
    view = memoryview(data)
    for key, sample in itertools.groupby(members(name, pa.BufferReader(data)), key=lambda member: member.key):
        row: dict[str, object] = {"__key__": key}
        for member in sample:
            row[member.column] = view[member.start : member.start + member.size_bytes]
        rows.append(row)
    if len(rows) != run.samples:
        raise InvalidRequest(
            f"{name} has {len(rows)} samples where its index has {run.samples}: it is not what was indexed"
        )
    names = (
        columns if columns is not None else ["__key__", *sorted({name for row in rows for name in row} - {"__key__"})]
    )
    return pa.table(
        {
            name: pa.array([row.get(name) for row in rows], pa.string() if name == "__key__" else pa.binary())
            for name in names
        }
    )
