"""Errors over HTTP: which status a class has, and how the class and its sentence come back on the other side.

The rule: the class name travels in ``Shoal-Error`` and the sentence in the body, so a client raises what the server
raised. A class this version does not know falls back to the one that its status stands for.
"""

from __future__ import annotations

from http import HTTPStatus

from shoal import errors
from shoal.errors import ShoalError

#: From the most to the least derived: the first match by isinstance gives the status.
_STATUS: tuple[tuple[type[ShoalError], HTTPStatus], ...] = (
    (errors.InvalidRequest, HTTPStatus.BAD_REQUEST),
    (errors.NotFound, HTTPStatus.NOT_FOUND),
    (errors.OriginNotFound, HTTPStatus.NOT_FOUND),
    (errors.OriginChanged, HTTPStatus.CONFLICT),
    (errors.OriginError, HTTPStatus.BAD_GATEWAY),
    (errors.NotCached, HTTPStatus.GATEWAY_TIMEOUT),
    (errors.DeadlineExceeded, HTTPStatus.GATEWAY_TIMEOUT),
    (errors.Overloaded, HTTPStatus.SERVICE_UNAVAILABLE),
    (errors.Unavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (ShoalError, HTTPStatus.INTERNAL_SERVER_ERROR),
)

_FALLBACK: dict[int, type[ShoalError]] = {
    400: errors.InvalidRequest,
    404: errors.NotFound,
    405: errors.InvalidRequest,
    409: errors.OriginChanged,
    413: errors.InvalidRequest,
    414: errors.InvalidRequest,
    416: errors.InvalidRequest,
    431: errors.InvalidRequest,
    502: errors.OriginUnavailable,
    503: errors.Overloaded,
    504: errors.NotCached,
}


def status_of(error: ShoalError) -> HTTPStatus:
    """The status that stands for `error` (docs/wire.md, "Status codes")."""
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def from_response(status: int, name: str, sentence: str) -> ShoalError:
    """The error that a response stands for.

    Args:
        status: of the response.
        name: its ``Shoal-Error`` header, or "".
        sentence: its body.
    """
    kind = getattr(errors, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, ShoalError)):
        kind = _FALLBACK.get(status, ShoalError)
    return kind(sentence.strip() or f"the server answered HTTP {status}")
