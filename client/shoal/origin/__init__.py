"""Origins: where datasets really live, behind one seam.

    open_origin(url, storage_options)   any fsspec URL as an `Origin`: `list` it for a snapshot, `stream` or `read` it
    parse_options, resolve_options, redact   what people pass as storage options

Importing this package imports no origin's library; opening an origin imports the one it needs.
"""

from shoal.origin.base import Deadlines, ObjectInfo, Origin, Sink, key_path
from shoal.origin.opening import open_origin
from shoal.origin.options import parse_options, redact, redact_url, resolve_options
from shoal.origin.urls import OriginUrl
from shoal.origin.urls import parse as parse_url

__all__ = [
    "Deadlines",
    "ObjectInfo",
    "Origin",
    "OriginUrl",
    "Sink",
    "key_path",
    "open_origin",
    "parse_options",
    "parse_url",
    "redact",
    "redact_url",
    "resolve_options",
]
