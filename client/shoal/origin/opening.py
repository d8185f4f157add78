"""From a URL and storage options to an open origin, which is asked again where it fails for now.

The rule: references to secrets are resolved here, in the process that reads the origin, and values go no further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import InvalidRequest
from shoal.origin import options, urls
from shoal.origin.base import Deadlines, Origin
from shoal.origin.patient import OnTrouble, PatientOrigin

_PATIENCE = "patience"


def open_origin(
    url: str,
    storage_options: Mapping[str, Any],
    *,
    deadlines: Deadlines | None = None,
    on_trouble: OnTrouble | None = None,
) -> Origin:
    """The origin at `url`; connects to nothing yet.

    Args:
        url: any fsspec URL, or an absolute local path.
        storage_options: fsspec's for that protocol, ``env:`` and ``file:`` references included; and ``reader``, for S3
            ``obstore`` or ``s3fs``, for Google and Azure ``obstore`` or ``fsspec``; ``patience``: `Deadlines.parse`.
        deadlines: how long the origin may keep callers waiting; what ``patience`` says, else the defaults, where None.
        on_trouble: told of each attempt of a read that failed for now.

    Raises:
        InvalidRequest: the URL is malformed, its protocol unknown or not installed (the message names the package), an
            option wrong, or a reference leads nowhere.
    """
    parsed = urls.parse(url)
    resolved = options.resolve_options(storage_options)
    shown = options.redact(storage_options)
    limits = Deadlines.parse(resolved.pop(_PATIENCE, {}))
    shown.pop(_PATIENCE, None)
    limits = deadlines or limits
    opened: Origin
    match parsed.protocol:
        case "file":
            from shoal.origin.local import LocalOrigin

            if resolved:
                raise InvalidRequest(f"{parsed} takes no storage options: leave out {', '.join(resolved)}")
            return LocalOrigin(parsed)  # how patient a mount is, its own options say
        case "s3":
            from shoal.origin import s3

            opened = s3.open_s3(parsed, resolved, limits)
        case "gs" | "abfs":
            from shoal.origin import cloud

            opened = cloud.open_cloud(parsed, resolved, limits, shown=shown)
        case _:
            from shoal.origin.generic import open_generic

            opened = open_generic(parsed, resolved, limits, shown=shown)
    return PatientOrigin(opened, limits, on_trouble)
