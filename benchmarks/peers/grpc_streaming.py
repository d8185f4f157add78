"""gRPC's server streaming in Python, the way most home-made data services send bytes.

The documentation says that synchronous streams cost threads in Python and names asyncio as the remedy, so the server is
asyncio's and the client is tried in both kinds; messages are raw bytes without Protocol Buffers, which would only copy.
"""

from __future__ import annotations

import asyncio
import functools
import mmap
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from benchmarks.harness import Outcome

SETTINGS = "grpcio: asyncio server, one kept channel, raw messages of 1 MiB, no size limit; the faster kind of client"
MESSAGE_BYTES = 1 << 20
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
METHOD = "/bench.Data/Get"


@functools.cache
def _mapped(path: str) -> mmap.mmap:
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


async def _get(request: bytes, context: Any) -> AsyncIterator[bytes]:
    data = _mapped(request.decode())
    for start in range(0, len(data), MESSAGE_BYTES):
        yield data[start : start + MESSAGE_BYTES]


def serve() -> int:
    """Start the server in this worker and return its port."""
    started = threading.Event()
    port = 0

    async def main() -> None:
        nonlocal port
        server = grpc.aio.server(options=OPTIONS)
        handler = grpc.unary_stream_rpc_method_handler(_get)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Data", {"Get": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        started.set()
        await server.wait_for_termination()

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    if not started.wait(30):
        raise RuntimeError("the gRPC server did not start")
    return port


@functools.cache
def _call(port: int) -> Any:
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS).unary_stream(METHOD, None, None)


def read(port: int, paths: Sequence[str]) -> Outcome:
    """With the synchronous client."""
    started = time.perf_counter()
    size = sum(len(message) for path in paths for message in _call(port)(path.encode()))
    return Outcome(time.perf_counter() - started, size)


def read_asyncio(port: int, paths: Sequence[str]) -> Outcome:
    async def main() -> Outcome:
        size = 0
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            call = channel.unary_stream(METHOD, None, None)
            await channel.channel_ready()
            started = time.perf_counter()
            for path in paths:
                async for message in call(path.encode()):
                    size += len(message)
            return Outcome(time.perf_counter() - started, size)

    return asyncio.run(main())
