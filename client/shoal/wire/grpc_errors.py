"""Errors over gRPC: which status a class has, and how the class and its sentence come back on the other side.

The rule: the class name travels in the trailing metadata ``shoal-error`` and the sentence in the status details, so a
client raises what the server raised. A class this version does not know, and a failure of gRPC itself, fall back to the
class that the status stands for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio

from shoal import errors
from shoal.errors import ShoalError

METADATA_KEY = "shoal-error"
#: Peers refuse heads above 8 KiB by default, and details are percent-encoded: a byte may take three.
MAX_DETAILS_BYTES = 2 << 10

Code = grpc.StatusCode

#: From the most to the least derived: the first match by isinstance gives the status.
_CODES: tuple[tuple[type[ShoalError], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, Code.INVALID_ARGUMENT),
    (errors.AlreadyExists, Code.ALREADY_EXISTS),
    (errors.NotFound, Code.NOT_FOUND),
    (errors.OriginNotFound, Code.NOT_FOUND),
    (errors.OriginDenied, Code.PERMISSION_DENIED),
    (errors.OriginUnavailable, Code.UNAVAILABLE),
    (errors.OriginChanged, Code.ABORTED),
    (errors.ReadOnly, Code.PERMISSION_DENIED),
    (errors.Unavailable, Code.UNAVAILABLE),
    (errors.Overloaded, Code.RESOURCE_EXHAUSTED),
    (errors.DoesNotFit, Code.FAILED_PRECONDITION),
    (errors.NotCached, Code.FAILED_PRECONDITION),
    (errors.ShardCorrupt, Code.DATA_LOSS),
    (errors.StoreUnusable, Code.INTERNAL),
    (ShoalError, Code.UNKNOWN),
)

_FALLBACK: dict[grpc.StatusCode, type[ShoalError]] = {
    Code.INVALID_ARGUMENT: errors.InvalidRequest,
    Code.ALREADY_EXISTS: errors.AlreadyExists,
    Code.NOT_FOUND: errors.NotFound,
    Code.PERMISSION_DENIED: errors.OriginDenied,
    Code.UNAVAILABLE: errors.ClusterUnavailable,
    Code.DEADLINE_EXCEEDED: errors.ClusterUnavailable,
    Code.ABORTED: errors.OriginChanged,
    Code.RESOURCE_EXHAUSTED: errors.Overloaded,
    Code.FAILED_PRECONDITION: errors.DoesNotFit,
    Code.DATA_LOSS: errors.ShardCorrupt,
}


def code_of(error: ShoalError) -> grpc.StatusCode:
    """The status that stands for `error`."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ShoalError) -> NoReturn:
    """End the call of `context` with `error`."""
    details = str(error).encode()[:MAX_DETAILS_BYTES].decode(errors="ignore")
    await context.abort(code_of(error), details, ((METADATA_KEY, type(error).__name__),))
    raise AssertionError("abort() does not return")


def from_rpc_error(error: grpc.RpcError, *, target: str = "the controller") -> ShoalError:
    """The error that a failed call stands for; raise it ``from error``.

    Args:
        error: what a call raised, of `grpc` or of `grpc.aio`.
        target: who was called (``host:port``), for the sentence where nobody answered.
    """
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return ShoalError(f"the call to {target} failed: {error}")
    code, details = error.code(), error.details() or ""
    kind = _named(error.trailing_metadata() or ())
    if kind is not None:
        return kind(details)
    if code is Code.UNAVAILABLE:
        return errors.ClusterUnavailable(
            f"nothing answers at {target}: check SHOAL_ENDPOINT and that the controller runs ({details})"
        )
    if code is Code.DEADLINE_EXCEEDED:
        return errors.ClusterUnavailable(f"{target} did not answer in time: try again, and see the controller's log")
    if code is Code.UNIMPLEMENTED:
        return ShoalError(f"{target} does not know this call: it runs another version of Shoal, or is no controller")
    return _FALLBACK.get(code, ShoalError)(details or f"{target} answered {code.name}")


def _named(metadata: Iterable[Any]) -> type[ShoalError] | None:
    name = next((value for key, value in metadata if key == METADATA_KEY), "")
    kind = getattr(errors, name, None) if isinstance(name, str) and name.isidentifier() else None
    return kind if isinstance(kind, type) and issubclass(kind, ShoalError) else None
