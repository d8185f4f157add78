"""From a URL and storage options to an open origin.

The rule: references to secrets are resolved here, in the process that reads the origin, and values go no further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import InvalidRequest
from shoal.origin import options, urls
from shoal.origin.base import Deadlines, Origin


def open_origin(url: str, storage_options: Mapping[str, Any], *, deadlines: Deadlines | None = None) -> Origin:
    """The origin at `url`; connects to nothing yet.

    Args:
        url: any fsspec URL, or an absolute local path.
        storage_options: fsspec's for that protocol, ``env:`` and ``file:`` references included; and ``reader``, for S3
            ``obstore`` or ``s3fs``, for Google and Azure ``obstore`` or ``fsspec``.
        deadlines: how long the origin may keep callers waiting; the defaults of `Deadlines` where None.

    Raises:
        InvalidRequest: the URL is malformed, its protocol unknown or not installed (the message names the package), an
            option wrong, or a reference leads nowhere.
    """
    parsed = urls.parse(url)
    limits = deadlines or Deadlines()
    resolved = options.resolve_options(storage_options)
    match parsed.protocol:
        case "file":
            from shoal.origin.local import LocalOrigin

            if resolved:
                raise InvalidRequest(f"{parsed} takes no storage options: leave out {', '.join(resolved)}")
            return LocalOrigin(parsed)
        case "s3":
            from shoal.origin import s3

            return s3.open_s3(parsed, resolved, limits)
        case "gs" | "abfs":
            from shoal.origin import cloud

            return cloud.open_cloud(parsed, resolved, limits, shown=options.redact(storage_options))
        case _:
            from shoal.origin.generic import open_generic

            return open_generic(parsed, resolved, limits, shown=options.redact(storage_options))
