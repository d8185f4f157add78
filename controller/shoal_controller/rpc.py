"""The seam around every RPC: errors become statuses, calls are counted, and what nobody expected is logged.

The rule: a servicer raises `shoal.errors` and knows nothing of gRPC's statuses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from shoal.errors import InvalidRequest, ShoalError
from shoal.wire import grpc_errors

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.aio.ServerInterceptor  # generic in the stubs alone

#: Counts a finished call: (method, name of the status).
Count = Callable[[str, str], None]


class Seam(_ServerInterceptor):
    """Wraps every handler of a server."""

    def __init__(self, count: Count) -> None:
        self._count = count

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method.rpartition("/")[2]
        parse = handler.request_deserializer
        # Parsed here and not by gRPC, which answers a message that is none as a failure of its own, with a traceback.
        codec = {"request_deserializer": None, "response_serializer": handler.response_serializer}
        if handler.unary_unary is not None:
            answer = handler.unary_unary

            async def unary(request: Any, context: Any) -> Any:
                async with _Call(self._count, method, context):
                    return await answer(_parsed(parse, request, method), context)

            return grpc.unary_unary_rpc_method_handler(unary, **codec)
        assert handler.unary_stream is not None, "the control plane has no other kind of call"
        answers = handler.unary_stream

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async with _Call(self._count, method, context):
                async for message in answers(_parsed(parse, request, method), context):
                    yield message

        return grpc.unary_stream_rpc_method_handler(stream, **codec)


def _parsed(parse: Callable[[bytes], Any], request: bytes, method: str) -> Any:
    try:
        return parse(request)
    except DecodeError as error:
        raise InvalidRequest(f"the message is no request of {method}: use the client of this version") from error


class _Call:
    """One call: `async with` counts how it ended and aborts it where it failed."""

    def __init__(self, count: Count, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._count = count
        self._method = method
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        match error:
            case None:
                self._count(self._method, "OK")
            case ShoalError():
                log.debug("%s refused: %s", self._method, error)
                self._count(self._method, grpc_errors.code_of(error).name)
                await grpc_errors.abort(self._context, error)
            case asyncio.CancelledError() | GeneratorExit():
                self._count(self._method, grpc.StatusCode.CANCELLED.name)
            case _:
                log.exception("%s failed", self._method, exc_info=error)
                self._count(self._method, grpc.StatusCode.INTERNAL.name)
                internal = ShoalError(f"the controller failed ({error!r}): its log has the details")
                await grpc_errors.abort(self._context, internal)
