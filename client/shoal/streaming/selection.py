"""Selections: the objects of a snapshot that a stream reads, as a pattern over their paths and a format. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash
from fsspec.utils import glob_translate

from shoal.errors import InvalidRequest, NotFound
from shoal.snapshot import Snapshot
from shoal.streaming.formats import format as formats
from shoal.streaming.formats.format import Format

_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Selection:
    """Objects of a snapshot.

    Attributes:
        digest: of the snapshot.
        pattern: a glob over paths in the dataset as fsspec has it (``*`` stays within a name, ``**`` does not).
    """

    digest: str
    pattern: str
    format: Format

    @classmethod
    def of_path(cls, snapshot: Snapshot, path: str, format: str | None = None) -> Selection:
        """What a user means by `path`: a pattern, one object, or a directory, which stands for all that lies under it.

        Args:
            format: None: what the names say.

        Raises:
            NotFound: nothing matches.
            InvalidRequest: the objects are of different formats, or there is no such format.
        """
        pattern = path.strip("/")
        if not _MAGIC.search(pattern) and snapshot.find(pattern) is None:
            pattern = f"{pattern}/**" if pattern else "**"
        rows = rows_of(snapshot, pattern)
        kind = formats.parse(format) if format is not None else formats.of_paths(map(snapshot.path, rows.tolist()))
        return cls(snapshot.digest, pattern, kind)

    @property
    def key(self) -> str:
        """32 hex digits that name it."""
        return xxhash.xxh3_128_hexdigest(json.dumps([self.digest, self.pattern, self.format]).encode())

    def rows(self, snapshot: Snapshot) -> npt.NDArray[np.int64]:
        """The rows, ascending; at least one. Raises NotFound."""
        return rows_of(snapshot, self.pattern)


def rows_of(snapshot: Snapshot, pattern: str) -> npt.NDArray[np.int64]:
    """The rows whose paths match `pattern`, ascending.

    Raises:
        NotFound: none does.
        InvalidRequest: `pattern` is none.
    """
    if not _MAGIC.search(pattern):
        row = snapshot.find(pattern)
        rows = np.array([] if row is None else [row], np.int64)
    else:
        prefix = pattern[: _MAGIC.search(pattern).start()]  # type: ignore[union-attr] # it was found above
        try:
            rows = snapshot.glob_rows(glob_translate(pattern), snapshot.rows_under(prefix))
        except ValueError as error:
            raise InvalidRequest(f"{pattern!r} is no pattern: {error}") from error
    if not len(rows):
        raise NotFound(
            f"nothing in snapshot {snapshot.digest[:8]} matches {pattern!r}: 'shoal ls' lists what is there, and after "
            "a change at the origin 'shoal dataset refresh' finds it"
        )
    return rows
