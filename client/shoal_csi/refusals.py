"""The seam around every call of an orchestrator: Shoal's errors become the codes of the CSI specification.

    INVALID_ARGUMENT      a field is missing or says nothing possible     fix it
    NOT_FOUND             no such dataset, snapshot, folder or volume      register it, or name another
    ALREADY_EXISTS        something else is mounted at the target          unpublish that first
    FAILED_PRECONDITION   a writer, a block device                         ask for a read-only file system
    ABORTED               another call for the same target goes on         wait and repeat
    UNAVAILABLE           the cluster or the mount does not answer         repeat
    INTERNAL              the kernel or the mount command said no          read the sentence

The rule: services raise `shoal.errors` and know nothing of gRPC; what nobody expected is INTERNAL and in the log. No
request is ever logged, because it may carry secrets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from shoal.errors import InvalidRequest, ShoalError
from shoal.wire import grpc_errors
from shoal_csi.capability import Unsupported

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    _ServerInterceptor = grpc.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.ServerInterceptor  # generic in the stubs alone


class Busy(ShoalError):
    """Another call works on the same thing: repeat this one later."""


class MountFailed(ShoalError, OSError):
    """The kernel or the mount command refused: its own words are in the sentence."""


class NotAnswering(ShoalError):
    """A mount is there and its server says nothing: repeat later."""


_CODES: tuple[tuple[type[ShoalError], grpc.StatusCode], ...] = (
    (Busy, grpc.StatusCode.ABORTED),
    (Unsupported, grpc.StatusCode.FAILED_PRECONDITION),
    (MountFailed, grpc.StatusCode.INTERNAL),
    (NotAnswering, grpc.StatusCode.UNAVAILABLE),
)


def code_of(error: ShoalError) -> grpc.StatusCode:
    """The code that the specification has for `error`."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    code = grpc_errors.code_of(error)
    return grpc.StatusCode.INTERNAL if code is grpc.StatusCode.UNKNOWN else code


#: A call of a method begins; gives what is called with the name of its code when it ends.
Begun = Callable[[str], Callable[[str], None]]


class Seam(_ServerInterceptor):
    """Wraps every handler of a server.

    Args:
        begun: counts calls.
    """

    def __init__(self, begun: Begun) -> None:
        self._begun = begun

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method.rpartition("/")[2]
        answer, parse = handler.unary_unary, handler.request_deserializer
        assert answer is not None and parse is not None, "CSI has no streams here"

        def call(request: bytes, context: grpc.ServicerContext) -> Any:
            ended = self._begun(method)
            try:
                # Parsed here and not by gRPC, which answers a message that is none with a traceback of its own.
                found = answer(parse(request), context)
            except DecodeError:
                refusal: ShoalError = InvalidRequest(f"the message is no request of {method} (CSI v1)")
            except ShoalError as error:
                refusal = error
            except Exception as error:  # told with a sentence; gRPC would say UNKNOWN and nothing else
                log.exception("%s failed", method, extra={"method": method})
                refusal = ShoalError(f"the driver failed ({error!r}): its log has the details")
            else:
                ended(grpc.StatusCode.OK.name)
                return found
            ended(code_of(refusal).name)
            _abort(context, method, refusal)

        return grpc.unary_unary_rpc_method_handler(call, None, handler.response_serializer)


def _abort(context: grpc.ServicerContext, method: str, error: ShoalError) -> NoReturn:
    code = code_of(error)
    log.warning("%s: %s: %s", method, code.name, error, extra={"method": method, "code": code.name})
    context.abort(code, str(error).encode()[: grpc_errors.MAX_DETAILS_BYTES].decode(errors="ignore"))
    raise AssertionError("abort() does not return")
