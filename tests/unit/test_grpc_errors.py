"""Every error class crosses gRPC as itself, with its sentence."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import grpc
import grpc.aio
import pytest

from shoal import errors
from shoal.errors import ShoalError
from shoal.wire import grpc_errors

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ShoalError)]


class Call(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """A failed call as the synchronous client raises it."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__()
        self._failure = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._failure[0]

    def details(self) -> str:
        return self._failure[1]

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._failure[2]


Call.__abstractmethods__ = frozenset()


def crossed(error: ShoalError) -> ShoalError:
    """`error` after it went over a real connection."""

    async def fail(request: bytes, context: Any) -> bytes:
        await grpc_errors.abort(context, error)

    async def call() -> ShoalError:
        server = grpc.aio.server()
        handlers = {"Fail": grpc.unary_unary_rpc_method_handler(fail)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.T", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await channel.unary_unary("/test.T/Fail")(b"")
        except grpc.aio.AioRpcError as failure:
            assert failure.code() is grpc_errors.code_of(error)
            return grpc_errors.from_rpc_error(failure)
        finally:
            await server.stop(None)
        raise AssertionError("the call did not fail")

    return asyncio.run(call())


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_comes_back_as_itself(kind: type[ShoalError]) -> None:
    wire = Call(grpc_errors.code_of(kind("x")), "the sentence", (("other", "y"), ("shoal-error", kind.__name__)))
    back = grpc_errors.from_rpc_error(wire)
    assert type(back) is kind
    assert str(back) == "the sentence"


@pytest.mark.parametrize(
    "error",
    [
        errors.DatasetNotFound("no dataset is named 'ä ö → 数据'"),
        errors.DoesNotFit("two\nlines: 100 % of 12 GiB"),
    ],
)
def test_sentences_cross_a_connection_unharmed(error: ShoalError) -> None:
    back = crossed(error)
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_a_sentence_too_long_for_a_head_is_cut_between_characters() -> None:
    back = crossed(errors.OriginError("ü" * 100_000))
    assert type(back) is errors.OriginError
    assert str(back) == "ü" * (grpc_errors.MAX_DETAILS_BYTES // 2)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
        (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.DatasetNotFound, grpc.StatusCode.NOT_FOUND),
        (errors.OriginNotFound, grpc.StatusCode.NOT_FOUND),
        (errors.OriginDenied, grpc.StatusCode.PERMISSION_DENIED),
        (errors.OriginUnavailable, grpc.StatusCode.UNAVAILABLE),
        (errors.NodeUnavailable, grpc.StatusCode.UNAVAILABLE),
        (errors.OriginChanged, grpc.StatusCode.ABORTED),
        (errors.OriginError, grpc.StatusCode.UNKNOWN),
        (errors.DoesNotFit, grpc.StatusCode.FAILED_PRECONDITION),
        (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_statuses_say_what_the_class_says(kind: type[ShoalError], code: grpc.StatusCode) -> None:
    assert grpc_errors.code_of(kind("x")) is code


@pytest.mark.parametrize("name", ["", "NoSuchClass", "__name__", "NamedTuple", "annotations", "a b"])
def test_an_unknown_class_falls_back_to_what_the_status_stands_for(name: str) -> None:
    back = grpc_errors.from_rpc_error(Call(grpc.StatusCode.NOT_FOUND, "gone", (("shoal-error", name),)))
    assert type(back) is errors.NotFound
    assert str(back) == "gone"


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ClusterUnavailable, "nothing answers at h:1: check SHOAL_ENDPOINT"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.ClusterUnavailable, "h:1 did not answer in time"),
        (grpc.StatusCode.UNIMPLEMENTED, ShoalError, "another version of Shoal"),
        (grpc.StatusCode.INTERNAL, ShoalError, "h:1 answered INTERNAL"),
    ],
)
def test_failures_of_grpc_itself_name_who_was_called(code: grpc.StatusCode, kind: type[ShoalError], words: str) -> None:
    back = grpc_errors.from_rpc_error(Call(code, ""), target="h:1")
    assert type(back) is kind
    assert words in str(back)


def test_an_error_that_is_no_call_keeps_its_text() -> None:
    assert str(grpc_errors.from_rpc_error(grpc.RpcError("odd"), target="h:1")) == "the call to h:1 failed: odd"
