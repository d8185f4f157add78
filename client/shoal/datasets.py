"""Dataset records as every process sees them, and the two ways to name what is in one. Pure.

    NAME[@SNAPSHOT]/path      what follows ``shoal://``
    an origin URL             what follows ``shoal::``

The rule: a record carries no credentials, so it may travel and be printed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shoal.errors import InvalidRequest, SnapshotNotFound

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_DIGEST_PREFIX = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """A dataset without its credentials.

    Attributes:
        origin: fsspec URL of the prefix, without a slash at the end.
        endpoint: the service behind the URL where the protocol has several (an S3 endpoint URL); else "".
        shard_size: bytes.
        snapshot: digest of the newest snapshot, 32 hex digits.
        snapshots: digests still served, newest first.
        objects, total_bytes: of the newest snapshot.
        adhoc: made by a read of ``shoal::URL`` rather than by ``shoal dataset add``.
        pinned: its shards are never dropped to make room.
        quota_bytes: the share of the cluster's cache that is kept for it; 0: none.
        direct: clients with credentials of their own may read the origin where no node answers.
    """

    name: str
    origin: str
    endpoint: str
    shard_size: int
    replicas: int
    snapshot: str
    snapshots: tuple[str, ...]
    objects: int
    total_bytes: int
    adhoc: bool = False
    pinned: bool = False
    quota_bytes: int = 0
    direct: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> DatasetRecord:
        """Build a record from parsed JSON.

        Fields that are not known are a newer version's and are ignored; policies that are missing were not known to an
        older one and get their defaults.

        Raises:
            InvalidRequest: `raw` is no record, or a field without a default is missing.
        """
        try:
            known = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
            known["snapshots"] = tuple(known["snapshots"])
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise InvalidRequest(f"not a dataset record: {error!r}") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> DatasetRecord:
        return cls.from_dict(json.loads(text))


def check_name(name: str) -> str:
    """Return `name` if a dataset may have it.

    Raises:
        InvalidRequest: it may not.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is no dataset name: use 1 to 63 lower-case letters, digits, '-', '.' or '_', "
            "beginning and ending with a letter or digit"
        )
    return name


def check_digest(text: str) -> str:
    """Return `text` if it is a whole snapshot digest: 32 hex digits.

    Raises:
        InvalidRequest: it is not.
    """
    if not _DIGEST.fullmatch(text):
        raise InvalidRequest(f"{text!r} is no snapshot digest: 32 hex digits are")
    return text


def choose_snapshot(record: DatasetRecord, wanted: str) -> str:
    """The digest of `record` that `wanted`, some of its first digits or "" for the newest, stands for.

    Raises:
        SnapshotNotFound: none, or several.
    """
    if not wanted:
        return record.snapshot
    matches = [digest for digest in record.snapshots if digest.startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    served = ", ".join(digest[:8] for digest in record.snapshots)
    reason = "is not one of its snapshots" if not matches else "is the beginning of several of its snapshots"
    raise SnapshotNotFound(f"{record.name}@{wanted}: {wanted} {reason} ({served}); open {record.name} without '@'")


@dataclass(frozen=True, slots=True)
class DatasetPath:
    """``NAME[@SNAPSHOT]/path`` taken apart. `snapshot` is a digest, 4 digits or more of one, or "" for the newest."""

    dataset: str
    snapshot: str
    path: str

    @property
    def root(self) -> str:
        """``NAME`` or ``NAME@SNAPSHOT``, as it was written."""
        return f"{self.dataset}@{self.snapshot}" if self.snapshot else self.dataset


def parse_path(text: str) -> DatasetPath:
    """Take ``NAME[@SNAPSHOT][/path]`` apart. The path is taken as it is: no character in it is special.

    Raises:
        InvalidRequest: NAME or SNAPSHOT cannot be one.
    """
    root, _, path = text.partition("/")
    name, at, snapshot = root.partition("@")
    check_name(name)
    if at and not _DIGEST_PREFIX.fullmatch(snapshot):
        raise InvalidRequest(
            f"{snapshot!r} in {root!r} is no snapshot: write 4 to 32 hex digits of its digest after the '@' "
            "('shoal dataset show' lists them)"
        )
    return DatasetPath(name, snapshot, path)


def resolve(records: Iterable[DatasetRecord], url: str, endpoint: str) -> tuple[DatasetRecord, str] | None:
    """The dataset whose origin lies over `url`, and the path inside it; None where none does.

    The longest origin wins; at equal length the first by name. An `endpoint` of "" matches any.
    """
    best: tuple[DatasetRecord, str] | None = None
    for record in sorted(records, key=lambda r: r.name):
        if endpoint and record.endpoint and endpoint.rstrip("/") != record.endpoint.rstrip("/"):
            continue
        if url != record.origin and not url.startswith(record.origin.rstrip("/") + "/"):
            continue
        if best is None or len(record.origin) > len(best[0].origin):
            best = record, url[len(record.origin) :].lstrip("/")
    return best
