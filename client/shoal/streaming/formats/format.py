"""Which format an object has, told from its name."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from shoal.errors import InvalidRequest


class Format(enum.StrEnum):
    """How an object holds samples."""

    ARROW = "arrow"  #: Arrow IPC file or stream: a sample is a row
    PARQUET = "parquet"  #: a sample is a row
    TAR = "tar"  #: WebDataset: a sample is the neighbouring members of one key
    OBJECTS = "objects"  #: an object is a sample, as in a folder of images


_BY_SUFFIX = {
    ".arrow": Format.ARROW,
    ".arrows": Format.ARROW,
    ".feather": Format.ARROW,
    ".ipc": Format.ARROW,
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
    ".tar": Format.TAR,
}


def parse(name: str) -> Format:
    """The format that a user names. Raises InvalidRequest."""
    try:
        return Format(name)
    except ValueError:
        raise InvalidRequest(f"{name!r} is no format: use one of {', '.join(Format)}") from None


def of_paths(paths: Iterable[str]) -> Format:
    """The one format that all of `paths` have by their suffixes.

    Raises:
        InvalidRequest: they have several.
    """
    found: dict[Format, str] = {}
    for path in paths:
        _, dot, suffix = path.rpartition("/")[2].lower().rpartition(".")
        found.setdefault(_BY_SUFFIX.get(dot + suffix, Format.OBJECTS), path)
        if len(found) > 1:
            first, second = found.items()
            raise InvalidRequest(
                f"{first[1]} and {second[1]} are of different formats ({first[0]}, {second[0]}): write a pattern that "
                "matches one of them, or say format="
            )
    return next(iter(found), Format.OBJECTS)
