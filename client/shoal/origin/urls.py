"""Origin URLs as people write them, brought to one spelling. Pure.

The rule: one origin has one canonical URL, because dataset records are found by it: an alias of a protocol becomes the
protocol, no slash is at the end, and no credentials are inside.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass

from shoal.errors import InvalidRequest
from shoal.origin import options

_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_CHAINED = re.compile(r"^[A-Za-z0-9+.-]+::|::[A-Za-z][A-Za-z0-9+.-]*://")
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs", "local": "file"}
#: Protocols whose URL is percent-encoded and may have a query; in all others each character stands for itself.
WEB = frozenset({"http", "https"})
_WITH_BUCKET = WEB | {"s3", "gs", "abfs"}


@dataclass(frozen=True, slots=True)
class OriginUrl:
    """A URL taken apart.

    Attributes:
        protocol: fsspec's name, lower-case.
        authority: what stands before the first slash: a bucket, a container, a host; "" for ``file``.
        path: what follows, without slashes at either end; for ``file`` the absolute path.
    """

    protocol: str
    authority: str
    path: str

    def __str__(self) -> str:
        if self.protocol == "file":
            return f"file://{self.path}"
        return f"{self.protocol}://{self.authority}/{self.path}" if self.path else f"{self.protocol}://{self.authority}"


def parse(text: str) -> OriginUrl:
    """Take an origin URL, or an absolute local path, apart.

    Raises:
        InvalidRequest: it is neither, or holds a password.
    """
    if text.startswith("/"):
        return _local(text, text)
    match = _PROTOCOL.fullmatch(text)
    if match is None or _CHAINED.search(text):
        raise InvalidRequest(
            f"{options.redact_url(text)!r} is no origin: write one URL such as s3://bucket/prefix, or an absolute path "
            "such as /data/set"
        )
    protocol = _ALIASES.get(match[1].lower(), match[1].lower())
    if protocol == "file":
        return _local(text, match[2])
    if protocol == "shoal":
        raise InvalidRequest(f"{text!r} is Shoal's own: an origin is where the data really lives")
    is_query = protocol in WEB and "?" in match[2]
    # A query belongs to one object. Elsewhere "?" is a character like any other.
    checked = text if is_query else text.partition("?")[0]
    if options.redact_url(checked) != checked:
        raise InvalidRequest(
            f"{options.redact_url(text)!r} holds credentials: leave them out of the URL and give them as storage "
            "options"
        )
    rest = match[2] if is_query else match[2].rstrip("/")
    authority, _, path = (rest.lstrip("/") if protocol == "memory" else rest).partition("/")
    if not authority and protocol in _WITH_BUCKET:
        raise InvalidRequest(f"{text!r} names no bucket or host: write {protocol}://NAME/prefix")
    return OriginUrl(protocol, authority, path)


def _local(text: str, path: str) -> OriginUrl:
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(
            f"{text!r} is no absolute path: write file:///data/set, mounted at that path on the controller and on "
            "every cache node"
        )
    # normpath keeps two leading slashes, which POSIX allows to be special.
    return OriginUrl("file", "", os.path.normpath("/" + path.lstrip("/")))


def join(url: str, path: str) -> str:
    """The URL of the object at `path` below `url`, for messages."""
    return f"{url.rstrip('/')}/{path}" if path else url
